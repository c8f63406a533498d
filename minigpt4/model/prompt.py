"""Conversation -> prompt: token ids, image positions, loss mask. No torch.

A prompt consists of three kinds of content, which are kept apart: the template's own text (which
may hold control tokens), the texts of people and models (in which nothing is a control token), and
pictures. Text between two pictures or control tokens is tokenised as one string, as in the
published code, so that an ordinary conversation gets exactly the published token ids.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

IMAGE_ID = -1  # in `Prompt.ids`, at the position of an image embedding


@dataclass(frozen=True)
class ImageRef:
    """A picture in a message: `key` identifies its content (see `image.Picture`).

    words: the words that a word head found in it, listed after its embeddings, or "".
    """

    key: str
    words: str = ""


@dataclass(frozen=True)
class Message:
    """A question or an answer; parts: texts and pictures in the order in which they were given."""

    role: Literal["user", "assistant"]
    parts: tuple[str | ImageRef, ...]

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The pictures among the parts."""
        return tuple(p for p in self.parts if isinstance(p, ImageRef))


@dataclass(frozen=True)
class Template:
    """The format of conversations that a model was trained with.

    Names from `controls` in these strings become control tokens. `markers` are the parts of the
    format that are plain text: they are broken up in the texts of people and models.
    """

    system: str  # default system text
    system_wrap: str  # with {} for the system text; left out if that is empty
    user: str  # opens a user's message
    assistant: str  # opens the assistant's message, and ends a prompt
    user_end: str  # closes a user's message
    assistant_end: str  # closes an answer
    between_images: str  # between two pictures in a row
    stop: tuple[str, ...]  # strings that end an answer
    controls: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    bos: bool = True  # the tokenizer's beginning-of-sequence token comes first
    training_user: str = ""  # `user` in stage 2's training, if it differs
    training_user_end: str = ""
    system_without_images: str = ""  # instead of `system` while a conversation has no picture


# Texts of the published Conversation class and train configs; the trailing spaces are theirs.
_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)

VICUNA = Template(
    system=_SYSTEM,
    system_wrap="{}###",
    user="Human: ",
    user_end="###",
    assistant="Assistant: ",
    assistant_end="###",
    between_images="###Human: ",
    stop=("###",),
    markers=("###", "<Img>", "</Img>"),
    training_user="###Human: ",
    training_user_end=" ###",
)

LLAMA2 = Template(
    system=_SYSTEM,
    system_wrap="{}",
    user="<s>[INST] ",
    user_end="",
    assistant=" [/INST] ",
    assistant_end="",
    between_images="<s>[INST] ",
    stop=("</s>",),
    controls=("<s>", "</s>"),
    markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<Img>", "</Img>"),
    training_user="[INST] ",
)

CHATML = Template(
    system="",
    system_wrap="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n",
    user_end="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    assistant_end="<|im_end|>\n",
    between_images=" ",
    stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    controls=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    markers=("<Img>", "</Img>"),
    bos=False,
)

# Without a system text, a language model for code answers a greeting with Python. With a picture
# there is no system text, as in training.
CHATML_GREETED = replace(
    CHATML,
    system_without_images=(
        "You are MiniGPT-4, a helpful research assistant that chats about pictures. You can "
        "describe pictures, answer questions about them and write poems about them. There is no "
        "picture yet. When asked to describe a picture, say that you see no picture."
    ),
)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this project uses."""

    bos_token_id: int
    eos_token_id: int

    def encode(self, text: str, **options) -> list[int]: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...


@dataclass
class Prompt:
    """The model's input, position by position.

    ids: token ids, IMAGE_ID at image positions.
    keys: equal to ids, except that each image position has a value unique to (picture, index): two
        prompts share the longest common prefix of their keys in a key-value cache.
    images: (first position, picture) in order.
    loss_mask: true if the token counts in the training loss.
    """

    ids: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    images: list[tuple[int, ImageRef]] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def picture_keys(self) -> set[str]:
        return {image.key for _, image in self.images}

    def followed_by(self, ids: list[int]) -> "Prompt":
        """The prompt and these tokens of its answer."""
        return Prompt([*self.ids, *ids], [*self.keys, *ids], self.images)

    def add_tokens(self, ids: Iterable[int], learn: bool = False) -> None:
        """Append tokens; learn: their value in the loss mask."""
        ids = list(ids)
        self.ids += ids
        self.keys += ids
        self.loss_mask += [learn] * len(ids)

    def add_image(self, image: ImageRef, length: int) -> None:
        """Append `length` positions for the picture."""
        self.images.append((len(self), image))
        base = int(image.key, 16) * 4096  # negative and far from any token id
        self.ids += [IMAGE_ID] * length
        self.keys += [-1 - base - i for i in range(length)]
        self.loss_mask += [False] * length


def plain(text: str, template: Template) -> str:
    """`text` made safe for a prompt: valid Unicode, with the template's markers broken up.

    "###" becomes "# # #". Names of control tokens stay: text is tokenised without control tokens.
    """
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    for marker in template.markers:
        broken = " ".join(marker) if len(set(marker)) == 1 else f"{marker[0]} {marker[1:]}"
        while marker in text:
            text = text.replace(marker, broken)
    return text


class _Writer:
    """Builds a prompt: collects text up to a picture or control token, then tokenises it at
    once."""

    def __init__(self, tokenizer: Tokenizer, template: Template, image_tokens: int) -> None:
        self.prompt = Prompt()
        self._tokenizer = tokenizer
        self._template = template
        self._image_tokens = image_tokens
        self._pending = ""
        names = "|".join(re.escape(name) for name in template.controls)
        self._controls = re.compile(f"({names})") if names else None
        if template.bos:
            self.prompt.add_tokens([tokenizer.bos_token_id])

    def template(self, text: str) -> None:
        """Write the template's own text, in which names of control tokens become these."""
        segments = self._controls.split(text) if self._controls else [text]
        for segment in segments:
            if segment in self._template.controls:
                self.flush()
                self.prompt.add_tokens([self._tokenizer.convert_tokens_to_ids(segment)])
            else:
                self._pending += segment

    def text(self, text: str) -> None:
        """Write a person's or a model's text, in which nothing is a control token."""
        self._pending += plain(text, self._template)

    def image(self, image: ImageRef) -> None:
        """Write a picture between <Img> and </Img>."""
        self.template("<Img>")
        self.flush()
        self.prompt.add_image(image, self._image_tokens)
        if image.words:
            self.text(f" {image.words}")
        self.template("</Img>")

    def flush(self) -> None:
        """Tokenise the collected text."""
        if self._pending:
            self.prompt.add_tokens(encode_text(self._tokenizer, self._pending))
            self._pending = ""

    def parts(self, parts: Sequence[str | ImageRef]) -> None:
        """Write a message's content; a text is separated from its neighbours by a space."""
        previous = None
        for part in parts:
            if previous is not None:
                pictures = isinstance(part, ImageRef) and isinstance(previous, ImageRef)
                self.template(self._template.between_images if pictures else " ")
            if isinstance(part, ImageRef):
                self.image(part)
            else:
                self.text(part)
            previous = part


