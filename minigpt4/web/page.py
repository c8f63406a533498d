"""The chat page: what visitors see, say and stop. It asks `chat`, which asks the engine."""

import argparse
import html
import logging
from collections.abc import Iterator
from functools import partial

import gradio as gr
from gradio.events import Events

from minigpt4 import start
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.web.chat_endpoint import add_chat_endpoint
from minigpt4.web.server import Server
from minigpt4.web.session import Session

KEPT_SECONDS = 24 * 3600  # conversations and uploaded files of visitors who have gone quiet
ANSWERS_AT_ONCE = 8
FILE_TYPES = ["image", ".heic", ".heif", ".hif", ".avif", ".jfif"]  # those some systems do not know
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Write a short poem about this image.",
    "What is unusual about this image?",
    "Write an advertisement for this.",
)
WELCOME = "## Chat about a picture\nAdd one with the clip, or paste or drop it below; then ask."
SORRY = "Something went wrong while answering; please try again."
# Sampling's field -> label, what it does, lowest, highest, step
SLIDERS = {
    "temperature": ("Temperature", "0 takes the likeliest word; higher varies more.", 0, 2, 0.05),
    "top_p": ("Top-p", "Lower leaves unlikely words out; 1 keeps them all.", 0.05, 1, 0.05),
    "repetition_penalty": ("Repetition penalty", "Above 1 repeats words less.", 1, 2, 0.05),
    "max_new_tokens": ("Longest answer", "In tokens; a word is one or two.", 10, 1000, 10),
    "num_beams": ("Beams", "Above 1 weighs several answers, shown when done.", 1, 8, 1),
}
THEME = gr.themes.Default(
    primary_hue="teal", font=["sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# Gradio's own clear button would empty the page only; its share button is for Hugging Face.
CSS = """
.gradio-container { --font: system-ui, sans-serif; }
.main { max-width: 60rem !important; margin: 0 auto; padding: 1rem min(3vw, 2rem) !important; }
#head { align-items: center; flex-wrap: nowrap; }
#head .html-container { padding: 0; }
#head b { font-size: 1.25rem; margin-right: 0.5rem; }
#head small { opacity: 0.65; display: inline-block; }
#chat { min-height: 20rem; }
#chat .wrapper > .icon-button-wrapper, #chat .message-buttons-right { display: none; }
#chat .placeholder { text-align: center; }
#chat .examples { grid-template-columns: repeat(2, minmax(0, 1fr)); max-width: 100%; }
#chat .example { padding: 0.6rem 0.9rem; }
#chat .message img { max-height: 16rem; width: auto; }
"""

# Whatever an answer holds, the browser fetches nothing from elsewhere.
HEAD = """<meta http-equiv="Content-Security-Policy" content="
default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">"""

log = logging.getLogger(__name__)


def _warn(error: UserError) -> None:
    gr.Warning(html.escape(str(error)))  # Gradio shows it as HTML


def attach(value: dict, session: Session) -> tuple[Session, dict]:
    """Read pictures as soon as they are uploaded; those that cannot be read leave the box."""
    good = []
    for path in value["files"]:
        try:
            session.read(path)
            good.append(path)
        except UserError as error:
            _warn(error)
    all_good = len(good) == len(value["files"])  # then the box stays alone: someone is typing there
    return session, gr.skip() if all_good else {"text": value["text"], "files": good}


def encode(engine: Engine, session: Session) -> None:
    """Have the uploaded pictures encoded while their question is still being typed."""
    for picture in list(session.uploads.values()):
        try:
            engine.encode(picture)
        except Exception:  # only a head start: the answer will tell
            log.exception("while encoding a picture")


def respond(
    engine: Engine, names: list[str], value: dict, session: Session, *settings: float | str | None
) -> Iterator[tuple]:
    """Ask, and stream the answer: (session, messages, box). Closing it ends the request.

    names: the fields of Sampling that `settings` are.
    """
    streamed = None
    try:
        sampling = _sampling(**dict(zip(names, settings, strict=True)))
        streamed = session.ask(engine, value["text"], value["files"], sampling)
        yield session, session.shown, _box(answering=True, value=None)
        for _ in session.take(streamed):
            yield gr.skip(), session.shown, gr.skip()
    except UserError as error:
        if streamed is None:
            _warn(error)
        else:
            session.say(str(error))
    except Exception:
        log.exception("while answering")
        session.say(SORRY)
    finally:
        if streamed is not None:
            streamed.close()
    yield gr.skip(), session.shown, _box(answering=False)


def _sampling(seed: str | None = None, **settings: float) -> Sampling:
    digits = (seed or "").strip()
    if digits and not digits.isdecimal():
        raise UserError("The seed must be a whole number, or empty for a new one each time.")
    return Sampling(seed=int(digits) if digits else None, **settings)


def stop(session: Session) -> dict:
    """End the answer at its next step."""
    session.stop()
    return _box(answering=False)


def _box(answering: bool, **changes: object) -> dict:
    return gr.update(submit_btn=not answering, stop_btn=answering, **changes)


def fill(value: dict, example: gr.SelectData) -> dict:
    """A clicked instruction goes into the box, beside the pictures that are there."""
    return {"text": example.value["text"], "files": value["files"]}


def new_chat() -> tuple[Session, list, dict]:
    """Nothing said, nothing attached."""
    return Session(), [], _box(answering=False, value=None)


def build_page(engine: Engine, server: Server | None = None) -> gr.Blocks:
    """The page, with the endpoint /chat where there is a server for programs; `launch` serves."""
    event = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(
        title="MiniGPT-4",
        fill_height=True,
        analytics_enabled=False,
        delete_cache=(3600, KEPT_SECONDS),
    ) as page:
        session = gr.State(Session(), time_to_live=KEPT_SECONDS)
        with gr.Row(elem_id="head"):
            gr.HTML(f"<b>MiniGPT-4</b><small>{_describe(engine)}</small>")
            fresh = gr.Button("New chat", size="sm", scale=0, min_width=96)
        chatbot = gr.Chatbot(
            elem_id="chat",
            scale=1,
            show_label=False,
            label="Conversation",
            placeholder=WELCOME,
            examples=[{"text": text} for text in INSTRUCTIONS],
            buttons=["copy"],
            allow_file_downloads=False,
            feedback_options=None,
        )
        box = gr.MultimodalTextbox(
            elem_id="box",
            show_label=False,
            label="Message",
            placeholder="Ask about your picture…",
            file_types=FILE_TYPES,
            file_count="multiple",
            max_plain_text_length=100_000,
            autofocus=True,
        )
        with gr.Accordion("Settings", open=False):
            settings = _settings(start.default_sampling(engine.model.config))

        attaching = Events.upload.listener(
            box, attach, [box, session], [session, box], trigger_mode="always_last", **event
        )
        attaching.then(partial(encode, engine), session, trigger_mode="multiple", **event)
        chatbot.example_select(fill, box, box, **event)
        responding = box.submit(
            partial(respond, engine, list(settings)),
            [box, session, *settings.values()],
            [session, chatbot, box],
            **event,
        )
        box.stop(stop, session, box, cancels=responding, **event)
        going_on = [responding, attaching]
        fresh.click(new_chat, None, [session, chatbot, box], cancels=going_on, **event)
        if server is not None:
            add_chat_endpoint(server.asking)
    return page


def _describe(engine: Engine) -> str:
    model = engine.model
    precision = "unquantised" if model.quantize == "none" else model.quantize
    return html.escape(f"{model.config.name} · {precision} · {model.device}")


def _settings(default: Sampling) -> dict[str, gr.components.Component]:
    """Sampling's field -> its control, rendered where this is called."""
    controls = {}
    with gr.Row():
        for name, (label, info, low, high, step) in SLIDERS.items():
            controls[name] = gr.Slider(
                low,
                high,
                getattr(default, name),
                step=step,
                precision=0 if isinstance(step, int) else None,
                label=label,
                info=info,
                min_width=240,
            )
        controls["seed"] = gr.Textbox(
            label="Seed",
            placeholder="random",
            info="The same number gives the same answer again.",
            min_width=240,
        )
    return controls


def serve(page: gr.Blocks, options: argparse.Namespace, server: Server | None = None) -> str:
    """Start the page, and the server's endpoints, in the background; the address here."""
    page.queue(max_size=options.max_queue, default_concurrency_limit=ANSWERS_AT_ONCE)
    try:
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            max_file_size=options.max_upload_mb * 2**20,
            theme=THEME,
            css=CSS,
            head=HEAD,
            footer_links=[],
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            **(server.launching if server is not None else {}),
        )
    except (OSError, OverflowError):
        raise UserError(
            f"Port {options.port} of {options.host} cannot be used, or is used already: choose "
            "another with --port or --host."
        ) from None
    return address.rstrip("/")


def launch(page: gr.Blocks, options: argparse.Namespace, server: Server) -> None:
    """Serve the page until the program is interrupted, or told to end."""
    with server.until_terminated(page):
        print(f"Open {serve(page, options, server)}", flush=True)
        page.block_thread()
