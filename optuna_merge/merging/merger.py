"""The merge: a recipe and checkpoints in, a stream of merged tensors out.

Reads each byte of a checkpoint once, holds one merged tensor and a few float32 buffers of bounded size, and rounds each
element once. Results depend only on the recipe and the checkpoints, not on chunk size, threads or shards. Does not
check whether a result is finite; whoever scores it does.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.compare import common_names
from optuna_merge.checkpoints.reference import ResolvedReference
from optuna_merge.checkpoints.unify import unify
from optuna_merge.errors import MergeError, NonFiniteMergeError, first_line, is_out_of_memory
from optuna_merge.merging.placement import Placement, count_disk_waits, free_host_bytes, place_checkpoints
from optuna_merge.merging.plan import MergePlan, MergeStep, Numbers
from optuna_merge.merging.sizes import KERNEL_ELEMENTS, PIECE_ELEMENTS
from optuna_merge.merging.staging import Stage
from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.kept import KeptTensors
from optuna_merge.recipe import Recipe

Destination = Callable[[str], Tensor | None]
"""Maps a tensor name to the memory that its merged tensor is written into, or to None for a new tensor."""

_COMPILED_FROM = 1 << 27
"""From this many elements of a model on, a study saves more time than compiling takes, which is up to a minute."""

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": PIECE_ELEMENTS}  # the CPU's buffers stay in its cache
# One call costs as much as some 100,000 elements on a CPU, and 10 million on a GPU.
_KERNEL_ELEMENTS = {"cpu": 1 << 24, "cuda": KERNEL_ELEMENTS}
_LEAST_CHUNK_ELEMENTS = 1 << 18

_T = TypeVar("_T")


class Merger:
    """Merges open checkpoints by any number of recipes.

    Attributes:
        checkpoints: Model reference, as recipes spell it, to its checkpoint.
        device: Device that computes and holds merged tensors.
        followers: Tensor name to the one whose gradient came after it in the last backward pass.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        *,
        device: str | torch.device = "cpu",
        tokenizer_source: str | None = None,
        chunk_elements: int | None = None,
        is_compiled: bool | None = None,
        placement: Placement = "disk",
        keep_in: Path | None = None,
    ) -> None:
        """Check that the checkpoints fit together.

        Args:
            checkpoints: Reference to checkpoint. The others are compared with the first, whose tensor order the
                stream has: the base, if there is one.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``.
            tokenizer_source: ``base`` (the first), ``union``, or a key of ``checkpoints``; None if they agree already.
            chunk_elements: Elements merged at a time; None to choose by device.
            is_compiled: Compile elementwise arithmetic with torch.compile; None to compile if the models are large.
                It changes no result; if it fails, merging warns and continues without it.
            placement: Where the checkpoints' tensors are kept once they have been read.
            keep_in: Folder for the matrices that some methods make once and add in every merge; None: in memory.

        Raises:
            CheckpointError: If they differ in names, shapes, architecture or vocabulary.
        """
        self.device = _with_index(torch.device(device))
        self.checkpoints = place_checkpoints(unify(checkpoints, tokenizer_source), placement, self.device)
        self._placement = placement
        self._reads_ahead = placement == "disk"
        self._chunk_elements = chunk_elements or _CHUNK_ELEMENTS[self.device.type]
        self._kernel_elements = _KERNEL_ELEMENTS[self.device.type]
        self._stage = Stage(self.device)
        self._is_compiled = self._is_large() if is_compiled is None else is_compiled
        self._buffers: dict[str, Tensor] = {}
        self._written: dict[int, tuple[Any, ...]] = {}  # address of a destination -> record of what it holds
        self._keep_in = keep_in
        self._vocabulary = str(tokenizer_source)
        self._kept: dict[str | None, KeptTensors] = {}  # base model -> matrices that methods made
        self._memory: dict[str | None, dict[tuple[str, ...], Any]] = {}  # base model -> what methods remember
        self.followers: dict[str, str] = {}

    @classmethod
    def open(
        cls,
        references: Sequence[str | ResolvedReference],
        *,
        relative_to: Path | None = None,
        device: str | torch.device = "cpu",
        tokenizer_source: str | None = None,
        keep_in: Path | None = None,
    ) -> Merger:
        """Open checkpoints by reference; the base comes first, if there is one.

        Recipes must spell the references as they are spelled here; a :class:`ResolvedReference` by its ``name``.
        """
        checkpoints = {
            reference if isinstance(reference, str) else reference.name: Checkpoint.open(reference, relative_to)
            for reference in references
        }
        return cls(checkpoints, device=device, tokenizer_source=tokenizer_source, keep_in=keep_in)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the merged tensors, in the order of the stream."""
        return common_names(list(self.checkpoints.values()))

    def merge(self, recipe: Recipe, out: Destination | None = None) -> Iterator[tuple[str, Tensor]]:
        """Merge one tensor after the other.

        Args:
            recipe: Its references must be among ``checkpoints``.
            out: Destinations of the results, for instance in a resident model. A destination must be contiguous, on
                ``device``, of the tensor's shape and of ``recipe.dtype``. Nobody else may write into it: it is left as
                it is if the same numbers were merged into it last time.

        Yields:
            Name and merged tensor, each once: the destination of ``out``, or a new tensor that nothing else refers
            to. Tensors of other than floating dtypes, and constants such as rotary frequencies, are copied from the
            base or the first model; what only one model has besides language is copied from that one. Stopping early
            leaves nothing open.

        Raises:
            NonFiniteMergeError: If a method refuses a tensor because of NaN or infinity; others give a result that is
                not finite, which whoever scores it refuses.
            MergeError: If the recipe does not fit the checkpoints, a method fails, or a tensor does not fit into memory
                even in small pieces; the message names the tensor.
            CheckpointError: If a file of weights was overwritten since it was opened.
        """
        plan = MergePlan.make(recipe, self.checkpoints)
        plan.refuse_overwritten()
        steps = [MergeStep.of(plan, name, None if out is None else out(name)) for name in self.names]
        n_reads = count_disk_waits()
        try:
            for step, following in zip(steps, [*steps[1:], None], strict=True):
                merge = functools.partial(self._merge_tensor, plan, step, following)
                yield step.name, self.fitting(step.name, merge)
        finally:
            self._stage.drop()
        plan.refuse_overwritten()
        if self._placement == "disk":
            # Once everything is in memory, reading ahead is left out: it takes as long as a fifth of a linear merge.
            fits = sum(checkpoint.nbytes for checkpoint in plan.read) <= free_host_bytes()
            self._reads_ahead = not fits if self._reads_ahead else count_disk_waits() > n_reads

    def template(self, recipe: Recipe) -> Checkpoint:
        """The checkpoint that gives the merged model its configuration and tokenizer.

        It is the one that sees or hears if the others do not, else the one that ``recipe.tokenizer_source`` names, else
        the base, else the first model.
        """
        whole = next(iter(self.checkpoints.values())).whole
        if whole is not None:
            return self.checkpoints[whole]
        if recipe.tokenizer_source in self.checkpoints:
            return self.checkpoints[recipe.tokenizer_source]
        return self.checkpoints[recipe.models[0] if recipe.base_model is None else recipe.base_model]

    def take(self, plan: MergePlan, name: str) -> list[Tensor]:
        """The tensors of a name, of every checkpoint that is read; :meth:`end` must follow at last."""
        return self._stage.take(name, lambda: plan.tensors(name))

    def begin(self, plan: MergePlan, name: str) -> None:
        """Start to read and copy the tensors of the name that is taken next."""
        if self._reads_ahead:
            for checkpoint in plan.read:
                checkpoint.prefetch(name)
        if self._stage.is_ahead:
            self._stage.start(name, plan.tensors(name))

    def end(self, plan: MergePlan) -> None:
        """Release what was read ahead.

        Raises:
            CheckpointError: If a file of weights was overwritten since it was opened.
        """
        self._stage.drop()
        plan.refuse_overwritten()

    def _is_large(self) -> bool:
        first = next(iter(self.checkpoints.values()))
        return sum(math.prod(first.shape(name)) for name in self.names) >= _COMPILED_FROM

    def fitting(self, name: str, compute: Callable[[], _T]) -> _T:
        """What ``compute`` returns. If memory runs out, it is called again with smaller pieces from then on."""
        while True:
            try:
                return compute()
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
                self._shrink(name, exc)

    def _shrink(self, name: str, exc: Exception) -> None:
        self._buffers.clear()
        self._stage.stop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes = self._chunk_elements, self._kernel_elements
        if max(sizes) > _LEAST_CHUNK_ELEMENTS:
            self._chunk_elements, self._kernel_elements = (max(_LEAST_CHUNK_ELEMENTS, n // 4) for n in sizes)
            return
        ways = {"gpu": "engine.sources: host or disk, ", "host": "engine.sources: disk, ", "disk": ""}[self._placement]
        ways += "engine.merge_device: cpu, " if self.device.type == "cuda" else ""
        raise MergeError(
            f"{name}: merging must fit into the memory of {self.device}, got {first_line(exc)[:200]}; use {ways}a"
            " smaller engine.batch_size or fewer workers, and run the same command again"
        ) from exc

    def _merge_tensor(self, plan: MergePlan, step: MergeStep, following: MergeStep | None) -> Tensor:
        name, result = step.name, step.destination
        if result is None:
            result = torch.empty(plan.template.shape(name), dtype=step.dtype, device=self.device)
        else:
            _check_destination(name, result, plan.template.shape(name), step.dtype, self.device)
            if self._is_written(step):
                return result
            self._written.pop(result.data_ptr(), None)
        tensors = [] if step.numbers is None else self.take(plan, name)
        if following is not None and following.numbers is not None and not self._is_written(following):
            self.begin(plan, following.name)
        if step.numbers is None:
            result.copy_(plan.template.get(name))
        else:
            self.run(plan, self.inputs(plan, name, step.numbers, tensors), tensors, result)
        if step.destination is not None:
            self._written[result.data_ptr()] = step.record
        return result

    def run(self, plan: MergePlan, inputs: MergeInput, tensors: list[Tensor], out: Tensor) -> None:
        """Call the method for one tensor, of which ``tensors`` are those of :meth:`.plan.MergePlan.tensors`.

        Raises:
            NonFiniteMergeError: If it fails because a model is not finite.
            MergeError: If it fails otherwise.
        """
        try:
            plan.function(inputs, out)
        except Exception as exc:  # a user's method may raise anything
            if is_out_of_memory(exc):
                raise
            if not_finite := plan.not_finite(tensors):
                raise NonFiniteMergeError(
                    f"{inputs.name}: every model must be finite, got NaN or infinity in {', '.join(not_finite)}; repair"
                    " or leave out that model"
                ) from exc
            if isinstance(exc, NonFiniteMergeError):
                raise
            raise MergeError(f"{inputs.name}: {plan.recipe.method} failed: {exc}") from exc

    def _is_written(self, step: MergeStep) -> bool:
        """Whether the destination already holds the result."""
        return step.destination is not None and self._written.get(step.destination.data_ptr()) == step.record

    def inputs(self, plan: MergePlan, name: str, numbers: Numbers, tensors: list[Tensor]) -> MergeInput:
        """What the method is given for one tensor."""
        assert plan.method is not None
        recipe = plan.recipe
        base, models = (None, tensors) if plan.base is None else (tensors[0], tensors[1:])
        return MergeInput(
            name=name,
            base=base,
            models=tuple(models),
            per_model=numbers.per_model,
            shared=numbers.shared,
            switches={switch: bool(recipe.options.get(switch, default)) for switch, default in plan.method.switches},
            seed=recipe.seed,
            identities=tuple(plan.identities[i] for i in plan.used),
            device=self.device,
            chunk_elements=self._chunk_elements,
            kernel_elements=self._kernel_elements,
            buffers=self._buffers,
            memory=self._memory.setdefault(recipe.base_model, {}),
            is_compiled=self._is_compiled,
            kept=self._kept_for(plan),
        )

    def _kept_for(self, plan: MergePlan) -> KeptTensors:
        """What methods keep for a base; the folder is named after its weights and the vocabulary."""
        reference = plan.recipe.base_model
        if reference not in self._kept:
            folder = self._keep_in
            if folder is not None:
                text = f"{plan.template.weights_digest}\0{self._vocabulary}"
                folder /= hashlib.sha256(text.encode()).hexdigest()[:16]
            self._kept[reference] = KeptTensors(folder)
        return self._kept[reference]


def _with_index(device: torch.device) -> torch.device:
    """``cuda:<i>`` instead of ``cuda``, as tensors name their device."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _check_destination(
    name: str, destination: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(destination.shape) != tuple(shape):
        raise MergeError(
            f"{name}: shape must be {list(shape)} as in the model files, got {list(destination.shape)} in the resident"
            " model; the config.json of the base, or of the first model, must describe its weights"
        )
    wanted = (tuple(shape), dtype, device.type)
    got = (tuple(destination.shape), destination.dtype, destination.device.type)
    if wanted != got or not destination.is_contiguous():
        raise MergeError(f"{name}: destination must be contiguous, {wanted}, got {got}")
