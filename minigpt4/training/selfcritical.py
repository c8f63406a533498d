"""Self-critical sequence training (Rennie et al., 2017): the model samples several answers, and
those with a higher score than the others become more likely. The baseline is the mean score of the
others (Luo, 2020)."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from minigpt4.errors import UserError
from minigpt4.evaluation.metrics import ptb_tokens
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import Prompt
from minigpt4.training.packing import Learned

_SIGMA = 6.0  # words; width of CIDEr-D's penalty for a length other than the reference's
_LONGEST = 4  # words in an n-gram


class CiderReward:
    """CIDEr-D (Vedantam et al., 2015) of one text against a picture's references.

    Document frequencies are those of all references given here. The end of a text counts as a
    word: otherwise a text could stop after "with a" at no cost.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]]) -> None:
        counted = {k: [_ngrams(_words(t)) for t in texts] for k, texts in references.items()}
        self._frequency: Counter = Counter()
        for texts in counted.values():
            self._frequency.update({gram for text in texts for gram in text})
        self._log_count = math.log(max(2, len(counted)))
        self._references = {k: [self._vectors(c) for c in texts] for k, texts in counted.items()}

    def __call__(self, key: Hashable, text: str, ended: bool = True) -> float:
        """The score; 1.0 is 100 in papers. ended: the model ended the text itself."""
        vectors = self._vectors(_ngrams(_words(text, ended)))
        return self._score(vectors, self._references[key])

    def agreement(self, key: Hashable) -> list[float]:
        """The score of each of a picture's references against its others."""
        references = self._references[key]
        return [
            self._score(one, references[:i] + references[i + 1 :])
            for i, one in enumerate(references)
        ]

    def _score(self, vectors: tuple, references: Sequence[tuple]) -> float:
        words, norms, length = vectors
        total = 0.0
        for other, other_norms, other_length in references:
            near = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            products = [0.0] * _LONGEST
            for gram, weight in words.items():
                if gram in other:
                    products[len(gram) - 1] += min(weight, other[gram]) * other[gram]
            for product, norm, other_norm in zip(products, norms, other_norms, strict=True):
                if norm and other_norm:
                    total += near * product / (norm * other_norm)
        return 10 * total / (_LONGEST * len(references))

    def _vectors(self, counts: Counter) -> tuple[dict, list[float], int]:
        """(n-gram -> tf-idf, norm for each n, length in words)."""
        weights, squares = {}, [0.0] * _LONGEST
        for gram, count in counts.items():
            weight = count * (self._log_count - math.log(max(1.0, self._frequency[gram])))
            weights[gram] = weight
            squares[len(gram) - 1] += weight * weight
        length = sum(count for gram, count in counts.items() if len(gram) == 1)
        return weights, [math.sqrt(s) for s in squares], length


def _words(text: str, ended: bool = True) -> list[str]:
    return ptb_tokens(text).split() + (["<end>"] if ended else [])


def _ngrams(words: Sequence[str]) -> Counter:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1)
    )


@torch.inference_mode()
def sample_answers(
    model: MiniGPT4, questions: Sequence[Prompt], images: Tensor, *how: Any
) -> list[list[list[int]]]:
    """Answers to questions, each about one picture.

    images: embeddings of the pictures [questions, image_tokens, hidden]. how: the arguments of
    `sample` after the prompts.
    """
    rows = [
        model.embed(question, {question.images[0][1].key: one})[0]
        for question, one in zip(questions, images, strict=True)
    ]
    return sample(model, rows, *how)


@torch.inference_mode()
def sample(
    model: MiniGPT4,
    rows: Sequence[Tensor],
    count: int,
    limit: int,
    temperature: float,
    generator: torch.Generator | None = None,
    tokens: Tensor | None = None,
) -> list[list[list[int]]]:
    """`count` answers of at most `limit` token ids to each prompt [length, hidden].

    They are drawn from the whole distribution at `temperature`; at 0, the likeliest tokens are
    taken. An answer that ended has the end token as its last id. Each prompt is computed once, and
    its keys and values are repeated. tokens: the ids that may be drawn, including the end token;
    all by default.
    """
    end = model.tokenizer.eos_token_id
    # Padded on the left: attention is relative, so positions may shift.
    inputs = pad_sequence(list(rows), batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
    places = torch.arange(inputs.shape[1], 0, -1, device=inputs.device)
    mask = (places <= lengths[:, None]).long()
    weight = model.torch_llm.get_output_embeddings().weight
    weight = weight if tokens is None else weight[tokens]
    decoder = model.torch_llm.get_decoder()
    output = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(count)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(count, 0)
    mask = mask.repeat_interleave(count, 0)
    drawn = []
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for _ in range(limit):
        likely = F.linear(hidden, weight).float()
        if temperature:
            likely = (likely / temperature).softmax(-1)
            # A race of exponential variables: the same as `multinomial`, which is slow on a CPU.
            likely /= torch.empty_like(likely).exponential_(generator=generator)
        token = likely.argmax(-1)
        token = (token if tokens is None else tokens[token])[:, None]
        drawn.append(token)
        ended |= token[:, 0] == end
        if ended.all():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = decoder(
            input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        hidden = output.last_hidden_state[:, -1]
    answers = []
    for ids in torch.cat(drawn, 1).tolist():
        answers.append(ids[: ids.index(end) + 1] if end in ids else ids)
    return [answers[i : i + count] for i in range(0, len(answers), count)]


def check_count(samples: int) -> None:
    """UserError if so many samples cannot be compared with each other."""
    if samples == 1:
        raise UserError("“--samples” compares captions with each other: use 2 or more.")


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the others."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def compared(
    tokenizer: Any,
    question: Prompt,
    answers: Sequence[Sequence[int]],
    score: Callable[[str, bool], float],
    weight: float,
    temperature: float,
    kind: str = "",
) -> tuple[list[Learned], float]:
    """(the answers to be learned, weighted by advantage; their mean score).

    score: function of a text and of whether the model ended it itself.
    """
    scores = [
        score(tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == tokenizer.eos_token_id)
        for ids in answers
    ]
    learned = [
        Learned(answered(question, ids), weight * advantage, temperature, kind)
        for ids, advantage in zip(answers, advantages(scores), strict=True)
    ]
    return learned, sum(scores) / len(scores)


def question_of(prompt: Prompt) -> Prompt:
    """The part of a training prompt before the tokens that are learned."""
    length = prompt.loss_mask.index(True)
    return Prompt(
        prompt.ids[:length], prompt.keys[:length], prompt.images, prompt.loss_mask[:length]
    )


def answered(question: Prompt, ids: Sequence[int]) -> Prompt:
    """A training prompt of the question and an answer to learn."""
    prompt = Prompt(
        list(question.ids), list(question.keys), question.images, list(question.loss_mask)
    )
    prompt.add_tokens(ids, learn=True)
    return prompt
