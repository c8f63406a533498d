"""MiniGPT-4: a frozen visual encoder, one trained linear projection, a frozen language model.

    model = minigpt4.load("nano")
    print(model.ask("photo.jpg", "What is in this picture?"))

Importing this package imports no torch; `load` does.
"""

import copy
import io
import os
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Union

if TYPE_CHECKING:
    from PIL import Image

    from minigpt4.conversation import Conversation
    from minigpt4.engine import AnyEngine
    from minigpt4.model.image import Picture

__version__ = "0.1.0"
__all__ = ["Chat", "Model", "load"]

_CLOSED = "This model is closed: load it again."
# A path, the content of a picture file, a file opened in binary mode, or a picture of Pillow.
PictureSource = Union[str, os.PathLike, bytes, bytearray, BinaryIO, "Image.Image"]


def load(
    model: str | None = None,
    *,
    device: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
    projection: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    qformer: str | os.PathLike | None = None,
    llm: str | os.PathLike | None = None,
    llm_url: str | None = None,
    llm_key: str | None = None,
    embeddings_mb: int | None = None,
) -> "Model":
    """Load a model; missing weights are downloaded. model: a name such as "nano", or USER/NAME of a
    projection that `minigpt4 push` sent to the Hugging Face hub.

    The arguments are the options of `minigpt4 ask` and have the same environment variables and
    defaults: see `minigpt4 ask --help`. UserError for an invalid value, and for weights that are
    not available.
    """
    from minigpt4 import options, start

    given = {
        "model": model,
        "device": device,
        "quantize": quantize,
        "dtype": dtype,
        "projection": projection,
        "vision": vision,
        "qformer": qformer,
        "llm": llm,
        "llm_url": llm_url,
        "llm_key": llm_key,
        "embeddings_mb": embeddings_mb,
    }
    return Model(start.open_engine(options.from_mapping(options.LOADING, given)))


class Model:
    """A loaded model. Any number of threads may use it at once.

    `with` closes it. Sampling is set by keyword arguments, as in `ask(…, temperature=0, seed=1)`:
    temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, num_beams, seed,
    presence_penalty, frequency_penalty. By default, or if one is None, the model's configuration
    decides. UserError for a picture that cannot be read, an invalid value, or a question that is
    too long.
    """

    def __init__(self, engine: "AnyEngine") -> None:
        self.engine = engine
        self.closed = False

    @property
    def name(self) -> str:
        """The name of the model, which `load("auto")` has selected."""
        return self.engine.model.config.name

    def ask(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        **sampling: float | None,
    ) -> str:
        """The answer to a question about a picture, or about several."""
        return "".join(self.stream(pictures, question, **sampling))

    def stream(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        **sampling: float | None,
    ) -> Generator[str, None, None]:
        """The answer as text that comes in parts. Closing the iterator stops the answer."""
        return self.chat(pictures).stream(question, **sampling)

    def chat(
        self, pictures: PictureSource | Sequence[PictureSource] = (), system: str | None = None
    ) -> "Chat":
        """A new conversation, whose first question shows these pictures.

        system: the system prompt; by default the model's own.
        """
        return Chat(self, pictures, system)

    def close(self) -> None:
        """Stop the engine and free its memory."""
        self.closed = True
        self.engine.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Chat:
    """A conversation: every question is asked together with all earlier messages and pictures."""

    def __init__(
        self,
        model: Model,
        pictures: PictureSource | Sequence[PictureSource] = (),
        system: str | None = None,
    ) -> None:
        from minigpt4.conversation import Conversation
        from minigpt4.errors import UserError

        if not isinstance(system, str | None):
            raise UserError(f"The system prompt must be text, not “{type(system).__name__}”.")
        self._model = model
        self._pictures = _load_pictures(pictures)  # shown with the next question
        self._conversation = Conversation(system=system)

    def __deepcopy__(self, memo: object) -> "Chat":
        """An independent copy of the chat, with the same model."""
        from dataclasses import replace

        chat, said = copy.copy(self), self._conversation
        chat._pictures = [*self._pictures]
        messages, pictures = [*said.messages], {**said.pictures}
        chat._conversation = replace(said, messages=messages, pictures=pictures)
        return chat

    @property
    def conversation(self) -> "Conversation":
        """All messages so far, as plain data."""
        return self._conversation

    def show(self, *pictures: PictureSource) -> None:
        """Show more pictures with the next question."""
        self._pictures += _load_pictures(pictures)

    def ask(self, question: str, **sampling: float | None) -> str:
        """The answer to the next question."""
        return "".join(self.stream(question, **sampling))

    def stream(self, question: str, **sampling: float | None) -> Generator[str, None, None]:
        """The answer as text that comes in parts. If it is stopped early, its text so far stays in
        the conversation; a question that failed does not."""
        from dataclasses import replace

        from minigpt4.conversation import ask
        from minigpt4.errors import UserError
        from minigpt4.start import default_sampling

        if not isinstance(question, str):
            raise UserError(f"The question must be text, not “{type(question).__name__}”.")
        if not question.strip():
            raise UserError("The question is empty: write one.")
        if self._model.closed:
            raise UserError(_CLOSED)
        before, engine = self._conversation, self._model.engine
        asked = replace(before, messages=[*before.messages], pictures={**before.pictures})
        asked.add_question(question, self._pictures)
        answer = ask(engine, asked, default_sampling(engine.model.config, **sampling))
        try:
            yield from answer
        except UserError:
            if self._model.closed:
                raise UserError(_CLOSED) from None
            raise
        finally:
            if answer.text:
                asked.add_answer(answer.text)
                self._conversation, self._pictures = asked, []


def _load_pictures(sources: PictureSource | Sequence[PictureSource]) -> "list[Picture]":
    if isinstance(sources, (list, tuple)):
        return [_load_picture(source) for source in sources]
    return [_load_picture(sources)]


def _load_picture(source: Any) -> "Picture":
    from PIL import Image

    from minigpt4.errors import UserError
    from minigpt4.model import image

    if isinstance(source, Image.Image):
        return image.convert(source)
    if isinstance(source, io.TextIOBase):
        raise UserError("The picture's file is open as text: open it in binary mode, “rb”.")
    if hasattr(source, "read"):
        if getattr(source, "closed", False):
            raise UserError("The picture's file is closed: open it again.")
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)  # another question may have read it
        source = source.read()
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if isinstance(source, (str, os.PathLike, bytes)):
        return image.load(source, whole_path=True)
    raise UserError(
        "A picture is a path, the bytes of a picture file, a file opened in binary mode or a "
        f"Pillow image, not “{type(source).__name__}” (Pillow's Image.fromarray makes one of an "
        "array)."
    )
