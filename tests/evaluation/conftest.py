"""Task files, a tiny model with a chat template, and its engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.testing.models import write_tiny_models
from tests.evaluation.task_files import TEMPLATE, write_all, write_task


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval") / "tasks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, [folder] = write_tiny_models(tmp_path_factory.mktemp("models"), 1, spread=0.4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> HFEngine:
    engine = HFEngine(model, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    return engine


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    write_task(folder, "right", n_documents=200, doc_to_choice=["right", "wrong"], doc_to_target=0)
    write_task(folder, "rarely", n_documents=100, doc_to_choice=["right", "wrong", "bad"], doc_to_target=0)
    return folder
