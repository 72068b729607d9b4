from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from optuna_merge.storage import batched as storage
from optuna_merge.storage.open import create_study


def test_reports_go_in_together_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    url = f"sqlite:///{tmp_path}/study.db"
    study, batched = create_study(url, "s")
    trial = study.ask()

    def seen() -> list[int]:
        return sorted(optuna.load_study(storage=url, study_name="s").trials[0].intermediate_values)

    trial.report(0.5, step=0)
    assert seen() == [0]  # the first one never waits
    trial.report(0.5, step=1)
    now[0] += 0.9
    trial.report(0.5, step=2)
    assert seen() == [0]
    now[0] += 0.2
    trial.report(0.5, step=3)
    assert seen() == [0, 1, 2, 3]
    trial.report(0.5, step=4)
    batched.flush()
    assert seen() == [0, 1, 2, 3, 4]
    trial.report(0.5, step=5)
    study.tell(trial, 1.0)
    assert seen() == [0, 1, 2, 3, 4, 5]
