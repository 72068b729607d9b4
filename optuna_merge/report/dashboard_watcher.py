"""Keeps a study's page in the dashboard up to date while the study runs."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.internals.optuna import known_state
from optuna_merge.report import artifacts
from optuna_merge.report.dashboard import refresh, save_trial_note
from optuna_merge.report.note import best_note
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.documents import DocumentScores
from optuna_merge.storage.outages import reason
from optuna_merge.storage.trials import score_of
from optuna_merge.study.folder import documents_folder
from optuna_merge.study.watcher import Watcher

_SHARE = 100
"""A refresh waits 100 times as long as the last one took, so that refreshes take at most 1 % of the time."""
_REFRESH_S = 20.0
"""Least time between two refreshes without a new best merge."""


class DashboardWatcher(Watcher):
    """Refreshes note and pictures, and gives each trial its artifacts.

    Note and pictures are refreshed at a new best merge and otherwise every 20 seconds, but so rarely that
    refreshes take at most 1 % of the time. A file that cannot be written or a picture that cannot be drawn is reported
    once and does not stop the study.

    Args:
        config: The study file.
        merge_file: Returns the mergekit file of a trial.
        warn: Is told, once, what cannot be written.
    """

    def __init__(
        self, config: StudyConfig, merge_file: Callable[[FrozenTrial], str], warn: Callable[[str], None]
    ) -> None:
        self._config = config
        self._merge_file = merge_file
        self._warn = warn
        self._artifacts = artifacts.artifact_storage(config)
        self._next = 0.0
        self._next_best = 0.0
        self._warned = False
        self._best: float | None = None

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Write note and pictures."""
        self._best = summarize(study, self._config).best_value
        self._refresh(study)

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Upload the trial's merge file and the scores of its documents."""
        frozen = known_state(trial)  # reading the storage would flush delayed writes, and take longer than the upload
        if attributes.FAILURE in frozen.user_attrs:
            return
        documents = DocumentScores(documents_folder(self._config.storage_path, study.study_name))
        try:
            artifacts.upload_missing(study, frozen, self._artifacts, self._merge_file, documents.path(trial.number))
        except OSError as exc:
            self._warn_once(f"artifacts of trial {trial.number} cannot be written: {reason(exc)}")

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Add a note to a new best merge; refresh note and pictures if it is time."""
        if is_best:
            self._note_best(study, trial)
        now = time.monotonic()
        if now >= (self._next_best if is_best else self._next):
            self._refresh(study)

    def study_closed(self, study: optuna.Study) -> None:
        """Write note and pictures."""
        self._refresh(study)

    def _refresh(self, study: optuna.Study) -> None:
        start = time.monotonic()
        try:
            with (self._config.storage_path / artifacts.FOLDER / "refresh.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                refresh(study, self._config)
        except BlockingIOError:
            pass  # another worker of this study is refreshing
        except OSError as exc:
            self._warn_once(f"note and pictures cannot be refreshed: {reason(exc)}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:  # a defect of a picture
            self._warn_once(f"note and pictures cannot be refreshed, the search goes on: {type(exc).__name__}: {exc}")
        end = time.monotonic()
        self._next_best = end + _SHARE * (end - start)
        self._next = max(self._next_best, end + _REFRESH_S)

    def _note_best(self, study: optuna.Study, trial: FrozenTrial) -> None:
        score = score_of(trial)
        assert score is not None
        save_trial_note(study, trial, best_note(summarize(study, self._config), trial.number, score, self._best))
        self._best = score

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)
