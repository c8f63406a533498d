"""The side panel: settings and presets, saved conversations, the website in an answer."""

import html
import json
import time
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4 import start
from minigpt4.web.page import render, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.render import ASSETS
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import label, translate

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

RECENT_JS = (ASSETS / "recent.js").read_text(encoding="utf-8")
RECENT_HTML = (
    '<p class="none"></p><ul class="recent"></ul><button type="button" class="all" hidden></button>'
)
KEEP_JS = "watch('value', () => minigpt4.recent.keep(props.value));"
SAVE_JS = "(file) => { if (file) minigpt4.save(file); }"
# Saves the website that is shown, even if its answer has been removed since.
SAVE_WEBSITE_JS = "(text) => minigpt4.save({ name: 'website.html', type: 'text/html', text })"

# Sampling's field -> minimum, maximum, step, and the published demo's value, shown while loading.
SLIDERS = {
    "temperature": (0, 2, 0.05, 1.0),
    "top_p": (0.05, 1, 0.05, 0.9),
    "repetition_penalty": (1, 2, 0.05, 1.05),
    "max_new_tokens": (10, 1000, 10, 300),
    "num_beams": (1, 8, 1, 1),
}
PRESETS = ("precise", "balanced", "creative")
PRESET_FIELDS = ("temperature", "top_p", "num_beams")


class Panel:
    """The panel's parts, rendered where this is constructed, and its handlers.

    settings: Sampling's fields, "seed" and "system" -> their controls.
    """

    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        # Passes the conversation to the script that stores it, whichever tab is shown.
        self.keeper = gr.HTML(html_template="", js_on_load=KEEP_JS, elem_id="keeper")
        with gr.Tabs() as self.tabs:
            with gr.Tab(label("settings"), id="settings"):
                self._build_settings()
            with gr.Tab(label("conversations"), id="conversations"):
                self._build_conversations()
            with gr.Tab(label("website"), id="website"):
                self._build_website()

    def _build_settings(self) -> None:
        self.preset = gr.Radio(
            preset_choices(None),
            value="balanced",
            label=label("preset"),
            info=label("preset_info"),
        )
        self.settings = build_controls(self._loading)
        self.theme = gr.Button(label("theme"), size="sm")
        self.model = gr.Markdown(describe(self._loading, None), elem_id="model")

    def _build_conversations(self) -> None:
        with gr.Row():
            self.markdown = gr.Button(label("save_markdown"), size="sm", min_width=140)
            self.json = gr.Button(label("save_json"), size="sm", min_width=140)
        self.upload = gr.UploadButton(label("open_file"), size="sm", file_types=[".json"])
        # Passes what is to be saved to the browser; the server writes no file.
        self.saved = gr.JSON(visible=False)
        gr.Markdown(label("save_info"), elem_classes="hint")
        gr.Markdown(label("recent"), elem_classes="hint")
        self.recent = gr.HTML(
            html_template=RECENT_HTML,
            js_on_load=RECENT_JS,
            elem_id="recent",
            padding=False,
            apply_default_css=False,
        )

    def _build_website(self) -> None:
        self.no_website = gr.Markdown(label("no_website"), elem_id="no-website")
        with gr.Column(visible=False, elem_id="website") as self.website:
            self.version = gr.Radio(label=label("versions"), visible=False)
            with gr.Tabs():
                with gr.Tab(label("preview_tab")):
                    self.frame = gr.HTML(elem_id="frame")
                with gr.Tab(label("code_tab")):
                    self.code = gr.Code(
                        language="html", interactive=False, elem_id="code", label="HTML"
                    )
                with gr.Tab(label("download_tab")):
                    gr.Markdown(label("download_info"))
                    self.download = gr.Button(label("download_page"), size="sm")

        self.site = [self.no_website, self.website, self.version, self.frame, self.code]

    def clear_website(self) -> list:
        """Show that there is nothing to preview."""
        hidden = gr.update(visible=False)
        return [gr.update(visible=True), hidden, gr.update(choices=[], value=None), "", ""]

    def wire(
        self, sidebar: gr.Sidebar, chatbot: gr.Chatbot, session: gr.State, event: dict
    ) -> None:
        """Connect the parts to their handlers."""
        changed = [self.settings[name] for name in PRESET_FIELDS]
        self.preset.input(self.choose_preset, self.preset, changed, **event)
        self.theme.click(None, js="() => minigpt4.theme()")
        for button, handler in ((self.markdown, self.save_markdown), (self.json, self.save_json)):
            button.click(handler, session, self.saved, **event).then(
                None, self.saved, None, js=SAVE_JS
            )
        site = self.site
        chatbot.option_select(self.show_website, session, [sidebar, self.tabs, *site], **event)
        self.version.input(self.show_version, [self.version, session], site, **event)
        self.download.click(None, self.code, None, js=SAVE_WEBSITE_JS)

    def choose_preset(self, name: str) -> list[float]:
        """The values of the sliders that a preset sets."""
        return preset(name, self._loading.engine)

    def record(self, session: Session) -> dict:
        """The conversation, with small pictures, for the browser's list."""
        if not session.conversation.messages:
            return gr.skip()
        data = transcript.to_data(session.conversation, transcript.SMALL_SIDE, self._name())
        return {"name": session.name, "data": data}

    def record_left(self, session: Session) -> dict:
        """The conversation that was left while its answer was running, as far as it had come."""
        left, session.predecessor = session.predecessor, None
        return self.record(left) if left else gr.skip()

    def save_markdown(self, session: Session, request: gr.Request) -> dict | None:
        """The conversation as a Markdown file."""
        text = transcript.to_markdown(session.conversation, self._name())
        return self._file(session, "md", "text/markdown", text, request)

    def save_json(self, session: Session, request: gr.Request) -> dict | None:
        """The conversation as a JSON file that can be opened again."""
        data = transcript.to_data(session.conversation, transcript.FULL_SIDE, self._name())
        text = json.dumps(data, ensure_ascii=False, indent=1)
        return self._file(session, "json", "application/json", text, request)

    def _file(
        self, session: Session, suffix: str, kind: str, text: str, request: gr.Request
    ) -> dict | None:
        if not session.conversation.messages:
            gr.Info(translate("nothing_said", request), title="")
            return None
        name = f"minigpt4-{time.strftime('%Y-%m-%d-%H%M')}.{suffix}"
        return {"name": name, "type": kind, "text": text}

    def _name(self) -> str:
        return self._loading.engine.model.config.name if self._loading.engine else ""

    def show_website(
        self, session: Session, chosen: gr.SelectData, request: gr.Request
    ) -> list | dict:
        """Open the panel with the last answer's website, if that is the button that was clicked."""
        if chosen.value != "preview":
            return [gr.skip()] * 7
        return [
            gr.Sidebar(open=True),
            gr.Tabs(selected="website"),
            *self._site(len(render.websites(session)) - 1, session, request),
        ]

    def show_version(self, number: int, session: Session, request: gr.Request) -> list:
        """The website of an earlier answer."""
        return self._site(number, session, request)

    def _site(self, number: int, session: Session, request: gr.Request) -> list:
        sites = render.websites(session)
        if not 0 <= number < len(sites):
            return [gr.skip()] * 5
        choices = [(translate("version", request, number=i + 1), i) for i in range(len(sites))]
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            gr.update(choices=choices, value=number, visible=len(sites) > 1),
            render.frame(sites[number], translate("website", request)),
            sites[number],
        ]


