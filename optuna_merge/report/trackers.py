"""Trackers: where the figures of a run go, such as Weights & Biases, MLflow or a tracker of your own. Loads no torch.

A tracker knows figures by name; which figures a study has is in ``tracking_watcher.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from optuna_merge.errors import StudyError, first_line


class Tracker(Protocol):
    """Where the figures of a run go; import it as ``optuna_merge.Tracker``.

    Write a class with these methods, which can be made without arguments, and name it on the command line:
    ``--tracker my_package.MyTracker``. If a method raises, the error is reported in one line, the tracker is not called
    again, and the study goes on.
    """

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin the run of a study, or continue it.

        Args:
            name: Name of the study.
            config: Its study file, as plain data.
        """

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures.

        Args:
            figures: Name to figure, which may be NaN or infinite.
            step: Number of the trial.
        """

    def save(self, file: Path) -> None:
        """Keep the mergekit file of the best merge; called again for each better merge."""

    def finish(self) -> None:
        """End the run."""


class WandbTracker:
    """Weights & Biases. With ``WANDB_MODE=offline`` it writes only to ``folder``, for ``wandb sync``.

    Args:
        folder: Folder for wandb's files.
        project: Project of the run.
        entity: User or team; None for the account that is logged in.
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
        """Log figures, the trial's number among them: workers finish trials out of order, and wandb's steps ascend."""
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
    """MLflow, at the server or folder that ``MLFLOW_TRACKING_URI`` names.

    Args:
        experiment: Experiment of the run.
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
        """Log figures, with the characters that MLflow refuses in a name replaced by ``_``."""
        self._mlflow.log_metrics({_plain(name): value for name, value in figures.items()}, step=step)

    def save(self, file: Path) -> None:
        """Log the file as an artifact."""
        self._mlflow.log_artifact(str(file))

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def make_tracker(path: str) -> Tracker:
    """The tracker that ``--tracker`` names.

    Args:
        path: ``mlflow``, or the import path of a class without arguments, such as ``my_package.MyTracker``.

    Raises:
        StudyError: If there is no such class, or if it needs arguments.
    """
    if path == "mlflow":
        return MlflowTracker()
    module, _, name = path.rpartition(".")
    try:
        tracker: Tracker = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as exc:
        raise StudyError(
            f"tracker must be mlflow or the import path of a class without arguments, got {path} ({first_line(exc)});"
            " see optuna_merge.Tracker"
        ) from exc
    return tracker


def _plain(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "_-./ " else "_" for sign in name)
