"""Three skills on lists of letters, and the documents that measure them. Knows nothing of models.

A question is the word of a skill and a list of letters; the answer follows from the letters by the rule of the skill.
Whether a list may be trained on or asked in a document is decided by a hash of its letters alone. So no list of a
document is ever put before a model in training, by any skill, whatever is drawn and in whatever order.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

ALPHABET = string.ascii_lowercase
N_LETTERS = 4
N_CHOICES = 4
_ONE_IN = 5  # one list in five is kept for documents


def reverse(letters: str) -> str:
    """The letters from the last to the first."""
    return letters[::-1]


def advance(letters: str) -> str:
    """Each letter replaced by the one that follows it in the alphabet; ``a`` follows ``z``."""
    return "".join(_shift(letter, 1) for letter in letters)


def latest(letters: str) -> str:
    """The letter that comes last in the alphabet."""
    return max(letters)


RULES: dict[str, Callable[[str], str]] = {"reverse": reverse, "next": advance, "last": latest}


def is_for_documents(letters: str) -> bool:
    """Whether a list of letters may be asked in a document; if not, it may be trained on."""
    return hashlib.sha256(letters.encode()).digest()[0] % _ONE_IN == 0


def draw_letters(rng: random.Random, *, for_documents: bool, length: int = N_LETTERS) -> str:
    """A list of different letters, uniform over one side of the split."""
    while True:
        letters = "".join(rng.sample(ALPHABET, length))
        if is_for_documents(letters) == for_documents:
            return letters


def spaced(letters: str) -> str:
    """The letters as they are written in a text: one space between two."""
    return " ".join(letters)


def question(skill: str, letters: str) -> str:
    """The prompt; the answer follows it after one space."""
    return f"{skill}: {spaced(letters)}\nanswer:"


def guess(rng: random.Random, skill: str, letters: str) -> str:
    """An answer of the right form, drawn without using the rule.

    Uniform over the orders of the letters (``reverse``), over all lists (``next``), over the letters (``last``).
    """
    if skill == "reverse":
        return "".join(rng.sample(letters, len(letters)))
    if skill == "next":
        return "".join(rng.choices(ALPHABET, k=len(letters)))
    return rng.choice(letters)


def draw_choices(rng: random.Random, skill: str, letters: str, position: int) -> list[str]:
    """Different answers with the right one at ``position``; the others are near misses.

    Near misses are other orders of the letters (``reverse``), the right answer with one or two letters off by one
    or two places (``next``), the other letters of the list (``last``).
    """
    right = RULES[skill](letters)
    wrong: list[str] = []
    while len(wrong) < N_CHOICES - 1:
        answer = _misplaced(rng, right) if skill == "next" else guess(rng, skill, letters)
        if answer != right and answer not in wrong:
            wrong.append(answer)
    return [*wrong[:position], right, *wrong[position:]]


def documents(skill: str, n_documents: int, seed: int, **_: object) -> dict[str, datasets.Dataset]:
    """The documents of one skill's task, the same ones for the same arguments.

    Args:
        skill: A key of ``RULES``.
        n_documents: How many; no two ask the same list. The right answer is at each position equally often
            (to within one document).
        seed: Decides the lists, the choices and their order.
        **_: The ``metadata`` of the task, which lm-eval passes along.

    Returns:
        One split, ``test``, with the columns ``question``, ``choices`` (spaced letters) and ``answer`` (an index).
    """
    import datasets  # only here: the processes that train models do without it

    rng = random.Random(f"{skill} {seed}")
    positions = [number % N_CHOICES for number in range(n_documents)]
    rng.shuffle(positions)
    lists: dict[str, None] = {}
    while len(lists) < n_documents:
        lists[draw_letters(rng, for_documents=True)] = None
    rows = [
        {
            "question": question(skill, letters),
            "choices": [spaced(choice) for choice in draw_choices(rng, skill, letters, position)],
            "answer": position,
        }
        for letters, position in zip(lists, positions, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def _misplaced(rng: random.Random, answer: str) -> str:
    letters = list(answer)
    for place in rng.sample(range(len(letters)), rng.randint(1, 2)):
        letters[place] = _shift(letters[place], rng.choice((-2, -1, 1, 2)))
    return "".join(letters)


def _shift(letter: str, by: int) -> str:
    return ALPHABET[(ALPHABET.index(letter) + by) % len(ALPHABET)]
