"""Every recorded trial exports to the model that was scored; lm-eval and mergekit confirm it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optuna_merge.cli.options import open_started
from optuna_merge.merging.export import export
from optuna_merge.storage.trials import best_merge
from optuna_merge.study.folder import BEST_CONFIG
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study


def run(file: Path) -> MergeObjective:
    objective = MergeObjective.from_file(file)
    run_study(objective.config, objective)
    return objective


def searched_documents(objective: MergeObjective) -> dict[str, list[int]]:
    results = [objective.scorer.score_chunk(chunk) for chunk in range(objective.scorer.n_chunks)]
    ids: dict[str, list[int]] = {}
    for result in results:
        for task, columns in result.documents.items():
            ids.setdefault(task, []).extend(columns["doc_id"])
    return {task: sorted(doc_ids) for task, doc_ids in ids.items()}


def plain_lm_eval(folder: Path, tasks: Path, documents: dict[str, list[int]]) -> dict[str, float]:
    """Accuracies according to transformers and lm-eval, without our code."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8)
    found: Any = lm_eval.simple_evaluate(
        lm,
        tasks=list(documents),
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        samples=documents,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {task: found["results"][task]["acc,none"] for task in documents}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_every_trials_score_is_what_plain_lm_eval_says_of_its_export(
    method: str, study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    genome: dict[str, Any] = {"models": [str(tiny_models / f"model_{i}") for i in range(2)], "layer_granularity": 1}
    genome |= {"merge_method": method, "allow_negative_weights": True}
    if method == "task_arithmetic":
        genome["base_model"] = str(tiny_models / "base")
    objective = run(study_file(genome=genome, study={"n_trials": 9, "seed": 1, "n_chunks": 4}))
    documents = searched_documents(objective)
    assert all(len(ids) == 30 for ids in documents.values())
    for trial in open_started(objective.config).trials:
        folder = export(objective.recipe(trial), tmp_path / f"trial_{trial.number}", merger=objective.loader.merger)
        accuracies = plain_lm_eval(folder, tmp_path / "tasks", documents)
        assert accuracies == {task: trial.user_attrs[f"score {task}"] for task in documents}
        assert trial.value == pytest.approx(0.5 * accuracies["one"] + 0.5 * accuracies["two"], abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("embed_group", ["shared", "own"])
def test_mergekit_makes_the_exported_tensors_from_best_config(
    dtype: str, embed_group: str, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # The first trials are uniform merges; the last one has a weight of its own in each group.
    search = {"embed_group": embed_group, "weight": {"low": 0.0, "high": 1.5}}
    objective = run(
        study_file(
            engine={"dtype": dtype, "device": "cpu"},
            search=search,
            study={"name": "tiny", "n_trials": 12, "seed": 2, "n_chunks": 2},
        )
    )
    study = open_started(objective.config)
    last = study.trials[-1]
    assert len(set(last.params.values())) == len(last.params)
    file = objective.config.storage_path / BEST_CONFIG
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(objective.merge_file(best_merge(study)))
    config = MergeConfiguration.model_validate(yaml.safe_load(objective.merge_file(last)))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    export(objective.recipe(last), tmp_path / "ours", merger=objective.loader.merger)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    n_different = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == getattr(torch, dtype)
        if dtype == "float32":
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
        else:
            different = tensor != theirs[name]
            n_different += int(different.sum())
            ulp = (tensor.view(torch.int16).int() - theirs[name].view(torch.int16).int()).abs()
            assert int(ulp.max()) <= 1
    assert n_different <= sum(tensor.numel() for tensor in ours.values()) / 10_000


def test_the_resident_weights_are_the_exported_ones(study_file: Callable[..., Path], tmp_path: Path) -> None:
    objective = MergeObjective.from_file(study_file(engine={"dtype": "bfloat16", "device": "cpu"}))
    recipe = objective.space.decode({name: 0.1 + i / 7 for i, name in enumerate(objective.space.distributions)})
    objective.load(recipe)
    folder = export(recipe, tmp_path / "merged", merger=objective.loader.merger)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(objective.loader.engine.resident(name), tensor)


def test_a_seed_makes_the_same_study_again(study_file: Callable[..., Path]) -> None:
    one = run(study_file(study={"name": "tiny", "n_trials": 9, "seed": 5, "n_chunks": 2}, storage_path="a"))
    two = run(study_file(study={"name": "tiny", "n_trials": 9, "seed": 5, "n_chunks": 2}, storage_path="b"))
    trials = [open_started(load.config).trials for load in (one, two)]
    assert [t.params for t in trials[0]] == [t.params for t in trials[1]]
    assert [t.value for t in trials[0]] == [t.value for t in trials[1]]
