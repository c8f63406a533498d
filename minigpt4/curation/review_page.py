"""The page of a review: a picture beside its description, and a key for each decision."""

import argparse
from pathlib import Path

import gradio as gr

from minigpt4.curation.review import Review
from minigpt4.errors import UserError
from minigpt4.web.server import start_server, warn

ASSETS = Path(__file__).parent / "assets"
LONGEST_SIDE = 1600  # pixels, of the picture that the browser receives
LOOK = {  # system fonts: the page loads nothing from other servers
    "theme": gr.themes.Default(
        primary_hue="teal", font=["sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    "head": f"<script>\n{(ASSETS / 'review.js').read_text(encoding='utf-8')}</script>",
    "css": "#text textarea { font-size: 1.15rem; line-height: 1.5 } #picture { min-height: 20rem }"
    "@media (max-width: 640px) { #picture { height: 40vh !important; min-height: 0 !important } }",
}
HELP = (
    "**K** keeps the description, **E** edits it (then **Ctrl+Enter** keeps the edited text and "
    "**Esc** leaves the text field), **D** drops the picture, **←** goes back."
)


class ReviewPage:
    """The event handlers of one review.

    `shown` is "TURN ID" of the picture that the browser shows. Every event sends it, so that a
    decision is about the picture that was seen; a new turn tells the browser that there is a new
    picture.
    """

    def __init__(self, review: Review) -> None:
        self._review = review

    def build(self) -> gr.Blocks:
        """The components and their events."""
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
        """The values for a browser that has just opened the page."""
        return self._show(self._review.next(), 0)

    def keep(self, shown: str, text: str) -> tuple:
        """Keep the description, edited or not, and show the next picture."""
        return self._decide(shown, False, text)

    def drop(self, shown: str, text: str) -> tuple:
        """Drop the picture and show the next one."""
        return self._decide(shown, True, text)

    def back(self, shown: str) -> tuple:
        """Show the previous picture, to decide again."""
        turn, image_id = self._read(shown)
        return self._show(self._review.previous(image_id), turn + 1)

    def note(self, shown: str, text: str) -> None:
        """Save the draft of the text."""
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
        summary = ", ".join(f"{counts[d]} {w}" for d, w in WORDS.items() if counts[d])
        progress = f"{done} of {len(self._review)} decided" + (f": {summary}" if summary else "")
        if not image_id:
            head = f"### All decided\n{progress}. The file is complete; close this page."
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
    """Start the server in the background. Returns the address of the page."""
    page.queue(default_concurrency_limit=1)  # decisions are processed in order
    return start_server(page, options, **LOOK)
