"""The holdout: what the best merges and the baselines score on documents that the search never saw.

The best of many noisy trials looks better than it is. Only the holdout compares it fairly: with the same documents
for every model, document by document.

Knows the objective and a finished study; ``holdout_file.py`` knows the file that the report reads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.holdout import Holdout
from optuna_merge.evaluation.results import Score
from optuna_merge.evaluation.transcript import ANSWER
from optuna_merge.internals.optuna import storage_of
from optuna_merge.storage import attributes
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import local_file, storage_url
from optuna_merge.storage.trials import best_merges
from optuna_merge.study.answers_file import Answer, AnsweredDocument, write_answers
from optuna_merge.study.folder import claim_folder
from optuna_merge.study.holdout_file import N_BEST, HoldoutRow, TaskFigure, write_holdout, write_scores
from optuna_merge.study.objective import MergeObjective

_SILENT_S = 2.0
"""How long to wait for another process before a line says so."""


@dataclass(frozen=True)
class _Entry:
    trial: FrozenTrial
    score: Score


def score_holdout(
    study: optuna.Study,
    objective: MergeObjective,
    note: Callable[[str], None] = lambda _: None,
    n_best: int = N_BEST,
    max_gen_toks: int | None = None,
) -> list[HoldoutRow]:
    """Score the best merges, the end of the ascent and every finished baseline on the holdout.

    The figures are written to ``holdout.json``.

    Scores are kept on disk by recipe and documents, so only new merges cost anything. Of several processes that share
    the study and its folder, one scores. The others wait for it and read its scores; if it dies, one of them goes on.

    Args:
        study: The study.
        objective: Its objective; the resident model is overwritten.
        note: Called with a line about each model that is scored.
        n_best: How many of the best merges to score.
        max_gen_toks: Let answers have up to this many tokens, and write a file of its own. The objective then scores no
            other way any more. None: what each task allows; what was answered is written, too.

    Returns:
        The best merges first, then the baselines in their order; empty without a holdout or without a merge.

    Raises:
        StudyError: If the figures cannot be written, or the folder belongs to another study.
        TaskError: If ``max_gen_toks`` is given and no task generates.
    """
    holdout = objective.scorer.holdout
    if holdout is None or not best_merges(study, n_best):
        return []
    if max_gen_toks is not None:
        holdout.lengthen(max_gen_toks)
    claim_folder(study, objective.config.storage_path)
    with _alone(study, objective.config, note):
        return _score_models(study, objective, holdout, note, n_best, max_gen_toks)


@contextmanager
def _alone(study: optuna.Study, config: StudyConfig, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the holdout's own lock, so that those who run trials do not wait for it."""
    file = local_file(storage_url(config.storage_path, config.study.storage))
    lock = make_lock(storage_of(study), f"{config.study.name}.holdout", file)
    waits = threading.Timer(_SILENT_S, note, ["another process scores the holdout; waiting for its figures"])
    waits.daemon = True
    waits.start()
    try:
        with lock():
            waits.cancel()
            yield
    finally:
        waits.cancel()


def _score_models(
    study: optuna.Study,
    objective: MergeObjective,
    holdout: Holdout,
    note: Callable[[str], None],
    n_best: int,
    max_gen_toks: int | None,
) -> list[HoldoutRow]:
    best, *others = best_merges(study, n_best)
    ranked = {trial.number for trial in (best, *others)}
    baselines = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if (attributes.BASELINE in trial.user_attrs and trial.number != best.number)
        or (attributes.ASCENT in trial.user_attrs and trial.number not in ranked)
    ]
    entries = [_Entry(trial, _score(trial, study, objective, holdout, note)) for trial in [best, *others, *baselines]]
    rows = [_row(entry, entries[0], objective) for entry in entries]
    write_holdout(objective.config.storage_path, study, best, rows, max_gen_toks)
    if max_gen_toks is None:
        _write_answers(study, objective.config.storage_path, holdout, entries)
    return rows


def _write_answers(study: optuna.Study, storage_path: Path, holdout: Holdout, entries: Sequence[_Entry]) -> None:
    answers: dict[tuple[str, int], dict[int, Answer]] = {}
    held_out = holdout.documents()
    weights = {held.task: held.weights for held in held_out}
    for entry in entries:
        for task, columns in entry.score.documents.items():
            counted = {metric: columns[metric] for metric in weights[task] if metric in columns}
            for row, document in enumerate(columns["doc_id"]):
                values = {metric: column[row] for metric, column in counted.items()}
                scores = {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
                own = answers.setdefault((task, document), {})
                own[entry.trial.number] = Answer(columns[ANSWER][row], scores)
    documents = [
        AnsweredDocument(**asdict(held), answers=answers.get((held.task, held.document), {})) for held in held_out
    ]
    write_answers(storage_path, study, [entry.trial for entry in entries], documents)


def _score(
    trial: FrozenTrial,
    study: optuna.Study,
    objective: MergeObjective,
    holdout: Holdout,
    note: Callable[[str], None],
) -> Score:
    recipe = objective.recipe(trial, study)
    key = objective.models.identify(recipe) + objective.scorer.fingerprint()
    cache = objective.config.storage_path / "holdout" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if cache.exists():
        score = Score.from_json(cache.read_text(encoding="utf-8"))
        if all(ANSWER in columns for columns in score.documents.values()):  # earlier versions kept no answers
            return score
    label = trial.user_attrs.get(attributes.BASELINE, "one of the best merges")
    note(f"scoring trial {trial.number} ({label}) on the holdout")
    objective.load(recipe)
    score = holdout.score(stderr=True)
    write_scores(cache, score.to_json())
    return score


def _row(entry: _Entry, best: _Entry, objective: MergeObjective) -> HoldoutRow:
    ahead = objective.scorer.paired_difference(best.score, entry.score)
    return HoldoutRow(
        trial=entry.trial.number,
        value=entry.score.value,
        tasks={
            name: TaskFigure(task.metric, task.value, task.stderr, task.n_documents, task.answers)
            for name, task in entry.score.tasks.items()
        },
        difference=ahead.value,
        difference_stderr=ahead.stderr,
        p_value=ahead.p_value,
    )
