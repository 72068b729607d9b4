"""The fixed answers of pairwise judging where the documents have none: those of one of the study's models.

Which model that is follows from ``judge.against``. It answers once, before the first trial, and its answers are kept in
the folder ``rivals`` of the study, under a digest of the models and tasks. They become part of the documents, and so of
the study's fingerprint: a study goes on with the same answers or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from optuna_merge.atomic import write_atomically
from optuna_merge.config.judge import BEST_SOURCE
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.evaluation.rivals import Rivals
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.recipe import Recipe
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage.lock import file_lock
from optuna_merge.storage.outages import reason
from optuna_merge.study.judges import make_judge
from optuna_merge.study.models import StudyModels

RIVALS_FOLDER = "rivals"


@dataclass(frozen=True)
class RivalModel:
    """The model with whose answers others are compared.

    Attributes:
        name: That of its baseline.
        scores: Each source to its score on the tasks that tell which is best; empty if the study file names the model.
        answers: See :data:`~optuna_merge.evaluation.rivals.RivalAnswers`.
    """

    name: str
    scores: dict[str, float]
    answers: dict[str, dict[str, dict[str, str]]]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the answers."""
        return hashlib.sha256(json.dumps(self.answers, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """Whose answers they are and why, on one line."""
        why = ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
        return f"judging: answers are compared with those of {self.name}" + (
            f", the source with the best score on the other tasks ({why})" if why else ""
        )


_RIVAL_MODEL = TypeAdapter(RivalModel)


def find_against(config: StudyConfig, rivals: Rivals) -> str | None:
    """Who answers the documents that lack an answer to compare with.

    Args:
        config: The study file.
        rivals: The documents.

    Returns:
        A model's reference, or ``best_source``; None if no document lacks it.

    Raises:
        StudyError: If ``judge.against`` is needless, or the best source cannot be told.
    """
    against = None if config.judge is None else config.judge.against
    if not rivals:
        if against is not None:
            raise StudyError(
                f"{config.path}: judge.against must be left out if no task compares answers or its documents name the"
                f" fixed one, got {against!r}; remove it, or that field of the documents"
            )
        return None
    if against in (None, BEST_SOURCE):
        if not rivals.others:
            raise StudyError(
                f"{config.path}: judge.against must name a model if no other task tells which source is best, got"
                f" {BEST_SOURCE}; name one of genome.models, or write the answers into the documents"
            )
        return BEST_SOURCE
    return against


def put_rivals(
    config: StudyConfig,
    models: StudyModels,
    space: SearchSpace,
    scorer: Scorer,
    load: Callable[[Recipe], object],
    note: Callable[[str], None],
) -> RivalModel | None:
    """Give each document the fixed answer that it lacks, from the study's folder or from a model.

    Of several processes that share the folder one has the model answer, and the others wait for it.

    Args:
        config: The study file.
        models: Its checkpoints.
        space: Its search space; of several methods, any.
        scorer: Its eval tasks.
        load: Merges a recipe into the resident model.
        note: Called with a line about each model that is scored or answers.

    Returns:
        The model that answered; None if no document lacked an answer.

    Raises:
        StudyError: As :func:`find_against`, and if the answers cannot be read or written.
        OptunaMergeError: If a model cannot be loaded or scored.
    """
    against = find_against(config, scorer.rivals)
    if against is None:
        return None
    names = list(space.labels) if against == BEST_SOURCE else [_baseline(config, space, against)]
    recipes = {name: space.baseline_recipe(name) for name in names}
    judge = make_judge(config) if against == BEST_SOURCE and scorer.rivals.n_judged else None
    key = [against, *map(models.identify, recipes.values()), scorer.fingerprint(), judge and judge.identity]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = config.storage_path / RIVALS_FOLDER / f"{digest[:16]}.json"
    with file_lock(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            found = _answer(scorer.rivals, recipes, load, note, is_given=against != BEST_SOURCE)
            _write(path, found)
    scorer.rivals.put(found.answers)
    return found


def _answer(
    rivals: Rivals,
    recipes: Mapping[str, Recipe],
    load: Callable[[Recipe], object],
    note: Callable[[str], None],
    *,
    is_given: bool,
) -> RivalModel:
    scores: dict[str, float] = {}
    for name, recipe in {} if is_given else recipes.items():
        note(f"scoring {name} on the other tasks, to find the best source")
        load(recipe)
        scores[name] = rivals.score_others()
    best = max(recipes, key=lambda name: _rank(scores.get(name, 0.0)))
    note(f"having {best} answer, with whose answers those of the merges are compared")
    load(recipes[best])
    answers = {leaf: {doc: dict(own) for doc, own in of.items()} for leaf, of in rivals.answer().items()}
    return RivalModel(best, scores, answers)


def _rank(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _baseline(config: StudyConfig, space: SearchSpace, reference: str) -> str:
    """Name of the baseline that scores a model unchanged."""
    sources: Sequence[str] = config.sources
    return space.labels[sources.index(reference)] if reference in sources else "base"


def _read(path: Path) -> RivalModel | None:
    try:
        return _RIVAL_MODEL.validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise StudyError(
            f"{path}: must hold the answers to compare with, got something else; restore it, or delete it: the model"
            " answers again"
        ) from exc


def _write(path: Path, found: RivalModel) -> None:
    try:
        write_atomically(path, json.dumps(asdict(found), ensure_ascii=False, indent=1))
    except OSError as exc:
        raise StudyError(
            f"{path}: answers to compare with must be writable, got {reason(exc)}; make room and run again"
        ) from exc
