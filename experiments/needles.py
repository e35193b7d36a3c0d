"""Facts hidden in a text, and questions about them: what compression costs a user.

A needle is a sentence ("The password of Lisbon is walnut."), put into the text at even distances. A question is its
beginning; it is answered when the model's greedy continuation is that word, exactly. No context gives it away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from experiments import Step

PLACES = ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Delhi", "Seoul", "Quito")
WORDS = ("walnut", "marble", "saffron", "copper", "velvet", "tiger", "lantern", "orchid")
TOKENS_A_NEEDLE = 64
"""Of text for each needle, so that a short prefix is not made of needles alone."""

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Question:
    """The beginning of a needle's sentence (1, n), and the tokens (m,) that must follow."""

    ids: torch.Tensor
    answer: torch.Tensor


def hidden(encode: Encode, filler: Sequence[int], prefix: int) -> tuple[list[int], tuple[Question, ...]]:
    """`prefix` tokens of filler with needles in it, and the questions about them."""
    facts = list(zip(PLACES, WORDS, strict=True))[: max(1, prefix // TOKENS_A_NEEDLE)]
    needles = [list(encode(f"\nThe password of {place} is {word}.\n")) for place, word in facts]
    room = prefix - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"{prefix} tokens hold no needle of {len(needles[0])}")
    ids: list[int] = []
    for i, needle in enumerate(needles):
        # The last needle has text behind it too: what stands at the very end is kept by every window.
        ids += filler[i * room // (len(needles) + 1) : (i + 1) * room // (len(needles) + 1)]
        ids += needle
    ids += filler[len(needles) * room // (len(needles) + 1) :][: prefix - len(ids)]
    return ids, tuple(_question(encode, place, word) for place, word in facts)


def _question(encode: Encode, place: str, word: str) -> Question:
    whole = list(encode(f"\n\nThe password of {place} is {word}"))
    asked = list(encode(f"\n\nThe password of {place} is"))
    if whole[: len(asked)] != asked:  # the tokenizer joins the answer to the word before it
        raise ValueError(f"the tokenizer does not split before {word!r}")
    return Question(torch.tensor([asked]), torch.tensor(whole[len(asked) :]))


def answered(step: Step, question: Question) -> bool:
    """Whether greedy decoding gives exactly the answer: each token of it is the most likely after those before."""
    logits = step(torch.cat((question.ids, question.answer[None, :-1]), dim=1))
    guesses = logits[question.ids.shape[1] - 1 :].argmax(-1)
    return bool(torch.equal(guesses, question.answer))
