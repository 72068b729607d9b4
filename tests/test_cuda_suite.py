from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    line = [sys.executable, ROOT / "benchmarks" / "cuda_suite.py", "--device", "cpu", "--tiny", "--out", out]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads(out.read_text())["parts"]
    assert {name for name, part in parts.items() if "figures" in part} == {
        "equal", "merge", "scoring", "study", "memory", "faults"
    }  # fmt: skip
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
