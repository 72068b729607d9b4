"""Export: a recipe becomes a model folder that transformers loads, whole or not at all.

Replays the recipe, so the tensors are those that were scored, bit for bit. Knows nothing of studies: what is to be
said about scores is given to it as text.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from optuna_merge.checkpoints.write import write_checkpoint
from optuna_merge.errors import ExportError
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe, split_reference

RECIPE_FILE = "mergekit_config.yml"


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

    Everything is written into a folder ``<folder>.<pid>.partial`` beside it, which is renamed when it is complete and
    removed when anything fails; only a killed process leaves one.

    Args:
        recipe: What is merged.
        folder: The model's folder; its parents are made.
        merger: Holds the checkpoints of the recipe.
        references: Model reference of the recipe to its original spelling, for the card and the merge file; model and
            adapter apart.
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
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: must be a folder or a new name, got a file; choose another")
    if folder.is_dir() and any(folder.iterdir()):
        _refuse_to_replace(folder, merger, overwrite=overwrite)
    template = merger.template(recipe)
    merge_file = to_mergekit(
        recipe,
        names=merger.names,
        architecture=next(iter(template.config.get("architectures") or ()), None),
        references=references,
        comment=comment,
    )
    with _whole_or_nothing(folder) as partial:
        write_checkpoint(partial, merger.merge(recipe), max_shard_bytes=max_shard_bytes)
        template.write_description(partial, recipe.dtype, copy_code=copy_code)
        (partial / RECIPE_FILE).write_text(merge_file, encoding="utf-8")
        card = model_card(recipe, folder.name, merge_file, references=references, results=results)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def model_card(
    recipe: Recipe, name: str, merge_file: str, *, references: Mapping[str, str] | None = None, results: str = ""
) -> str:
    """The README.md of a merged model: what it was made of and how to make it again."""
    parts = {reference: [part for part in split_reference(reference) if part] for reference in recipe.references}
    written = {part: (references or {}).get(part, part) for pair in parts.values() for part in pair}
    spelled = {reference: "+".join(written[part] for part in pair) for reference, pair in parts.items()}
    on_hub = [spelling for part, spelling in written.items() if not Path(part).is_absolute()]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "mergekit", "optuna-merge"]}
    if on_hub:
        metadata["base_model"] = [spelling.partition("@")[0] for spelling in on_hub]
    sources = "\n".join(f"- `{spelled[model]}`" for model in recipe.models)
    base = f"\n\nBase model: `{spelled[recipe.base_model]}`" if recipe.base_model is not None else ""
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"A merge made with optuna-merge, by the method `{recipe.method}`, of\n\n{sources}{base}",
        *([results.strip()] if results.strip() else []),
        f"## Merge file\n\n`{RECIPE_FILE}`, which `mergekit-yaml` turns into the same model:\n\n"
        f"```yaml\n{merge_file.rstrip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _refuse_to_replace(folder: Path, merger: Merger, *, overwrite: bool) -> None:
    if not overwrite:
        raise ExportError(
            f"{folder}: must be empty or new, got a folder with files; choose another or allow overwriting"
        )
    if not (folder / RECIPE_FILE).is_file():
        raise ExportError(
            f"{folder}: must be an earlier export to be replaced, got a folder without {RECIPE_FILE}; choose another"
        )
    for checkpoint in merger.checkpoints.values():
        if checkpoint.path.resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{folder}: must hold none of the models that are merged, got one; choose another")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            _flush(file)
        _replace(folder, partial)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"{folder}: must be writable, got: {_reason(exc)}; nothing was left there") from exc
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _replace(folder: Path, partial: Path) -> None:
    old = partial.with_suffix(".replaced")
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"{os.strerror(exc.errno)} ({errno.errorcode.get(exc.errno, exc.errno)})"
    return str(exc)
