"""MiniGPT-4: frozen visual encoder -> bridge -> one trained linear projection -> frozen LLM."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.config import ModelConfig
from minigpt4.model.detector import detections
from minigpt4.model.image import Detection, Encoded
from minigpt4.model.prompt import Prompt
from minigpt4.model.vision import preprocess, suitable_threads
from minigpt4.model.words import WordHead, choose, listed

if TYPE_CHECKING:  # transformers takes seconds to import; a GGUF file's blocks run without it
    from transformers import PreTrainedModel

    from minigpt4.weights.gguf import BlockLlama


def at_length(embeds: Tensor, length: float) -> Tensor:
    """Each embedding [..., hidden] scaled to `length`; 0: unchanged."""
    return F.normalize(embeds, dim=-1) * length if length else embeds


@dataclass
class TrainingBatch:
    """Packed training sequences, as `training.packing.pack` makes them.

    ids: [rows, length] token ids.
    image_rows: [images, 2] row and first position of each image; row i shows picture i.
    attention_mask: [rows, 1, length, length], true where a position may attend to another.
    position_ids: [rows, length].
    sources, targets, temperatures, weights: [learned tokens] the flat position `sources[i]`
        predicts token `targets[i]` at temperature `temperatures[i]`; its loss counts `weights[i]`
        times.
    """

    ids: Tensor
    image_rows: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor
    temperatures: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on `device`."""
        return TrainingBatch(**{name: t.to(device) for name, t in vars(self).items()})


class MiniGPT4(nn.Module):
    """The assembled model; only `projection` is ever trained.

    llm: a transformers model, through which gradients can pass; or, for an engine, a GGUF file's
    blocks or only the token embedding. quantize: how `llm` was loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: nn.Module,
        bridge: nn.Module,
        projection: nn.Linear,
        llm: Union["PreTrainedModel", "BlockLlama"],
        tokenizer,
        quantize: str = "none",
        word_head: WordHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.bridge = bridge
        self.projection = projection
        self.llm = llm
        self.tokenizer = tokenizer
        self.quantize = quantize
        self.word_head = word_head
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @property
    def torch_llm(self) -> "PreTrainedModel":
        """`llm`, if PyTorch runs it. TypeError for a GGUF file's blocks, which an engine runs."""
        if not isinstance(self.llm, nn.Module):
            raise TypeError(f"PyTorch does not run the {type(self.llm).__name__} of this model")
        return self.llm

    def pixel_values(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> [batch, 3, image_size, image_size] on the model's device."""
        pixels = torch.stack([preprocess(p, self.config.vision) for p in pictures])
        return pixels.to(self.device, next(self.encoder.parameters()).dtype)

    def encode_features(self, pixel_values: Tensor) -> Tensor:
        """Pixel values -> the vectors that the projection reads."""
        features = self.encoder(pixel_values)  # [batch, patches, hidden], or feature maps
        return self.bridge(features)  # [batch, image_tokens, projection_in]

    def project(self, features: Tensor) -> Tensor:
        """The output of `encode_features` -> image embeddings [batch, image_tokens, hidden]."""
        embeds = self.projection(features.to(self.projection.weight.dtype))
        return at_length(embeds, self.config.embedding_length)

    @torch.inference_mode()
    def find_words(self, features: Tensor) -> list[str]:
        """The words that a prompt lists for each picture, "" if the model has no word head.

        features: [batch, image_tokens, projection_in], from `encode_features`.
        """
        words = self.config.words
        if self.word_head is None or words is None:
            return [""] * len(features)
        terms = self.word_head.terms
        found = self.word_head(features).tolist()
        return [listed(choose(probabilities, terms, words)) for probabilities in found]

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> list[Encoded]:
        """RGB pictures -> embeddings, words and objects of each.

        Activations may overflow in float16: then a single picture is encoded again in 32 bit.
        """
        with suitable_threads(self.config.vision):
            maps = self.encoder(self.pixel_values(pictures))
            features = self.bridge(maps)
        embeds = self.project(features).float().cpu().numpy()
        half = self.projection.weight.dtype == torch.float16
        if half and len(pictures) == 1 and not np.isfinite(embeds).all():
            return self._in_float32().encode_pictures(pictures)
        objects: list[tuple[Detection, ...]] = [()] * len(pictures)
        if self.config.detects:
            heat, edges = (one.float().cpu() for one in maps[-2:])
            objects = [*map(detections, heat, edges)]
        return [*map(Encoded, embeds, self.find_words(features), objects)]

    def _in_float32(self) -> "MiniGPT4":
        """Encoder, bridge and projection copied into 32 bit; the rest is shared."""
        parts = (self.encoder, self.bridge, self.projection)
        encoder, bridge, projection = (deepcopy(part).float() for part in parts)
        llm, words = self.llm, self.word_head
        return MiniGPT4(
            self.config, encoder, bridge, projection, llm, self.tokenizer, self.quantize, words
        )

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> token embeddings [..., llm_hidden_size]; IMAGE_ID reads as id 0."""
        return self.torch_llm.get_input_embeddings()(ids.clamp_min(0))

    def embed(self, prompt: Prompt, image_embeds: Mapping[str, Tensor]) -> Tensor:
        """The prompt's embeddings [1, length, llm_hidden_size].

        image_embeds: picture key -> [image_tokens, llm_hidden_size].
        """
        embeds = self.embed_tokens(torch.tensor([prompt.ids], device=self.device))
        for position, image in prompt.images:
            vectors = image_embeds[image.key]
            embeds[0, position : position + len(vectors)] = vectors.to(embeds.dtype)
        return embeds

    def hidden_states(self, images: Tensor, batch: TrainingBatch) -> Tensor:
        """The language model's last hidden states of a packed batch [rows, length, hidden].

        images: image embeddings of the batch's pictures [pictures, image_tokens, hidden].
        """
        embeds = self.embed_tokens(batch.ids)  # [rows, length, llm_hidden_size]
        images = images.to(embeds.dtype)[batch.image_rows[:, 0]]  # [n, image_tokens, hidden]
        slots = batch.image_rows[:, 1:] + torch.arange(images.shape[1], device=embeds.device)
        embeds = embeds.index_put((batch.image_rows[:, :1], slots), images)
        # true and false -> 0 and the lowest number, added to the attention scores
        mask = torch.zeros_like(batch.attention_mask, dtype=embeds.dtype)
        mask = mask.masked_fill(~batch.attention_mask, torch.finfo(embeds.dtype).min)
        return self.torch_llm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state

    def training_loss(self, features: Tensor, batch: TrainingBatch) -> Tensor:
        """Mean weighted cross-entropy over the answers' tokens.

        features: [pictures, image_tokens, projection_in], from `encode_features`.
        """
        hidden_states = self.hidden_states(self.project(features), batch)
        # Only positions that predict a learned token go through the output layer.
        logits = self.torch_llm.get_output_embeddings()(hidden_states.flatten(0, 1)[batch.sources])
        logits = logits.float() / batch.temperatures[:, None]
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return (losses * batch.weights).mean()
