"""The page of a review: picture and description side by side, a key for each decision."""

import argparse
from pathlib import Path

import gradio as gr

from minigpt4.curation.review import Review
from minigpt4.errors import UserError
from minigpt4.web.server import start_server, warn

ASSETS = Path(__file__).parent / "assets"
LONGEST_SIDE = 1600  # pixels of what the browser is sent
LOOK = {  # fonts of the system: the page fetches nothing from elsewhere
    "theme": gr.themes.Default(
        primary_hue="teal", font=["sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    "head": f"<script>\n{(ASSETS / 'review.js').read_text(encoding='utf-8')}</script>",
    "css": "#text textarea { font-size: 1.15rem; line-height: 1.5 } #picture { min-height: 20rem }"
    "@media (max-width: 640px) { #picture { height: 40vh !important; min-height: 0 !important } }",
}
HELP = (
    "**K** keeps the description as it is, **E** edits it (then **Ctrl+Enter** keeps the edited "
    "one, **Esc** leaves the text), **D** drops the picture, **←** goes one back."
)


class ReviewPage:
    """The handlers of one review. `shown` is what the browser shows, "TURN ID": it comes back with
    every event, so that a decision is about what was seen, and the turn tells the browser that the
    next one is there."""

    def __init__(self, review: Review) -> None:
        self._review = review

    def build(self) -> gr.Blocks:
        """Its parts, and which of them calls what."""
        event = {"api_visibility": "private", "show_progress": "hidden"}
        with gr.Blocks(title="Review", analytics_enabled=False, fill_width=True) as page:
            head = gr.Markdown(elem_id="head")
            with gr.Row():
                picture = gr.Image(
                    elem_id="picture",
                    show_label=False,
                    interactive=False,
                    buttons=[],
                    height="70vh",
                )
                with gr.Column():
                    text = gr.Textbox(
                        elem_id="text",
                        label="Description",
                        lines=10,
                        max_lines=24,
                        submit_btn=False,
                    )
                    with gr.Row():
                        keep = gr.Button(
                            "Keep (K)", variant="primary", elem_id="keep", min_width=80
                        )
                        edit = gr.Button("Edit (E)", elem_id="edit", min_width=80)
                        drop = gr.Button("Drop (D)", variant="stop", elem_id="drop", min_width=80)
                        back = gr.Button("Back (←)", elem_id="back", min_width=80)
                    gr.Markdown(HELP)
            shown = gr.Textbox(elem_id="shown", visible="hidden")
            note = gr.Button(elem_id="note", visible="hidden")  # review.js presses it
            outputs = [shown, head, picture, text]
            page.load(self.begin, None, outputs, **event)
            keep.click(self.keep, [shown, text], outputs, **event)
            drop.click(self.drop, [shown, text], outputs, **event)
            back.click(self.back, shown, outputs, **event)
            edit.click(None, js="() => { document.querySelector('#text textarea').focus() }")
            note.click(self.note, [shown, text], None, trigger_mode="always_last", **event)
        return page

    def begin(self) -> tuple:
        """What a browser that has just come is shown."""
        return self._show(self._review.next(), 0)

    def keep(self, shown: str, text: str) -> tuple:
        """Keep the description, edited or not, and show the next picture."""
        return self._decide(shown, False, text)

    def drop(self, shown: str, text: str) -> tuple:
        """Drop the picture and show the next one."""
        return self._decide(shown, True, text)

    def back(self, shown: str) -> tuple:
        """The picture before, to decide again."""
        turn, image_id = self._read(shown)
        return self._show(self._review.previous(image_id), turn + 1)

    def note(self, shown: str, text: str) -> None:
        """What is being typed."""
        try:
            self._review.note(self._read(shown)[1], text)
        except UserError as error:
            warn(error, seconds=6)

    def _decide(self, shown: str, drop: bool, text: str) -> tuple:
        turn, image_id = self._read(shown)
        if image_id:
            try:
                self._review.decide(image_id, drop, text)
            except UserError as error:
                warn(error, seconds=6)
                return f"{turn + 1} {image_id}", gr.skip(), gr.skip(), gr.skip()
        return self._show(self._review.next(image_id), turn + 1)

    def _read(self, shown: str) -> tuple[int, str]:
        turn, _, image_id = (shown or "").partition(" ")
        return int(turn) if turn.isdecimal() else 0, image_id

    def _show(self, image_id: str, turn: int) -> tuple:
        """Values of: shown, head, picture, text."""
        counts = self._review.counts()
        done = len(self._review) - counts[""]
        said = ", ".join(f"{counts[d]} {w}" for d, w in WORDS.items() if counts[d])
        progress = f"{done} of {len(self._review)} decided" + (f": {said}" if said else "")
        if not image_id:
            head = f"### All decided\n{progress}. Close this page; the file is complete."
            return f"{turn} ", head, None, gr.update(value="", interactive=False)
        decided = self._review.decision(image_id)
        line = f"### {self._review.place(image_id)}. `{image_id}`"
        line += f" (decided: {decided})" if decided else ""
        try:
            picture = self._review.picture(image_id).rgb.copy()
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        except UserError as error:
            picture, progress = None, f"{progress}. {error}"
        value = self._review.text(image_id)
        text = gr.update(value=value, interactive=True)
        return f"{turn} {image_id}", f"{line}\n{progress}", picture, text


WORDS = {"keep": "kept", "edit": "edited", "drop": "dropped"}


def serve(page: gr.Blocks, options: argparse.Namespace) -> str:
    """Start the server in the background; the page's address."""
    page.queue(default_concurrency_limit=1)  # decisions in the order they were made
    return start_server(page, options, **LOOK)
