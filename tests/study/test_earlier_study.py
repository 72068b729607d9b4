"""A study that an earlier version wrote resumes with this one as if nothing had changed.

``tests/fixtures/earlier_study`` was written at commit 4d4c344, before the package was divided into rooms: two tiny
sources (``write_tiny_models``) and two tasks (``tests.conftest.write_task``), ``run_study`` with 24 trials, ended by
``os._exit`` after 67 chunks, in the 14th trial. Its machine's name and paths were replaced afterwards.
``expected.json`` has the 24 trials of the same study at the same commit, not interrupted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merge
from optuna_merge.study.folder import BEST_CONFIG, OWNER_FILE
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study

FIXTURE = Path(__file__).parents[1] / "fixtures" / "earlier_study"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
N_INTERRUPTED = 13
"""Number of the trial in which the process ended."""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "earlier")
    return tmp_path / "earlier" / "study.yaml"


def documents(study_file: Path) -> dict[str, bytes]:
    """File name to content of the scores of single documents."""
    return {path.name: path.read_bytes() for path in (study_file.parent / "out/documents/earlier").iterdir()}


def test_it_ends_with_the_trials_of_an_uninterrupted_run(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = documents(study_file)
    assert len(before) == N_INTERRUPTED + 1
    n_scored_before = sum(content.count(b"\n") - 1 for content in before.values())  # the first line is a digest
    objective = MergeObjective.from_file(study_file)
    assert [t.state for t in open_started(objective.config).trials][N_INTERRUPTED:] == [TrialState.RUNNING]
    scored: list[int] = []
    score_chunk = objective.scorer.score_chunk
    monkeypatch.setattr(objective.scorer, "score_chunk", lambda chunk: (scored.append(chunk), score_chunk(chunk))[1])

    assert run_study(objective.config, objective) == Outcome(24)

    study = open_started(objective.config)
    assert [trial.state.name for trial in study.trials] == [expected["state"] for expected in EXPECTED]
    for trial, expected in zip(study.trials, EXPECTED, strict=True):
        assert trial.value == pytest.approx(expected["value"], abs=1e-9)
        assert trial.params == pytest.approx(expected["params"], rel=1e-9)
        reported = {str(step): value for step, value in trial.intermediate_values.items()}
        assert reported == pytest.approx(expected["intermediate_values"], abs=1e-9)
    n_chunks = sum(len(expected["intermediate_values"]) for expected in EXPECTED)
    assert n_scored_before + len(scored) == n_chunks  # none was scored twice
    after = documents(study_file)
    interrupted = f"trial_{N_INTERRUPTED:05d}.jsonl"
    assert after[interrupted].startswith(before.pop(interrupted))
    assert {name: after[name] for name in before} == before


def test_its_best_merge_report_and_holdout_follow(study_file: Path) -> None:
    objective = MergeObjective.from_file(study_file)
    run_study(objective.config, objective)
    best = best_merge(open_started(objective.config))
    assert best is not None
    written = (study_file.parent / "out" / BEST_CONFIG).read_text()
    assert written.splitlines()[0].startswith(f"# study earlier, trial {best.number}, score ")
    assert written == objective.merge_file(best, [written.splitlines()[0].removeprefix("# ")])
    reported = CliRunner().invoke(app, ["report", str(study_file), "--json"])
    assert reported.exit_code == 0, reported.output
    summary = json.loads(reported.stdout)
    assert summary["best_trial"] == best.number
    assert all(row["holdout"] is not None for row in summary["rows"])


def test_its_folder_is_its_own(study_file: Path) -> None:
    """Its folder has no ``study.json``; the folder of its documents tells whose it is."""
    folder = study_file.parent / "out"
    before = (folder / BEST_CONFIG).read_bytes()
    other = MergeObjective.from_file(study_file, {"study.name": "later"})
    message = r"out: must be of study 'later', got that of study 'earlier'; choose another storage_path"
    with pytest.raises(StudyError, match=message):
        run_study(other.config, other)
    assert (folder / BEST_CONFIG).read_bytes() == before
    assert not (folder / OWNER_FILE).exists()
    same = MergeObjective.from_file(study_file, {"study.n_trials": N_INTERRUPTED + 1})
    run_study(same.config, same)
    own_id = open_started(same.config).user_attrs[attributes.STUDY_ID]
    assert json.loads((folder / OWNER_FILE).read_text()) == {"study": "earlier", "id": own_id}
    with pytest.raises(StudyError, match=message):
        run_study(other.config, other)
