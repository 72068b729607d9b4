"""Which model some fine-tunes have in common: what their cards and configurations say, or what their weights show.

Knows model cards (the front matter of ``README.md``), ``adapter_config.json`` and ``config.json``; decides nothing else
about a merge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import yaml
from torch import Tensor

from optuna_merge.checkpoints.adapter import CONFIG_FILE as ADAPTER_FILE
from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.compare import common_names
from optuna_merge.checkpoints.files import read_json
from optuna_merge.checkpoints.model_config import CONFIG_FILE
from optuna_merge.checkpoints.reference import ResolvedReference
from optuna_merge.errors import CheckpointError

CARD_FILE = "README.md"

MOST_ALIKE = 0.3
"""Changes of independent fine-tunes from their base have a smaller cosine than this."""

LEAST_ALIKE = 0.5
"""Seen from any other model, two changes share the way back to the base: their cosine is at least about this."""

_MAX_GENERATIONS = 4
_N_TENSORS = 16
_N_ELEMENTS = 1 << 16
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Ancestor:
    """The common base of some models.

    Attributes:
        reference: One of the given references, the absolute path of a folder, or a hub name.
        reason: How it was found.
    """

    reference: str
    reason: str


def find_base(models: Sequence[ResolvedReference]) -> Ancestor:
    """Find the model that all others were tuned from; it may be one of them.

    What cards and configurations say counts first, over up to four generations. Only if they agree on nothing are
    weights compared.

    Args:
        models: The models, at least one.

    Raises:
        CheckpointError: If there is no such model or it cannot be told; the message says what each model names.
    """
    keys = {_key(model): model.reference for model in models}
    lineages = [_lineage(model, keys) for model in models]
    common = [key for key in lineages[0] if all(key in lineage for lineage in lineages)]
    if len(models) == 1:
        common = common[1:]  # itself
    if common:
        nearest = min(common, key=lambda key: sum(lineage.index(key) for lineage in lineages))
        is_named = all(lineage.index(nearest) < 2 for lineage in lineages)
        who = "all others name" if nearest in keys else "all models name" if len(models) > 1 else "the model names"
        what = "it" if is_named else "it, or a model that was tuned from it,"
        return Ancestor(keys.get(nearest, nearest), f"{who} {what} in the card or the configuration")
    index, cosine = nearest_to_base([Checkpoint.open(model) for model in models]) if len(models) > 2 else (None, 1.0)
    if index is not None:
        likeness = f"the others changed in unrelated directions (cosine {abs(cosine):.2f})"
        return Ancestor(
            models[index].reference,
            f"no card tells, but seen from it {likeness}; correct this line if they were not tuned from it",
        )
    said = ", ".join(f"{_named(lineage)} by {model.reference}" for model, lineage in zip(models, lineages, strict=True))
    raise CheckpointError(
        f"base model must be named by all models or be one of them, got {said}, and their weights do not show it;"
        " name it with --base, or merge without one: --base none"
    )


def nearest_to_base(checkpoints: Sequence[Checkpoint]) -> tuple[int | None, float]:
    """Find the checkpoint that the others look like fine-tunes of, by a sample of the weights.

    Seen from their base, independent fine-tunes changed in unrelated directions. Seen from another model, all changes
    contain the way back to the base. A fine-tune that hardly differs from a base that is not given is taken for it.

    Args:
        checkpoints: The models; with fewer than three nothing can be told.

    Returns:
        The index of the base, or None if it cannot be told, and the largest cosine of two changes from it.
    """
    if len(checkpoints) < 3:
        return None, 1.0
    names = [name for name in common_names(checkpoints) if _is_comparable(name, checkpoints)]
    names = names[:: max(1, len(names) // _N_TENSORS)]
    if not names:
        return None, 1.0
    weights = torch.stack([_sample(checkpoint, names) for checkpoint in checkpoints])  # [n_models, n_elements]
    largest = [_largest_cosine(weights - weights[i], skip=i) for i in range(len(checkpoints))]
    nearest, second = sorted(range(len(largest)), key=largest.__getitem__)[:2]
    if largest[nearest] < MOST_ALIKE and largest[second] > LEAST_ALIKE:
        return nearest, largest[nearest]
    return None, largest[nearest]


def adapter_base(folder: Path) -> str | None:
    """The model that an adapter was trained for, as its configuration names it; None if the folder is no adapter."""
    if (folder / CONFIG_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
        return None
    return str(read_json(folder / ADAPTER_FILE).get("base_model_name_or_path") or "") or None


def _key(model: ResolvedReference) -> str:
    """What identifies a model among those that cards name: the path of a folder, or a hub name without revision."""
    return model.name if model.adapter is not None else _key_of_model(model)


def _key_of_model(model: ResolvedReference) -> str:
    """The same without the model's adapter."""
    return str(model.path) if model.is_local else re.split("[@+]", model.reference)[0]


