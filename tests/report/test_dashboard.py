from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState, create_trial

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import storage_of, study_id, trial_id
from optuna_merge.report.artifacts import write_documents
from optuna_merge.report.dashboard import refresh
from optuna_merge.report.dashboard_server import make_dashboard
from optuna_merge.report.dashboard_watcher import DashboardWatcher
from optuna_merge.report.pictures import Bars
from optuna_merge.report.study_pictures import pictures_of_study
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.documents import DocumentScores
from optuna_merge.storage.open import create_study, storage_url
from optuna_merge.storage.writes import Write, write_trial
from tests import processes

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def config(study_file: Callable[..., Path]) -> StudyConfig:
    path = study_file()
    path.write_text("# Which one?\n" + path.read_text())
    return load_study(path)


def open_study(config: StudyConfig) -> optuna.Study:
    return create_study(storage_url(config.storage_path, None), config.study.name)[0]


def fill(study: optuna.Study, n_trials: int, n_groups: int, n_models: int) -> None:
    """Add baselines, then merges that get better, ten to a generation; every other merge is pruned."""
    labels = [f"model_{index}" for index in range(n_models)]
    study.set_user_attr(attributes.FINGERPRINT, {"genome.models": labels})
    space = {
        f"layers_{group:02d}_{group:02d}.{label}.weight": optuna.distributions.FloatDistribution(0, 1)
        for group in range(n_groups)
        for label in labels
    }
    scores = {f"{attributes.SCORE} one": 0.4, f"{attributes.SCORE} two": 0.5, attributes.DOCUMENTS: 60}
    for name, kind, value in (("uniform", "uniform", 0.5), ("model_0", "source", 0.45), ("base", "base", 0.2)):
        labelled = {attributes.BASELINE: name, attributes.BASELINE_KIND: kind, **scores}
        study.add_trial(create_trial(value=value, user_attrs=labelled))
    for index in range(n_trials - 3):
        pruned = index % 2 == 1
        value = 0.5 + 0.3 * index / n_trials
        own = {attributes.DOCUMENTS: 20 if pruned else 60, **({PAIRED_ESTIMATE: value - 0.1} if pruned else scores)}
        params = {name: (index * 7 + place) % 100 / 100 for place, name in enumerate(space)}
        writes: list[Write] = [
            ("system_attr", "cma:generation", index // 10),
            *(("param", name, [share, distribution_to_json(space[name])]) for name, share in params.items()),
            *(("user_attr", key, attribute) for key, attribute in own.items()),
            *(("step", step, value) for step in range(20)),
        ]
        number = storage_of(study).create_new_trial(study_id(study))
        write_trial(storage_of(study), number, writes)  # all at once: Optuna takes 0.1 s for 100 parameters
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        storage_of(study).set_trial_state_values(number, state, None if pruned else [value])


@pytest.fixture
def served(config: StudyConfig) -> Any:
    """What the dashboard's server answers about a study of 23 trials."""
    study = open_study(config)
    fill(study, 23, 2, 2)
    refresh(study, config)
    dashboard = make_dashboard(config, port=0)
    thread = threading.Thread(target=dashboard.serve)
    thread.start()
    yield json.loads(urllib.request.urlopen(dashboard.url.replace("/dashboard/", "/api/")).read())
    dashboard.server.shutdown()
    thread.join()


def test_what_the_server_tells_the_browser(served: Any) -> None:
    note = served["note"]["body"]
    assert note.startswith("# Which one?")
    assert "Best merge: trial 21, 0.7348 on the searched documents, 0.2348 above uniform (0.5000)." in note
    assert "| one | 0.5 | acc,none |" in note
    assert "| best merge | 0.7348 |" in note
    assert "optuna-merge run-study" in note
    plots = {plot["id"]: json.loads(plot["graph_object"]) for plot in served["plotly_graph_objects"]}
    assert sorted(plots) == [
        "1-score-by-documents",
        "2-score-by-model",
        "3-weights-best",
        "4-weights-by-generation",
        "5-tasks-1",
    ]
    [heat] = plots["3-weights-best"]["data"]
    assert heat["y"] == ["layers_00_00", "layers_01_01"]
    assert heat["x"] == ["model_0", "model_1"]
    assert heat["z"] == [[0.26, 0.27], [0.28, 0.29]]  # trial 21 is the merge of index 18
    assert [series["name"] for series in plots["1-score-by-documents"]["data"]] == [
        "merge, every document",
        "pruned merge, its estimate",
        "best so far",
    ]


def test_a_readers_own_note_is_left_alone(config: StudyConfig) -> None:
    import optuna_dashboard

    study = open_study(config)
    fill(study, 10, 1, 2)
    refresh(study, config)
    first = optuna_dashboard.get_note(study)
    fill(study, 20, 1, 2)
    refresh(study, config)
    assert optuna_dashboard.get_note(study) != first
    optuna_dashboard.save_note(study, "mine")
    refresh(study, config)
    assert optuna_dashboard.get_note(study) == "mine"


def test_a_refresh_that_finds_nothing_new_writes_nothing(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(config)
    fill(study, 10, 1, 2)
    refresh(study, config)
    written: list[str] = []
    monkeypatch.setattr(storage_of(study), "set_study_system_attr", lambda _, key, __: written.append(key))
    refresh(study, config)
    assert written == []


def test_a_trial_gets_its_artifacts_once_and_a_new_best_its_note(config: StudyConfig) -> None:
    import optuna_dashboard

    study = open_study(config)
    documents = DocumentScores(config.storage_path / "documents" / "tiny")
    chunk = {"chunk": 0, "score": 0.5, "documents": {"one": {"doc_id": [3, 8], "acc": [1.0, 0.0]}}}
    documents.begin(0, "digest", [json.dumps(chunk)])
    warnings: list[str] = []
    watcher = DashboardWatcher(config, lambda trial: f"# merge {trial.number}\n", warnings.append)
    watcher.study_opened(study, 10, [])
    trial = study.ask()
    watcher.trial_scored(study, trial)
    again = optuna.Trial(study, trial_id(trial))  # as after a kill between the two uploads
    watcher.trial_scored(study, again)
    frozen = study.tell(trial, 0.7)
    watcher.trial_finished(study, frozen, is_best=True)
    artifacts = {
        meta["filename"]: (config.storage_path / "artifacts" / meta["artifact_id"]).read_text()
        for meta in map(json.loads, (v for k, v in study.trials[0].system_attrs.items() if k.startswith("artifacts:")))
    }
    assert artifacts == {
        "mergekit.yaml": "# merge 0\n",
        "documents.csv": "chunk,task,document,acc\n0,one,3,1.0\n0,one,8,0.0\n",
    }
    assert len(list((config.storage_path / "artifacts").glob("*-*"))) == 2
    notes = [value for key, value in storage_of(study).get_study_system_attrs(study_id(study)).items() if "note" in key]
    assert any("New best merge: 0.7000" in str(value) for value in notes)
    assert optuna_dashboard.get_note(study)
    assert warnings == []


def test_artifacts_that_cannot_be_written_stop_nothing(config: StudyConfig) -> None:
    study = open_study(config)
    warnings: list[str] = []
    watcher = DashboardWatcher(config, lambda trial: "", warnings.append)
    for _ in range(2):  # the document scores are missing
        watcher.trial_scored(study, study.ask())
    [warning] = warnings
    assert warning.startswith("artifacts of trial 0 cannot be written: ")


def test_an_end_of_the_ascent_that_other_merges_outrank(config: StudyConfig) -> None:
    study = open_study(config)
    study.add_trial(create_trial(value=0.55, user_attrs={attributes.ASCENT: True, f"{attributes.SCORE} one": 0.55}))
    fill(study, 23, 2, 2)
    summary = summarize(study, config)
    assert [(row.kind, row.trial) for row in summary.rows if row.kind in ("ascent", "best")] == [
        ("ascent", 0),
        ("best", 22),
    ]
    [bars] = [picture for picture in pictures_of_study(study, summary, config) if picture.key == "score-by-model"]
    assert isinstance(bars, Bars)
    assert [(name, role) for name, role, value, _ in bars.rows if value == 0.55] == [("end of the ascent", "merge")]


def test_a_picture_that_cannot_be_drawn_stops_nothing(config: StudyConfig) -> None:
    study = open_study(config)
    study.add_trial(create_trial(value=0.5, user_attrs={attributes.DOCUMENTS: "sixty"}))
    warnings: list[str] = []
    DashboardWatcher(config, lambda trial: "", warnings.append).study_closed(study)
    [warning] = warnings
    assert warning.startswith("note and pictures cannot be refreshed, the search goes on: ")


def test_artifacts_on_a_full_disk_stop_nothing(config: StudyConfig) -> None:
    study = open_study(config)
    warnings: list[str] = []
    watcher = DashboardWatcher(config, lambda trial: "a line\n" * 100, warnings.append)
    trial = study.ask()
    with processes.files_up_to(100):
        watcher.trial_scored(study, trial)
    assert warnings == ["artifacts of trial 0 cannot be written: [Errno 27] File too large"]
    assert study.tell(trial, 0.5).state == TrialState.COMPLETE


def test_documents_of_tasks_with_different_metrics(tmp_path: Path) -> None:
    chunk = {"one": {"doc_id": [1], "acc": [1.0]}, "two": {"doc_id": [2], "f1": [0.5]}}
    (tmp_path / "in").write_text("digest\n" + json.dumps({"chunk": 4, "score": 0, "documents": chunk}) + "\n")
    write_documents(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "chunk,task,document,acc,f1\n4,one,1,1.0,\n4,two,2,,0.5\n"


def test_a_study_that_was_not_started_and_a_port_that_is_taken(config: StudyConfig) -> None:
    with pytest.raises(StudyError, match="must have been started"):
        make_dashboard(config)
    open_study(config)
    with (
        make_dashboard(config, port=0).server as server,
        pytest.raises(StudyError, match=r"must be an address to listen on, got .*; choose another port"),
    ):
        make_dashboard(config, port=server.server_port)
