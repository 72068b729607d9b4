"""Check and measure merging and scoring on CUDA, in one call.

    python benchmarks/cuda_suite.py                                    all parts, at the shape of Mistral 7B
    python benchmarks/cuda_suite.py --part equal --part merge
    python benchmarks/cuda_suite.py --device cpu --tiny                the same code, as the test suite runs it

Needs no network and no other file. Models with random weights, a tokenizer and documents are written below ``--folder``
(58 GB; fewer layers if the disk is smaller). Figures go to ``--out`` as JSON after every part. A table is printed last,
with the target of a figure, if it has one, as ``goal``.

A part is skipped, with the reason, if its package is missing or if ``--minutes`` are over when it should begin. A part
that finds a difference or fails does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.inputs import Inputs, fitting_shape
from benchmarks.cuda.measuring import DifferenceError, device_name, empty_caches
from optuna_merge.atomic import write_atomically

PARTS = {
    "equal": "equality",
    "merge": "merging",
    "scoring": "scoring",
    "study": "studies",
    "memory": "studies",
    "faults": "faults",
    "vllm": "studies",
}
"""Name of a part to the file beside this one that has its function ``part_<name>``."""


def main() -> None:
    """Run the parts that the command line asks for and print their figures."""
    options = parse_options()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        inputs = Inputs(options.device, options.tiny, folder, fitting_shape(options.tiny, folder))
        report = run(inputs, options.part or list(PARTS), 60 * options.minutes, options.out)
    show(report)
    if any("failed" in part for part in report["parts"].values()):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    """Read the command line; end with a usage error if the device is missing or a folder cannot be made."""
    parser = argparse.ArgumentParser(
        prog="cuda_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:<index>; default cuda")
    parser.add_argument("--tiny", action="store_true", help="use small sizes, to try the code")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part; repeatable; default all")
    parser.add_argument("--folder", type=Path, help="write models here and keep them; default a temporary folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no part after so many minutes; default 8")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    options.device = parse_device(parser, options.device)
    for option, wanted in (("--folder", options.folder), ("--out", options.out and options.out.parent)):
        try:
            if wanted is not None:
                wanted.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            parser.error(f"{option} must be where files can be written, got {wanted}: {exc.strerror}; choose another")
    return options


def parse_device(parser: argparse.ArgumentParser, text: str) -> torch.device:
    """The device that ``--device`` names; a GPU always with its index."""
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if named is None:
        parser.error(f"--device must be cpu, cuda or cuda:<index>, got {text}")
    if text == "cpu":
        return torch.device("cpu")
    index, n_devices = int(named[1] or 0), torch.cuda.device_count()
    if index >= n_devices:
        found = f"{n_devices} CUDA devices are" if n_devices else "no CUDA device is"
        parser.error(f"--device must be there, got {text}: {found} found; try --device cpu --tiny")
    return torch.device("cuda", index)


def run(inputs: Inputs, parts: list[str], seconds: float, out: Path | None) -> dict[str, Any]:
    """Run parts one after the other and write the report after each.

    Args:
        inputs: Given to every part.
        parts: Names in ``PARTS``.
        seconds: Begin no part later than this.
        out: The report's file; None writes none.

    Returns:
        ``machine``, and for each of ``parts`` its ``seconds`` and ``figures``, ``failed`` or ``skipped``.
    """
    report: dict[str, Any] = {"machine": machine(inputs), "parts": {}}
    began = time.perf_counter()
    for name in parts:
        start = time.perf_counter()
        if start - began > seconds:
            part: dict[str, Any] = {"skipped": f"after {seconds / 60:g} minutes; try --part {name}"}
        else:
            part = run_part(name, inputs)
        empty_caches(inputs.device)
        part["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {part['seconds']} s", file=sys.stderr, flush=True)
        report["parts"][name] = part
        if out is not None:
            write_atomically(out, json.dumps(report, indent=2) + "\n")
    return report


def run_part(name: str, inputs: Inputs) -> dict[str, Any]:
    """Run one part; an error becomes part of the report, because the other parts can still run."""
    try:
        return {"figures": load_part(name)(inputs)}
    except ImportError as exc:
        return {"skipped": f"{exc.name or exc} is missing"}
    except DifferenceError as exc:
        return {"failed": str(exc), "figures": exc.figures}
    except Exception as exc:
        traceback.print_exc()
        return {"failed": f"{type(exc).__name__}: {exc}"}


def load_part(name: str) -> Callable[[Inputs], dict[str, Any]]:
    """Import the function of a part: only now, so that a missing package skips the parts that need it and no other."""
    part: Callable[[Inputs], dict[str, Any]] = getattr(
        importlib.import_module(f"benchmarks.cuda.{PARTS[name]}"), f"part_{name}"
    )
    return part


def machine(inputs: Inputs) -> dict[str, str]:
    """Date, hardware and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(inputs.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": driver(inputs),
        "transformers": version("transformers"),
        "layers": str(inputs.shape["num_hidden_layers"]),
    }


def driver(inputs: Inputs) -> str:
    """The version of NVIDIA's driver."""
    if not inputs.is_cuda or shutil.which("nvidia-smi") is None:
        return "none"
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or "unknown"


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name, part in report["parts"].items():
        print(f"\n{name}: {part.get('skipped') or part.get('failed') or 'passed'}")
        for row, figures in part.get("figures", {}).items():
            values = figures if isinstance(figures, dict) else {"": figures}
            print(f"  {row:34}" + "  ".join(f"{key} {shown(value)}".strip() for key, value in values.items()))


def shown(value: Any) -> str:
    """Four significant digits of a fraction, ``-`` for None."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