def _lineage(model: ResolvedReference, given: Collection[str]) -> list[str]:
    """The model itself, then those that it was tuned from, the nearest first."""
    own = _key_of_model(model)
    found = list(dict.fromkeys([_key(model), own]))
    latest = [own]
    for _ in range(_MAX_GENERATIONS):
        folders = [folder for key in latest if (folder := _folder(key) or (model.path if key == own else None))]
        older = [parent for folder in folders for parent in _parents(folder, given)]
        latest = [key for key in dict.fromkeys(older) if key not in found]
        found += latest
    return found


def _parents(folder: Path, given: Collection[str]) -> list[str]:
    """The keys of the models that a model says it was tuned from; a merge names several."""
    stated = _from_card(folder / CARD_FILE) or _from_config(folder / CONFIG_FILE)
    return [key for name in stated if (key := _identify(name, folder, given)) is not None]


def _from_card(card: Path) -> list[str]:
    """``base_model`` in the front matter of a card."""
    try:
        text = card.read_text(encoding="utf-8")
        matter = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        data = yaml.safe_load(matter[1]) if matter else None
    except (OSError, ValueError, yaml.YAMLError):  # people write cards by hand
        return []
    stated = data.get("base_model") if isinstance(data, dict) else None
    return [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]


def _from_config(file: Path) -> list[str]:
    """What older versions of transformers wrote: the name under which the model was loaded before it was tuned."""
    stated = read_json(file).get("_name_or_path") if file.is_file() else None
    return [stated] if isinstance(stated, str) else []


def _identify(name: str, folder: Path, given: Collection[str]) -> str | None:
    """The key of a stated name; None for a folder of the machine where the model was trained."""
    if name.startswith((".", "/", "~")):
        path = (folder / name if name.startswith(".") else Path(name)).expanduser()
        return str(path.resolve()) if path.is_dir() else None
    if not _HUB_NAME.fullmatch(name):
        return None
    copies = [key for key in given if Path(key).is_absolute() and Path(key).name.lower() == name.split("/")[1].lower()]
    return copies[0] if len(copies) == 1 else name


def _folder(key: str) -> Path | None:
    """Where the card of a model lies; None if it cannot be had."""
    if Path(key).is_dir():
        return Path(key)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(key, CARD_FILE)).parent
    except Exception:  # the hub's own errors, and those of whichever HTTP library it uses: then no card tells anything
        return None


def _named(lineage: Sequence[str]) -> str:
    return lineage[1] if len(lineage) > 1 else "nothing"


def _is_comparable(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether a tensor is a matrix of a layer that all models have in one shape."""
    shapes = {checkpoint.shape(name) for checkpoint in checkpoints}
    return len(shapes) == 1 and len(min(shapes)) == 2 and name.startswith(checkpoints[0].layer_stack)


def _sample(checkpoint: Checkpoint, names: Sequence[str]) -> Tensor:
    """The first elements of some tensors: float32, shape ``[n_elements]``."""
    return torch.cat([checkpoint.get(name).reshape(-1)[:_N_ELEMENTS].float() for name in names])


def _largest_cosine(changes: Tensor, skip: int) -> float:
    """The largest cosine of two rows of ``changes``, shape ``[n_models, n_elements]``, without row ``skip``."""
    others = [change for index, change in enumerate(changes) if index != skip]
    return max(float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(others, 2))
