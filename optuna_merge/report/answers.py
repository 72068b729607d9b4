"""What the models answered to some held-out documents, side by side: those first where they differ.

Knows the answers that are kept, not how they came about. A model may have written anything, so characters that a
terminal or a browser obeys are shown as their escapes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.report.summary import Summary
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merges
from optuna_merge.study.answers_file import AnsweredDocument, HeldDocument, read_answers
from optuna_merge.study.holdout_file import HOLDOUT_FILE, N_BEST, read_holdout

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reorder what stands around them."""

_LINE = 96
"""Characters of an answer that a line of the report shows."""


@dataclass(frozen=True)
class ShownAnswer:
    """What one model answered.

    Attributes:
        model: Its name in the report.
        trial: Number of the trial that scored it.
        scores: Metric to its value for this document.
        text: Its answer.
    """

    model: str
    trial: int
    scores: dict[str, float]
    text: str

    @property
    def score_text(self) -> str:
        """The scores on one line."""
        return ", ".join(f"{metric} {value:g}" for metric, value in self.scores.items())


@dataclass(frozen=True)
class ShownDocument(HeldDocument):
    """A held-out document with the answers of several models, in characters that nothing obeys.

    Attributes:
        differs: Whether the models' scores differ.
        answers: Of base, sources, and the best merge or another trial, in this order.
    """

    differs: bool
    answers: list[ShownAnswer]


def shown_documents(
    study: optuna.Study, summary: Summary, config: StudyConfig, trial: int | None = None
) -> list[ShownDocument]:
    """All held-out documents, in turns of one of each task; within a task by how far the models' scores are apart.

    Args:
        study: The study.
        summary: Its figures.
        config: Its study file.
        trial: Number of a trial to show instead of the best merge.

    Returns:
        Empty if there is no holdout, no merge yet, or an answer of one of these models is not kept.

    Raises:
        StudyError: If the file of answers cannot be read, or there is no such trial.
    """
    models = _models(study, summary, trial)
    if config.holdout is None or not models:
        return []
    kept = _kept(study, config, models)
    if _missing(models, kept):
        return []
    by_task: dict[str, list[AnsweredDocument]] = {}
    for document in kept:
        by_task.setdefault(document.task, []).append(document)
    ordered = [sorted(own, key=lambda document: -_spread(document, models)) for own in by_task.values()]
    turns = chain.from_iterable(zip_longest(*ordered))
    return [_shown(document, models) for document in turns if document is not None]


def nothing_to_show(study: optuna.Study, summary: Summary, config: StudyConfig, trial: int | None) -> StudyError:
    """Why :func:`shown_documents` found nothing, and what to run."""
    if config.holdout is None:
        return StudyError(
            f"{config.path}: holdout must be set, because answers to held-out documents are shown, got none; set it,"
            " and another study.name"
        )
    models = _models(study, summary, trial)
    if not models:
        return StudyError(f"study {summary.study!r} must have a merge with a score, got none; run it first")
    kept = _kept(study, config, models)
    return _not_kept(study, config, _missing(models, kept)[0])


def answer_lines(document: ShownDocument) -> list[str]:
    """A document with all answers, as lines of text."""
    lines = [f"── {document.task}, document {document.document}", *document.question.splitlines()]
    if document.right:
        lines.append(f"right: {document.right}")
    for answer in document.answers:
        lines += ["", f"{answer.model} (trial {answer.trial}): {answer.score_text}"]
        lines += [f"    {line}" for line in answer.text.splitlines() or [""]]
    return [*lines, ""]


def brief_lines(document: ShownDocument) -> list[str]:
    """A document with the beginning of each answer, on a line each."""
    width = max(len(answer.model) for answer in document.answers)
    lines = [f"{document.task}, document {document.document}: {_line(document.question)}"]
    lines += [f"  {'right':{width}}  {_line(document.right)}"] if document.right else []
    for answer in document.answers:
        lines.append(f"  {answer.model:{width}}  {_line(answer.text) or '(nothing)'}  [{answer.score_text}]")
    return lines


def printable(text: str) -> str:
    """A text without characters that a terminal or a browser obeys; each becomes its escape, as in a Python string."""
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text)


def _is_harmless(char: str) -> bool:
    if char in "\n\t":
        return True
    return unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") and char not in _BIDIRECTIONAL


def _models(study: optuna.Study, summary: Summary, trial: int | None) -> dict[int, str]:
    """Number of each trial that is shown, to its model's name; empty without a merge."""
    rows = [row for kind in ("base", "source") for row in summary.rows if row.kind == kind]
    models = {row.trial: row.name for row in rows}
    if trial is not None:
        trials = study.get_trials(deepcopy=False)
        if not 0 <= trial < len(trials):
            raise StudyError(f"--trial must be the number of a trial, got {trial}; there are {len(trials)}")
        models.setdefault(trial, _name(trials[trial]))
    elif summary.best_trial is None:
        return {}
    else:
        models[summary.best_trial] = "best merge"
    return models


def _kept(study: optuna.Study, config: StudyConfig, models: Mapping[int, str]) -> list[AnsweredDocument]:
    trials = study.get_trials(deepcopy=False)
    return read_answers(config.storage_path, study, {number: trials[number] for number in models})


def _missing(models: Mapping[int, str], kept: Sequence[AnsweredDocument]) -> list[int]:
    """Trials of which an answer is missing."""
    return [number for number in models if not kept or any(number not in document.answers for document in kept)]


def _name(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(attributes.BASELINE, f"trial {trial.number}"))


def _not_kept(study: optuna.Study, config: StudyConfig, number: int) -> StudyError:
    """Says what to run, so that the answers of a trial are kept."""
    trials = study.get_trials(deepcopy=False)
    merges = best_merges(study, len(trials))
    rank = next((rank for rank, trial in enumerate(merges, start=1) if trial.number == number), None)
    if rank is None and attributes.BASELINE not in trials[number].user_attrs:
        return StudyError(f"--trial must be one that was scored on every document, got {number}, which was not")
    line = f"optuna-merge report {config.path}" + (f" --best {rank}" if rank is not None and rank > N_BEST else "")
    if number in read_holdout(config.storage_path, study, merges[0] if merges else None):
        line = f"rm {config.storage_path / HOLDOUT_FILE} && {line}"  # an earlier version kept no answers
    return StudyError(f"trial {number}: answers to the held-out documents must be kept, got none; run {line}")


def _spread(document: AnsweredDocument, models: Mapping[int, str]) -> float:
    """How far apart the scores of the models are, each metric counting by its weight."""
    values = [
        sum(document.weights[metric] * value for metric, value in document.answers[number].scores.items())
        for number in models
    ]
    return max(values) - min(values)


def _shown(document: AnsweredDocument, models: Mapping[int, str]) -> ShownDocument:
    answers = []
    for number, name in models.items():
        found = document.answers[number]
        scores = {metric.removesuffix(",none"): value for metric, value in found.scores.items()}
        text = "\n\n".join(printable(text).strip() for text in found.texts)
        answers.append(ShownAnswer(name, number, scores, text))
    return ShownDocument(
        document.task,
        document.document,
        printable(document.question).strip(),
        printable(document.right),
        document.weights,
        len({tuple(answer.scores.items()) for answer in answers}) > 1,
        answers,
    )


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"