# --- the controls ---------------------------------------------------------------------------------


def build_controls(loading: Loading) -> dict[str, gr.components.Component]:
    """Sampling's fields, "seed" and "system" -> controls, rendered where this is called."""
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


def sampling_values(engine: "AnyEngine | None") -> dict[str, float]:
    """Slider -> the model's default."""
    if engine is None:
        return {name: published for name, (*_, published) in SLIDERS.items()}
    default = start.default_sampling(engine.model.config)
    return {name: getattr(default, name) for name in SLIDERS}


def preset(name: str, engine: "AnyEngine | None") -> list[float]:
    """The values of PRESET_FIELDS. "balanced" is the model's default, "precise" always takes the
    likeliest token, "creative" samples from more tokens at a higher temperature."""
    values = sampling_values(engine)
    if name == "precise":
        values |= {"temperature": 0, "top_p": 1}
    elif name == "creative":
        values |= {"temperature": min(2, round(values["temperature"] + 0.3, 2)), "top_p": 0.95}
    return [values[field] for field in PRESET_FIELDS]


def preset_choices(request: gr.Request | None) -> list[tuple[str, str]]:
    """The presets with their names in the visitor's language."""
    return [(translate(name, request), name) for name in PRESETS]


def describe(loading: Loading, request: gr.Request | None) -> str:
    """The model's name, precision, device and licence, as Markdown."""
    if loading.engine is None:
        return ""
    model = loading.engine.model
    precision = model.quantize if model.quantize != "none" else translate("unquantised", request)
    return translate(
        "model",
        request,
        name=html.escape(model.config.name),
        precision=html.escape(precision),
        device=html.escape(f"{model.device} ({loading.engine.decoder_name})"),
        licence=html.escape(model.config.licence or "—"),
    )


def summary(loading: Loading) -> str:
    """The model and the device in one line, beside the page's name."""
    if loading.engine is None:
        return ""
    model = loading.engine.model
    precision = "" if model.quantize == "none" else f" · {model.quantize}"
    return html.escape(f"{model.config.name}{precision} · {model.device}")
