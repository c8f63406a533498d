"""One model, several conversations: each request is a stream of token ids.

The engine knows no tokenizer and no template. Requests take turns step by step under one lock;
pictures are encoded once and kept by the hash of their content.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from minigpt4.engine.sampling import Sampling, choose, penalize
from minigpt4.image import Picture
from minigpt4.model import MiniGPT4
from minigpt4.prompt import Prompt

KEPT_PICTURES = 256  # embeddings of the most recently used pictures: 60 KB each for nano


@dataclass(frozen=True)
class Request:
    """What to answer: the prompt, its pictures by key, how to draw, where to end."""

    prompt: Prompt
    pictures: Mapping[str, Picture]
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # where beams end, which are shown when done
    penalized: tuple[int, ...] = ()  # ids the repetition penalty covers from the start


class Stream:
    """Token ids as they are generated; the stop id, where one ended it, comes last.

    stop_reason: "stop", "length" or "closed" once ended; seconds_to_first: from submit to the
    first token. `close`, from any thread, ends the request before its next step.
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        run = engine._search if request.sampling.num_beams > 1 else engine._decode
        self._closed = threading.Event()
        self._steps = run(request, self._closed)
        self._stop_ids = request.stop_ids
        self._limit = request.sampling.max_new_tokens
        self._start = time.perf_counter()
        self.count = 0
        self.stop_reason = ""
        self.seconds_to_first = 0.0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        if self.stop_reason:
            raise StopIteration
        try:
            token = next(self._steps)
        except StopIteration:
            self.stop_reason = self.stop_reason or "stop"
            raise
        if self.count == 0:
            self.seconds_to_first = time.perf_counter() - self._start
        self.count += 1
        if token in self._stop_ids:
            self.stop_reason = "stop"
        elif self.count == self._limit:
            self.stop_reason = "length"
        return token

    def close(self) -> None:
        """End the request; what was generated stays generated."""
        self._closed.set()
        self.stop_reason = self.stop_reason or "closed"


class Engine:
    """Owns the model; `encode` pictures early, `submit` requests."""

    def __init__(self, model: MiniGPT4) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, picture: Picture) -> Tensor:
        """The picture's embeddings [image_tokens, llm_hidden_size], computed once."""
        with self._lock, torch.inference_mode():
            embeds = self._embeds.pop(picture.key, None)
            if embeds is None:
                embeds = self.model.encode_images([picture.rgb])[0]
            self._embeds[picture.key] = embeds
            while len(self._embeds) > KEPT_PICTURES:
                self._embeds.popitem(last=False)
        return embeds

    def submit(self, request: Request) -> Stream:
        """Start answering; iterate over the stream for the token ids."""
        return Stream(self, request)

    def _embed(self, request: Request) -> Tensor:
        images = {key: self.encode(request.pictures[key]) for key in _image_keys(request.prompt)}
        with torch.inference_mode():
            return self.model.embed(request.prompt, images)

    def _decode(self, request: Request, closed: threading.Event) -> Iterator[int]:
        """Greedy or sampled, a token a step."""
        sampling, device = request.sampling, self.model.device
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(device)
            seed = sampling.seed if sampling.seed is not None else generator.seed()
            generator.manual_seed(seed)
        seen = torch.tensor(request.penalized, dtype=torch.long, device=device)
        inputs, cache = {"inputs_embeds": self._embed(request)}, None
        for _ in range(sampling.max_new_tokens):
            if closed.is_set():
                return
            with self._lock, torch.inference_mode():
                output = self.model.llm(
                    **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
                token = choose(output.logits[0, -1], seen, sampling, generator)
                new = torch.tensor([token], device=device)
                seen = torch.cat([seen, new])
                inputs = {"input_ids": new[None]}
            yield token

    def _search(self, request: Request, closed: threading.Event) -> Iterator[int]:
        """Beam search, by transformers; the ids come when it is done. Others' steps come between
        its own."""
        sampling = request.sampling
        embeds = self._embed(request)
        first = torch.tensor(request.penalized, dtype=torch.long, device=embeds.device)
        processor = _GeneratedPenalty(first, sampling.repetition_penalty)
        with self._lock, torch.inference_mode():
            ids = self.model.llm.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                num_beams=sampling.num_beams,
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                logits_processor=[processor],
                stopping_criteria=[_BeamStop(request.stop_sequences, closed, self._lock)],
                eos_token_id=sorted(request.stop_ids) or None,
                pad_token_id=0,
            )
        if not closed.is_set():
            yield from ids[0].tolist()


class _GeneratedPenalty(LogitsProcessor):
    """`penalize` over each beam's generated tokens (transformers hands them as input_ids)."""

    def __init__(self, first: Tensor, penalty: float) -> None:
        self._first, self._penalty = first, penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            penalize(row, torch.cat([self._first, seen]), self._penalty)
            for seen, row in zip(input_ids, scores, strict=True)
        ]
        return torch.stack(rows)


class _BeamStop(StoppingCriteria):
    """Ends a beam at a stop sequence and the search when it was closed; lets others in."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], closed: threading.Event, lock: threading.Lock
    ) -> None:
        self._sequences, self._closed, self._lock = sequences, closed, lock

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self._lock.release()
        time.sleep(0)  # whoever waits for the lock can take it
        self._lock.acquire()
        done = [
            self._closed.is_set() or any(row[-len(s) :] == list(s) for s in self._sequences)
            for row in input_ids.tolist()
        ]
        return torch.tensor(done, device=input_ids.device)


def _image_keys(prompt: Prompt) -> set[str]:
    return {image.key for _, image in prompt.images}
