"""The CUDA suite runs on the CPU at small sizes; each way that a part can end is reported."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.cuda import equality, suite
from benchmarks.cuda.inputs import TINY, Inputs, fitting_shape, tensor_shapes
from benchmarks.cuda.measuring import DifferenceError
from benchmarks.cuda.scoring import counted_passes
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.testing.conformance import TextRequest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(torch.device("cpu"), True, tmp_path, TINY)


def start(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the documented line from the repository's root."""
    line = [sys.executable, "benchmarks/cuda_suite.py", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    result = start("--device", "cpu", "--tiny", "--out", out, OMP_NUM_THREADS="1")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "no CUDA device is found; try --device cpu --tiny"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:<index>, got tpu"),
        (["--device", "cpu", "--folder", "README.md"], "--folder must be where files can be written, got README.md"),
        (["--device", "cpu", "--part", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["cuda_suite.py", *arguments])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_entry_does_not_hide_nvidias_package() -> None:
    """torch imports ``cuda.bindings``, which a folder ``cuda`` at the head of the path would hide."""
    code = "import sys; sys.argv = ['cuda_suite.py', '--help']; import runpy\n"
    code += "try: runpy.run_path('benchmarks/cuda_suite.py', run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "import importlib.util; print(repr(importlib.util.find_spec('cuda')), file=sys.stderr)"
    path = str(ROOT / "benchmarks")  # what Python puts first when it starts the script
    line = [sys.executable, "-c", f"import sys; sys.path[0] = {path!r}\n{code}"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
    assert path not in result.stderr
    assert "--minutes" in result.stdout


def test_a_part_that_fails_leaves_the_others_and_what_was_found(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Inputs) -> dict[str, Any]:
        raise RuntimeError("no kernel image is available")

    def differs(_: Inputs) -> dict[str, Any]:
        raise DifferenceError("ties differs", {"ties": 1})

    def lacks(_: Inputs) -> dict[str, Any]:
        raise ImportError(name="lm_eval")

    parts: dict[str, Callable[[Inputs], dict[str, Any]]]
    parts = {"equal": fails, "merge": differs, "scoring": lacks, "study": lambda _: {"seconds": 1.0}}
    monkeypatch.setattr(suite, "load_part", parts.get)
    report = suite.run(inputs, list(parts), 60, tmp_path / "out.json")
    found = report["parts"]
    assert found["equal"]["failed"] == "RuntimeError: no kernel image is available"
    assert found["merge"]["failed"] == "ties differs"
    assert found["merge"]["figures"] == {"ties": 1}
    assert found["scoring"]["skipped"] == "lm_eval is missing"
    assert found["study"]["figures"] == {"seconds": 1.0}
    assert json.loads((tmp_path / "out.json").read_text()) == report


@pytest.mark.parametrize("name", suite.PARTS)
def test_each_part_has_its_function(name: str) -> None:
    assert callable(suite.load_part(name))


def test_no_part_begins_when_the_time_is_over(inputs: Inputs) -> None:
    parts = suite.run(inputs, ["equal"], -1, None)["parts"]
    assert parts["equal"]["skipped"].endswith("; try --part equal")


@pytest.mark.parametrize(("free", "expected"), [(100, 32), (64, 32), (40, 19), (1, 1)])
def test_models_have_fewer_layers_where_the_disk_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=free * 2**30))
    shape = fitting_shape(False, tmp_path)
    assert shape["num_hidden_layers"] == expected
    n_bytes = 4 * 2 * sum(math.prod(size) for group in tensor_shapes(shape) for size in group.values())
    assert expected == 1 or n_bytes < free * 2**30
    (tmp_path / "model_0").mkdir()
    (tmp_path / "model_0" / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 7}))
    (tmp_path / "complete").touch()
    assert fitting_shape(False, tmp_path)["num_hidden_layers"] == 7


def test_what_differs_fails_the_part_and_is_named(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_tensors, calls = equality.merge_tensors, iter(range(1000))

    def drifts(method: str, *args: Any, **options: Any) -> torch.Tensor:
        merged = merge_tensors(method, *args, **options)
        return merged * (1 + 1e-4 * next(calls)) if method == "linear" else merged

    monkeypatch.setattr(equality, "merge_tensors", drifts)
    methods = {name: equality.METHODS[name] for name in ("linear", "nearswap", "dare_ties")}
    monkeypatch.setattr(equality, "METHODS", methods)
    part = suite.run(inputs, ["equal"], 60, None)["parts"]["equal"]
    assert part["failed"].startswith("linear differs from the CPU's; linear: pieces of 257 elements change the result")
    assert "nearswap" not in part["failed"]
    assert part["figures"]["linear"]["relative_float32"] > 1e-6
    assert part["figures"]["exported"] == 0


def test_placements_and_an_export_that_differ_are_named(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    open_merger, opened = equality.open_merger, iter(range(100))

    def drifts(inputs: Inputs, recipe: Any, placement: Any) -> Any:
        merger = open_merger(inputs, recipe, placement)
        if next(opened) % 2:
            merge = merger.merge
            monkeypatch.setattr(merger, "merge", lambda *args: ((name, 2 * t) for name, t in merge(*args)))
        return merger

    monkeypatch.setattr(equality, "open_merger", drifts)
    monkeypatch.setattr(equality, "METHODS", {})
    part = suite.run(inputs, ["equal"], 60, None)["parts"]["equal"]
    assert "model.layers.0.mlp.up_proj.weight: differs between sources on ['disk', 'host']" in part["failed"]
    assert part["failed"].endswith("exported tensors differ from the resident ones")
    assert part["figures"]["exported"] > 0


def test_forward_passes_of_the_model_are_counted(inputs: Inputs) -> None:
    engine = HFEngine(inputs.models[0], dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(inputs.models[0], dtype=torch.float32)
    engine.load_weights(model.state_dict().items())
    requests = [TextRequest("loglikelihood", ("cat", f" {number}")) for number in ("one", "two")]
    prepared = engine.prepare(requests)
    engine.respond(prepared)  # the first call also checks once whether contexts can be shared
    with counted_passes(type(model)) as passes:
        engine.respond(prepared)
    assert len(passes) == 1
