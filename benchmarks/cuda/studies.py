"""Parts ``study``, ``memory`` and ``vllm``: whole studies, as ``run-study`` runs them.

Knows where the seconds of a trial go and how much memory a study takes. Does not know merging or scoring by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cuda.inputs import Inputs, write_tasks
from benchmarks.cuda.measuring import GIB, TARGETS, empty_caches, memory_limit, peak_bytes, reset_peak
from optuna_merge.config.read import load_study
from optuna_merge.storage import attributes
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.study.check import check_study
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study


def part_study(inputs: Inputs) -> dict[str, Any]:
    """Run twenty trials with pruning."""
    return run_trials(inputs, n_trials=4 if inputs.tiny else 20, engine={"sources": "auto"})


def part_memory(inputs: Inputs) -> dict[str, Any]:
    """Run two trials in 24 GiB of the GPU with sources in host memory; compare the plan of ``check`` with the peak."""
    empty_caches(inputs.device)
    with memory_limit(inputs.device, 24 * GIB):
        reset_peak(inputs.device)
        figures = run_trials(inputs, n_trials=2, engine={"sources": "host"})
    figures["peak_gib"] = peak_bytes(inputs.device) / GIB
    if inputs.is_cuda:
        figures["planned_over_peak"] = figures["planned_gib"] / figures["peak_gib"]
        figures["goal of planned_over_peak"] = "{} to {}".format(*TARGETS["planned_over_peak"])
    return figures


def part_vllm(inputs: Inputs) -> dict[str, Any]:
    """Run three trials with vLLM instead of transformers.

    Raises:
        ImportError: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(name="vllm")
    options = {"backend": "vllm", **({"vllm": {"enforce_eager": True}} if inputs.tiny else {})}
    return run_trials(inputs, n_trials=3, engine=options)


def run_trials(inputs: Inputs, n_trials: int, engine: dict[str, Any]) -> dict[str, Any]:
    """Run a new study.

    Args:
        inputs: The models and eval tasks of the study.
        n_trials: How many trials it has.
        engine: Keys for the study file's section of this name.

    Returns:
        Seconds of a trial, the shares of them that its phases take, and the planned memory in GiB.
    """
    config = load_study(write_study(inputs, n_trials, engine))
    planned = check_study(config).memory
    objective = MergeObjective.from_config(config)
    with timed_storage() as in_storage:
        start = time.perf_counter()
        run_study(config, objective)
        wall = time.perf_counter() - start
    objective.close()
    empty_caches(inputs.device)
    trials = open_study(storage_url(config.storage_path, config.study.storage), config.study.name).trials
    keys = (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
    merging, scoring = (sum(trial.user_attrs.get(key, 0.0) for trial in trials) for key in keys)
    storage = sum(in_storage)  # none of it lies within the seconds of merging and scoring
    return {
        "n_trials": n_trials,
        "n_pruned": sum(trial.state.name == "PRUNED" for trial in trials),
        "seconds_a_trial": wall / n_trials,
        "merge": merging / wall,
        "scoring": scoring / wall,
        "storage": storage / wall,
        "rest": (wall - merging - scoring - storage) / wall,
        "goal": TARGETS["rest"],
        "planned_gib": (planned["device"] - planned["runtime"]) / GIB,
    }


def write_study(inputs: Inputs, n_trials: int, engine: dict[str, Any]) -> Path:
    """Write a study file under a name that is not yet taken."""
    write_tasks(inputs)
    name = f"suite_{time.time_ns()}"
    device = {} if engine.get("backend") == "vllm" else {"device": str(inputs.device)}
    path = inputs.folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "study": {"name": name, "n_trials": n_trials, "seed": 0},
                "storage_path": f"./{name}",
                "genome": {
                    "models": [str(path) for path in inputs.models[1:]],
                    "base_model": str(inputs.models[0]),
                    "merge_method": "task_arithmetic",
                    "layer_granularity": max(1, inputs.shape["num_hidden_layers"] // 4),
                },
                "tasks": [{"name": "letters"}, {"name": "phrases"}],
                "task_search_path": ["./tasks"],
                "apply_chat_template": False,
                "engine": device | engine,
            }
        )
    )
    return path


@contextlib.contextmanager
def timed_storage() -> Iterator[list[float]]:
    """Collect the seconds of each storage call of the main thread; calls that a call makes itself count once."""
    seconds: list[float] = []
    depth = threading.local()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            is_outer = not getattr(depth, "value", 0)
            depth.value = getattr(depth, "value", 0) + 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                depth.value -= 1
                if is_outer and threading.current_thread() is threading.main_thread():
                    seconds.append(time.perf_counter() - start)

        return call

    methods = {n: m for n, m in vars(BatchedStorage).items() if callable(m) and not n.startswith("_")}
    try:
        for name, method in methods.items():
            setattr(BatchedStorage, name, timed(method))
        yield seconds
    finally:
        for name, method in methods.items():
            setattr(BatchedStorage, name, method)
