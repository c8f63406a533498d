"""The settings: one control for each field of Sampling, presets, and what is known of the model."""

import html
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4 import start
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.texts import label, say

if TYPE_CHECKING:
    from minigpt4.engine import Engine

# Sampling's field -> lowest, highest, step, and the published demo's value, shown while loading
SLIDERS = {
    "temperature": (0, 2, 0.05, 1.0),
    "top_p": (0.05, 1, 0.05, 0.9),
    "repetition_penalty": (1, 2, 0.05, 1.05),
    "max_new_tokens": (10, 1000, 10, 300),
    "num_beams": (1, 8, 1, 1),
}
PRESETS = ("precise", "balanced", "creative")
PRESET_FIELDS = ("temperature", "top_p", "num_beams")


def build_controls(loading: Loading) -> dict[str, gr.components.Component]:
    """Sampling's fields, "seed" and "system" -> their controls, rendered where this is called."""
    values = sampling_values(loading.engine)
    controls: dict[str, gr.components.Component] = {}
    for name, (low, high, step, _) in SLIDERS.items():
        controls[name] = gr.Slider(
            low,
            high,
            values[name],
            step=step,
            precision=0 if isinstance(step, int) else None,
            label=label(name),
            info=label(f"{name}_info"),
        )
    controls["seed"] = gr.Textbox(
        label=label("seed"), info=label("seed_info"), placeholder=label("random"), max_length=20
    )
    controls["system"] = gr.Textbox(
        label=label("system"), info=label("system_info"), lines=2, max_lines=8, max_length=4000
    )
    return controls


def sampling_values(engine: "Engine | None") -> dict[str, float]:
    """Slider -> the model's default."""
    if engine is None:
        return {name: published for name, (*_, published) in SLIDERS.items()}
    default = start.default_sampling(engine.model.config)
    return {name: getattr(default, name) for name in SLIDERS}


def preset(name: str, engine: "Engine | None") -> list[float]:
    """The values of PRESET_FIELDS. Balanced is the model's default, precise always takes the
    likeliest word, creative draws from more words, more evenly."""
    values = sampling_values(engine)
    if name == "precise":
        values |= {"temperature": 0, "top_p": 1}
    elif name == "creative":
        values |= {"temperature": min(2, round(values["temperature"] + 0.3, 2)), "top_p": 0.95}
    return [values[field] for field in PRESET_FIELDS]


def preset_choices(request: gr.Request | None) -> list[tuple[str, str]]:
    """The presets with their names in the visitor's language."""
    return [(say(name, request), name) for name in PRESETS]


def describe(loading: Loading, request: gr.Request | None) -> str:
    """The model's name, precision, device and licence, as Markdown."""
    if loading.engine is None:
        return ""
    model = loading.engine.model
    precision = model.quantize if model.quantize != "none" else say("unquantised", request)
    return say(
        "model",
        request,
        name=html.escape(model.config.name),
        precision=html.escape(precision),
        device=html.escape(str(model.device)),
        licence=html.escape(model.config.licence or "—"),
    )


def short(loading: Loading) -> str:
    """What stands beside the page's name."""
    if loading.engine is None:
        return ""
    model = loading.engine.model
    precision = "" if model.quantize == "none" else f" · {model.quantize}"
    return html.escape(f"{model.config.name}{precision} · {model.device}")
