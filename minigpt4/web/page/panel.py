"""The panels beside the conversation: the list of chats, the settings, an answer's website."""

import html
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4 import start
from minigpt4.web.page import answers, looks, render, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.parts import PLAIN, fragment
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import label, language, translate

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

KEEP_JS = "watch('value', () => minigpt4.chats.told(props.value));"
KEEP_SETTING_JS = "(value) => minigpt4.settings.keep('{name}', value)"
SETTLED_JS = "() => { minigpt4.settle(-1); }"  # questions wait for the values: see upload.js
FACTS_JS = (
    "watch('value', () => { minigpt4.facts(props.value); minigpt4.versions(props.value, "
    "(chosen) => trigger('select', chosen)); });"
)
# The website's drawer opens as soon as there is something in it.
FRAME_JS = (
    "const show = () => { if (props.value) minigpt4.drawer('website'); }; "
    "watch('value', show); show();"
)
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


class Panel:
    """The panels beside the conversation (the rail, the settings, the website) and their handlers.

    settings: Sampling's fields, "seed" and "system" -> their controls.
    """

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def build_rail(self) -> gr.Button:
        """The list of conversations; returns the button for a new one."""
        fragment("brand")
        new_chat = gr.Button(label("new_chat"), elem_id="new-chat", elem_classes="line")
        # These pass data to scripts: the conversation, which is stored, and facts on its answers.
        self.keeper = gr.HTML(html_template="", js_on_load=KEEP_JS, elem_classes="unseen")
        self.facts = gr.HTML(html_template="", js_on_load=FACTS_JS, elem_classes="unseen")
        self.recent = fragment("recent", elem_id="conversations")
        self.upload = gr.UploadButton(
            label("open_file"), file_types=[".json"], elem_id="open-file", elem_classes="line"
        )
        self.foot = fragment("foot", summary(self._loading.engine), elem_id="foot")
        return new_chat

    def build_drawers(self) -> None:
        """The settings and the website, each in a drawer that is closed at first."""
        with gr.Column(elem_id="settings", elem_classes="drawer", min_width=0):
            fragment("drawer", "settings")
            self._build_settings()
        with gr.Column(elem_id="website", elem_classes="drawer", min_width=0):
            fragment("drawer", "website")
            self._build_website()
        # Passes a file's content to the browser, which saves it; the server writes no file.
        self.saved = gr.JSON(visible=False)

    def _build_settings(self) -> None:
        self.preset = fragment("presets", "balanced", elem_id="presets")
        with gr.Accordion(label("advanced"), open=False, elem_id="advanced"):
            self.settings = build_controls(self._loading)
        fragment("theme")
        self.model = gr.Markdown(describe(self._loading.engine, None), elem_id="model")

    def _build_website(self) -> None:
        self.no_website = gr.Markdown(label("no_website"), elem_classes="hint")
        with gr.Column(visible=False, elem_id="site", min_width=0) as self.website:
            self.version = gr.Dropdown(label=label("versions"), visible=False)
            self.frame = gr.HTML(elem_id="frame", js_on_load=FRAME_JS, **PLAIN)
            self.download = gr.Button(label("download_page"))
            gr.Markdown(label("download_info"), elem_classes="hint")
            with gr.Accordion(label("code_tab"), open=False):
                # Not gr.Code: its editor would be a quarter of a first visit's download.
                self.code = gr.Textbox(
                    interactive=False, elem_id="code", show_label=False, label="HTML", max_lines=24
                )
        self.site = [self.no_website, self.website, self.version, self.frame, self.code]

    def clear_website(self) -> list:
        """Show that there is nothing to preview."""
        hidden = gr.update(visible=False)
        return [gr.update(visible=True), hidden, gr.update(choices=[], value=None), "", ""]

    def wire(self, head: gr.HTML, chatbot: gr.Chatbot, session: gr.State, event: dict) -> None:
        """Connect the parts to their handlers."""
        changed = [self.settings[name] for name in SLIDERS]
        self.preset.select(None, self.preset, None, js=KEEP_SETTING_JS.format(name="preset"))
        chosen = [*changed, self.preset]
        values = self.preset.select(
            self.choose_preset, session, chosen, trigger_mode="multiple", **event
        )
        values.then(None, None, None, js=SETTLED_JS)
        for name in SLIDERS:
            control = self.settings[name]
            control.input(None, control, None, js=KEEP_SETTING_JS.format(name=name))
        gr.on(
            [slider.input for slider in changed],
            self.name_preset,
            [session, *changed],
            self.preset,
            trigger_mode="always_last",
            **event,
        )
        saving = head.select(self.save, session, self.saved, trigger_mode="multiple", **event)
        saving.then(None, self.saved, None, js=SAVE_JS)
        chatbot.option_select(self.show_website, session, self.site, **event)
        shown = [self.version, session]
        self.version.input(self.show_version, shown, self.site, trigger_mode="always_last", **event)
        self.download.click(None, self.code, None, js=SAVE_WEBSITE_JS)

    # Coroutines: they answer in order, threads would not.
    async def choose_preset(self, session: Session, chosen: gr.SelectData) -> list:
        """The values of the sliders that a preset sets, and its name."""
        engine = self._loading.find(session.model)
        values = [*preset_values(str(chosen.value), engine).values()]
        return [*values, preset_of(values, engine)]

    async def name_preset(self, session: Session, *values: float) -> str:
        """The preset that has these values, "custom" if none has."""
        return preset_of(values, self._loading.find(session.model))

    def record(self, session: Session, request: gr.Request) -> list:
        """The conversation for the browser's store, and the facts on its answers."""
        session.changed = False  # before reading it: a change meanwhile is recorded later
        said = bool(session.conversation.messages or session.forks)
        kept = [transcript.record(session, self._loading.name(session.model))] if said else []
        left = self._records_of_left(session)
        facts = self._facts(session, request)
        # Computing the facts takes time: by now the page may show another conversation.
        return [transcript.told(session, *left, *kept), gr.skip() if session.successor else facts]

    def record_left(self, session: Session, request: gr.Request) -> list:
        """Record the sessions that were left before a turn's end was recorded, as far as the turn
        had come, and this session if it was opened from a file.

        A busy browser notices only the later of two messages, so each message repeats the records.
        """
        if session.entry:
            session.record_later(session)
        self._records_of_left(session)
        told = transcript.told(session, *session.opened_with, settled=True)
        return [told, self._facts(session, request)]

    def _records_of_left(self, session: Session) -> list[dict]:
        """The records of sessions that were left and are not recorded yet."""
        left, session.unrecorded = session.unrecorded, []
        records = []
        for one in left:
            one.changed = False  # before reading it
            if one.name:
                record = transcript.record(one, self._loading.name(one.model))
                records.append({**record, "once": secrets.token_hex(4)})
            one.entry = None
        session.opened_with += records
        return records

    def _facts(self, session: Session, request: gr.Request) -> dict:
        engine = self._loading.find(session.model)
        detects = engine is not None and engine.model.config.detects
        if engine and detects:
            looks.find_objects(engine, session.conversation.pictures.values())
        return answers.facts(session, request, detects)

    def save(self, session: Session, chosen: gr.SelectData, request: gr.Request) -> dict | None:
        """The conversation as a Markdown file, or as a JSON file that can be opened again.

        chosen.value: the kind of file, and the entry in the browser's list.
        """
        if not session.conversation.messages:
            gr.Info(translate("nothing_said", request), title="")
            return None
        chose = chosen.value if isinstance(chosen.value, dict) else {}
        entry = transcript.read_about(chose.get("about"))
        talk, model = session.conversation, self._loading.name(session.model)
        name = f"minigpt4-{time.strftime('%Y-%m-%d-%H%M')}"
        if chose.get("kind") == "markdown":
            text = transcript.to_markdown(talk, model, entry.title)
            return {"name": f"{name}.md", "type": "text/markdown", "text": text}
        data = transcript.to_data(session, model)
        text = json.dumps({**data, "about": asdict(entry)}, ensure_ascii=False, indent=1)
        return {"name": f"{name}.json", "type": "application/json", "text": text}

    def show_website(self, session: Session, chosen: gr.SelectData, request: gr.Request) -> list:
        """The last answer's website, if “Preview the website” was clicked."""
        if chosen.value != "preview":
            return [gr.skip()] * 5
        return self.show_version(len(render.websites(session)) - 1, session, request)

    def show_version(self, number: int, session: Session, request: gr.Request) -> list:
        """Show the website with this number, counting those of all answers."""
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
    """Sampling's fields, "seed" and "system" -> controls, created in the current gr.Blocks."""
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
            interactive=loading.engine is not None,  # until then, the values are not the model's
            buttons=[],  # no reset: it knows one model's values; presets know each model's
        )
    controls["seed"] = gr.Textbox(
        label=label("seed"),
        info=label("seed_info"),
        placeholder=label("random"),
        max_length=19,
        elem_id="set-seed",
    )
    controls["system"] = gr.Textbox(
        label=label("system"),
        info=label("system_info"),
        lines=2,
        max_lines=8,
        max_length=4000,
        elem_id="set-system",
    )
    return controls