def stop_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """Token ids that end an answer: the template's control tokens among `stop`, and the model's
    end-of-sequence token."""
    controls = (s for s in template.stop if s in template.controls)
    return frozenset({tokenizer.convert_tokens_to_ids(s) for s in controls}) | {
        tokenizer.eos_token_id
    }


def stop_strings(template: Template) -> tuple[str, ...]:
    """The stop strings that are plain text, which various token sequences may spell."""
    return tuple(s for s in template.stop if s not in template.controls)


def stop_sequences(template: Template, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences that commonly spell a plain stop string: at a line's start, after a word."""
    spellings = set()
    for text in stop_strings(template):
        spellings.add(tuple(encode_text(tokenizer, text)))
        alone, after = encode_text(tokenizer, "a"), encode_text(tokenizer, "a" + text)
        if after[: len(alone)] == alone:
            spellings.add(tuple(after[len(alone) :]))
    return tuple(sorted(spellings))


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text: nothing in it becomes a control token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_chat(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    image_tokens: int,
    system: str | None = None,
) -> Prompt:
    """The prompt for an answer to the last of `messages`.

    If that is the assistant's, the prompt ends inside it, and the answer is continued. system: None
    is the template's default, which depends on whether there are pictures; image_tokens: positions
    per picture.
    """
    writer = _Writer(tokenizer, template, image_tokens)
    if system is None:
        shown = any(message.images for message in messages)
        system = template.system if shown else template.system_without_images or template.system
    else:
        system = plain(system, template)
    if system:
        before, after = template.system_wrap.split("{}")
        writer.template(before)
        writer._pending += system
        writer.template(after)
    for i, message in enumerate(messages):
        last = i == len(messages) - 1
        if message.role == "user":
            writer.template(template.user)
            writer.parts(message.parts)
            writer.template(template.user_end)
            if last:
                writer.template(template.assistant)
        else:
            writer.template(template.assistant)
            writer.parts(message.parts)
            if not last:
                writer.template(template.assistant_end)
    writer.flush()
    return writer.prompt


def encode_training(
    parts: Sequence[str | ImageRef],
    answer: str,
    template: Template,
    tokenizer: Tokenizer,
    image_tokens: int,
    max_text_tokens: int,
    wrap: bool = True,
    end: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """A training sample: `parts` are the user's message; `answer` and its end are learned.

    earlier: the turns before it, (question, answer) each; then the pictures belong to the first.
    wrap: False is the published stage 1: the image embeddings, then the answer, without a prompt.
    The answer is tokenised on its own, as in the published code. Together with its end, it is cut
    at `max_text_tokens`. end: None is the template's first stop string.
    """
    writer = _Writer(tokenizer, template, image_tokens)
    if wrap:
        opening = template.training_user or template.user
        pictures = [part for part in parts if isinstance(part, ImageRef)]
        messages: list[tuple[Sequence[str | ImageRef], str | None]] = []
        for question, earlier_answer in earlier:
            messages.append(([question] if messages else [*pictures, question], earlier_answer))
        last = [part for part in parts if part not in pictures] if earlier else parts
        for content, answered in [*messages, (last, None)]:
            writer.template(opening)
            writer.parts(content)
            writer.template(template.training_user_end or template.user_end)
            writer.template(template.assistant)
            if answered is not None:
                writer.text(answered)
                writer.template(template.assistant_end)
            opening = template.user
        writer.flush()
    else:
        for part in parts:
            if isinstance(part, ImageRef):
                writer.prompt.add_image(part, image_tokens)
    end = template.stop[0] if end is None else end
    control = end in template.controls
    ids = encode_text(tokenizer, plain(answer, template) + ("" if control else end))
    if control:
        ids.append(tokenizer.convert_tokens_to_ids(end))
    writer.prompt.add_tokens(ids[:max_text_tokens], learn=True)
    return writer.prompt
