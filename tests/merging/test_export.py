from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import ExportError, MergeError
from optuna_merge.merging import whole_folder
from optuna_merge.merging.export import export
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Dtype, GroupRecipe, ParameterSet, Recipe
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models
from tests import processes
from tests.processes import obeying_permissions


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    base, models = write_tiny_models(tmp_path_factory.mktemp("tiny"), 2)
    return tuple(map(str, (base, *models)))


def recipe_of(references: tuple[str, ...], dtype: Dtype = "float32") -> Recipe:
    group = GroupRecipe(
        "layers_00_02", (0, 3), ("embedding", "head"), (ParameterSet(None, {}, {"weight": (0.3, 0.9)}),)
    )
    return Recipe("task_arithmetic", references[1:], references[0], 3, (group,), dtype=dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folder_loads_and_holds_the_merged_bits(architecture: TinyArchitecture, dtype: Dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, models = write_tiny_models(tmp_path, 2, architecture, tied=True if architecture == "qwen2" else None)
    own = tuple(map(str, (base, *models)))
    merger = Merger.open(own)
    recipe = recipe_of(own, dtype)
    folder = export(recipe, tmp_path / "out", merger=merger, max_shard_bytes=20_000)
    written = Checkpoint.open(str(folder))
    assert len(written.files) > 1
    for name, tensor in merger.merge(recipe):
        assert torch.equal(written.get(name), tensor)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert model(**tokenizer("the cat", return_tensors="pt")).logits.isfinite().all()
    assert (folder / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_card_and_merge_file_say_what_it_is(references: tuple[str, ...], tmp_path: Path) -> None:
    recipe = recipe_of(references)
    folder = export(
        recipe, tmp_path / "my-merge", merger=Merger.open(references), comment=["trial 7"], results="| a | b |\n"
    )
    merger = Merger.open(references)
    merge_file = (folder / "mergekit_config.yml").read_text()
    assert merge_file.startswith("# trial 7\nmerge_method: task_arithmetic\n")
    assert merge_file == to_mergekit(recipe, names=merger.names, architecture="LlamaForCausalLM", comment=["trial 7"])
    card = (folder / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["tags"] == ["merge", "mergekit", "optuna-merge"]
    assert "base_model" not in yaml.safe_load(metadata)
    assert text.startswith("\n# my-merge\n")
    assert "| a | b |" in text
    assert merge_file.rstrip() in text
    assert all(reference in text for reference in references)


def test_card_names_models_of_the_hub(references: tuple[str, ...], tmp_path: Path) -> None:
    checkpoints = {f"org/m{i}@abc": Checkpoint.open(reference) for i, reference in enumerate(references)}
    spellings = {name: name.replace("@abc", "@main") for name in checkpoints}
    folder = export(recipe_of(tuple(checkpoints)), tmp_path / "out", merger=Merger(checkpoints), references=spellings)
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert metadata["base_model"] == ["org/m0", "org/m1", "org/m2"]
    assert "model: org/m1@main\n" in (folder / "mergekit_config.yml").read_text()


def test_models_own_code_is_copied_only_if_asked(tmp_path: Path) -> None:
    base, models = write_tiny_models(tmp_path, 2)
    (base / "modeling_x.py").write_text("")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "torch_dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    own = tuple(map(str, (base, *models)))
    plain = export(recipe_of(own), tmp_path / "plain", merger=Merger.open(own))
    assert not (plain / "modeling_x.py").exists()
    written = json.loads((plain / "config.json").read_text())
    assert "auto_map" not in written
    assert (written["dtype"], "torch_dtype" in written) == ("float32", False)
    with_code = export(recipe_of(own), tmp_path / "code", merger=Merger.open(own), copy_code=True)
    assert (with_code / "modeling_x.py").exists()
    assert "auto_map" in json.loads((with_code / "config.json").read_text())


def test_a_folder_with_files_is_kept_unless_told_otherwise(references: tuple[str, ...], tmp_path: Path) -> None:
    merger = Merger.open(references)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match=r"out: must be empty or new, got a folder with files"):
        export(recipe_of(references), out, merger=merger)
    with pytest.raises(ExportError, match=r"mine.txt: must be a folder or a new name, got a file"):
        export(recipe_of(references), out / "mine.txt", merger=merger)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    with pytest.raises(ExportError, match=r"out: must be an earlier export to be replaced, got a folder without merge"):
        export(recipe_of(references), out, merger=merger, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    exported = export(recipe_of(references), tmp_path / "exported", merger=merger)
    (exported / "mine.txt").write_text("stale")
    export(recipe_of(references), exported, merger=merger, overwrite=True)
    assert not (exported / "mine.txt").exists()
    assert (exported / "model.safetensors").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exported", "out"]


def test_a_model_that_is_merged_is_not_replaced(references: tuple[str, ...], tmp_path: Path) -> None:
    first = export(recipe_of(references), tmp_path / "first", merger=Merger.open(references))
    again = (references[0], str(first), references[2])
    for folder in (first, tmp_path):
        (folder / "mergekit_config.yml").touch()
        with pytest.raises(ExportError, match=r"must hold none of the models that are merged, got one"):
            export(recipe_of(again), folder, merger=Merger.open(again), overwrite=True)
    assert (first / "model.safetensors").exists()


def test_nothing_is_left_when_the_disk_is_full(
    references: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("optuna_merge.checkpoints.write.save_file", full)
    with pytest.raises(
        ExportError, match=r"out: must be writable, got: No space left on device \(ENOSPC\); nothing was"
    ):
        export(recipe_of(references), tmp_path / "out", merger=Merger.open(references))
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_one_line(references: tuple[str, ...], tmp_path: Path) -> None:
    merger = Merger.open(references)
    with processes.files_up_to(10_000), pytest.raises(ExportError, match="must be writable, got:") as caught:
        export(recipe_of(references), tmp_path / "out", merger=merger)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_one_line(references: tuple[str, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with obeying_permissions(), pytest.raises(ExportError, match=r"must be writable, got: Permission denied"):
            export(recipe_of(references), tmp_path / "out", merger=Merger.open(references))
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file_is_one_line(references: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"must be writable, got: (Not a directory|File exists) \(E"):
        export(recipe_of(references), tmp_path / "file" / "out", merger=Merger.open(references))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MergeError])
def test_an_interrupted_export_leaves_nothing(
    error: type[BaseException], references: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args: object) -> None:
        raise error

    monkeypatch.setattr("optuna_merge.merging.merger.Merger._merge_tensor", stops)
    with pytest.raises(error):
        export(recipe_of(references), tmp_path / "out", merger=Merger.open(references))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_whole(references: tuple[str, ...], tmp_path: Path) -> None:
    def die() -> None:
        whole_folder._flush = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        export(recipe_of(references), tmp_path / "out", merger=Merger.open(references))

    with processes.forked(die) as [process]:
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.")
    assert left.name.endswith(".partial")
    export(recipe_of(references), tmp_path / "out", merger=Merger.open(references))


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_step_of_replacing_a_folder_loses_neither(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:  # as on a file system that cannot exchange two names, such as NFS
        monkeypatch.setattr(whole_folder, "_exchange", lambda first, second: False)
    folder = tmp_path / "out.put"
    states = set()
    for step in range(100):
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        folder.mkdir()
        (folder / "text").write_text("old")
        process = processes.start(lambda step=step: replace_and_die(folder, step))
        process.join()
        whole_folder.recover(folder)
        states.add((folder / "text").read_text())
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert step > 3
    assert states == {"old", "new"}
    assert list(tmp_path.iterdir()) == [folder]


def replace_and_die(folder: Path, n_steps: int) -> None:
    """Replace a folder, and die by SIGKILL before the next step on the file system after ``n_steps`` of them."""
    steps = itertools.count()

    def on_event(event: str, arguments: object) -> None:
        is_step = event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if is_step and next(steps) == n_steps:
            os.kill(os.getpid(), signal.SIGKILL)

    with whole_folder.whole_folder(folder) as partial:
        (partial / "text").write_text("new")
        sys.addaudithook(on_event)


def test_an_export_takes_up_the_folder_that_a_killed_one_left_aside(
    references: tuple[str, ...], tmp_path: Path
) -> None:
    merger, folder = Merger.open(references), tmp_path / "out"
    export(recipe_of(references), folder, merger=merger).rename(tmp_path / "out.0123abcd.replaced")
    with pytest.raises(ExportError, match=r"out: must be empty or new, got a folder with files"):
        export(recipe_of(references), folder, merger=merger)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "model.safetensors").is_file()


def test_a_folder_that_was_left_aside_is_not_taken_for_another(tmp_path: Path) -> None:
    (tmp_path / "out.put.0123abcd.replaced").mkdir()
    whole_folder.recover(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    whole_folder.recover(tmp_path / "out.put")
    assert list(tmp_path.iterdir()) == [tmp_path / "out.put"]
