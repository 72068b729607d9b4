"""The file ``holdout_answers.json``: what the best merges and the baselines answered to each held-out document.

Written with ``holdout.json`` from the scores that are kept, so that whoever reads answers needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from optuna_merge.errors import StudyError
from optuna_merge.evaluation.results import HeldDocument
from optuna_merge.storage import attributes
from optuna_merge.study.holdout_file import write_scores

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

__all__ = ["ANSWERS_FILE", "Answer", "AnsweredDocument", "HeldDocument", "read_answers", "write_answers"]

ANSWERS_FILE = "holdout_answers.json"


@dataclass(frozen=True)
class Answer:
    """What one model answered to one document.

    Attributes:
        texts: Its texts, or the choice that it took; several for a request that is repeated.
        scores: Each ``metric,filter`` to its value for this document; those that are no number are left out.
    """

    texts: list[str]
    scores: dict[str, float]


@dataclass(frozen=True)
class AnsweredDocument(HeldDocument):
    """One held-out document with the answers of several models.

    Attributes:
        answers: Number of each trial to its answer.
    """

    answers: dict[int, Answer]


@dataclass(frozen=True)
class _Content:
    """The content of the file: whose answers they are, by study and recipe, and the documents."""

    study: str
    recipes: dict[int, str | None]
    documents: list[AnsweredDocument]


_CONTENT = TypeAdapter(_Content)


def write_answers(
    storage_path: Path, study: optuna.Study, trials: Sequence[FrozenTrial], documents: Sequence[AnsweredDocument]
) -> None:
    """Write what some trials answered.

    Raises:
        StudyError: If the file cannot be written.
    """
    recipes = {trial.number: trial.user_attrs.get(attributes.RECIPE_DIGEST) for trial in trials}
    content = _Content(study.study_name, recipes, list(documents))
    write_scores(storage_path / ANSWERS_FILE, json.dumps(asdict(content)))


def read_answers(storage_path: Path, study: optuna.Study, trials: Mapping[int, FrozenTrial]) -> list[AnsweredDocument]:
    """The documents, with the answers of those of the given trials that have been kept; empty if none has.

    Args:
        storage_path: The study's folder.
        study: The study.
        trials: Number of each trial to the trial.

    Raises:
        StudyError: If the file cannot be read.
    """
    path = storage_path / ANSWERS_FILE
    if not path.exists():
        return []
    try:
        found = _CONTENT.validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise StudyError(
            f"{path}: must hold the answers to the held-out documents, got something else; delete it: report writes it"
        ) from exc
    if found.study != study.study_name:
        return []
    kept = {
        number
        for number, trial in trials.items()
        if number in found.recipes and found.recipes[number] == trial.user_attrs.get(attributes.RECIPE_DIGEST)
    }
    return [
        replace(document, answers={number: answer for number, answer in document.answers.items() if number in kept})
        for document in found.documents
        if kept
    ]
