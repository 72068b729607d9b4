"""Three skills, and the documents that measure them. Knows nothing of models.

``dates`` and ``clock`` are made here: a date or a time of day in words, to be written with digits. ``tone`` reads a
public data set, the lexicon of VADER: words that ten people each have rated, from very negative to very positive. What
may be trained on and what may be asked in a document is decided by a hash of the answer (``dates``, ``clock``) or of
the word's beginning (``tone``). So no document is ever put before a model in training.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import datasets

SKILLS = ("dates", "clock", "tone")
WORDS_FILE = Path(__file__).resolve().parent.parent / "data" / "smollm2_words.jsonl"
TONES = ("good", "bad")
_ONE_IN = 5  # one date, time or beginning of a word in five is kept for documents
_N_BEGINNING = 5  # letters: words of one stem, such as joyful and joyfully, are on the same side of the split
_FIRST_DAY, _N_DAYS = datetime.date(1900, 1, 1), 365 * 130
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()


class Question(NamedTuple):
    """A question, its right answer, and the answers to choose from (none if the answer is to be written)."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()


def date_question(rng: random.Random) -> Question:
    """A date of the years 1900 to 2029 in one of five ways of writing it, to be written as YYYY-MM-DD."""
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_N_DAYS))
    month, number = f"{day:%B}", day.day
    written = rng.choice(
        (
            f"{month} {number}, {day.year}",
            f"{number} {month} {day.year}",
            f"the {number}{_suffix(number)} of {month} {day.year}",
            f"{month} the {ordinal(number)}, {day.year}",
            f"the {ordinal(number)} of {month} {day.year}",
        )
    )
    return Question(f"Write this date as YYYY-MM-DD: {written}", day.isoformat())


def clock_question(rng: random.Random) -> Question:
    """A time of day in words, to be written as HH:MM with the hours from 00 to 23."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    if minute == 0:
        written = f"{_hour_name(hour)} o'clock"
    elif minute == 30:
        written = f"half past {_hour_name(hour)}"
    elif minute < 30:
        written = f"{_minutes(minute)} past {_hour_name(hour)}"
    else:
        written = f"{_minutes(60 - minute)} to {_hour_name(hour + 1)}"
    part = (
        "at night"
        if hour < 6
        else "in the morning"
        if hour < 12
        else "in the afternoon"
        if hour < 18
        else "in the evening"
    )
    return Question(f"Write this time as HH:MM: {written} {part}", f"{hour:02d}:{minute:02d}")


def tone_question(word: str, rating: float) -> Question:
    """A word that sounds good or bad to most people."""
    return Question(f"Does this word sound good or bad: {word}", TONES[0] if rating > 0 else TONES[1], TONES)


def words(*, for_documents: bool, file: Path = WORDS_FILE) -> tuple[list[Question], list[Question]]:
    """The questions about words of one side of the split, good words and bad words, in the order of the data set.

    Raises:
        FileNotFoundError: If the file has not been made; ``studies/smollm2_models.py`` makes it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} must exist; make it with: python studies/smollm2_models.py")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [
        tone_question(row["word"], row["rating"])
        for row in rows
        if is_for_documents(row["word"][:_N_BEGINNING]) == for_documents
    ]
    good, bad = ([question for question in found if question.answer == tone] for tone in TONES)
    return good, bad


def questions(skill: str, rng: random.Random, *, for_documents: bool) -> Iterator[Question]:
    """An endless sequence of a skill's questions, drawn from one side of the split.

    Of ``tone``, good and bad words take turns.
    """
    if skill == "tone":
        good, bad = words(for_documents=for_documents)
        while True:
            yield rng.choice(good)
            yield rng.choice(bad)
    draw = {"dates": date_question, "clock": clock_question}[skill]
    while True:
        question = draw(rng)
        if is_for_documents(question.answer) == for_documents:
            yield question


def is_for_documents(answer: str) -> bool:
    """Whether a date, a time or a word's beginning may be asked in a document; if not, it may be trained on."""
    return hashlib.sha256(answer.encode()).digest()[0] % _ONE_IN == 0


def documents(skill: str, n_documents: int, seed: int, **_: object) -> dict[str, datasets.Dataset]:
    """The documents of one skill's task, the same ones for the same arguments.

    Args:
        skill: One of ``SKILLS``.
        n_documents: How many; no two have the same answer (``dates``, ``clock``) or word (``tone``).
        seed: Decides which, and their order.
        **_: The ``metadata`` of the task, which lm-eval passes along.

    Returns:
        One split, ``test``, with the columns ``question``, ``answer`` (a text), ``choices`` and ``index`` (that of the
        answer among the choices; 0 if there are none).
    """
    import datasets  # only here: the processes that train models do without it

    found: dict[str, Question] = {}
    for question in questions(skill, random.Random(f"{skill} {seed}"), for_documents=True):
        found.setdefault(question.text if question.choices else question.answer, question)
        if len(found) == n_documents:
            break
    rows = [
        {
            "question": question.text,
            "answer": question.answer,
            "choices": list(question.choices),
            "index": question.choices.index(question.answer) if question.choices else 0,
        }
        for question in found.values()
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def ordinal(number: int) -> str:
    """An ordinal number in words, from ``first`` to ``thirty-first``."""
    if number <= 20:
        return _ORDINALS[number - 1]
    if number == 30:
        return "thirtieth"
    return f"{'twenty' if number < 30 else 'thirty'}-{_ORDINALS[number % 10 - 1]}"


def _suffix(number: int) -> str:
    return "th" if 11 <= number <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _hour_name(hour: int) -> str:
    return _NUMBERS[(hour - 1) % 12 + 1]


def _minutes(number: int) -> str:
    if number == 15:
        return "a quarter"
    words = _NUMBERS[number] if number < 20 else "twenty" if number == 20 else f"twenty-{_NUMBERS[number % 10]}"
    return words if number % 5 == 0 else f"{words} minute{'s' if number > 1 else ''}"
