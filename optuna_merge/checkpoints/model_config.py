"""What a model's ``config.json`` says of its layers and its vocabulary. Knows the keys, not the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna_merge.checkpoints.files import read_json
from optuna_merge.errors import CheckpointError

CONFIG_FILE = "config.json"

_N_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_config(folder: Path, reference: str) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        folder: The model's folder.
        reference: The model's name in messages.

    Raises:
        CheckpointError: If the folder or the file is missing or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{reference}: must be an existing folder, found none at {folder}")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{reference}: must hold a {CONFIG_FILE}, found none in {folder}")
    return read_json(file)


def stated_n_layers(config: Mapping[str, Any]) -> int | None:
    """Number of layers; None if the configuration does not state it."""
    return _first_integer(config, *_N_LAYERS_KEYS)


def stated_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding; None if the configuration does not state them."""
    return _first_integer(config, "vocab_size")


def restated(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """The configuration with other values, in the section of the text model too if the model has several."""
    changed = {**config, **values}
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = {**config["text_config"], **values}
    return changed


def _first_integer(config: Mapping[str, Any], *keys: str) -> int | None:
    for section in (config.get("text_config"), config):
        for key in keys:
            if isinstance(section, Mapping) and isinstance(section.get(key), int):
                return int(section[key])
    return None
