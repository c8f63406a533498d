"""The chat page: its parts, and which of them calls what. The handlers are in the files beside."""

import argparse
from typing import TYPE_CHECKING

import gradio as gr
from gradio.events import Events

from minigpt4.web.api.gradio_chat import add_chat_endpoint
from minigpt4.web.guard import uploads
from minigpt4.web.guard.events import guard
from minigpt4.web.page import controls, texts
from minigpt4.web.page.examples import FOLDER, examples
from minigpt4.web.page.feedback import Feedback, Ratings
from minigpt4.web.page.files import Files
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.panel import Panel
from minigpt4.web.page.session import Session
from minigpt4.web.page.shown import ASSETS
from minigpt4.web.page.texts import label, say
from minigpt4.web.page.turns import Turns
from minigpt4.web.server import Server, start_server

if TYPE_CHECKING:
    from minigpt4.engine import Engine

FILE_TYPES = ["image", ".heic", ".heif", ".hif", ".avif", ".jfif"]  # those some systems do not know
MOST_VISITORS = 500  # whose conversations are kept; who was quiet the longest goes first
MOST_EVENTS = 500  # of all visitors' pages that may wait to begin
OTHER_EVENTS = 40  # at once, beside the answers: New chat, pictures that are read, pages that load
# Whatever an answer holds, the browser fetches nothing from elsewhere, and no frame leads anywhere.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-src 'none'; "
    "object-src 'none'; form-action 'self'"
)
LOOK = {  # for Blocks.launch, or gr.mount_gradio_app
    "theme": gr.themes.Default(
        primary_hue="teal", font=["sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    # The style stands here, not in `css`: Gradio would prefix its selectors, `body` among them.
    "head": f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f"<style>\n{(ASSETS / 'page.css').read_text(encoding='utf-8')}</style>\n"
    + "".join(
        f"<script>\n{(ASSETS / name).read_text(encoding='utf-8')}</script>\n"
        for name in ("names.js", "page.js")
    ),
    "i18n": texts.I18N,
    "allowed_paths": [str(FOLDER)],  # from whichever folder the program is started
}
NAME = "<h1>MiniGPT-4</h1><small>${value}</small>"
# A status line that screen readers read out.
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
# The box without the files that were refused.
WITHOUT = (
    "(refused, box) => refused?.length ? {...box, files: box.files.filter((file) => "
    "!refused.includes(file.path))} : {__type__: 'update'}"
)
WIDE = "() => ({__type__: 'update', open: innerWidth >= 1100})"


async def renew(session: Session) -> Session:
    """Gradio keeps a state for so long after it was last put out; without that, for ever."""
    return session.latest


def build_page(
    source: "Engine | Loading", feedback: Feedback | None = None, server: Server | None = None
) -> gr.Blocks:
    """The page of an engine, there already or still being loaded; `serve` serves it.

    With a server for programs, the page has the endpoint /chat as well.
    """
    loading = source if isinstance(source, Loading) else Loading.done(source)
    # Questions wait in the engine's own queue, which knows their places, not in Gradio's.
    event = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    with gr.Blocks(title="MiniGPT-4", fill_height=True, analytics_enabled=False) as page:
        session = gr.State(Session(), time_to_live=uploads.KEPT_SECONDS)
        with gr.Row(elem_id="head"):
            name = gr.HTML(controls.short(loading), html_template=NAME)
            fresh = gr.Button(label("new_chat"), size="sm", scale=0, min_width=96)
        chatbot = gr.Chatbot(
            elem_id="chat",
            scale=1,
            show_label=False,
            label=label("conversation"),
            placeholder=label("welcome"),
            examples=examples(None),
            buttons=["copy"],
            editable="user",
            allow_file_downloads=False,
            feedback_options=("Like", "Dislike") if feedback else None,
            group_consecutive_messages=False,
        )
        if feedback:
            ratings = Ratings(loading, feedback)
        with gr.Row(elem_id="under"):
            status = gr.HTML("", elem_id="status", js_on_load=LIVE)
            camera_button = gr.Button(label("camera"), size="sm", scale=0, min_width=72)
        refused = gr.JSON(visible=False)  # files
        camera_open = gr.State(False)
        camera = gr.Image(
            sources=["webcam"],
            type="filepath",
            label=label("take_picture"),
            visible="hidden",  # made anew each time, Gradio's camera loses pictures
            elem_id="camera",
            height=320,
            webcam_options=gr.WebcamOptions(mirror=False),
        )
        box = gr.MultimodalTextbox(
            elem_id="box",
            show_label=False,
            label=label("message"),
            placeholder=label("ask_here"),
            file_types=FILE_TYPES,
            file_count="multiple",
            max_plain_text_length=100_000,
            autofocus=True,
        )
        with gr.Sidebar(open=False, position="right", width="24rem", elem_id="panel") as sidebar:
            panel = Panel(loading)

        turns = Turns(loading, [name for name in panel.settings if name != "system"])
        files = Files(loading, turns)
        given = list(panel.settings.values())
        answered = [chatbot, box, status]
        replaced = [session, *answered]
        answering = [
            box.submit(turns.ask, [box, session, *given], answered, **event),
            chatbot.retry(turns.retry, [session, *given], answered, **event),
            chatbot.edit(turns.edit, [session, *given], answered, **event),
            chatbot.option_select(turns.option, [session, *given], answered, **event),
        ]
        box.stop(turns.stop, session, None, queue=False, **event)  # stands behind nobody
        undoing = chatbot.undo(turns.undo, session, answered, **event)
        for said in (*answering, undoing):
            said.then(panel.record, session, panel.keeper, **event)
            said.then(renew, session, session, **event)
        page.load(renew, session, session, **event)

        attaching = Events.upload.listener(
            box,
            files.attach,
            [box, session],
            [refused, status],
            trigger_mode="always_last",
            **event,
        )
        attaching.then(None, [refused, box], box, js=WITHOUT)
        chatbot.example_select(files.fill, [box, session], [box, status], **event)
        camera_button.click(files.show_camera, camera_open, [camera_open, camera], **event)
        camera.change(
            files.photograph, [camera, box, session], [box, camera_open, camera, status], **event
        )

        opened = [*replaced, panel.settings["system"]]
        for left in (
            fresh.click(files.new_chat, session, replaced, **event),
            panel.recent.select(files.reopen, session, opened, **event),
            panel.upload.upload(files.open, [panel.upload, session], opened, **event),
        ):
            left.then(panel.clear_website, None, panel.site, **event)
            left.then(panel.record_left, session, panel.keeper, **event)
        panel.wire(sidebar, chatbot, session, event)
        if feedback:
            ratings.wire(chatbot, session, event)

        greeted = [name, panel.model, *(panel.settings[s] for s in controls.SLIDERS)]
        known_when_built = loading.engine is not None

        def greet(request: gr.Request) -> list:
            """What was not known, or not in the visitor's language, when the page was built."""
            return [
                gr.Chatbot(examples=examples(request)),
                gr.Radio(choices=controls.preset_choices(request)),
                *known(request),
            ]

        def known(request: gr.Request) -> list:
            values = list(controls.sampling_values(loading.engine).values())
            if known_when_built:  # a visitor may have moved them already
                values = [gr.skip()] * len(values)
            return [controls.short(loading), controls.describe(loading, request), *values]

        def look(request: gr.Request) -> list:
            """How far the model is."""
            if loading.engine is not None:
                return [say("ready", request), gr.Timer(active=False), *known(request)]
            if loading.error is not None:
                return [str(loading.error), gr.Timer(active=False)] + [gr.skip()] * len(greeted)
            line = say("loading", request, step=loading.step, seconds=loading.seconds)
            return [line, gr.skip()] + [gr.skip()] * len(greeted)

        page.load(greet, None, [chatbot, panel.preset, *greeted], **event)
        page.load(None, None, sidebar, js=WIDE)
        if loading.engine is None:
            timer = gr.Timer(0.5)
            timer.tick(look, None, [status, timer, *greeted], **event)
        if server is not None:
            add_chat_endpoint(server.chat_service)
    return page


def serve(page: gr.Blocks, options: argparse.Namespace, server: Server | None = None) -> str:
    """Start the server in the background, endpoints for programs included; its address here."""
    page.queue(api_open=False, max_size=MOST_EVENTS, default_concurrency_limit=None)
    guard(page._queue)
    page._queue.ANALYTICS_MAX_EVENTS = 1  # Gradio makes a table of all that it keeps after each
    # An answer is one of Gradio's jobs from its place in the engine's queue on to its end.
    machines = (options.llm_url or "").count(",") + 1
    answers = options.max_running * machines + options.max_queue
    return start_server(
        page,
        options,
        share=options.share,
        max_threads=answers + OTHER_EVENTS,
        max_file_size=options.max_upload_mb * 2**20,
        run_history=False,
        state_session_capacity=MOST_VISITORS,
        **LOOK,
        **(server.launching if server else {}),
    )


def launch(page: gr.Blocks, options: argparse.Namespace, loading: Loading, server: Server) -> None:
    """Serve until the program is told to end. Raises what keeps the model from loading."""
    with server.until_terminated(page):
        print(f"Open {serve(page, options, server)}", flush=True)
        loading.start()
        loading.wait()
        page.block_thread()
