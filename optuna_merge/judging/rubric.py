"""What a judge is asked about an answer, and how its reply is read.

Knows documents and texts. It does not know where the judge is (``client.py``) nor what it said before (``store.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna_merge.errors import TaskError

Message = tuple[str, str]
"""Role and content of one message of a chat."""

_SCORE = re.compile(r"Score: (-?\d+(?:\.\d+)?)")

_ASKED = """{rubric}

Question:
{question}
{reference}
Answer to rate:
{answer}

Explain your rating briefly. End with a line that holds nothing but the score, a number from {lowest:g} to {highest:g}:
Score: <number>"""


@dataclass(frozen=True)
class Question:
    """What a judge is asked about one answer.

    Attributes:
        messages: The chat that it continues.
        lowest, highest: The range of the score.
    """

    messages: tuple[Message, ...]
    lowest: float
    highest: float

    def read(self, reply: str) -> float:
        """The score in a reply. Its last line must be ``Score: <number>``, and the number must lie in the range.

        Raises:
            ValueError: If it does not; says what the reply must be, for the judge and for the user.
        """
        [*_, last] = [line.strip() for line in reply.splitlines() if line.strip()] or [""]
        found = _SCORE.fullmatch(last)
        if found is None:
            raise ValueError(f"the last line must be 'Score: <number>', got {last[:80]!r}")
        score = float(found[1])
        if not self.lowest <= score <= self.highest:
            raise ValueError(f"the score must be from {self.lowest:g} to {self.highest:g}, got {found[1]}")
        return score


@dataclass
class Rubric:
    """By what a judge rates the answers of an eval task.

    It is a ``filter_fn`` of lm-eval's ``custom`` filter: each answer becomes its score, a number. The judge is that of
    the study file; ``eval_tasks/judged`` has a task to copy.

    Attributes:
        text: Tells the judge what makes an answer good, and what each score stands for.
        lowest, highest: The range of the score.
        question: Field of a document that holds its question.
        reference: Field that holds a good answer, which the judge is shown; a document may lack it.
        ask: The judge: scores for questions, in their order. The scorer sets it.
    """

    text: str
    lowest: float = 1
    highest: float = 5
    question: str = "question"
    reference: str = "reference"
    ask: Callable[[Sequence[Question]], list[float]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a range without numbers.

        Raises:
            TaskError: If ``lowest`` is not below ``highest``.
        """
        if not self.lowest < self.highest:
            raise TaskError(
                f"rubric: lowest must be below highest, got {self.lowest:g} and {self.highest:g}; correct the task"
            )

    def __call__(self, answers: Sequence[Sequence[str]], documents: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Scores of the answers to some documents.

        Args:
            answers: For each document its answers.
            documents: The documents.

        Raises:
            TaskError: If there is no judge, or a document lacks its question.
            JudgeError: If the judge cannot be asked, or gives no score.
        """
        if self.ask is None:
            raise TaskError("a judged task must be scored by a study that names a judge; add the section judge to it")
        asked = [
            [self.about(document, str(answer)) for answer in own]
            for own, document in zip(answers, documents, strict=True)
        ]
        scores = iter(self.ask([question for own in asked for question in own]))
        return [[next(scores) for _ in own] for own in asked]

    def about(self, document: Mapping[str, Any], answer: str) -> Question:
        """The question about one answer to a document.

        Raises:
            TaskError: If the document lacks its question.
        """
        if self.question not in document:
            fields = ", ".join(map(str, document))
            raise TaskError(f"rubric: question must name a field of the documents ({fields}), got '{self.question}'")
        reference = document.get(self.reference)
        text = _ASKED.format(
            rubric=self.text.strip(),
            question=document[self.question],
            reference=f"\nA good answer:\n{reference}\n" if reference else "",
            answer=answer.strip() or "(no answer)",
            lowest=self.lowest,
            highest=self.highest,
        )
        return Question((("user", text),), self.lowest, self.highest)
