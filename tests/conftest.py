"""Fixtures: tiny models, two eval tasks whose documents are made on the spot, and a study file over them."""

from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from optuna_merge.testing.models import write_tiny_models

# a shell's background process ignores it, and so would the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

TASK_HELPER = """
import datasets


def documents(**_):
    rows = [{"question": f"Question {name} {i}:", "gold": {gold}} for i in range({n})]
    return {"test": datasets.Dataset.from_list(rows)}


def choices(doc):
    return ["right", "dog", "one two", "seven"]
"""

TASK = """
task: {name}
custom_dataset: !function {name}_helper.documents
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: !function {name}_helper.choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, name: str, n: int = 40, gold: str = "i % 4") -> None:
    """Write a four-choice eval task whose documents come from code.

    Args:
        folder: Where its two files are written.
        name: Of the eval task.
        n: Number of documents.
        gold: Python expression for the index of the right choice in document ``i``.
    """
    folder.mkdir(exist_ok=True)
    helper = TASK_HELPER.replace("{name}", name).replace("{n}", str(n)).replace("{gold}", gold)
    (folder / f"{name}_helper.py").write_text(helper)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name))


def pytest_collection_finish() -> None:
    """Spare the garbage collector all that importing has made; it would look through it at the end of each study."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests a plain run leaves out; those that are skipped name what they need in their reasons above."""
    if "not vllm" in terminalreporter.config.option.markexpr:
        terminalreporter.write_line(
            "deselected: the tests of the vLLM engine (make test-vllm installs vLLM and runs them) and of the wheel"
            " (make test-wheel)"
        )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and the sources ``model_0`` and ``model_1``, fine-tunes of it: Llamas of two layers."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder, 2, n_layers=2, spread=0.3)
    return folder


@pytest.fixture
def study_file(tmp_path: Path, tiny_models: Path) -> Callable[..., Path]:
    """A function that writes two eval tasks and a study file over the tiny models.

    Its keywords replace keys of the study file; None removes a key.
    """

    def write(n_documents: int = 40, gold: str = "i % 4", **changes: Any) -> Path:
        write_task(tmp_path / "tasks", "one", n_documents, gold)
        write_task(tmp_path / "tasks", "two", n_documents, gold)
        data: dict[str, Any] = {
            "genome": {
                "models": [str(tiny_models / "model_0"), str(tiny_models / "model_1")],
                "base_model": str(tiny_models / "base"),
                "merge_method": "task_arithmetic",
                "layer_granularity": 1,
            },
            "tasks": [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}],
            "study": {"name": "tiny", "n_trials": 10, "seed": 3, "n_chunks": 5},
            "engine": {"device": "cpu", "dtype": "float32"},
            "holdout": 0.25,
            "task_search_path": "tasks",
            "storage_path": "out",
            **changes,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
        return path

    return write
