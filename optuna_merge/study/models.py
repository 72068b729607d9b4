"""The checkpoints of a study: resolved, opened, and compared with each other.

Knows the study file and the checkpoints; reads no weights and knows nothing of trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.compare import common_names
from optuna_merge.checkpoints.reference import ResolvedReference, resolve
from optuna_merge.checkpoints.tensor_names import is_buffer, place_of
from optuna_merge.checkpoints.unify import unify
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import CheckpointError
from optuna_merge.merging.placement import PlacementPlan, free_host_bytes, plan_placement
from optuna_merge.recipe import Dtype, Recipe
from optuna_merge.search.profile import TensorPlace
from optuna_merge.search.space import ModelRefs
from optuna_merge.study.memory import MemoryPlan

_DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class StudyModels:
    """The checkpoints of a study, open, and compared with each other.

    Attributes:
        refs: Their resolved references and depth, and the merged model's dtype.
        spelling: Resolved reference to the name that works on other machines: a hub name as the study file writes
            it, or the absolute path of a folder. Models and their adapters have an entry each.
        checkpoints: Resolved reference to checkpoint, the base first.
        resolved: Where each checkpoint was found, in the same order.
    """

    refs: ModelRefs
    spelling: Mapping[str, str]
    checkpoints: Mapping[str, Checkpoint]
    resolved: tuple[ResolvedReference, ...]

    @classmethod
    def open(cls, config: StudyConfig) -> StudyModels:
        """Find and open the checkpoints of a study file, without loading weights.

        Raises:
            CheckpointError: If a checkpoint is missing or damaged, or two references lead to the same one.
        """
        folder = config.path.resolve().parent
        base = config.genome.base_model
        resolved = {
            reference: resolve(reference, folder)
            for reference in dict.fromkeys([*([base] if base else []), *config.sources])
        }
        _refuse_twice(resolved.values())
        checkpoints = {found.name: Checkpoint.open(found) for found in resolved.values()}
        first = next(iter(checkpoints.values()))
        refs = ModelRefs(
            sources=tuple(resolved[reference].name for reference in config.sources),
            base=None if base is None else resolved[base].name,
            n_layers=first.n_layers,
            dtype=config.dtype or _stored_dtype(first),
            tokenizer_source=_tokenizer_source(config, resolved, next(iter(checkpoints))),
        )
        spelling = {name: written for found in resolved.values() for name, written in found.spellings.items()}
        return cls(refs, spelling, checkpoints, tuple(resolved.values()))

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """Resolved reference to a digest of the checkpoint's content; the folder's name does not enter it."""
        return {reference: checkpoint.content_digest() for reference, checkpoint in self.checkpoints.items()}

    def identify(self, recipe: Recipe) -> str:
        """Digest of a recipe with content digests in place of references: the same wherever the models lie."""
        return replace(
            recipe,
            models=tuple(self.contents[model] for model in recipe.models),
            base_model=None if recipe.base_model is None else self.contents[recipe.base_model],
            tokenizer_source=self.contents.get(recipe.tokenizer_source or "", recipe.tokenizer_source),
        ).digest()

    @cached_property
    def views(self) -> Mapping[str, Checkpoint]:
        """Resolved reference to the checkpoint as the merge sees it: all in one vocabulary, with the same tensors.

        Raises:
            CheckpointError: If the models differ in architecture, tensors or vocabulary.
        """
        return unify(self.checkpoints, self.refs.tokenizer_source)

    @property
    def template(self) -> Checkpoint:
        """The checkpoint whose configuration and tokenizer the merged model takes over."""
        first = next(iter(self.views))
        return self.views.get(self.views[first].whole or self.refs.tokenizer_source or first, self.views[first])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the merged model's tensors."""
        return common_names(list(self.views.values()))

    @property
    def places(self) -> tuple[TensorPlace, ...]:
        """Where each tensor is that a method merges; constants are copied."""
        stack, copied = self.template.layer_stack, self.template.copied
        floating = [name for name in self.names if self.template.dtype(name).is_floating_point]
        merged = [name for name in floating if not is_buffer(name) and name not in copied]
        found = [(name, place_of(name, stack)) for name in merged]
        return tuple(TensorPlace(name, place.role, place.layer) for name, place in found)

    def plan_placement(self, config: StudyConfig, device: torch.device, memory: MemoryPlan) -> PlacementPlan:
        """Decide where the models that are merged live between merges.

        Args:
            config: The study file; ``engine.sources`` may name the place.
            device: Where they are merged.
            memory: What else the device holds.

        Raises:
            EngineError: If they do not fit in the place that the study file names.
        """
        return plan_placement(
            config.engine.sources,
            self.views.values(),
            self.names,
            device,
            gpu_free=max(0, memory.left),
            host_free=free_host_bytes(),
        )

    @contextmanager
    def described(self) -> Iterator[Path]:
        """A folder with the merged model's configuration and tokenizer; it may be temporary."""
        if self.template.is_as_stored:
            yield self.template.path
            return
        with TemporaryDirectory(prefix="optuna-merge-") as folder:
            self.template.write_description(Path(folder), self.refs.dtype, copy_code=True)
            yield Path(folder)


def _refuse_twice(models: Iterable[ResolvedReference]) -> None:
    seen: dict[str, str] = {}
    for model in models:
        if model.name in seen:
            raise CheckpointError(
                f"genome: {model.reference!r} and {seen[model.name]!r} must be different models, both are {model.name};"
                " drop one or spell them alike"
            )
        seen[model.name] = model.reference


def _tokenizer_source(config: StudyConfig, resolved: Mapping[str, ResolvedReference], first: str) -> str | None:
    wanted = config.genome.tokenizer_source
    if wanted is None or wanted == "base":
        return first if wanted else None
    return resolved[wanted].name if wanted in resolved else wanted


def _stored_dtype(checkpoint: Checkpoint) -> Dtype:
    """The dtype in which a checkpoint stores most of its weights."""
    counts: dict[str, int] = {}
    for name in checkpoint.names:
        dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
        counts[dtype] = counts.get(dtype, 0) + math.prod(checkpoint.shape(name))
    most = max(counts, key=lambda dtype: counts[dtype])
    for dtype in _DTYPES:
        if dtype == most:
            return dtype
    raise CheckpointError(f"{checkpoint.reference}: dtype must be one of {', '.join(_DTYPES)}, got {most}")
