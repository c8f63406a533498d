"""One model, several conversations: each request is a stream of token ids.

The engine knows no tokenizer and no template. Requests take turns step by step under one lock;
pictures are encoded once and kept by the hash of their content.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

from minigpt4.engine.sampling import Sampling, choose, penalize
from minigpt4.image import Picture
from minigpt4.model import MiniGPT4
from minigpt4.prompt import Prompt

KEPT_PICTURES = 256  # embeddings of the most recently used pictures: 60 KB each for nano


@dataclass(frozen=True)
class Request:
    """What to answer: the prompt, its pictures by key, how to draw, where to end."""

    prompt: Prompt
    pictures: Mapping[str, Picture]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # besides the language model's own end token
    penalized: tuple[int, ...] = ()  # ids the repetition penalty covers from the start


class Stream:
    """Token ids as they are generated; the stop id, where one ended it, comes last.

    stop_reason: "stop", "length" or "closed" once ended; seconds_to_first: from submit to the
    first token. Closing the stream ends the request before its next step.
    """

    def __init__(self, steps: Iterator[int], stop_ids: frozenset[int], limit: int) -> None:
        self._steps = steps
        self._stop_ids = stop_ids
        self._limit = limit
        self._start = time.perf_counter()
        self.count = 0
        self.stop_reason = ""
        self.seconds_to_first = 0.0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        if self.stop_reason:
            raise StopIteration
        try:
            token = next(self._steps)
        except StopIteration:
            self.stop_reason = "length"
            raise
        if self.count == 0:
            self.seconds_to_first = time.perf_counter() - self._start
        self.count += 1
        if token in self._stop_ids:
            self.stop_reason = "stop"
        elif self.count == self._limit:
            self.stop_reason = "length"
        return token

    def close(self) -> None:
        self.stop_reason = self.stop_reason or "closed"
        self._steps.close()


class Engine:
    """Owns the model; `encode` pictures early, `submit` requests."""

    def __init__(self, model: MiniGPT4) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()
        eos = model.llm.generation_config.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [eos] if eos is not None else [])

    def encode(self, picture: Picture) -> Tensor:
        """The picture's embeddings [image_tokens, llm_hidden_size], computed once."""
        with self._lock, torch.inference_mode():
            embeds = self._embeds.pop(picture.key, None)
            if embeds is None:
                embeds = self.model.encode_images([picture.rgb])[0]
            self._embeds[picture.key] = embeds
            while len(self._embeds) > KEPT_PICTURES:
                self._embeds.popitem(last=False)
        return embeds

    def submit(self, request: Request) -> Stream:
        """Start answering; iterate over the stream for the token ids."""
        stop_ids = request.stop_ids | self.eos_ids
        steps = self._search(request, stop_ids) if request.sampling.num_beams > 1 else None
        return Stream(steps or self._decode(request), stop_ids, request.sampling.max_new_tokens)

    def _embed(self, request: Request) -> Tensor:
        images = {key: self.encode(request.pictures[key]) for key in _image_keys(request.prompt)}
        with torch.inference_mode():
            return self.model.embed(request.prompt, images)

    def _decode(self, request: Request) -> Iterator[int]:
        """Greedy or sampled, a token a step."""
        sampling, device = request.sampling, self.model.device
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(device)
            seed = sampling.seed if sampling.seed is not None else generator.seed()
            generator.manual_seed(seed)
        seen = torch.tensor(request.penalized, dtype=torch.long, device=device)
        inputs, cache = {"inputs_embeds": self._embed(request)}, None
        for _ in range(sampling.max_new_tokens):
            with self._lock, torch.inference_mode():
                output = self.model.llm(
                    **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
                token = choose(output.logits[0, -1], seen, sampling, generator)
                new = torch.tensor([token], device=device)
                seen = torch.cat([seen, new])
                inputs = {"input_ids": new[None]}
            yield token

    def _search(self, request: Request, stop_ids: frozenset[int]) -> Iterator[int]:
        """Beam search, by transformers; the ids come when it is done."""
        sampling = request.sampling
        embeds = self._embed(request)
        first = torch.tensor(request.penalized, dtype=torch.long, device=embeds.device)
        processor = _GeneratedPenalty(first, sampling.repetition_penalty)
        with self._lock, torch.inference_mode():
            ids = self.model.llm.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                num_beams=sampling.num_beams,
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                logits_processor=[processor],
                eos_token_id=sorted(stop_ids) or None,
                pad_token_id=0,
            )
        yield from ids[0].tolist()


class _GeneratedPenalty(LogitsProcessor):
    """`penalize` over each beam's generated tokens (transformers hands them as input_ids)."""

    def __init__(self, first: Tensor, penalty: float) -> None:
        self._first, self._penalty = first, penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            penalize(row, torch.cat([self._first, seen]), self._penalty)
            for seen, row in zip(input_ids, scores, strict=True)
        ]
        return torch.stack(rows)


def _image_keys(prompt: Prompt) -> set[str]:
    return {image.key for _, image in prompt.images}
