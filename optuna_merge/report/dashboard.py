"""What we write into a study's storage for optuna-dashboard: its note and its pictures. Loads no torch.

A plain ``optuna-dashboard`` on the same storage shows it too. The server is in ``dashboard_server.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.internals.optuna import storage_of, study_id, trial_id
from optuna_merge.report.note import study_note
from optuna_merge.report.plotly import plotly
from optuna_merge.report.study_pictures import pictures_of_study
from optuna_merge.report.summary import summarize

_NOTE = "optuna_merge:note"
"""System attribute of a study: digest of the note that we wrote last. A note of another digest is a reader's own."""


def refresh(study: optuna.Study, config: StudyConfig) -> None:
    """Write a study's note and pictures into its storage, where they have changed; leave a reader's own note alone.

    Args:
        study: The study, running or not.
        config: Its study file.
    """
    import optuna_dashboard

    summary = summarize(study, config)
    stored = storage_of(study).get_study_system_attrs(study_id(study))
    note = study_note(summary, config)
    shown = optuna_dashboard.get_note(study)
    if shown != note and (not shown or _digest(shown) == stored.get(_NOTE)):
        optuna_dashboard.save_note(study, note)
        storage_of(study).set_study_system_attr(study_id(study), _NOTE, _digest(note))
    plots = _stored_plots(stored)
    for order, picture in enumerate(pictures_of_study(study, summary, config), start=1):
        key, figure = f"{order}-{picture.key}", _Figure(plotly(picture))
        if plots.get(key) != figure.to_json():
            optuna_dashboard.save_plotly_graph_object(study, figure, graph_object_id=key)


def save_trial_note(study: optuna.Study, trial: FrozenTrial, note: str) -> None:
    """Write the note of a finished trial."""
    import optuna_dashboard

    # save_note wants a running trial, because a FrozenTrial has no storage, and reads these attributes of it.
    stand_in = SimpleNamespace(storage=storage_of(study), study=study, _trial_id=trial_id(trial))
    optuna_dashboard.save_note(stand_in, note)


class _Figure:
    """What ``save_plotly_graph_object`` needs of a figure, its JSON, so that the package plotly is not needed."""

    def __init__(self, figure: Mapping[str, Any]) -> None:
        self._json = json.dumps(figure, separators=(",", ":"), allow_nan=False)

    def to_json(self) -> str:
        return self._json


def _stored_plots(stored: Mapping[str, Any]) -> dict[str, str]:
    """Plot to its JSON, joined from the pieces that the dashboard stores."""
    pieces: dict[str, dict[int, str]] = {}
    for key, value in stored.items():
        if key.startswith("dashboard:plot_data:"):
            name, _, number = key.removeprefix("dashboard:plot_data:").rpartition(":")
            pieces.setdefault(name, {})[int(number)] = value
    return {name: "".join(found[number] for number in sorted(found)) for name, found in pieces.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
