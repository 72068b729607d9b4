"""LoRA adapters in PEFT's layout, applied to a model's tensors one at a time.

Knows ``adapter_config.json``, PEFT's tensor names and its arithmetic, without needing peft. Does not know the model:
the caller passes in each of its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.files import TensorFiles, read_json
from optuna_merge.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_USED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
_WITHOUT_EFFECT = (  # say what was trained and how, or repeat what the tensors tell
    "alora_invocation_tokens auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_dropout "
    "lora_ga_config megatron_config megatron_core modules_to_save peft_version qalora_group_size revision "
    "runtime_config target_modules task_type"
).split()
_STARTS_FROM_THE_MODEL = (True, False, None, "gaussian", "eva", "orthogonal")  # other values change the model first
_MERGE_IT = "merge such an adapter with peft's merge_and_unload and name the result"
_FACTORS = {
    "lora_A.weight": ("A", False),
    "lora_B.weight": ("B", False),
    "lora_embedding_A": ("A", True),
    "lora_embedding_B": ("B", True),
}


@dataclass(frozen=True)
class _Update:
    """What the adapter does to one tensor of the model: replaces it, adds ``scaling * B @ A``, or both.

    Attributes:
        replacement: Name of the adapter's tensor that replaces it.
        a, b: Names of the factors.
        scaling: Factor of their product.
        transposed: Whether the product is transposed before it is added.
    """

    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    scaling: float = 1.0
    transposed: bool = False


class Adapter:
    """A LoRA adapter on disk, matched with the tensor names of a model.

    Attributes:
        path: The adapter's folder.
        reference: The adapter's name in messages.
        files: The adapter's tensors.
    """

    def __init__(self, path: Path, reference: str, names: Collection[str]) -> None:
        """Open an adapter; reads headers, not weights.

        Args:
            path: The adapter's folder.
            reference: The adapter's name in messages.
            names: Tensor names of the model that it belongs to.

        Raises:
            CheckpointError: If it is not a LoRA adapter of such a model, or if it does more than add
                ``scaling * B @ A`` to weights and replace whole tensors.
        """
        self.path = path
        self.reference = reference
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{reference}: adapter must hold {CONFIG_FILE}, found none in {path}")
        config = read_json(path / CONFIG_FILE)
        _check_kind(config, reference)
        if not (path / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{reference}: adapter weights must be in {WEIGHTS_FILE}, found none in {path}")
        self.files = TensorFiles([path / WEIGHTS_FILE], reference)
        self._updates = _fit(self.files, config, reference, names)

    def __contains__(self, name: str) -> bool:
        return name in self._updates

    def replaced_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor that replaces the model's tensor ``name``; None if it is not replaced."""
        update = self._updates.get(name)
        return None if update is None or update.replacement is None else self.files.shape(update.replacement)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Apply the adapter to the model's tensor ``name``.

        Args:
            name: The tensor's name.
            tensor: The tensor as the model stores it; left unmodified.

        Returns:
            ``tensor`` itself if the adapter does not change it; otherwise a new tensor of its dtype, computed in
            float32 and rounded once.

        Raises:
            CheckpointError: If the shapes do not match.

        References:
            LoRA, arXiv:2106.09685, section 4.1; rank-stabilized scaling: arXiv:2312.03732. Departure: PEFT rounds
            ``scaling * B @ A`` to the model's dtype before it adds it.
        """
        update = self._updates.get(name)
        if update is None:
            return tensor
        dtype = tensor.dtype
        if update.replacement is not None:
            tensor = self.files.get(update.replacement)
        if update.a is None or update.b is None:
            return tensor.to(dtype)
        a, b = self.files.get(update.a).float(), self.files.get(update.b).float()
        left, right = (a.T, b.T) if update.transposed else (b, a)
        product = (left.shape[0], right.shape[1])
        if tuple(tensor.shape) != product or left.shape[1] != right.shape[0]:
            raise CheckpointError(
                f"{self.reference}: shape of {name} must match the model {list(tensor.shape)}, got {list(product)}; "
                "is it an adapter of this model?"
            )
        return torch.addmm(tensor.float(), left, right, alpha=update.scaling).to(dtype)


def _check_kind(config: Mapping[str, Any], reference: str) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{reference}: peft_type must be LORA, got {config.get('peft_type')}; {_MERGE_IT}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_FROM_THE_MODEL:
        raise CheckpointError(
            f"{reference}: init_lora_weights must leave the model as it is, got {start}; convert the adapter to plain "
            "LoRA with peft's path_initial_model_for_weight_conversion"
        )
    known = {*_USED, *_WITHOUT_EFFECT}
    if unknown := [key for key, value in config.items() if value and key not in known]:
        raise CheckpointError(f"{reference}: {unknown[0]} must be off, got {config[unknown[0]]}; {_MERGE_IT}")


def _fit(files: TensorFiles, config: Mapping[str, Any], reference: str, names: Collection[str]) -> dict[str, _Update]:
    replaced: dict[str, str] = {}
    factors: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    for key in files.names:
        path = key.removeprefix("base_model.model.")
        for ending, (factor, is_embedding) in _FACTORS.items():
            if path.endswith(f".{ending}"):
                module = path.removesuffix(f".{ending}")
                factors.setdefault(module, {})[factor] = key
                embeddings |= {module} if is_embedding else set()
                break
        else:
            if "lora_" in path:
                raise CheckpointError(f"{reference}: tensors must be LoRA factors or whole tensors, got {key}")
            replaced[path.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
    updates = {_find(path, reference, names): _Update(key) for path, key in replaced.items()}
    for module, found in factors.items():
        if found.keys() != {"A", "B"}:
            raise CheckpointError(
                f"{reference}: {module} must have both factors, got {next(iter(found.values()))} alone"
            )
        rank = files.shape(found["A"])[0]
        name = _find(f"{module}.weight", reference, names)
        updates[name] = _Update(
            replacement=updates[name].replacement if name in updates else None,
            a=found["A"],
            b=found["B"],
            scaling=_scaling(config, module, rank, reference),
            transposed=module in embeddings or bool(config.get("fan_in_fan_out")),
        )
    return updates


def _find(path: str, reference: str, names: Collection[str]) -> str:
    """The model's name of a tensor. Either name may lack a prefix of the other, such as GPT-2's ``transformer.``."""
    if path in names:
        return path
    found = [name for name in names if name.endswith(f".{path}") or path.endswith(f".{name}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{reference}: {path} must be a tensor of the model, which has none of that name; "
            "is it an adapter of this model?"
        )
    return found[0]


def _scaling(config: Mapping[str, Any], module: str, rank: int, reference: str) -> float:
    stated = _lookup(config.get("rank_pattern"), module, config.get("r"))
    if stated != rank:
        raise CheckpointError(f"{reference}: rank of {module} must be {stated} as in {CONFIG_FILE}, got {rank}")
    alpha = float(_lookup(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lookup(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Value of the first key that, as a regular expression, matches the end of a module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
