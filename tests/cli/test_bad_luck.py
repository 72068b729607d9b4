"""What the commands say when something around a study goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.test_cli import error_of, invoke

BROKEN = """

def process(doc, results):
    if doc["question"].endswith(" 39:"):
        raise ValueError("no such answer")
    return {"acc": float(results[doc["gold"]][0] > -1)}
"""


def test_a_held_out_document_that_cannot_be_scored_does_not_hide_what_the_search_found(
    study_file: Callable[..., Path],
) -> None:
    file = study_file(tasks=[{"name": "one"}], holdout=[{"name": "two"}], study={"n_trials": 7, "n_chunks": 2})
    tasks = file.parent / "tasks"
    with (tasks / "two_helper.py").open("a") as helper:
        helper.write(BROKEN)
    with (tasks / "two.yaml").open("a") as task:
        task.write("process_results: !function two_helper.process\n")
    wrong = "error: task 'two', document 39: process_results raised ValueError: no such answer; correct the task's"
    for command in ("run-study", "report"):
        done = invoke(command, file)
        assert "study study: 7 complete" in done.stdout
        assert "best merge" in done.stdout
        assert wrong in error_of(done)


def test_fewer_trials_than_there_are(study_file: Callable[..., Path]) -> None:
    file = study_file(study={"n_trials": 8, "n_chunks": 2})
    assert invoke("run-study", file).exit_code == 0
    done = invoke("run-study", file, "--n-trials", "3")
    assert done.exit_code == 0
    assert "8 trials were finished before, more than the 3 wanted: none is left to run" in done.stderr
    assert "study study: 8 complete" in done.stdout
    assert "study study: 8 of 8 trials (8 complete)" in invoke("status", file).stdout
