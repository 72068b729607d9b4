"""The ways to put a recipe's merged weights into the resident model.

A loader knows recipes and the engine; it knows nothing of trials, eval tasks or scores.
"""

from __future__ import annotations

from typing import Protocol

from optuna_merge.errors import EngineError, first_line, is_out_of_memory
from optuna_merge.evaluation.engine import Engine, MakingEngine
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe


class RecipeLoader(Protocol):
    """Merges recipes into one resident model.

    Attributes:
        device: Where the resident model lives: ``cpu`` or ``cuda:<i>``.
    """

    @property
    def device(self) -> str: ...  # noqa: D102

    def load(self, recipe: Recipe) -> None:
        """Merge a recipe and overwrite the resident model's weights with the result.

        Raises:
            NonFiniteMergeError: If a merged tensor holds NaN or infinity.
            EngineDiedError: If the engine dies during the load, is started again and dies again.
            MergeError, EngineError: If the merge fails, or memory runs out.
        """
        ...

    def close(self) -> None:
        """Free the memory of the resident model; call nothing else of a ``LocalLoader`` afterwards."""
        ...


class LocalLoader:
    """Merges in this process and streams the tensors into the engine.

    On one device the merge writes straight into the engine's resident tensors.

    Attributes:
        merger: Holds the open checkpoints.
        engine: Holds the resident model.
    """

    def __init__(self, merger: Merger, engine: Engine) -> None:
        self.merger = merger
        self.engine = engine

    @property
    def device(self) -> str:
        """The engine's device."""
        return self.engine.device

    def load(self, recipe: Recipe) -> None:
        """Merge and load tensor by tensor; see :meth:`RecipeLoader.load`."""
        is_same_device = str(self.merger.device) == self.engine.device
        try:
            self.engine.load_weights(self.merger.merge(recipe, out=self.engine.resident if is_same_device else None))
        except (MemoryError, RuntimeError) as exc:
            if not is_out_of_memory(exc):
                raise
            raise EngineError(
                f"engine: a merge must fit into the memory of {self.engine.device} while it is loaded, got"
                f" {first_line(exc)}; use engine.sources: disk, a smaller engine.batch_size or fewer workers, and run"
                " the same command again"
            ) from exc

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()


class WorkerLoader:
    """Hands the recipe to an engine whose workers merge where their part of the model lives, as vLLM's do.

    Attributes:
        engine: Holds the resident model.
    """

    def __init__(self, engine: MakingEngine) -> None:
        self.engine = engine

    @property
    def device(self) -> str:
        """The engine's device."""
        return self.engine.device

    def load(self, recipe: Recipe) -> None:
        """Let the workers merge; see :meth:`RecipeLoader.load`."""
        self.engine.load_made(recipe.to_json())

    def close(self) -> None:
        """Stop the workers, which frees their memory; the next load starts them again."""
        self.engine.close()