def sampling_values(engine: "AnyEngine | None") -> dict[str, float]:
    """Slider -> the model's default."""
    if engine is None:
        return {name: published for name, (*_, published) in SLIDERS.items()}
    default = start.default_sampling(engine.model.config)
    return {name: getattr(default, name) for name in SLIDERS}


def preset_values(name: str, engine: "AnyEngine | None") -> dict[str, float]:
    """Slider -> value. "balanced" is the model's default, "precise" always takes the
    likeliest token, "creative" samples from more tokens at a higher temperature."""
    values = sampling_values(engine)
    if name == "precise":
        values |= {"temperature": 0, "top_p": 1}
    elif name == "creative":
        values |= {"temperature": min(2, round(values["temperature"] + 0.3, 2)), "top_p": 0.95}
    return values


def remembered_texts(remembered: object) -> list:
    """The seed and the system prompt that the visitor's browser remembers, if it remembers any."""
    given = remembered if isinstance(remembered, dict) else {}
    found = [(given.get(name), longest) for name, longest in (("seed", 19), ("system", 4000))]
    return [text[:longest] if isinstance(text, str) else gr.skip() for text, longest in found]


def preset_of(values: Sequence[float], engine: "AnyEngine | None") -> str:
    """The preset whose sliders have these values, "custom" if none has."""
    for name in PRESETS:
        if [*preset_values(name, engine).values()] == [*values]:
            return name
    return "custom"


