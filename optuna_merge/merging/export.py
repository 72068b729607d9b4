"""Export: turns a recipe into a model folder that transformers loads.

Replays the recipe, so the tensors equal those that were scored, bit for bit. Knows nothing of studies: text about
scores is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna_merge.checkpoints.write import write_checkpoint
from optuna_merge.errors import ExportError
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.model_card import MERGE_FILE, model_card
from optuna_merge.merging.whole_folder import recover, whole_folder
from optuna_merge.recipe import Recipe


def export(
    recipe: Recipe,
    folder: Path,
    *,
    merger: Merger,
    references: Mapping[str, str] | None = None,
    comment: Sequence[str] = (),
    results: str = "",
    overwrite: bool = False,
    copy_code: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the model of a recipe: weights, configuration, tokenizer, model card and merge file.

    Args:
        recipe: The merge.
        folder: The model's folder, written whole or not at all; its parents are created.
        merger: Holds the checkpoints of the recipe.
        references: Model reference of the recipe to its spelling in card and merge file, model and adapter apart.
        comment: Lines above the merge file, without ``#``.
        results: Markdown for the model card, such as tables of scores.
        overwrite: Replace the folder of an earlier export.
        copy_code: Copy the model's own Python files too, which run when it is loaded with ``trust_remote_code``.
        max_shard_bytes: Weights are split into files of at most this size.

    Returns:
        The folder, absolute.

    Raises:
        ExportError: If the folder holds anything but an earlier export that may be replaced, or cannot be written.
        MergeError: If the merge fails.
    """
    folder = folder.absolute()
    recover(folder)
    _check_target(folder, merger, overwrite=overwrite)
    template = merger.template(recipe)
    architecture = next(iter(template.config.get("architectures") or ()), None)
    merge_file = to_mergekit(
        recipe,
        names=[name for name in merger.names if name not in template.copied],
        architecture=architecture,
        whole=template.whole,
        references=references,
        comment=comment,
    )
    with whole_folder(folder) as partial:
        write_checkpoint(partial, merger.merge(recipe), max_shard_bytes=max_shard_bytes)
        template.write_description(partial, recipe.dtype, copy_code=copy_code)
        (partial / MERGE_FILE).write_text(merge_file, encoding="utf-8")
        card = model_card(recipe, folder.name, merge_file, whole=template.whole, references=references, results=results)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _check_target(folder: Path, merger: Merger, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: must be a folder or a new name, got a file; choose another")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"{folder}: must be empty or new, got a folder with files; choose another or allow overwriting"
        )
    if not (folder / MERGE_FILE).is_file():
        raise ExportError(
            f"{folder}: must be an earlier export to be replaced, got a folder without {MERGE_FILE}; choose another"
        )
    for checkpoint in merger.checkpoints.values():
        if checkpoint.path.resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{folder}: must hold none of the models that are merged, got one; choose another")
