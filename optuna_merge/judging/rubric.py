"""What a judge is asked about an answer, and how its reply is read.

Knows documents and texts. It does not know where the judge is (``client.py``) nor what it said before (``store.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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

_COMPARED = """{rubric}

Question:
{question}
{reference}
Answer A:
{first}

Answer B:
{second}

Explain your choice briefly. End with a line that holds nothing but the score: 1 if answer A is better, 0 if answer B is
better, 0.5 if neither is better:
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
    n_questions: ClassVar[int] = 1
    """What is asked about one answer."""

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
        scores = iter(self.ask([question for own in asked for questions in own for question in questions]))
        return [[self.score([next(scores) for _ in questions]) for questions in own] for own in asked]

    def about(self, document: Mapping[str, Any], answer: str) -> list[Question]:
        """What is asked about one answer to a document.

        Raises:
            TaskError: If the document lacks its question.
        """
        return [self._question(_ASKED, document, answer=_shown(answer), lowest=self.lowest, highest=self.highest)]

    def score(self, scores: Sequence[float]) -> float:
        """The score of an answer, from those of what is asked about it."""
        [score] = scores
        return score

    def _question(self, form: str, document: Mapping[str, Any], **parts: Any) -> Question:
        reference = document.get(self.reference)
        text = form.format(
            rubric=self.text.strip(),
            question=self._field(document, "question"),
            reference=f"\nA good answer:\n{reference}\n" if reference else "",
            **parts,
        )
        return Question((("user", text),), self.lowest, self.highest)

    def _field(self, document: Mapping[str, Any], name: str) -> Any:
        value = document.get(getattr(self, name))
        if value is None:
            fields = ", ".join(map(str, document))
            raise TaskError(
                f"rubric: {name} must name a field of the documents ({fields}), got '{getattr(self, name)}'"
            )
        return value


@dataclass
class Pairwise(Rubric):
    """By what a judge compares answers with a fixed one, for tasks without references; otherwise as :class:`Rubric`.

    The judge is asked twice, with each of the two answers first, so that a liking for the first place cancels out. The
    score is the mean of both, 1 where the answer is better than the fixed one and 0 where it is worse.

    Attributes:
        rival: Field of a document that holds the fixed answer. If no document has it, a source's answers are put there
            before the first trial; see ``judge.against``.
    """

    lowest: float = 0
    highest: float = 1
    rival: str = "rival"
    n_questions: ClassVar[int] = 2

    def about(self, document: Mapping[str, Any], answer: str) -> list[Question]:
        """The two questions about one answer to a document; the answer is A in the first one.

        Raises:
            TaskError: If the document lacks its question or the fixed answer.
        """
        pair = _shown(answer), _shown(str(self._field(document, "rival")))
        return [self._question(_COMPARED, document, first=a, second=b) for a, b in (pair, pair[::-1])]

    def score(self, scores: Sequence[float]) -> float:
        """The mean over both orders."""
        first, second = scores
        return (first + 1 - second) / 2


def _shown(answer: str) -> str:
    return answer.strip() or "(no answer)"
