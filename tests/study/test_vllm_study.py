"""A study with the vLLM engine, killed and resumed through the command line; needs vLLM's CPU build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from optuna_merge.errors import StudyError
from optuna_merge.quickstart.folder import write_quickstart
from optuna_merge.quickstart.models import Settings
from optuna_merge.storage.ascent import AscentStep, steps_of
from optuna_merge.storage.open import open_study
from optuna_merge.study.objective import MergeObjective
from optuna_merge.testing.models import write_tiny_models

SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
N_TRIALS = 10


def command(file: Path, storage: Path, n_trials: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "optuna_merge",
        "run-study",
        str(file),
        "--vllm",
        "--storage-path",
        str(storage),
        "--n-trials",
        str(n_trials),
        "--json",
    ]


def trials(name: str, storage: Path) -> list[tuple[Any, ...]]:
    import optuna

    study = optuna.load_study(study_name=name, storage=f"sqlite:///{storage}/study.db")
    return [(t.state.name, t.value, t.params, t.intermediate_values) for t in study.trials]


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(folder.name), *children(int(folder.name))]
    return found


def runs(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def tiny_genome(tmp_path: Path) -> dict[str, Any]:
    """Two sources, of a head size that vLLM's CPU build supports."""
    base, models = write_tiny_models(tmp_path / "wide", 2, head_dim=32, n_layers=2, spread=0.3)
    return {
        "models": [str(model) for model in models],
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
    }


@pytest.mark.vllm
def test_a_killed_study_goes_on_as_if_it_had_not_been(tmp_path: Path, study_file: Callable[..., Path]) -> None:
    genome = tiny_genome(tmp_path)
    study = {
        "name": "tiny",
        "n_trials": N_TRIALS,
        "seed": 3,
        "n_chunks": 8,
        "pruner": {"name": "wilcoxon", "p_threshold": 0.4},
    }
    file = study_file(genome=genome, study=study, engine={"dtype": "float32", "vllm": {"kv_cache_memory_bytes": 2**25}})
    check_kill(file, tmp_path, N_TRIALS, has_scored("tiny"), {"COMPLETE", "PRUNED"})


@pytest.mark.vllm
def test_the_quickstart_too(tmp_path: Path) -> None:
    """Its models, but trained briefly and with two heads instead of four, of a size that the CPU build supports."""
    settings = Settings(n_heads=2, base_steps=60, skill_steps=30)
    file = write_quickstart(tmp_path, print, settings)
    study = yaml.safe_load(file.read_text())
    study["limit"] = 80
    study["study"] |= {"n_chunks": 8, "pruner": {"name": "wilcoxon", "p_threshold": 0.4}}
    file.write_text(yaml.safe_dump(study))
    check_kill(file, tmp_path, 14, has_scored(study["study"]["name"]), {"COMPLETE", "PRUNED"})


@pytest.mark.vllm
def test_it_ascends_before_vllm_starts(tmp_path: Path, study_file: Callable[..., Path]) -> None:
    """Transformers climbs, the study is killed in between, and vLLM scores what was found at the end."""
    study = {"name": "tiny", "n_trials": 9, "seed": 3, "n_chunks": 2}
    engine = {"dtype": "float32", "vllm": {"kv_cache_memory_bytes": 2**25}}
    file = study_file(16, genome=tiny_genome(tmp_path), study=study, engine=engine, search={"start": "ascent"})

    def steps(storage: Path) -> list[AscentStep]:
        try:
            trials = open_study(f"sqlite:///{storage}/study.db", "tiny").trials
        except StudyError:  # it is being made
            return []
        return [replace(step, seconds=0.0) for step in steps_of(trials[0])] if trials else []

    check_kill(file, tmp_path, 9, lambda storage: len(steps(storage)) >= 2, {"COMPLETE"})
    assert len(steps(tmp_path / "killed")) == 6
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
    objective = MergeObjective.from_file(file, {"engine.backend": "hf", "study.n_chunks": 2})
    whole = open_study(f"sqlite:///{tmp_path}/whole/study.db", "tiny")
    objective.load(objective.recipe(whole.trials[0], whole))
    assert whole.trials[0].value == objective.scorer.score_all().value


def has_scored(name: str) -> Callable[[Path], bool]:
    return lambda storage: len(list((storage / "documents" / name).glob("*.jsonl"))) >= 6


def check_kill(
    file: Path, tmp_path: Path, n_trials: int, is_time: Callable[[Path], bool], states: Collection[str]
) -> None:
    """Kill a study when it is time, resume it, and compare it with one that was left alone.

    Args:
        file: The study file.
        tmp_path: Where both studies are kept: in ``killed`` and ``whole``.
        n_trials: Of each study.
        is_time: Told from the folder of the study.
        states: Of the trials, all of them.
    """
    name = yaml.safe_load(file.read_text())["study"]["name"]
    environment = {**os.environ, **SETTINGS}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        command(file, killed, n_trials), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    while not is_time(killed):
        assert process.poll() is None, "the study ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(process.pid)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "vLLM outlives the study"
        time.sleep(0.2)
    summaries = []
    for storage in (killed, whole):
        done = subprocess.run(
            command(file, storage, n_trials), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        summaries.append(json.loads(done.stdout))  # so vLLM printed nothing to stdout
    ours, theirs = trials(name, killed), trials(name, whole)
    assert len(ours) == n_trials
    assert ours == theirs
    assert {state for state, *_ in ours} == set(states)
