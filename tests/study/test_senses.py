"""A study that merges language models with one that also sees: checked, run, exported, and scored by lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.errors import EngineError
from optuna_merge.merging.export import export
from optuna_merge.study.check import check_study
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from tests.architectures.tiny import write_vision_models
from tests.study.test_replay import searched_documents


def accuracies(folder: Path, tasks: Path, documents: dict[str, list[int]]) -> dict[str, float]:
    """According to lm-eval, of the whole model as transformers loads it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(pretrained=model, backend="causal", tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = lm_eval.simple_evaluate(
        lm, tasks=list(documents), task_manager=manager, samples=documents, bootstrap_iters=0, log_samples=False
    )
    return {task: found["results"][task]["acc,none"] for task in documents}


def test_a_study_searches_the_language_part(study_file: Callable[..., Path], tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("gemma3", tmp_path / "models")
    genome = {"models": [str(whole), str(second)], "base_model": str(first), "merge_method": "task_arithmetic"}
    search = {"start": "ascent", "profile": "tensor"}
    file = study_file(16, genome=genome, search=search, study={"name": "vlm", "n_trials": 8, "seed": 3, "n_chunks": 2})

    copied = check_study(load_study(file)).copied
    stored, language = (load_file(path / "model.safetensors") for path in (whole, first))
    assert copied is not None
    assert set(copied["names"]) == {name for name in stored if not name.startswith("language_model.")}
    assert copied["parts"] == ["multi_modal_projector", "vision_tower"]
    shown = CliRunner().invoke(app, ["check", str(file)])
    assert f"copied     {len(stored) - len(language)} tensors of {whole}, " in shown.output
    assert f"tensors    {len(language)} in each" in shown.output

    objective = MergeObjective.from_file(file)
    run_study(objective.config, objective)
    trials = [trial for trial in open_started(objective.config).trials if trial.state.name == "COMPLETE"]
    ascents = [trial for trial in trials if "ascent" in trial.user_attrs]
    assert len(ascents) == 1
    assert trials[-1] is not ascents[0]
    documents = searched_documents(objective)
    for trial in [ascents[0], trials[-1]]:
        folder = export(objective.recipe(trial), tmp_path / f"trial_{trial.number}", merger=objective.loader.merger)
        found = accuracies(folder, tmp_path / "tasks", documents)
        assert found == {task: trial.user_attrs[f"score {task}"] for task in documents}
        written = load_file(folder / "model.safetensors")
        assert all(torch.equal(written[name], stored[name]) for name in copied["names"])
        assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"


def test_vllm_is_refused(study_file: Callable[..., Path], tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("llava", tmp_path / "models")
    genome = {"models": [str(first), str(second)], "base_model": str(whole), "merge_method": "ties"}
    config = load_study(study_file(genome=genome, engine={"backend": "vllm"}))
    with pytest.raises(EngineError, match=rf"backend must be hf when .* with {whole}, which sees or hears, got vllm"):
        check_study(config)
