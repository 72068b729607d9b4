"""Questions whose answers a stronger model judges: documents, rubrics and scores.

``judged_questions`` has each answer rated, ``judged_pairs`` has it compared with a fixed answer. To judge questions of
your own, copy this folder, put them into ``questions.jsonl``, and say below what a good answer is.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from optuna_merge.judging import Pairwise, Rubric

if TYPE_CHECKING:
    import datasets

rubric = Rubric(
    """You are rating the answer of an assistant to a question.
5: correct, complete and easy to follow.
4: correct, with a small omission or a clumsy passage.
3: mostly correct, but an important part is missing or wrong.
2: mostly wrong, or it answers another question.
1: wrong, empty, or not readable.
Length is no merit: an answer that says the same in fewer words is as good. A good answer, if one is shown, is an
example: other answers may be as good.""",
    lowest=1,
    highest=5,
)

pairwise = Pairwise(
    """You are comparing two answers of assistants to a question. Prefer the one that is correct, complete and easy to
follow. Length is no merit: an answer that says the same in fewer words is as good."""
)


def documents(questions: str = "questions.jsonl", **_: Any) -> dict[str, datasets.Dataset]:
    """The questions, as documents.

    Args:
        questions: JSON lines with ``question`` and, if there is one, ``reference``; for ``judged_pairs`` with
            ``rival``, the fixed answer, unless it shall be that of a source. Relative to this folder.
    """
    import datasets

    text = (Path(__file__).parent / questions).read_text(encoding="utf-8")
    rows = [{"reference": "", **json.loads(line)} for line in text.splitlines() if line.strip()]
    return {"test": datasets.Dataset.from_list(rows)}


def process(document: dict[str, Any], scores: list[list[float]]) -> dict[str, float]:
    """The mean score of a document's answers."""
    return {"judge_score": fmean(scores[0])}


def compare(document: dict[str, Any], scores: list[list[float]]) -> dict[str, float]:
    """How often a document's answers are preferred to the fixed one, a tie counting half."""
    return {"preferred": fmean(scores[0])}
