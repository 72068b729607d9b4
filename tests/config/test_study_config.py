"""A whole study file: what its values are, and what it says by leaving them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.read import load_study
from tests.config.study_text import STUDY, TWO_TASKS

ROOT = Path(__file__).parents[2]


# A file as users of mergekit-evolve have: every key it knows, nothing of ours.
EVOLVE = """\
genome:
    models:
      - NousResearch/Hermes-2-Pro-Mistral-7B
      - PocketDoc/Dans-AdventurousWinds-Mk2-7b@main
      - HuggingFaceH4/zephyr-7b-beta
    merge_method: task_arithmetic
    base_model: mistralai/Mistral-7B-v0.1
    tokenizer_source: null
    layer_granularity: 8 # sane default
    allow_negative_weights: true # useful with task_arithmetic
    normalize: false
    smooth: false
    filters:
      - self_attn
      - mlp
tasks:
  - name: alpaca_prompt_format
    weight: 0.4
  - name: spartqa_train
    weight: 0.6
    metric: acc_norm,none
  - name: verbosity
    weight: -0.1
    metric: length,none
limit: 100
num_fewshot: 2
shuffle: true
random_init: false
apply_chat_template: false
fewshot_as_multiturn: false
"""


def test_a_mergekit_evolve_file_loads_as_it_stands(load: Any) -> None:
    config = load(EVOLVE)
    assert config.genome.models == (
        "NousResearch/Hermes-2-Pro-Mistral-7B",
        "PocketDoc/Dans-AdventurousWinds-Mk2-7b@main",
        "HuggingFaceH4/zephyr-7b-beta",
    )
    assert config.genome.base_model == "mistralai/Mistral-7B-v0.1"
    assert config.genome.tokenizer_source is None
    assert (config.genome.layer_granularity, config.genome.filters) == (8, ("self_attn", "mlp"))
    assert (config.genome.allow_negative_weights, config.genome.normalize, config.genome.smooth) == (True, False, False)
    assert [(t.name, t.weight, t.metric) for t in config.tasks] == [
        ("alpaca_prompt_format", 0.4, "acc,none"),
        ("spartqa_train", 0.6, "acc_norm,none"),
        ("verbosity", -0.1, "length,none"),
    ]
    assert (config.limit, config.num_fewshot, config.shuffle, config.random_init) == (100, 2, True, False)
    assert (config.apply_chat_template, config.fewshot_as_multiturn) == (False, False)
    assert config.method.name == "task_arithmetic"


def test_defaults(load: Any, tmp_path: Path) -> None:
    config = load(STUDY)
    assert config.study.name == "my_study"
    assert config.storage_path == tmp_path / "my_study_study"
    assert config.study.sampler.name == "cmaes"
    assert config.study.pruner.name == "wilcoxon"
    assert config.apply_chat_template is None
    assert config.holdout is None
    assert config.dtype is None
    assert config.engine.trust_remote_code is False
    assert config.allow_unsafe_code is False
    assert config.path == tmp_path / "my_study.yaml"


def test_the_config_is_frozen(load: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(STUDY).limit = 3


def test_several_objectives_have_their_own_sampler_and_no_pruner(load: Any) -> None:
    config = load(TWO_TASKS + "study: {goal: pareto}\n")
    assert config.objectives == ("letters", "style")
    assert (config.study.sampler.name, config.study.pruner.name) == ("tpe", "none")
    assert load(TWO_TASKS + "study: {goal: pareto, sampler: nsga2}\n").study.sampler.name == "nsga2"
    assert load(STUDY).objectives == ("score",)


def test_a_task_named_again_with_another_metric_is_an_objective_of_its_own(load: Any) -> None:
    config = load(STUDY + "  - {name: letters, metric: n_tokens, weight: -1}\nstudy: {goal: pareto}\n")
    assert config.objectives == ("letters (acc,none)", "letters (n_tokens)")


def test_relative_paths_start_at_the_file(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    config = load(STUDY + "storage_path: out/here\ntask_search_path: tasks\n")
    assert config.storage_path == tmp_path / "out/here"
    assert config.task_search_path == (tmp_path / "tasks",)
    assert load(STUDY + "storage_path: /abs\n").storage_path == Path("/abs")
    assert load(STUDY, {"storage_path": "x", "task_search_path": ["tasks"]}).storage_path == tmp_path / "x"
    monkeypatch.setenv("HOME", "/home/me")
    assert load(STUDY + "storage_path: ~/x\n").storage_path == Path("/home/me/x")


@pytest.mark.parametrize("text", ["", "study: {sampler: tpe, pruner: none}\nsearch: {prior: isotropic}\n"])
def test_a_config_is_written_as_json_without_a_warning(load: Any, text: str) -> None:
    dumped = load(STUDY + text).model_dump(mode="json")
    assert (dumped["path"], dumped["study"]["name"]) == (str(load(STUDY).path), "my_study")


def test_sources_leave_out_the_base_where_it_has_no_task_vector(load: Any) -> None:
    text = STUDY.replace("[a, b]", "[a, base, b]")
    assert load(text).sources == ("a", "b")
    assert load(text.replace("task_arithmetic", "linear")).sources == ("a", "base", "b")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_the_study_files_of_the_repository_load(path: Path) -> None:
    config = load_study(path)
    assert config.study.name == path.stem
    assert path.read_text().splitlines()[0].startswith("# ")
    assert path.read_text().splitlines()[0].endswith("?")
    for folder in config.task_search_path:
        assert folder.is_dir()


def test_a_relative_storage_starts_at_the_file(load: Any, tmp_path: Path) -> None:
    assert load(STUDY + "study: {storage: 'sqlite:///s.db'}\n").study.storage == f"sqlite:///{tmp_path}/s.db"
