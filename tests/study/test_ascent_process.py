"""The ascent of a study whose engine merges in workers, as vLLM does: real processes, tiny models."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path

import pytest

from optuna_merge.cli.options import open_started
from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.recipe import Recipe
from optuna_merge.storage.ascent import steps_of
from optuna_merge.study.ascent_process import climb_apart
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from tests.processes import forked, until
from tests.study.killing import Killed
from tests.study.test_ascent import N_STEPS, STUDY, record
from tests.study.test_vllm_study import runs

N_TRIALS = 8


class Workers:
    """A loader that is not local, and refuses to load while another process has the memory."""

    device = "cpu"

    def __init__(self, inner: LocalLoader) -> None:
        self.inner = inner
        self.events: list[str] = []

    def load(self, recipe: Recipe) -> None:
        assert not active_children()
        self.events.append("load")
        self.inner.load(recipe)

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def local(study_file: Callable[..., Path]) -> MergeObjective:
    study = {**STUDY, "n_trials": N_TRIALS, "n_chunks": 2}
    return MergeObjective.from_file(study_file(n_documents=16, study=study, search={"start": "ascent"}))


def apart(local: MergeObjective) -> MergeObjective:
    """The same study, for an engine that merges in workers; its file leaves the number of chunks open."""
    open_study = local.config.study.model_copy(update={"n_chunks": None})
    engine = local.config.engine.model_copy(update={"backend": "vllm"})
    changes = {"storage_path": local.config.storage_path / "apart", "engine": engine, "study": open_study}
    assert isinstance(local.loader, LocalLoader)
    return MergeObjective(local.config.model_copy(update=changes), local.models, Workers(local.loader), local.scorer)


def test_it_takes_the_same_steps_and_outlives_no_study(local: MergeObjective) -> None:
    objective = apart(local)
    workers = objective.loader
    assert isinstance(workers, Workers)

    class Stopped(Killed):
        def ascent_stepped(self, *step: object) -> None:
            pid_file.write_text(" ".join(str(process.pid) for process in active_children()))
            super().ascent_stepped(*step)  # type: ignore[arg-type]

    pid_file = local.config.storage_path.with_name("pids")
    with forked(lambda: run_study(objective.config, objective, Stopped("step", 2))) as [process]:
        process.join(240)
        assert process.exitcode == 9
    [pid] = map(int, pid_file.read_text().split())
    until(lambda: not runs(pid))
    assert run_study(objective.config, objective) == Outcome(N_TRIALS)
    study = open_started(objective.config)
    assert run_study(local.config, local) == Outcome(N_TRIALS)
    assert record(study) == record(open_started(local.config))
    # what the engine had is freed before the ascent, and only then
    assert workers.events == ["close"] + ["load"] * N_TRIALS
    assert steps_of(study.trials[0])[0].seconds > 1  # a process starts
    assert not active_children()


def test_its_errors_are_those_of_the_study(local: MergeObjective) -> None:
    start = local.space.uniform()
    nowhere = [dict.fromkeys(start, float("nan"))]
    with pytest.raises(NonFiniteMergeError, match="NaN"):
        list(climb_apart(local.config, "", 2, "cpu")(nowhere, None))
    with closing(climb_apart(local.config, "", 2, "cpu")([start], None)) as climbing:
        assert next(climbing).n_steps == N_STEPS
        os.kill(active_children()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(
            EngineError, match=r"must live until its last step, died with exit code -9; .* search\.start"
        ):
            list(climbing)
    assert not active_children()
