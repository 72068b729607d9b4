from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def suite_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_suite", ROOT / "benchmarks" / "cuda_suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_suite", module)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    line = [sys.executable, ROOT / "benchmarks" / "cuda_suite.py", "--device", "cpu", "--tiny", "--out", out]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads(out.read_text())["parts"]
    assert {"equal", "merge", "scoring", "study", "memory", "faults"} <= {
        name for name, part in parts.items() if "figures" in part
    }
    assert parts["vllm"].get("skipped") == "vllm is missing" or "figures" in parts["vllm"]
    study = parts["study"]["figures"]
    assert sum(study[part] for part in ("merge", "scoring", "storage", "rest")) == pytest.approx(1)
    assert 0 < study["storage"] < 1
    assert parts["equal"]["figures"]["exported"] == 0
    assert parts["faults"]["figures"] == {
        "a merge that is not finite": "the next score is right",
        "an interrupted merge": "the next score is right",
    }


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    line = [sys.executable, ROOT / "benchmarks" / "cuda_suite.py", "--device", "cuda"]
    result = subprocess.run(
        line, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 2
    assert "no CUDA device is found; try --device cpu --tiny" in result.stderr.replace("\n", " ")


def test_a_part_that_fails_leaves_the_others_and_what_was_found(suite_module: ModuleType, tmp_path: Path) -> None:
    def fails(suite: object) -> None:
        raise RuntimeError("no kernel image is available")

    def differs(suite: object) -> None:
        raise suite_module.DifferenceError("ties differs", {"ties": 1})

    suite_module.PARTS |= {"equal": fails, "merge": differs, "study": lambda suite: {"seconds": 1.0}}
    suite = suite_module.Suite(torch.device("cpu"), True, tmp_path, suite_module.TINY)
    report = suite_module.run(suite, ["equal", "merge", "study"], 60, tmp_path / "out.json")
    parts = report["parts"]
    assert parts["equal"]["failed"] == "RuntimeError: no kernel image is available"
    assert parts["merge"]["failed"] == "ties differs"
    assert parts["merge"]["figures"] == {"ties": 1}
    assert parts["study"]["figures"] == {"seconds": 1.0}
    assert json.loads((tmp_path / "out.json").read_text()) == report


def test_no_part_begins_when_the_time_is_over(suite_module: ModuleType, tmp_path: Path) -> None:
    suite = suite_module.Suite(torch.device("cpu"), True, tmp_path, suite_module.TINY)
    parts = suite_module.run(suite, ["equal"], -1, None)["parts"]
    assert parts["equal"]["skipped"].endswith("; try --part equal")


@pytest.mark.parametrize(("free", "expected"), [(100, 32), (64, 32), (40, 19), (1, 1)])
def test_models_have_fewer_layers_where_the_disk_is_small(
    suite_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr(suite_module.shutil, "disk_usage", lambda folder: argparse.Namespace(free=free * 2**30))
    shape = suite_module.fitting_shape(False, tmp_path)
    assert shape["num_hidden_layers"] == expected
    n_bytes = 4 * 2 * sum(math.prod(size) for group in suite_module.tensor_shapes(shape) for size in group.values())
    assert expected == 1 or n_bytes < free * 2**30
    (tmp_path / "model_0").mkdir()
    (tmp_path / "model_0" / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 7}))
    (tmp_path / "complete").touch()
    assert suite_module.fitting_shape(False, tmp_path)["num_hidden_layers"] == 7


def test_what_differs_fails_the_part_and_is_named(suite_module: ModuleType, tmp_path: Path) -> None:
    merge_tensors, calls = suite_module.merge_tensors, iter(range(1000))

    def drifts(method: str, *args: object, **options: object) -> torch.Tensor:
        merged: torch.Tensor = merge_tensors(method, *args, **options)
        return merged * (1 + 1e-4 * next(calls)) if method == "linear" else merged

    suite_module.merge_tensors = drifts
    suite_module.METHODS = {name: suite_module.METHODS[name] for name in ("linear", "nearswap", "dare_ties")}
    suite = suite_module.Suite(torch.device("cpu"), True, tmp_path, suite_module.TINY)
    part = suite_module.run(suite, ["equal"], 60, None)["parts"]["equal"]
    assert part["failed"].startswith("linear differs from the CPU's; linear: pieces of 257 elements change the result")
    assert "nearswap" not in part["failed"]
    assert part["figures"]["linear"]["relative_float32"] > 1e-6
    assert part["figures"]["exported"] == 0
