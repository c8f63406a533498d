"""Step 1, generate: the model describes each picture, and is told to go on where it said little.

As in the paper (section 3.2): one question about the picture, and “Continue” after an answer of
fewer than 80 tokens. No torch.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.curation.pictures import Source, load_picture
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model.prompt import Template
from minigpt4.training.data import read_lines

MIN_TOKENS = 80  # the paper's


def read_prompt(name: str) -> str:
    """An instruction out of `prompts/`, its lines joined to one; UserError for an empty file."""
    lines = read_lines(name)
    if not lines:
        raise UserError(f"prompts/{name} holds no line: write the instruction into it.")
    return " ".join(lines)


def paper_template(template: Template) -> Template:
    """The template as the paper's generation and training use it: "###Human: … ###Assistant: ",
    where the published chat puts a system text in front and no mark before its first turn."""
    if not template.training_user:
        return replace(template, system="")
    return replace(
        template,
        system="",
        user=template.training_user,
        user_end=template.training_user_end or template.user_end,
        assistant_end=" " if template.assistant_end else "",  # the next turn begins with it
    )


def name_of(engine: Engine) -> str:
    """The model and a hash of its projection: which of two trainings described a picture."""
    weight = engine.model.projection.weight.detach().float().cpu().numpy()
    return f"{engine.model.config.name}@{hashlib.sha256(weight.tobytes()).hexdigest()[:8]}"


@dataclass
class _Task:
    """A picture that is being described."""

    source: Source
    conversation: Conversation
    answer: Answer
    text: str = ""
    tokens: int = 0
    continued: int = 0


class Generator:
    """Describes pictures: `together` at once, each told at most `continues` times to go on."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        min_tokens: int = MIN_TOKENS,
        continues: int = 1,
        together: int = 16,
    ) -> None:
        self._engine, self._sampling = engine, sampling
        self._min_tokens, self._continues, self._together = min_tokens, continues, together
        self._template = paper_template(engine.model.config.template)
        self.model = name_of(engine)
        self.prompt = read_prompt("describe.txt")
        self._continue = read_prompt("continue.txt")

    def __call__(self, sources: Sequence[Source]) -> Iterator[dict]:
        """A record a picture, as they are finished: those told to go on come later.

        A picture that cannot be read gives a record with `error` in place of `text`.
        """
        waiting = deque(sources)
        tasks: deque[_Task] = deque()
        while waiting or tasks:
            if waiting and len(tasks) < self._together:
                source = waiting.popleft()
                try:
                    tasks.append(self._begin(source))
                except UserError as error:
                    if error.kind not in ("request", "too_long"):  # it is not the picture's fault
                        raise
                    yield {**vars(source), "model": self.model, "error": str(error)}
                continue
            task = tasks.popleft()
            self._read(task)
            if self._goes_on(task):
                tasks.append(task)
            else:
                yield self._record(task)

    def _begin(self, source: Source) -> _Task:
        conversation = Conversation(template=self._template)
        conversation.add_question(self.prompt, [load_picture(source.picture)])
        return _Task(source, conversation, ask(self._engine, conversation, self._sampling))

    def _read(self, task: _Task) -> None:
        said = "".join(task.answer).strip()
        task.conversation.add_answer(said)
        task.text = f"{task.text} {said}".strip()
        task.tokens += len(task.answer.tokens)

    def _goes_on(self, task: _Task) -> bool:
        """Tell the model to go on, where it said too little and the context has room."""
        if task.tokens >= self._min_tokens or task.continued == self._continues:
            return False
        task.conversation.add_question(self._continue)
        try:
            task.answer = ask(self._engine, task.conversation, self._sampling, trim=False)
        except UserError as error:
            if error.kind == "too_long":
                return False
            raise
        task.continued += 1
        return True

    def _record(self, task: _Task) -> dict:
        return {
            **vars(task.source),
            "text": task.text,
            "tokens": task.tokens,
            "continued": task.continued,
            "cut": task.answer.stop_reason != "stop",
            "model": self.model,
            "prompt": self.prompt,
        }
