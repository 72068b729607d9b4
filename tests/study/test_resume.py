"""A trial that is taken up again reads its chunks back: whatever a kill or a second owner has left in its file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_merge.cli.options import open_started
from optuna_merge.internals.optuna import storage_of, trial_id
from optuna_merge.storage.documents import DocumentScores
from optuna_merge.study.folder import documents_folder
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from optuna_merge.study.watcher import Watcher
from tests.processes import forked
from tests.study.test_objective import fake_objective


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    return fake_objective(study_file(gold="0", study={"name": "tiny", "n_trials": 25, "seed": 3, "n_chunks": 5}))


def scores_file(objective: MergeObjective, trial_number: int) -> Path:
    folder = documents_folder(objective.config.storage_path, objective.config.study.name)
    return DocumentScores(folder).path(trial_number)


def chunks(file: Path) -> list[int]:
    return [json.loads(line)["chunk"] for line in file.read_text().splitlines()[1:]]


def spoilt(line: str) -> str:
    """The line of a chunk as another machine may have scored it: with another score and other values."""
    chunk = json.loads(line)
    chunk["score"] += 0.5
    for columns in chunk["documents"].values():
        columns["acc,none"] = [0.0] * len(columns["acc,none"])
    return json.dumps(chunk)


class StopError(Exception):
    """Ends a trial as a kill would."""


def stopped_after(objective: MergeObjective, n_chunks: int) -> tuple[optuna.Trial, float]:
    """A trial that was stopped after some chunks, and the value that it would have had."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()

    def on_chunk(n_scored: int) -> None:
        if n_scored == n_chunks:
            raise StopError

    with pytest.raises(StopError):
        objective.evaluate(trial, on_chunk)
    return trial, objective.scorer.score_all().value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("left", "scored"),
    [
        ("0 1 2", [3, 4]),
        ("2 0 1", [3, 4]),
        ("0 1 2 3", [4]),  # written, not reported
        ("0 1 1 2", [3, 4]),
        ("0 1 2 1", [3, 4]),  # of an owner that woke after another process had gone on
        ("0 1 2 1'", [3, 4]),  # the same, and it scores a little differently
        ("0 1' 1 2", [3, 4]),
        ("0 2", [1, 3, 4]),
        ("0 1 2 4", [3]),
        ("1 2", [0, 3, 4]),
        ("0 1 2 3'torn", [3, 4]),
        ("", [0, 1, 2, 3, 4]),
        ("other recipe 0' 1' 2'", [0, 1, 2, 3, 4]),
    ],
)
def test_chunks_are_resumed_by_their_number(
    objective: MergeObjective, left: str, scored: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, value = stopped_after(objective, 3)
    file = scores_file(objective, 0)
    digest, *lines = file.read_text().splitlines()
    lines = [*lines, *(objective.scorer.score_chunk(chunk).to_json() for chunk in (3, 4))]
    written = "other" if "other" in left else digest
    for part in left.removeprefix("other recipe").split():
        line = spoilt(lines[int(part[0])]) if "'" in part else lines[int(part[0])]
        written += "\n" + (line[:40] if "torn" in part else line)
    file.write_text(written if "torn" in left else written + "\n")
    again: list[int] = []
    score_chunk = objective.scorer.score_chunk
    monkeypatch.setattr(objective.scorer, "score_chunk", lambda chunk: (again.append(chunk), score_chunk(chunk))[1])
    assert objective.evaluate(trial) == value
    assert again == scored
    assert sorted(chunks(file)) == [0, 1, 2, 3, 4]
    assert sorted(file.read_text().splitlines()[1:]) == sorted(lines)
    assert [*trial.study.trials[0].intermediate_values] == [0, 1, 2, 3, 4]


def test_an_owner_that_wakes_adds_nothing_to_the_file_of_the_next_one(
    objective: MergeObjective, tmp_path: Path
) -> None:
    """A worker sleeps in trial 7 until another process has finished the study."""
    asleep, wake = tmp_path / "asleep", tmp_path / "wake"

    class Sleepy(Watcher):
        number = -1

        def trial_started(self, trial: optuna.Trial) -> None:
            self.number = trial.number

        def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
            if self.number == 7 and n_scored == 2:
                asleep.touch()
                wait_for(wake)

    with forked(lambda: run_study(objective.config, objective, Sleepy())) as [owner]:
        wait_for(asleep)
        study = open_started(objective.config)
        assert study.trials[7].state == TrialState.RUNNING
        # what another machine does when it has heard nothing for a minute
        storage_of(study).set_trial_state_values(trial_id(study.trials[7]), TrialState.WAITING)
        assert run_study(objective.config, objective) == Outcome(25)
        before = scores_file(objective, 7).read_bytes()
        wake.touch()
        owner.join(60)
        assert owner.exitcode == 0
    assert scores_file(objective, 7).read_bytes() == before
    for trial in open_started(objective.config).trials:
        assert chunks(scores_file(objective, trial.number)) == [*trial.intermediate_values]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
