"""The chat page: its layout, and which event calls which handler of the modules beside this one."""

import argparse
import gc
import threading
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.events import Dependency, Events

from minigpt4.web.api import mcp
from minigpt4.web.api.gradio_chat import add_chat_endpoint
from minigpt4.web.guard.uploads import KEPT_SECONDS
from minigpt4.web.page import panel, parts, render, texts
from minigpt4.web.page.examples import FOLDER
from minigpt4.web.page.feedback import Feedback, Ratings
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.looks import FirstLook
from minigpt4.web.page.panel import Panel
from minigpt4.web.page.parts import ASSETS, PLAIN, fragment
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import explain_loading, label, translate, translate_step
from minigpt4.web.page.turns import Turns
from minigpt4.web.page.uploads import Uploads
from minigpt4.web.server import Server, start_server

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

# Some systems do not know that files with these extensions are images.
FILE_TYPES = ["image", ".heic", ".heif", ".hif", ".avif", ".jfif"]
MAX_VISITORS = 500  # sessions that are kept; the one idle the longest is dropped first
MAX_EVENTS = 500  # events of all visitors' pages that may wait to begin
OTHER_EVENTS = 40  # at once, besides the answers: New chat, pictures being read, pages loading
# Whatever an answer contains, the browser loads nothing from other hosts and no frame navigates.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-src 'none'; "
    "object-src 'none'; form-action 'self'"
)
LOOK = {  # for Blocks.launch, or gr.mount_gradio_app
    "theme": gr.themes.Default(
        primary_hue="teal", font=["sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    # The style is here, not in `css`: Gradio would prefix its selectors, `body` among them.
    "head": f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n' + parts.head(),
    "i18n": texts.I18N,
    "allowed_paths": [str(FOLDER)],
}
# Screen readers read this line out when it changes.
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
# Removes refused files from the box, and from the draft that survives a reload.
WITHOUT_REFUSED = (
    "(refused, box) => refused?.length ? minigpt4.draft.keep({...box, files: box.files.filter("
    "(file) => !refused.includes(file.path))}) : {__type__: 'update'}"
)
# Clears the status "Ready: ask away." when the last picture leaves the box.
CHANGED_JS = (
    "(box, status) => [minigpt4.draft.changed(box), box?.files?.length || "
    "status !== minigpt4.say('looked') ? {__type__: 'update'} : '']"
)
CAPTIONS_JS = "watch('value', () => minigpt4.captions(props.value));"
# Conversations are opened only after this: `renew` would replace them by the first session.
LOADED_JS = "() => { minigpt4.chats.loaded(); }"
# Sets a turn's last input: the browser's id of the conversation that the page shows.
SHOWN_JS = "(...inputs) => [...inputs.slice(0, -1), minigpt4.chats.current]"
# Sets also the question's text to that at the moment of sending: Gradio reads the box later.
ASK_JS = f"(box, ...inputs) => [minigpt4.asSent(box), ...({SHOWN_JS})(...inputs)]"
# Null if the box has been emptied since sending.
EMPTY_JS = "(box, session) => [minigpt4.unaccepted() ? minigpt4.asSent(box) : null, session]"
ENDED_JS = "() => { minigpt4.ended(); }"
SETTINGS_JS = "() => [minigpt4.settings.begin(), null]"
# New chats get the visitor's own system prompt, not that of the conversation shown before.
OWN_SYSTEM_JS = "() => [minigpt4.settings.load().system ?? '']"
# Options of every event. Questions wait in the engine's queue, which knows their places, so
# Gradio's own queue is not limited.
EVENT = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
# Options of a step that follows an event (`then`). By default, Gradio would drop the step while an
# earlier run of it has not ended.
NEXT = {**EVENT, "trigger_mode": "multiple"}


def build_page(
    source: "AnyEngine | Loading", feedback: Feedback | None = None, server: Server | None = None
) -> gr.Blocks:
    """Build the page for an engine that is loaded or still loading; `serve` serves it.

    With a server for programs, the page also has the endpoint /chat and the tool of --mcp.
    """
    loading = source if isinstance(source, Loading) else Loading.done(source)
    # Without these, the page has Gradio's default width until its own styles are loaded.
    wide: dict[str, bool] = {"fill_height": True, "fill_width": True}
    with gr.Blocks(title="MiniGPT-4", analytics_enabled=False, **wide) as page:
        ChatPage(page, loading, feedback)
        if server is not None:
            add_chat_endpoint(server.chat_service)
            if server.offers_mcp:
                mcp.add_tool(server.chat_service)
    page.temp_file_sets.append(render.thumbnail_files)  # deleted when the server ends
    return page


class ChatPage:
    """The page's components, created inside the current gr.Blocks, and their events."""

    def __init__(self, page: gr.Blocks, loading: Loading, feedback: Feedback | None) -> None:
        self._page, self._loading = page, loading
        self._known_when_built = loading.engine is not None
        self._session = gr.State(Session(), time_to_live=KEPT_SECONDS)
        self._panel = side = Panel(loading)
        # Outside the columns, which a phone's drawers make inert: screen readers always find it.
        gr.HTML('<h1 class="heard">MiniGPT-4</h1>', elem_id="name", **PLAIN)
        with gr.Column(elem_id="rail", min_width=0):
            self._new_chat = side.build_rail()
        with gr.Column(elem_id="main", min_width=0):
            self._head = fragment("head", panel.model_name(loading), elem_id="head")
            self._hello = parts.hello()
            self._build_chat(feedback is not None)
            ratings = Ratings(loading, feedback) if feedback else None
            self._build_composer()
        side.build_drawers()
        sliders = [side.settings[name] for name in panel.SLIDERS]
        told = [self._head, side.foot, self._note, side.model]
        self._model_parts = [*told, *sliders, side.preset]  # components that depend on the model
        self._remembered = gr.JSON(visible=False)  # the settings that the browser keeps

        self._wire_turns()
        uploads = Uploads(loading)
        self._wire_pictures(uploads)
        self._wire_conversations(uploads)
        side.wire(self._head, self._chatbot, self._session, EVENT)
        if ratings:
            chatbot = self._chatbot
            left = [chatbot.retry, chatbot.edit, chatbot.undo, self._box.submit]
            left += [self._hello.select, self._new_chat.click, side.recent.select]
            left.append(side.upload.upload)
            ratings.wire(chatbot, self._session, left, EVENT)
        self._wire_start()
        if loading.several:
            self._wire_models()

    def _build_chat(self, rated: bool) -> None:
        self._chatbot = gr.Chatbot(
            elem_id="chat",
            scale=1,
            show_label=False,
            label=label("conversation"),
            buttons=["copy"],
            latex_delimiters=render.FORMULAS,
            editable="user",
            allow_file_downloads=False,
            elem_classes="rated" if rated else None,
            feedback_options=("Like", "Dislike") if rated else None,
            group_consecutive_messages=False,
        )

    def _build_composer(self) -> None:
        with gr.Column(elem_id="composer", min_width=0):
            fragment("add", elem_id="add")
            self._box = gr.MultimodalTextbox(
                elem_id="box",
                show_label=False,
                label=label("message"),
                placeholder=label("ask_here"),
                file_types=FILE_TYPES,
                file_count="multiple",
                max_plain_text_length=10**9,  # Gradio makes a file of a longer text
                autofocus=True,
            )
        opening = "" if self._known_when_built else '<span data-say="opening"></span>'
        with gr.Column(elem_id="lines", min_width=0):
            self._status = gr.HTML(opening, elem_id="status", js_on_load=LIVE, **PLAIN)
            self._note = fragment("note", "", elem_id="note")
        self._refused = gr.JSON(visible=False)  # paths of files
        self._captions = gr.HTML(html_template="", js_on_load=CAPTIONS_JS, elem_classes="unseen")

    def _wire_turns(self) -> None:
        names = [name for name in self._panel.settings if name != "system"]
        turns = Turns(self._loading, names)
        session, box, chatbot, side = self._session, self._box, self._chatbot, self._panel
        named = gr.JSON(visible=False)
        settings = [*side.settings.values(), named]
        shown = [chatbot, box, self._status, side.keeper]
        event_of_turn: dict[str, Any] = {**EVENT, "js": SHOWN_JS}
        asked = [box, session, *settings]
        events = [
            # By default, Gradio drops a question while the last one's event still runs, even if
            # New chat has ended the answer.
            box.submit(turns.ask, asked, shown, trigger_mode="multiple", js=ASK_JS, **EVENT),
            chatbot.retry(turns.retry, [session, *settings], shown, **event_of_turn),
            chatbot.edit(turns.edit, [session, *settings], shown, **event_of_turn),
            chatbot.option_select(turns.option, [session, *settings], shown, **event_of_turn),
            self._hello.select(turns.example, [session, *settings], shown, **event_of_turn),
        ]
        box.stop(turns.stop, session, None, queue=False, **EVENT)  # never waits behind others
        events.append(chatbot.undo(turns.undo, [box, session, named], shown, **event_of_turn))
        events.append(side.facts.select(turns.version, [session, named], shown, **event_of_turn))
        emptied = events[0].then(turns.empty, [box, session], box, js=EMPTY_JS, **NEXT)
        emptied.then(None, None, None, js=ENDED_JS)
        for event in events:
            event.then(side.record, session, [side.keeper, side.facts], **NEXT)
            event.then(renew, session, session, **NEXT)
        events[0].then(turns.look, session, [chatbot, side.keeper], **NEXT)

    def _wire_pictures(self, uploads: Uploads) -> None:
        box, session = self._box, self._session
        attaching = Events.upload.listener(
            box,
            uploads.attach,
            [box, session],
            [self._refused, self._status, self._captions],
            trigger_mode="always_last",
            **EVENT,
        )
        looked = attaching.then(None, [self._refused, box], box, js=WITHOUT_REFUSED)
        first_look = FirstLook(self._loading)
        looked.then(first_look.caption, [box, session], self._captions, **NEXT)

    def _wire_conversations(self, uploads: Uploads) -> None:
        """The events that show another conversation: New chat, the browser's list, a file."""
        session, side = self._session, self._panel
        replaced = [session, self._chatbot, self._box, self._status]
        opened = [*replaced, side.settings["system"]]
        new_chat = self._new_chat.click(uploads.new_chat, session, replaced, **EVENT)
        new_chat.then(None, None, side.settings["system"], js=OWN_SYSTEM_JS)
        events: tuple[Dependency, ...] = (
            new_chat,
            side.recent.select(uploads.reopen, session, opened, **EVENT),
            # A file that is chosen while another is being opened is opened next.
            side.upload.upload(
                uploads.open, [side.upload, session], opened, trigger_mode="always_last", **EVENT
            ),
        )
        for event in events:
            event.then(side.clear_website, None, side.site, **NEXT)
            event.then(side.record_left, session, [side.keeper, side.facts], **NEXT)
            if self._loading.several:
                known = [self._remembered, session]
                event.then(self.show_model, known, self._model_parts, js=SETTINGS_JS, **NEXT)

    def _wire_start(self) -> None:
        side, page = self._panel, self._page
        texts = [side.settings["seed"], side.settings["system"]]
        model = [*self._model_parts, *texts]
        known = [self._remembered, self._session]
        page.load(None, None, self._box, js="() => minigpt4.draft.load()")
        changed = [self._box, self._status]
        self._box.change(None, changed, changed, js=CHANGED_JS)
        renewed = page.load(renew, self._session, self._session, **EVENT)
        greeting: dict[str, Any] = {**EVENT, "fn": self.greet, "inputs": known, "js": SETTINGS_JS}
        greeting["outputs"] = [self._status, *model]
        if self._loading.several:  # after `renew`, which may change the session and its model
            renewed = renewed.then(**greeting)
        else:
            page.load(**greeting)
        renewed.then(None, None, None, js=LOADED_JS)
        if self._loading.engine is None:
            timer = gr.Timer(0.5)
            shown = [self._status, timer, *model]
            timer.tick(self.show_progress, known, shown, js=SETTINGS_JS, **EVENT)

    def _wire_models(self) -> None:
        """The selector of models in the head."""
        known = [self._remembered, self._session]
        shown = self._model_parts[1:]  # not the selector: it shows the choice and has the focus
        chosen = self._head.input(
            self.choose_model, self._session, None, trigger_mode="multiple", **EVENT
        )
        # A second step, so that it comes after a new chat's events, which show the former model.
        beside = chosen.then(self.show_model_beside, known, shown, js=SETTINGS_JS, **NEXT)
        beside.then(None, None, None, js=panel.SETTLED_JS)

    def greet(self, remembered: object, session: Session, request: gr.Request) -> list:
        """Fill in what was unknown when the page was built, in the visitor's language.

        remembered: the settings that the visitor's browser keeps.
        """
        status, _, *model = self.show_progress(remembered, session, request)
        return [gr.skip() if self._loading.engine else status, *model]

    def show_progress(self, remembered: object, session: Session, request: gr.Request) -> list:
        """The state of loading; the last call stops the timer."""
        loading = self._loading
        if not session.model and isinstance(remembered, dict):
            session.model = str(remembered.get("model") or "")
        unchanged = [gr.skip()] * (7 + len(panel.SLIDERS))
        if loading.engine is not None:
            ready = translate("ready", request)
            model = self.show_model(remembered, session, request)
            texts = panel.remembered_texts(remembered)
            return [ready, gr.Timer(active=False), *model, *texts]
        if loading.error is not None:
            return [explain_loading(loading.error, request), gr.Timer(active=False), *unchanged]
        step = translate_step(loading.step, request)
        line = translate("loading", request, step=step, seconds=loading.seconds)
        return [line, gr.skip(), *unchanged]

    def choose_model(self, session: Session, chosen: gr.EventData) -> None:
        """Have another model answer from the next question on.

        chosen.value: the model and the time of the choice, since quick choices may arrive out of
        order.
        """
        value = chosen.value if isinstance(chosen.value, dict) else {}
        latest, when = session.latest, value.get("when")
        if isinstance(when, int | float) and when >= latest.model_chosen:
            latest.model_chosen = when
            latest.model = self._loading.name(str(value.get("model")))

    def show_model_beside(self, remembered: object, session: Session, request: gr.Request) -> list:
        """The same as `show_model`, without the selector."""
        return self.show_model(remembered, session, request)[1:]

    def show_model(self, remembered: object, session: Session, request: gr.Request) -> list[Any]:
        """The page's texts about the session's model, and the settings' values for this model."""
        session = session.latest  # another conversation may be shown by now
        engine = self._loading.find(session.model)
        values = panel.remembered_values(remembered, engine)
        sliders: list[Any] = [gr.update(value=value, interactive=True) for value in values.values()]
        preset: Any = panel.preset_of([*values.values()], engine)
        first = self._known_when_built and not self._loading.several
        if first and not remembered:  # the page was built with these values
            sliders, preset = [gr.skip()] * len(sliders), gr.skip()
        return [
            panel.model_name(self._loading, session.model),
            panel.summary(engine),
            panel.language_note(engine, request),
            panel.describe(engine, request),
            *sliders,
            preset,
        ]


async def renew(session: Session) -> Session:
    """Return the session, so that it is an output: Gradio deletes a state some time after its last
    output, and never deletes a state that was not an output."""
    return session.latest


def serve(page: gr.Blocks, options: argparse.Namespace, server: Server | None = None) -> str:
    """Start the server and its endpoints for programs in the background; returns its address."""
    page.queue(api_open=False, max_size=MAX_EVENTS, default_concurrency_limit=None)
    # An answer occupies one of Gradio's threads from when it enters the engine's queue to its end.
    machines = (options.llm_url or "").count(",") + 1
    answers = options.max_running * machines + options.max_queue
    return start_server(
        page,
        options,
        first=parts.asset("first.html"),
        share=options.share,
        max_threads=answers + OTHER_EVENTS,
        pwa=True,
        favicon_path=str(ASSETS / "icon.png"),
        max_file_size=options.max_upload_mb * 2**20,
        run_history=False,
        state_session_capacity=MAX_VISITORS,
        **LOOK,
        **(server.launching if server else {}),
    )


def launch(page: gr.Blocks, options: argparse.Namespace, loading: Loading, server: Server) -> None:
    """Serve until the program is told to end. Raises the error if loading or a GPU failed."""
    try:
        with server.until_terminated(page):
            print(f"Open {serve(page, options, server)}", flush=True)
            loading.start()
            loading.wait()
            # Not in this thread: a signal during a finalizer would print a traceback.
            freezing = threading.Thread(target=freeze_objects, name="freezing", daemon=True)
            freezing.start()
            freezing.join()
            server.wait(page)
    except KeyboardInterrupt:
        loading.leave(130)
        raise
    loading.leave(0)


def freeze_objects() -> None:
    """Exempt what exists now (modules, the page, the model) from garbage collection: it stays.

    Otherwise a full collection visits all of it and blocks the event loop for 120 ms or more.
    """
    gc.collect()
    gc.freeze()
