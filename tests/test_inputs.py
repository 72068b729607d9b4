"""Checkpoints as users have them, through the command line: merged, scored, exported and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.testing.models import write_tiny_models
from tests.study.test_replay import plain_lm_eval


@pytest.mark.parametrize("kind", ["experts", "stored rotary frequencies"])
def test_a_study_of(kind: str, study_file: Callable[..., Path], tmp_path: Path) -> None:
    base, models = write_tiny_models(tmp_path, 2, "mixtral" if kind == "experts" else "llama", n_layers=2)
    if kind != "experts":
        tensors = load_file(models[0] / "model.safetensors")
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        save_file(tensors, models[0] / "model.safetensors", {"format": "pt"})
    genome = {"models": list(map(str, models)), "base_model": str(base), "merge_method": "task_arithmetic"}
    file = study_file(genome=genome, study={"name": "tiny", "n_trials": 6, "n_chunks": 2}, holdout=None)
    for command in (["check", str(file)], ["run-study", str(file)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    done = CliRunner().invoke(app, ["export", str(file), str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0, done.output
    exported = json.loads(done.stdout)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == load_file(base / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    accuracies = plain_lm_eval(
        tmp_path / "merged", tmp_path / "tasks", {"one": list(range(40)), "two": list(range(40))}
    )
    assert exported["score"] == pytest.approx(0.5 * accuracies["one"] + 0.5 * accuracies["two"], abs=1e-12)
