"""The panel that folds away: settings, conversations to keep, the website in an answer."""

import json
import time

import gradio as gr

from minigpt4.web.page import controls, preview, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session
from minigpt4.web.page.shown import ASSETS
from minigpt4.web.page.texts import label, say

RECENT_JS = (ASSETS / "recent.js").read_text(encoding="utf-8")
RECENT_HTML = (
    '<p class="none"></p><ul class="recent"></ul><button type="button" class="all" hidden></button>'
)
KEEP_JS = "watch('value', () => minigpt4.recent.keep(props.value));"
SAVE_JS = "(file) => { if (file) minigpt4.save(file); }"
# Saves the website that is shown, whatever became of its answer since.
SAVE_WEBSITE_JS = "(text) => minigpt4.save({ name: 'website.html', type: 'text/html', text })"


class Panel:
    """The panel's parts, rendered where this is made, and its handlers.

    settings: Sampling's fields, "seed" and "system" -> controls.
    """

    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        # Hands the conversation to the script that keeps it, whichever tab is shown.
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
            controls.preset_choices(None),
            value="balanced",
            label=label("preset"),
            info=label("preset_info"),
        )
        self.settings = controls.build_controls(self._loading)
        self.theme = gr.Button(label("theme"), size="sm")
        self.model = gr.Markdown(controls.describe(self._loading, None), elem_id="model")

    def _build_conversations(self) -> None:
        with gr.Row():
            self.markdown = gr.Button(label("save_markdown"), size="sm", min_width=140)
            self.json = gr.Button(label("save_json"), size="sm", min_width=140)
        self.upload = gr.UploadButton(label("open_file"), size="sm", file_types=[".json"])
        # What is to be saved passes through here to the browser; no file is left on the server.
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
        """Nothing to preview."""
        hidden = gr.update(visible=False)
        return [gr.update(visible=True), hidden, gr.update(choices=[], value=None), "", ""]

    def wire(
        self, sidebar: gr.Sidebar, chatbot: gr.Chatbot, session: gr.State, event: dict
    ) -> None:
        """Connect the parts to their handlers."""
        changed = [self.settings[name] for name in controls.PRESET_FIELDS]
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
        """The sliders that a preset sets."""
        return controls.preset(name, self._loading.engine)

    def record(self, session: Session) -> dict:
        """The conversation for the browser's list, with small pictures."""
        if not session.conversation.messages:
            return gr.skip()
        data = transcript.to_data(session.conversation, transcript.SMALL_SIDE, self._name())
        return {"name": session.name, "data": data}

    def record_left(self, session: Session) -> dict:
        """The conversation that was left in the middle of its answer, as far as that had come."""
        left, session.predecessor = session.predecessor, None
        return self.record(left) if left else gr.skip()

    def save_markdown(self, session: Session, request: gr.Request) -> dict | None:
        """The conversation as a Markdown file."""
        text = transcript.to_markdown(session.conversation, self._name())
        return self._file(session, "md", "text/markdown", text, request)

    def save_json(self, session: Session, request: gr.Request) -> dict | None:
        """The conversation as a JSON file, which can be opened again."""
        data = transcript.to_data(session.conversation, transcript.FULL_SIDE, self._name())
        text = json.dumps(data, ensure_ascii=False, indent=1)
        return self._file(session, "json", "application/json", text, request)

    def _file(
        self, session: Session, suffix: str, kind: str, text: str, request: gr.Request
    ) -> dict | None:
        if not session.conversation.messages:
            gr.Info(say("nothing_said", request), title="")
            return None
        name = f"minigpt4-{time.strftime('%Y-%m-%d-%H%M')}.{suffix}"
        return {"name": name, "type": kind, "text": text}

    def _name(self) -> str:
        return self._loading.engine.model.config.name if self._loading.engine else ""

    def show_website(
        self, session: Session, chosen: gr.SelectData, request: gr.Request
    ) -> list | dict:
        """Open the panel with the last answer's website, where that is what was clicked."""
        if chosen.value != "preview":
            return [gr.skip()] * 7
        return [
            gr.Sidebar(open=True),
            gr.Tabs(selected="website"),
            *self._site(len(session.websites) - 1, session, request),
        ]

    def show_version(self, number: int, session: Session, request: gr.Request) -> list:
        """The website of an earlier answer."""
        return self._site(number, session, request)

    def _site(self, number: int, session: Session, request: gr.Request) -> list:
        sites = session.websites
        if not 0 <= number < len(sites):
            return [gr.skip()] * 5
        choices = [(say("version", request, number=i + 1), i) for i in range(len(sites))]
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            gr.update(choices=choices, value=number, visible=len(sites) > 1),
            preview.frame(sites[number], say("website", request)),
            sites[number],
        ]
