from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.output_heads import untie
from optuna_merge.checkpoints.unify import unify
from optuna_merge.checkpoints.vocabulary import AlignedCheckpoint, align
from optuna_merge.cli.options import open_started
from optuna_merge.errors import CheckpointError
from optuna_merge.merging.export import export
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.testing.models import write_tiny_models
from tests.study.test_replay import plain_lm_eval

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def extend(source: Path, folder: Path, tokens: list[str], swap: tuple[str, str] | None = None) -> Path:
    """A copy of a model with more tokens at the end, each with a row of its own, and maybe two ids exchanged."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    n = tensors[VOCABULARY[0]].shape[0]
    for offset, token in enumerate(tokens):
        entry = {"id": n + offset, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**entry, "normalized": False, "special": True})
        for name in VOCABULARY:
            row = torch.full((1, tensors[name].shape[1]), float(len(token) + offset))
            tensors[name] = torch.cat([tensors[name], row])
    if swap is not None:
        vocab = tokenizer["model"]["vocab"]
        one, two = vocab[swap[0]], vocab[swap[1]]
        vocab[swap[0]], vocab[swap[1]] = two, one
        for name in VOCABULARY:
            tensors[name][[one, two]] = tensors[name][[two, one]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": n + len(tokens)}))
    return folder


@pytest.fixture
def checkpoints(tiny_models: Path, tmp_path: Path) -> dict[str, Checkpoint]:
    paths = {
        "base": tiny_models / "base",
        "more": extend(tiny_models / "model_0", tmp_path / "more", ["<|im_start|>", "<|im_end|>"]),
        "swapped": extend(tiny_models / "model_1", tmp_path / "swapped", ["<|im_end|>"], swap=("!", "#")),
    }
    return {name: Checkpoint.open(str(path)) for name, path in paths.items()}


def recipe(base: str, models: tuple[str, ...], source: str | None) -> Recipe:
    weights = ParameterSet(None, {"lambda": 1.0}, {"weight": (0.6, 0.7)})
    groups = (GroupRecipe("layers_00_01", (0, 2), ("embedding", "head"), (weights,)),)
    return Recipe("task_arithmetic", models, base, 2, groups, {"normalize": False}, tokenizer_source=source)


def run_mergekit(
    wanted: Recipe, checkpoints: dict[str, Checkpoint], folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int] | None]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    references = {name: str(checkpoint.path) for name, checkpoint in checkpoints.items()}
    text = to_mergekit(wanted, references=references)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder), MergeOptions(quiet=True))
    return load_file(folder / "model.safetensors"), Checkpoint.open(str(folder)).vocabulary()


def test_rows_follow_their_tokens(checkpoints: dict[str, Checkpoint]) -> None:
    aligned = align(checkpoints, "base")
    assert aligned["base"] is checkpoints["base"]
    tokens = checkpoints["base"].vocabulary()
    for name in VOCABULARY:
        theirs, ours = checkpoints["swapped"].get(name), aligned["swapped"].get(name)
        assert aligned["swapped"].shape(name) == tuple(ours.shape) == checkpoints["base"].shape(name)
        for token, row in tokens.items():
            assert torch.equal(ours[row], theirs[checkpoints["swapped"].vocabulary()[token]])
    assert torch.equal(aligned["more"].get("model.norm.weight"), checkpoints["more"].get("model.norm.weight"))


def test_a_token_that_a_model_lacks(checkpoints: dict[str, Checkpoint]) -> None:
    """By hand: from the only model that has it, or else the mean of those that have it."""
    aligned = align(checkpoints, "more")
    rows = checkpoints["more"].vocabulary()
    start, end = rows["<|im_start|>"], rows["<|im_end|>"]
    head = {name: checkpoint.get("lm_head.weight") for name, checkpoint in aligned.items()}
    assert all(tensor.shape[0] == 322 for tensor in head.values())
    assert torch.equal(head["base"][start], torch.full((16,), 12.0))
    assert torch.equal(head["swapped"][start], torch.full((16,), 12.0))
    assert torch.equal(head["swapped"][end], torch.full((16,), 10.0))
    assert torch.equal(head["more"][end], torch.full((16,), 11.0))
    assert torch.equal(head["base"][end], torch.full((16,), 10.5))


def test_equal_vocabularies_are_left_alone(tiny_models: Path) -> None:
    models = {name: Checkpoint.open(str(tiny_models / name)) for name in ("base", "model_0")}
    assert align(models, "base") == models
    assert not any(isinstance(checkpoint, AlignedCheckpoint) for checkpoint in align(models, "model_0").values())
    assert align(models, None) == models


@pytest.mark.parametrize("source", ["base", "more", "swapped"])
def test_the_merge_is_mergekits(checkpoints: dict[str, Checkpoint], source: str, tmp_path: Path) -> None:
    ours = dict(Merger(checkpoints, tokenizer_source=source).merge(recipe("base", ("more", "swapped"), source)))
    theirs, _ = run_mergekit(recipe("base", ("more", "swapped"), source), checkpoints, tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_without_a_source_they_are_refused(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="set tokenizer_source"):
        Merger(checkpoints)


def test_a_source_that_is_none(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="must be base, union or one of base, more, swapped, got nobody"):
        align(checkpoints, "nobody")


def test_views_are_views_of_themselves(checkpoints: dict[str, Checkpoint]) -> None:
    for source in ("base", "more", "union"):
        views = unify(checkpoints, source)
        assert unify(views, source) == views


def test_the_union_has_the_tokens_of_all(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoints["more"] = Checkpoint.open(
        str(extend(checkpoints["swapped"].path, tmp_path / "most", ["<new>", "<|im_start|>"]))
    )
    views = unify(checkpoints, "union")
    base = checkpoints["base"].vocabulary()
    vocabulary = base | {"<|im_end|>": 320, "<new>": 321, "<|im_start|>": 322}
    assert all(view.vocabulary() == vocabulary for view in views.values())
    assert all(view.shape(name) == (323, 16) for view in views.values() for name in VOCABULARY)
    folder = tmp_path / "described"
    folder.mkdir()
    views["base"].write_description(folder, "float32", copy_code=False)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 323
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == vocabulary
    assert tokenizer("the<new> cat<|im_end|>")["input_ids"].count(321) == 1
    assert "<|im_end|>" in tokenizer.decode(tokenizer("a<|im_end|>")["input_ids"])
    assert "<|im_end|>" not in tokenizer.decode([320], skip_special_tokens=True)


@pytest.mark.parametrize("padded", [False, True])
def test_the_union_is_mergekits(checkpoints: dict[str, Checkpoint], padded: bool, tmp_path: Path) -> None:
    if padded:  # rows without a token are kept, where mergekit drops them
        path = extend(checkpoints["base"].path, tmp_path / "padded", ["x"] * 7)
        shutil.copy(checkpoints["base"].path / "tokenizer.json", path)
        checkpoints["base"] = Checkpoint.open(str(path))
    wanted = recipe("base", ("more", "swapped"), "union")
    merger = Merger(checkpoints, tokenizer_source="union")
    ours, vocabulary = dict(merger.merge(wanted)), merger.template(wanted).vocabulary()
    theirs, their_vocabulary = run_mergekit(wanted, checkpoints, tmp_path / "out")
    assert vocabulary.keys() == their_vocabulary.keys()
    for name, tensor in theirs.items():
        if name not in VOCABULARY:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
            continue
        assert len(ours[name]) == (327 if padded else 322)
        for token, row in vocabulary.items():
            torch.testing.assert_close(ours[name][row], tensor[their_vocabulary[token]], rtol=1e-6, atol=1e-6)


def recipe_of_ties(base: str | None) -> Recipe:
    weights = ParameterSet(None, {}, {"weight": (0.6, 0.7)})
    groups = (GroupRecipe("layers_00_01", (0, 2), ("embedding", "head"), (weights,)),)
    return Recipe("linear" if base is None else "task_arithmetic", ("tied", "untied"), base, 2, groups)


@pytest.fixture
def half_tied(tmp_path: Path) -> dict[str, Checkpoint]:
    """A tied base and a tied model, and one whose head is its own."""
    tied, (model,) = write_tiny_models(tmp_path / "a", 1, "qwen2", n_layers=2, tied=True)
    _, (untied,) = write_tiny_models(tmp_path / "b", 1, "qwen2", n_layers=2, tied=False, spread=0.2)
    paths = {"base": tied, "tied": model, "untied": untied}
    return {name: Checkpoint.open(str(path)) for name, path in paths.items()}


@pytest.mark.parametrize("base", [None, "base"])
def test_one_untied_model_unties_the_merge(base: str | None, half_tied: dict[str, Checkpoint], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoints = {name: c for name, c in half_tied.items() if name != "base" or base}
    wanted = recipe_of_ties(base)
    merger = Merger(checkpoints)
    ours = dict(merger.merge(wanted))
    assert set(ours) == set(half_tied["untied"].names)
    assert not torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    theirs, _ = run_mergekit(wanted, checkpoints, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)

    folder = export(wanted, tmp_path / "out", merger=merger)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, ours["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, ours["model.embed_tokens.weight"])


def test_ties_that_all_have_stay(half_tied: dict[str, Checkpoint]) -> None:
    tied = {name: half_tied[name] for name in ("base", "tied")}
    assert untie(tied) == tied


def test_a_missing_head_is_no_tie(half_tied: dict[str, Checkpoint]) -> None:
    path = half_tied["tied"].path
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    checkpoints = {"untied": half_tied["untied"], "tied": Checkpoint.open(str(path))}
    with pytest.raises(CheckpointError, match=r"lm_head.weight: must be in every model, is in .* but not in"):
        Merger(checkpoints)


def study(study_file: Callable[..., Path], checkpoints: dict[str, Checkpoint], **genome: object) -> MergeObjective:
    models = [str(checkpoint.path) for checkpoint in list(checkpoints.values())[1:]]
    base = str(checkpoints["base"].path)
    genome = {"models": models, "base_model": base, "merge_method": "task_arithmetic", **genome}
    objective = MergeObjective.from_file(study_file(genome=genome, study={"n_trials": 6, "n_chunks": 2}, holdout=None))
    run_study(objective.config, objective)
    return objective


@pytest.mark.parametrize("kind", ["union", "ties"])
def test_a_study_scores_what_it_exports(
    kind: str,
    checkpoints: dict[str, Checkpoint],
    half_tied: dict[str, Checkpoint],
    study_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    if kind == "union":
        objective = study(study_file, checkpoints, tokenizer_source="union")
    else:
        objective = study(study_file, half_tied)
    last = open_started(objective.config).trials[-1]
    objective.load(objective.recipe(last))
    folder = export(objective.recipe(last), tmp_path / "merged", merger=objective.loader.merger)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(objective.loader.engine.resident(name), tensor)
    tasks = {"one": list(range(40)), "two": list(range(40))}
    accuracies = plain_lm_eval(folder, tmp_path / "tasks", tasks)
    assert accuracies == {task: last.user_attrs[f"score {task}"] for task in tasks}


def test_a_model_without_a_tokenizer(checkpoints: dict[str, Checkpoint]) -> None:
    for file in checkpoints["more"].path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="must have a tokenizer for tokenizer_source, found none; add it"):
        align(checkpoints, "base")
