"""Part ``faults``: after a merge or a score has failed, the next score is right.

Knows how to provoke faults. Does not know speed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.inputs import Inputs, make_recipe, open_merger, weighted_recipe, write_tasks
from benchmarks.cuda.measuring import GIB, DifferenceError, empty_caches, memory_limit
from optuna_merge.errors import NonFiniteMergeError, first_line
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask

SPARE_MEMORY = {"little memory in scoring": GIB // 2, "next to no memory": GIB // 16}
"""Fault to the bytes of GPU memory that are left for it."""


def part_faults(inputs: Inputs) -> dict[str, Any]:
    """Cause a non-finite merge, an interrupted one and a shortage of memory; score correctly after each.

    Raises:
        DifferenceError: If a fault passes unnoticed, or the next score is wrong.
    """
    bench = Bench(inputs.small)
    bench.load_non_finite()
    figures: dict[str, Any] = {"a merge that is not finite": bench.check("a merge that is not finite")}
    bench.interrupt_load()
    figures["an interrupted merge"] = bench.check("an interrupted merge")
    if inputs.is_cuda:
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(inputs.device)
        for fault, spare in SPARE_MEMORY.items():
            figures[f"{fault}: score there"] = bench.score_within(used + spare)
            figures[fault] = bench.check(fault)
    return figures


class Bench:
    """One engine that lives through all faults, and what it merges and scores."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.recipe = make_recipe(inputs, "task_arithmetic")
        self.merger = open_merger(inputs, self.recipe, "disk")
        self.folder = write_tasks(inputs)
        self.engine = self.build_engine()
        self.scorer = self.build_scorer(self.engine)

    def build_engine(self, **options: Any) -> HFEngine:
        """An engine without weights."""
        dtype: Any = self.recipe.dtype
        return HFEngine(self.inputs.models[0], dtype=dtype, device=str(self.inputs.device), **options)

    def build_scorer(self, engine: HFEngine) -> Scorer:
        """A scorer of two eval tasks."""
        tasks = [EvalTask("letters"), EvalTask("phrases")]
        return Scorer.build(engine, tasks, task_search_path=[self.folder], apply_chat_template=False, n_chunks=1)

    def score(self) -> float:
        """Merge into the engine and score."""
        self.engine.load_weights(self.merger.merge(self.recipe, out=self.engine.resident))
        return self.scorer.score_all().value

    def fresh_score(self) -> float:
        """The score of a new engine that saw no fault.

        Its batches have the same size, because rounding to bfloat16 depends on the size of a batch.
        """
        fresh = self.build_engine(batch_tokens=self.engine.batch_tokens)
        fresh.load_weights(open_merger(self.inputs, self.recipe, "disk").merge(self.recipe, out=fresh.resident))
        value = self.build_scorer(fresh).score_all().value
        fresh.close()
        return value

    def check(self, fault: str) -> str:
        """Compare the next score with one that saw no fault.

        Raises:
            DifferenceError: If they differ.
        """
        found, expected = self.score(), self.fresh_score()
        if found != expected:
            raise DifferenceError(f"after {fault} the score is {found}, without it {expected}")
        return "the next score is right"

    def load_non_finite(self) -> None:
        """Load a merge that overflows, and see it refused.

        Raises:
            DifferenceError: If it is loaded.
        """
        endless = weighted_recipe(self.inputs, "task_arithmetic", (1e40, 1e40, 1e40))
        with contextlib.suppress(NonFiniteMergeError):
            self.engine.load_weights(self.merger.merge(endless, out=self.engine.resident))
            raise DifferenceError("a merge that is not finite was loaded")

    def interrupt_load(self) -> None:
        """Interrupt a merge after its third tensor."""

        def interrupted() -> Iterator[tuple[str, Tensor]]:
            yield from itertools.islice(self.merger.merge(self.recipe, out=self.engine.resident), 3)
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self.engine.load_weights(interrupted())

    def score_within(self, n_bytes: int) -> float | str:
        """The score while the process may use only so many bytes of the GPU, or how it fails."""
        try:
            with memory_limit(self.inputs.device, n_bytes):
                return self.score()
        except Exception as exc:  # a merge wraps the error that stopped it
            return f"fails: {first_line(exc)}"
        finally:
            empty_caches(self.inputs.device)
