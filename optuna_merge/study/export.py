"""Exports a trial of a study: replays its recipe, checks that it is still the one that was scored, writes the model.

Knows a study and its file; how a model folder is written is known by ``merging/export.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.merging.export import export
from optuna_merge.merging.merger import Merger
from optuna_merge.search.race import make_spaces, space_of
from optuna_merge.storage import attributes
from optuna_merge.storage.fingerprint import refuse_differences
from optuna_merge.storage.trials import best_merge, score_of
from optuna_merge.study.fingerprint import merge_fingerprint
from optuna_merge.study.kept import matrices_folder
from optuna_merge.study.models import StudyModels
from optuna_merge.study.replay import recorded_recipe, shared_profile

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Exported:
    """A trial that was exported.

    Attributes:
        trial: Number of the trial.
        score: Its score; None if it is not complete.
        description: Study, trial and score in words.
        folder: The model folder, absolute.
    """

    trial: int
    score: float | None
    description: str
    folder: Path


def export_trial(
    study: optuna.Study,
    config: StudyConfig,
    folder: Path,
    number: int | None = None,
    *,
    results: str = "",
    overwrite: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the model of a trial: the tensors that were scored, the tokenizer, a model card and the merge file.

    Args:
        study: A study that has been started.
        config: Its study file.
        folder: The model folder; new or empty.
        number: Number of the trial; None for the best merge.
        results: Markdown for the model card, such as a table of scores.
        overwrite: Replace the folder of an earlier export.
        note: Is told when the merge begins.

    Raises:
        StudyError: If there is no such trial, or if it failed or was not merged.
        StudyMismatchError: If the study file or its models have changed since the study was created.
        ExportError: If the folder cannot be written.
    """
    trial = _find_trial(study, config, number)
    models = StudyModels.open(config)
    spaces = make_spaces(config, models.refs)
    refuse_differences(study, merge_fingerprint(config, models, spaces))
    recipe = recorded_recipe(trial, space_of(trial, spaces), models, shared_profile(study.get_trials(deepcopy=False)))
    state = trial.state.name.lower()
    score = score_of(trial) if state == "complete" else None
    description = f"study {study.study_name}, trial {trial.number}, "
    description += state if score is None else f"score {score:.6g}"
    note(f"merging trial {trial.number}")
    written = export(
        recipe,
        folder,
        merger=Merger(models.views, tokenizer_source=models.refs.tokenizer_source, keep_in=matrices_folder(config)),
        references=models.spelling,
        comment=[description],
        results=f"This is {description}.\n\n{results}",
        overwrite=overwrite,
        copy_code=config.engine.trust_remote_code,
    )
    return Exported(trial.number, score, description, written)


def _find_trial(study: optuna.Study, config: StudyConfig, number: int | None) -> FrozenTrial:
    trials = study.get_trials(deepcopy=False)
    if number is None:
        trial = best_merge(study)
        if trial is None:
            raise StudyError(f"{config.path}: study must have a complete merge to export, got none yet; run it first")
    elif not 0 <= number < len(trials):
        raise StudyError(f"{config.path}: trial must be in [0, {len(trials) - 1}], got {number}; see status")
    else:
        trial = trials[number]
    if trial.state.name == "FAIL":
        reason = trial.user_attrs.get(attributes.FAILURE, "no reason recorded")
        raise StudyError(f"trial {trial.number}: must have a score, it failed: {reason}; choose another, see status")
    return trial
