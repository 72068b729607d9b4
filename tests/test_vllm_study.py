"""A study with the vLLM engine through the command line, killed and gone on with; needs vLLM's CPU build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_merge.testing import write_tiny_models

SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
N_TRIALS = 10


def command(file: Path, storage: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "optuna_merge",
        "run-study",
        str(file),
        "--vllm",
        "--storage-path",
        str(storage),
        "--json",
    ]


def trials(file: Path, storage: Path) -> list[tuple[Any, ...]]:
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{storage}/study.db")
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


@pytest.mark.vllm
def test_a_killed_study_goes_on_as_if_it_had_not_been(tmp_path: Path, study_file: Callable[..., Path]) -> None:
    base, models = write_tiny_models(tmp_path / "wide", 2, head_dim=32, n_layers=2, spread=0.3)
    genome = {
        "models": [str(model) for model in models],
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
    }
    study = {
        "name": "tiny",
        "n_trials": N_TRIALS,
        "seed": 3,
        "n_chunks": 8,
        "pruner": {"name": "wilcoxon", "p_threshold": 0.4},
    }
    file = study_file(genome=genome, study=study, engine={"dtype": "float32", "vllm": {"kv_cache_memory_bytes": 2**25}})
    environment = {**os.environ, **SETTINGS}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        command(file, killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    documents = killed / "documents" / "tiny"
    while len(list(documents.glob("*.jsonl"))) < 6:
        assert process.poll() is None, "it ended by itself"
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
        done = subprocess.run(command(file, storage), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        summaries.append(json.loads(done.stdout))  # vLLM prints nothing among the results
    ours, theirs = trials(file, killed), trials(file, whole)
    assert len(ours) == N_TRIALS
    assert ours == theirs
    assert {state for state, *_ in ours} <= {"COMPLETE", "PRUNED"}
    assert "PRUNED" in {state for state, *_ in ours}
