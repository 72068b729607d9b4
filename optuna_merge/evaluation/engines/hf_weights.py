"""A transformers model on a device whose weights are overwritten from checkpoint tensors.

Knows how names and layouts in a checkpoint become parameters, by transformers' own rules: prefixes, renamed and fused
tensors, ties, and tensors that a model no longer has. It does not know what the model is used for.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights

from optuna_merge.errors import EngineError, NonFiniteMergeError, first_line


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint tensor goes: into a resident tensor, or into a converter that fuses several tensors.

    Attributes:
        target: Name of the resident tensor; "" for a tensor that the model no longer has.
        pattern: Pattern of the converter that takes the tensor; None: it is loaded as it is.
    """

    target: str
    pattern: str | None = None


class ResidentModel:
    """One model, built once and loaded many times.

    Attributes:
        model: In evaluation mode; its weights are undefined until a load succeeds.
        is_complete: Whether the last load succeeded.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        names: Iterable[str] | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> None:
        """Build the model from a folder's ``config.json``; its weights are not read.

        Args:
            path: The folder.
            dtype: The model's dtype.
            device: Where it lives.
            names: Names of the tensors that will be loaded; None: those of the weights in the folder.
            trust_remote_code: Run model code that the folder brings.
            attention: An attention implementation of transformers; None lets it choose.

        Raises:
            EngineError: If transformers cannot build it.
        """
        stored = _stored_names(path) if names is None else list(names)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if attention is not None:
            options["attn_implementation"] = attention
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            factory = factory_of(config)
            self.model = _build(factory, config, options, torch.device("meta"))
            self._map()
            if _may_see(config) and any(self._place(name) is None for name in stored):
                # of some configurations the causal model is only the language part
                factory = AutoModelForImageTextToText
                self.model = _build(factory, config, options, torch.device("meta"))
                self._map()
            if self._stores_both_sides_of_a_tie(stored):
                # transformers unties a model whose checkpoint holds both tensors, if they differ; merged ones may
                config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
                config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
                self.model = _build(factory, config, options, torch.device("meta"))
            if device.type != "meta":
                self.model = _build(factory, config, options, device)
            self._map()
            if (path / "generation_config.json").is_file():
                self.model.generation_config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as exc:
            raise EngineError(f"{path}: transformers cannot build the model: {first_line(exc)}") from exc
        stored = stored or self._default_names()
        self._groups = self._group(stored)
        self._names = self._name(stored)
        self._finite = _FiniteCheck(1 if device.type == "cpu" else None)
        self.is_complete = False

    def resident(self, name: str) -> Tensor | None:
        """The tensor that the checkpoint tensor ``name`` is loaded into; None if there is none or it is fused."""
        place = self._place(name)
        if place is None or place.pattern is not None or place.target not in self._resident:
            return None
        return cast(Tensor, self._resident[place.target].data)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights; see ``Engine.load_weights``. A fused parameter's tensors are kept until all came."""
        self.is_complete = False
        self._finite.clear()
        delivered: set[str] = set()
        written: dict[int, str] = {}
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            if name in delivered:
                raise EngineError(f"{name}: must be delivered once, came twice; correct the merge")
            delivered.add(name)
            place = self._place(name)
            if place is None:
                raise EngineError(f"{name}: must belong to {type(self.model).__name__}, which has no such tensor")
            if place.pattern is not None:
                group = waiting.setdefault(place.target, {})
                # the stream may reuse its buffer
                group[name] = tensor.to(self.model.dtype, copy=True)
                self._finite.add(name, group[name])
                if group.keys() == self._groups.get(place.target, set()):
                    for target, value in self._converted(place.target, waiting.pop(place.target)).items():
                        self._write(f"{name} (with those it is fused with)", target, value, written)
            elif place.target in self._resident:
                self._write(name, place.target, tensor, written)
        lacking = [name for target in waiting for name in sorted(self._groups.get(target, set()) - delivered)]
        lacking += [name for name, p in self._resident.items() if id(p) not in written and not self._may_lack(name)]
        if lacking:
            raise EngineError(
                f"{lacking[0]}: must be delivered, got nothing ({len(lacking)} missing); correct the merge"
            )
        self._finite.check()
        self._finish()
        self.is_complete = True

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter that a load overwrites, once, with its name in the model."""
        done: set[int] = set()
        for target in [*self._names, *self._groups]:
            tensor = self._resident.get(target)  # None for a tensor that the model no longer has
            if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point() and id(tensor) not in done:
                done.add(id(tensor))
                yield target, tensor

    def gradients(self, target: str, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The gradient of a parameter as the gradients of the checkpoint tensors that are loaded into it.

        Fusing tensors rearranges their elements, so the way back is that of their values.

        Args:
            target: Name of the parameter in the model.
            gradient: Its gradient.

        Raises:
            EngineError: If transformers takes a fused parameter apart into other tensors than were fused.
        """
        if target in self._names:
            yield self._names[target], gradient
            return
        parts = revert_weight_conversion(self.model, cast("Any", {target: gradient}))
        if parts.keys() != self._groups[target]:
            raise EngineError(
                f"{target}: must come apart into {', '.join(sorted(self._groups[target]))}, got"
                f" {', '.join(sorted(parts))}; use search.start: uniform for this model"
            )
        yield from parts.items()

    def _finish(self) -> None:
        """Repeat what transformers does after loading: a few models write over constants, such as a padding row."""
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            cast("Any", tensor)._is_hf_initialized = True
        for module in self.model.modules():
            cast("Any", module)._is_hf_initialized = False
        cast("Any", self.model).initialize_weights()

    def _map(self) -> None:
        self._resident = dict(self.model.state_dict(keep_vars=True))
        self._meta = {name: None if p is None else p.to("meta") for name, p in self._resident.items()}
        conversions = get_model_conversion_mapping(self.model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._places: dict[str, _Place | None] = {}

    def _place(self, name: str) -> _Place | None:
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> _Place | None:
        """Follow ``convert_and_load_state_dict_in_model`` of transformers; None for an unknown tensor."""
        prefix = self.model.base_model_prefix
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._meta)
            if target in self._resident:
                return _Place(target, pattern)
        return _Place("") if self._may_ignore(target) else None

    def _may_ignore(self, name: str) -> bool:
        buffers = {buffer for buffer, _ in self.model.named_buffers()}
        patterns = set(self.model._keys_to_ignore_on_load_unexpected or [])
        patterns |= {rf"(^|\.){end}$" for end in ("rotary_emb.inv_freq", "position_ids") if _any_ends(buffers, end)}
        return name in buffers or any(re.search(pattern, name) for pattern in patterns)

    def _may_lack(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_missing or [])

    def _group(self, names: Iterable[str]) -> dict[str, set[str]]:
        groups: dict[str, set[str]] = {}
        for name in names:
            place = self._place(name)
            if place is not None and place.pattern is not None:
                groups.setdefault(place.target, set()).add(name)
        return groups

    def _name(self, names: Iterable[str]) -> dict[str, str]:
        """Resident tensor to the checkpoint tensor that is loaded into it, fused ones left out."""
        found: dict[str, str] = {}
        for name in names:
            place = self._place(name)
            if place is not None and place.pattern is None and place.target:
                found.setdefault(place.target, name)
        return found

    def _default_names(self) -> list[str]:
        return list(revert_weight_conversion(self.model, cast("Any", dict(self._meta))))

    def _stores_both_sides_of_a_tie(self, stored: Iterable[str]) -> bool:
        targets = {place.target for name in stored if (place := self._place(name)) is not None}
        ties = getattr(self.model, "all_tied_weights_keys", {})
        return any({name, other} <= targets for name, other in ties.items())

    def _converted(self, target: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        patterns = {name: cast("_Place", self._place(name)).pattern for name in tensors}
        [first] = {id(c): c for c in self._converters if set(patterns.values()) & set(c.source_patterns)}.values()
        converter = copy.deepcopy(first)
        for name in sorted(tensors, key=dot_natural_key):
            converter.add_tensor(target, name, cast("str", patterns[name]), cast("Any", tensors[name]))
        values = converter.convert(target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def _write(self, name: str, target: str, tensor: Tensor, written: dict[int, str]) -> None:
        parameter = self._resident[target]
        if tensor.shape != parameter.shape:
            raise EngineError(
                f"{name}: shape must be {list(parameter.shape)}, got {list(tensor.shape)}; correct the merge"
            )
        data = parameter.data
        if id(parameter) in written:
            if not torch.equal(data, tensor.to(data)):
                raise EngineError(f"{name}: must equal {written[id(parameter)]}, which it is tied to, but differs")
            return
        if tensor.data_ptr() != data.data_ptr() or tensor.device != data.device:
            data.copy_(tensor)
        self._finite.add(name, data)
        written[id(parameter)] = name


class _FiniteCheck:
    """Checks that tensors are finite; on a GPU all together, because each check waits for the GPU's pending work."""

    def __init__(self, n_together: int | None) -> None:
        """Check ``n_together`` tensors at once; None: all that were added."""
        self._n_together = n_together
        self._added: list[tuple[str, Tensor]] = []

    def clear(self) -> None:
        self._added.clear()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor as it is now."""
        if tensor.numel() and tensor.is_floating_point():
            low, high = tensor.aminmax()
            # NaN fails every comparison
            self._added.append((name, (low > -torch.inf) & (high < torch.inf)))
            if len(self._added) == self._n_together:
                self.check()

    def check(self) -> None:
        """Refuse the first tensor that was not finite when it was added."""
        are_finite = torch.stack([is_finite for _, is_finite in self._added]).tolist() if self._added else []
        for (name, _), is_finite in zip(self._added, are_finite, strict=True):
            if not is_finite:
                raise NonFiniteMergeError(f"{name}: must be finite, got NaN or infinity; this merge cannot be scored")
        self._added.clear()


def factory_of(config: Any) -> Any:
    """The auto class of transformers that builds the model of a configuration, with its output head."""
    is_causal = type(config) in AutoModelForCausalLM._model_mapping or "auto_map" in config.to_dict()
    return AutoModelForImageTextToText if _may_see(config) and not is_causal else AutoModelForCausalLM


def _may_see(config: Any) -> bool:
    return type(config) in AutoModelForImageTextToText._model_mapping


def _build(factory: Any, config: Any, options: dict[str, Any], device: torch.device) -> transformers.PreTrainedModel:
    with torch.device(device), no_init_weights():
        model = factory.from_config(copy.deepcopy(config), **options)
    model.tie_weights()
    model.requires_grad_(False)
    return cast("transformers.PreTrainedModel", model.eval())


def _stored_names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint folder; empty if it holds no weights."""
    index = path / "model.safetensors.index.json"
    try:
        if index.is_file():
            return list(json.loads(index.read_text())["weight_map"])
        if (path / "model.safetensors").is_file():
            with safe_open(path / "model.safetensors", framework="pt") as file:
                return list(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise EngineError(f"{path}: the names of its tensors cannot be read: {first_line(exc)}") from exc
    return []


def _any_ends(names: Iterable[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)