def remembered_values(remembered: object, engine: "AnyEngine | None") -> dict[str, float]:
    """Slider -> the value that the visitor's browser remembers, or else the model's default."""
    given = remembered if isinstance(remembered, dict) else {}
    preset = given.get("preset")
    values = preset_values(preset if preset in PRESETS else "balanced", engine)
    for name, (low, high, *_) in SLIDERS.items():
        value = given.get(name)
        if isinstance(value, int | float) and low <= value <= high:
            values[name] = value
    return values


def describe(engine: "AnyEngine | None", request: gr.Request | None) -> str:
    """The model's name, precision, device and licence, as Markdown."""
    if engine is None:
        return ""
    model = engine.model
    precision = model.quantize if model.quantize != "none" else translate("unquantized", request)
    return translate(
        "model",
        request,
        name=html.escape(model.config.name),
        precision=html.escape(precision),
        device=html.escape(f"{model.device} ({engine.decoder_name})"),
        licence=html.escape(model.config.licence or "—"),
    )


def model_name(loading: Loading, chosen: str = "") -> str:
    """The model's name as HTML; a selector if there are several; "" while they are loading."""
    shown = loading.name(chosen)
    if not loading.several or not shown:
        return html.escape(shown)
    names = [engine.model.config.name for engine in loading.engines]
    options = "".join(
        f"<option{' selected' if name == shown else ''}>{html.escape(name)}</option>"
        for name in names
    )
    # The mark is new each time: Gradio renders only a value that differs from its last one, and the
    # visitor's choice, which is in the browser alone, may differ from both.
    mark = secrets.token_hex(4)
    return f'<select data-label="model_choice" data-mark="{mark}">{options}</select>'


def language_note(engine: "AnyEngine | None", request: gr.Request | None) -> str:
    """For visitors whose language the model does not speak; "" for others."""
    if not engine or not engine.model.config.english_only:
        return ""
    spoken = language(request)
    if spoken == "en":
        return ""
    return f'<span lang="{spoken}">{html.escape(translate("english_only", request))}</span>'


def summary(engine: "AnyEngine | None") -> str:
    """The model and the device in one line."""
    if engine is None:
        return ""
    model = engine.model
    precision = "" if model.quantize == "none" else f" · {model.quantize}"
    return html.escape(f"{model.config.name}{precision} · {model.device}")
