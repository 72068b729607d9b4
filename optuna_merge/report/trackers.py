"""Trackers: what a study tells Weights & Biases, MLflow, or a tracker of one's own. Loads no torch.

A tracker that fails never stops a study: it is reported in one line, and not told anything more.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import best_merge, generation, score_of
from optuna_merge.study.watcher import Watcher


class Tracker(Protocol):
    """Where figures go. Every method may raise anything: the study goes on without the tracker."""

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run of a study.

        Args:
            name: The study's.
            config: Its study file, as plain data.
        """

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures by name.

        Args:
            figures: Finite or not.
            step: Number of the trial.
        """

    def save(self, file: Path) -> None:
        """Keep the best merge's file; it is told again when there is a better one."""

    def finish(self) -> None:
        """End the run."""


class WandbTracker:
    """Weights & Biases. ``WANDB_MODE=offline`` writes to ``folder`` only, for ``wandb sync``.

    Args:
        folder: For what it writes.
        project: Of the run.
        entity: User or team; the reader's own by default.
    """

    def __init__(self, folder: Path, project: str = "optuna-merge", entity: str | None = None) -> None:
        self._folder = folder
        self._project = project
        self._entity = entity
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run."""
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=name,
            group=name,
            dir=str(self._folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures; trials that others finish earlier make no order, so the number is a figure too."""
        self._run.log({**figures, "trial": step})

    def save(self, file: Path) -> None:
        """Log the file as an artifact of type ``merge``."""
        import wandb

        artifact = wandb.Artifact("best_config", type="merge")
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class MlflowTracker:
    """MLflow, where ``MLFLOW_TRACKING_URI`` says.

    Args:
        experiment: That the run belongs to.
    """

    def __init__(self, experiment: str = "optuna-merge") -> None:
        self._experiment = experiment
        self._mlflow: Any = None

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run."""
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(self._experiment)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(config), "study.json")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures; MLflow's names have no parentheses and commas."""
        self._mlflow.log_metrics({_plain(name): value for name, value in figures.items()}, step=step)

    def save(self, file: Path) -> None:
        """Log the file as an artifact."""
        self._mlflow.log_artifact(str(file))

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class TrackingWatcher(Watcher):
    """Tells a tracker what happens, until it fails.

    Args:
        tracker: Is told.
        config: The study file.
        best_file: The best merge's file.
        warn: Is told, once, why the tracker is told no more.
    """

    def __init__(self, tracker: Tracker, config: StudyConfig, best_file: Path, warn: Callable[[str], None]) -> None:
        self._tracker = tracker
        self._config = config
        self._best_file = best_file
        self._warn = warn
        self._works = True
        self._started = False

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Begin."""
        self._started = True
        self._try(lambda: self._tracker.start(study.study_name, self._config.model_dump(mode="json")))

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Log the trial, the population so far and the best."""
        self._try(lambda: self._tracker.log(figures_of(study, trial), trial.number))
        if is_best:
            self._try(lambda: self._tracker.save(self._best_file))

    def close(self) -> None:
        """End, however the study ended."""
        if self._started:
            self._try(self._tracker.finish)

    def _try(self, call: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as exc:
            self._works = False
            words = " ".join(str(exc).split())[:200]
            self._warn(
                f"tracker {type(self._tracker).__name__} failed and is told no more: {words or type(exc).__name__}"
            )


def figures_of(study: optuna.Study, trial: FrozenTrial) -> dict[str, float]:
    """What is logged after a trial.

    Returns:
        ``best_score``; of the trial ``score`` or ``estimate`` (pruned), ``score/<task>``,
        ``objective/<name>`` where there are several, ``merge_s``,
        ``evaluation_s``, ``n_documents``, ``pruned``, ``failed``; of its generation so far ``generation``,
        ``population_mean`` and ``population_std``; of the study ``total_documents``.
    """
    trials = study.get_trials(deepcopy=False)
    figures: dict[str, float] = {
        "pruned": float(trial.state == TrialState.PRUNED),
        "failed": float(trial.state == TrialState.FAIL),
        "total_documents": sum(other.user_attrs.get(attributes.DOCUMENTS, 0) for other in trials),
    }
    best = best_merge(study)
    for key, scored in (("best_score", best), ("score", trial)):
        score = None if scored is None else score_of(scored)
        if score is not None:
            figures[key] = score
    if trial.values is not None and len(trial.values) > 1:
        names = study.metric_names or []
        figures |= {f"objective/{name}": value for name, value in zip(names, trial.values, strict=True)}
    if PAIRED_ESTIMATE in trial.user_attrs:
        figures["estimate"] = trial.user_attrs[PAIRED_ESTIMATE]
    for key in (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS, attributes.DOCUMENTS):
        if key in trial.user_attrs:
            figures[key] = trial.user_attrs[key]
    for key, value in trial.user_attrs.items():
        if key.startswith(f"{attributes.SCORE} "):
            figures[f"score/{key.removeprefix(f'{attributes.SCORE} ')}"] = value
    drawn_in = generation(trial)
    if drawn_in is not None:
        population = [other for other in trials if generation(other) == drawn_in]
        told = [other.user_attrs.get(PAIRED_ESTIMATE, score_of(other)) for other in population]
        values = [value for value in told if value is not None]
        figures["generation"] = drawn_in
        if values:
            figures["population_mean"] = statistics.fmean(values)
            figures["population_std"] = statistics.pstdev(values)
    return figures


def make_tracker(path: str) -> Tracker:
    """A tracker of one's own.

    Args:
        path: Import path of a class that is made without arguments, such as ``my_package.MyTracker``; or ``mlflow``.

    Raises:
        StudyError: If there is none.
    """
    if path == "mlflow":
        return MlflowTracker()
    module, _, name = path.rpartition(".")
    try:
        tracker: Tracker = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as exc:
        raise StudyError(
            f"--tracker must be mlflow or the import path of a class without arguments, got {path} ({exc});"
            " see optuna_merge.trackers.Tracker"
        ) from exc
    return tracker


def _plain(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "_-./ " else "_" for sign in name)
