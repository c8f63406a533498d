"""Step 1, generate: the model describes each picture, and is asked to continue a short description.

As in the paper (section 3.2): one question about the picture, then “Continue” after an answer of
fewer than 80 tokens. No torch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from minigpt4.batch import Batch, Dialogue
from minigpt4.conversation import Conversation, ask
from minigpt4.curation.pictures import PictureFile, load_picture
from minigpt4.data.files import prompt_text
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model.prompt import Template

MIN_TOKENS = 80  # in the paper


def paper_template(template: Template) -> Template:
    """The template in which the paper generates and trains: "###Human: … ###Assistant: ".

    The published chat adds a system text, and omits the marker before the first turn.
    """
    if not template.training_user:
        return replace(template, system="")
    return replace(
        template,
        system="",
        user=template.training_user,
        user_end=template.training_user_end or template.user_end,
        assistant_end=" " if template.assistant_end else "",  # the next turn begins with the marker
    )


def name_of(engine: Engine) -> str:
    """The model and a hash of its projection, which tells two trainings of a model apart."""
    weight = engine.model.projection.weight.detach().float().cpu().numpy()
    return f"{engine.model.config.name}@{hashlib.sha256(weight.tobytes()).hexdigest()[:8]}"


class Generator:
    """Describes pictures with the engine of a batch; asks at most `continues` times to continue."""

    def __init__(
        self,
        batch: Batch[Engine],
        sampling: Sampling,
        min_tokens: int = MIN_TOKENS,
        continues: int = 1,
    ) -> None:
        self._batch, self._sampling = batch, sampling
        self._min_tokens, self._continues = min_tokens, continues
        self._template = paper_template(batch.engine.model.config.template)
        self.model = name_of(batch.engine)
        self.options = asdict(sampling) | {"min_tokens": min_tokens, "continues": continues}
        self.prompt = prompt_text("describe.txt")
        self._continue = prompt_text("continue.txt")

    def __call__(self, files: Sequence[PictureFile]) -> Iterator[dict]:
        """A record for each picture, as soon as it is described.

        If a picture cannot be described, its record has `error` instead of `text`.
        """
        for file, outcome in self._batch.run(files, self._describe):
            record = vars(file) | {"model": self.model}
            if isinstance(outcome, UserError):
                yield record | {"error": str(outcome)}
            else:
                yield record | outcome | {"prompt": self.prompt, "options": self.options}

    def _describe(self, file: PictureFile) -> Dialogue:
        conversation = Conversation(template=self._template)
        conversation.add_question(self.prompt, [load_picture(file.picture)])
        answer = ask(self._batch.engine, conversation, self._sampling)
        parts: list[str] = []
        tokens = 0
        while True:
            completion = yield answer
            parts.append(completion.text)
            tokens += len(answer.tokens)
            if tokens >= self._min_tokens or len(parts) > self._continues:
                break
            conversation.add_answer(completion.text)
            conversation.add_question(self._continue)
            try:
                answer = ask(self._batch.engine, conversation, self._sampling, trim=False)
            except UserError as error:
                if error.kind != "too_long":
                    raise
                break
        return {
            "text": " ".join(filter(None, parts)),
            "tokens": tokens,
            "continued": len(parts) - 1,
            "cut": completion.truncated,
        }
