"""Reads a parity case folder: configuration, weight files, expected numbers."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from minigpt4.config import MODELS, ModelConfig
from minigpt4.model import prompt
from minigpt4.model.parts import ConcatPatches, EvaViT, QFormer
from minigpt4.model.prompt import ImageRef, Message
from minigpt4.weights.load import WeightFiles, load_model


class ParityCase:
    """A folder of tests/parity: sizes from its case.json, numbers from expected.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.case = json.loads((folder / "case.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")

    @property
    def config(self) -> ModelConfig:
        case, eps = self.case, self.case["layer_norm_eps"]
        vision = EvaViT(
            **case["vision"], layer_norm_eps=eps["vision"], ln_vision_eps=eps["ln_vision"]
        )
        bridge = (
            QFormer(**case["qformer"], layer_norm_eps=eps["qformer"])
            if case["qformer"]
            else ConcatPatches()
        )
        template = {"vicuna": prompt.VICUNA, "llama2": prompt.LLAMA2}[case["template"]]
        return replace(
            MODELS["vicuna-7b"],
            name=self.folder.name,
            vision=vision,
            bridge=bridge,
            template=template,
            llm_hidden_size=case["llm"]["hidden_size"],
            llm_vocabulary=0,
        )

    @property
    def files(self) -> WeightFiles:
        return WeightFiles(
            vision=self.folder / "eva_vit_g.pth",
            llm=self.folder / "llm",
            projection=self.folder / "pretrained_minigpt4.pth",
            qformer=self.folder / "blip2_pretrained_flant5xxl.pth",
        )

    def load(self, **options):
        return load_model(self.config, self.files, **options)

    @property
    def image_paths(self) -> list[Path]:
        return [self.folder / name for name in self.case["images"]]

    def messages(self, dialog: dict, turn: int, keys: list[str]) -> list[Message]:
        """The conversation as it stands when turn `turn` is asked."""
        messages = []
        for i in range(turn + 1):
            pictures = tuple(ImageRef(keys[j]) for j in dialog["images"]) if i == 0 else ()
            messages.append(Message("user", (*pictures, dialog["turns"][i]["user"])))
            if i < turn:
                answer = dialog["turns"][i]["answer_put_in_history"]
                messages.append(Message("assistant", (answer,)))
        return messages
