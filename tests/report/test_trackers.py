from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.report.trackers import MlflowTracker, WandbTracker, make_tracker
from optuna_merge.report.tracking_watcher import TrackingWatcher, figures_of
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE


class Recorder:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, name: str, config: Mapping[str, Any]) -> None:
        self.told.append(("start", name, config["genome"]["merge_method"]))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.told.append(("log", step, figures["best_score"]))

    def save(self, file: Path) -> None:
        self.told.append(("save", file.name))

    def finish(self) -> None:
        self.told.append(("finish",))


class Broken(Recorder):
    def log(self, figures: Mapping[str, float], step: int) -> None:
        raise ConnectionError("no network\nat all")


@pytest.fixture
def config(study_file: Callable[..., Path]) -> StudyConfig:
    return load_study(study_file())


@pytest.fixture
def study() -> optuna.Study:
    study = optuna.create_study(study_name="tiny", direction="maximize")
    study.add_trial(
        create_trial(value=0.5, user_attrs={attributes.BASELINE: "uniform", attributes.BASELINE_KIND: "uniform"})
    )
    study.add_trial(
        create_trial(
            value=0.7,
            user_attrs={f"{attributes.SCORE} one": 0.6, attributes.DOCUMENTS: 60, attributes.MERGE_SECONDS: 0.1},
            system_attrs={"cma:generation": 0},
        )
    )
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            user_attrs={PAIRED_ESTIMATE: 0.5, attributes.DOCUMENTS: 20},
            system_attrs={"cma:generation": 0},
        )
    )
    return study


def read_log(data: bytes) -> list[bytes]:
    """The records of a LevelDB log, as wandb writes it: pieces in blocks of 32 KiB, each after a header of 7 bytes."""
    block, head = 32768, 7
    records, place, partial = [], head, b""
    while place + head <= len(data):
        if block - place % block < head:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        partial += data[place + head : place + head + length]
        place += head + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(partial)
            partial = b""
    return records


def run(tracker: Any, study: optuna.Study, config: StudyConfig, best: Path) -> list[str]:
    warnings: list[str] = []
    watcher = TrackingWatcher(tracker, config, best, warnings.append)
    watcher.study_opened(study, 3, [])
    for trial in study.trials:
        watcher.trial_finished(study, trial, is_best=trial.number == 1)
    watcher.close()
    return warnings


def test_the_figures(study: optuna.Study) -> None:
    assert figures_of(study, study.trials[1]) == {
        "pruned": 0.0,
        "failed": 0.0,
        "total_documents": 80,
        "best_score": 0.7,
        "score": 0.7,
        "merge_s": 0.1,
        "n_documents": 60,
        "score/one": 0.6,
        "generation": 0,
        "population_mean": pytest.approx(0.6),
        "population_std": pytest.approx(0.1),
    }
    pruned = figures_of(study, study.trials[2])
    assert (pruned["pruned"], pruned["estimate"]) == (1.0, 0.5)
    assert "score" not in pruned
    assert "generation" not in figures_of(study, study.trials[0])


def test_a_tracker_is_told_what_happens(study: optuna.Study, config: StudyConfig) -> None:
    recorder = Recorder()
    assert run(recorder, study, config, Path("best_config.yaml")) == []
    assert recorder.told == [
        ("start", "tiny", "task_arithmetic"),
        ("log", 0, 0.7),
        ("log", 1, 0.7),
        ("save", "best_config.yaml"),
        ("log", 2, 0.7),
        ("finish",),
    ]


def test_a_tracker_that_fails_is_reported_once_and_told_no_more(study: optuna.Study, config: StudyConfig) -> None:
    broken = Broken()
    assert run(broken, study, config, Path("best_config.yaml")) == [
        "tracker Broken failed and gets no more figures: no network"
    ]
    assert broken.told == [("start", "tiny", "task_arithmetic")]


def test_a_package_that_is_missing_is_a_failure_of_the_tracker(
    study: optuna.Study, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    [warning] = run(MlflowTracker(), study, config, Path("best_config.yaml"))
    assert warning.startswith("tracker MlflowTracker failed and gets no more figures: import of mlflow halted")


def test_a_tracker_of_ones_own_by_its_path() -> None:
    assert isinstance(make_tracker("tests.report.test_trackers.Recorder"), Recorder)
    assert isinstance(make_tracker("mlflow"), MlflowTracker)
    for path in ("nonsense", "tests.report.test_trackers.Nobody", "no_such_module.Tracker", "pathlib.Path.nothing"):
        with pytest.raises(
            StudyError, match=r"tracker must be mlflow or the import path of a class .*; see optuna_merge\.Tracker"
        ):
            make_tracker(path)


def test_wandb_offline_read_back(
    study: optuna.Study, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs wandb: make setup-dev")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    best = tmp_path / "best_config.yaml"
    best.write_text("merge_method: task_arithmetic\n")
    assert run(WandbTracker(tmp_path / "out", "merges", "team"), study, config, best) == []

    [file] = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 120  # wandb's service may still be writing
    while True:
        records = [Record.FromString(data) for data in read_log(file.read_bytes())]
        if "exit" in [record.WhichOneof("record_type") for record in records] or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    [begun] = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (begun.project, begun.entity, begun.display_name) == ("merges", "team", "tiny")
    logged = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [figures["trial"] for figures in logged] == [0, 1, 2]
    assert [figures["best_score"] for figures in logged] == [0.7, 0.7, 0.7]
    assert logged[1]["score/one"] == 0.6
    assert logged[2]["population_mean"] == pytest.approx(0.6)
    text = file.read_bytes()
    assert b"best_config" in text
