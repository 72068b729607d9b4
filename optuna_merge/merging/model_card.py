"""The model card of a merged model: what it was made of and how to make it again. Writes text, no files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from optuna_merge.merging.mergekit import why_not_mergekit
from optuna_merge.recipe import Recipe, split_reference

MERGE_FILE = "mergekit_config.yml"
"""Name of the merge file beside the card."""


def model_card(
    recipe: Recipe,
    name: str,
    merge_file: str,
    *,
    whole: str | None = None,
    references: Mapping[str, str] | None = None,
    results: str = "",
) -> str:
    """Write the ``README.md`` of a merged model.

    Args:
        recipe: The merge.
        name: Title of the card.
        merge_file: Content of the merge file.
        whole: The model that sees or hears, if language models are merged with it.
        references: Model reference of the recipe to its spelling in the card, model and adapter apart.
        results: Markdown, such as tables of scores.
    """
    parts = {reference: [part for part in split_reference(reference) if part] for reference in recipe.references}
    written = {part: (references or {}).get(part, part) for pair in parts.values() for part in pair}
    spelled = {reference: "+".join(written[part] for part in pair) for reference, pair in parts.items()}
    on_hub = [spelling for part, spelling in written.items() if not Path(part).is_absolute()]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "mergekit", "optuna-merge"]}
    if on_hub:
        metadata["base_model"] = [spelling.partition("@")[0] for spelling in on_hub]
    models = "\n".join(f"- `{spelled[model]}`" for model in recipe.models)
    base = f"\n\nBase model: `{spelled[recipe.base_model]}`" if recipe.base_model is not None else ""
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"Merged with optuna-merge by the method `{recipe.method}` from\n\n{models}{base}",
        *([results.strip()] if results.strip() else []),
        f"## Merge file\n\n{_use(recipe, whole)}\n\n```yaml\n{merge_file.rstrip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _use(recipe: Recipe, whole: str | None) -> str:
    reason = why_not_mergekit(recipe, whole)
    if reason is None:
        return f"`mergekit-yaml` makes the same model from `{MERGE_FILE}`:"
    return f"`{MERGE_FILE}` records the merge; it cannot make the model, because {reason}:"
