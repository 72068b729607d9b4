"""What scoring returns: scores, chunk results and descriptions, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from optuna_merge.errors import TaskError

Documents = dict[str, dict[str, list[Any]]]
"""Leaf task to ``doc_id`` and to each metric (``acc,none``): parallel lists of plain JSON values, in document order."""


@dataclass(frozen=True)
class TaskScore:
    """What one eval task scored.

    Attributes:
        metric: ``metric,filter``.
        value: The metric as lm-eval aggregates it.
        stderr: Its standard error as lm-eval estimates it; None where it has no estimate or none was asked for.
        n_documents: Documents aggregated.
        weight: Its weight in the objective.
    """

    metric: str
    value: float
    stderr: float | None
    n_documents: int
    weight: float


@dataclass(frozen=True)
class Score:
    """The objective over some documents.

    Attributes:
        value: Sum of weight x metric over the eval tasks.
        tasks: Eval task to its score.
        documents: The document values behind it.
    """

    value: float
    tasks: dict[str, TaskScore]
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal score, floats included to the last bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Score:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no score.
        """
        try:
            data = json.loads(text)
            tasks = {name: TaskScore(**task) for name, task in data["tasks"].items()}
            return cls(data["value"], tasks, data["documents"])
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise TaskError(f"score: not readable ({exc!r}); it must be what Score.to_json wrote") from exc


@dataclass(frozen=True)
class ChunkResult:
    """What one trial scored on one chunk.

    Attributes:
        chunk: Number of the chunk, in [0, ``n_chunks``).
        score: Sum of weight x metric, each metric aggregated over this chunk's documents.
        documents: The document values behind it.
    """

    chunk: int
    score: float
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal result, floats included to the last bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChunkResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no result of a chunk.
        """
        try:
            data = json.loads(text)
            return cls(int(data["chunk"]), float(data["score"]), data["documents"])
        except (ValueError, KeyError, TypeError) as exc:
            raise TaskError(f"chunk result: not readable ({exc!r}); it must be what ChunkResult.to_json wrote") from exc


@dataclass(frozen=True)
class TaskDescription:
    """What was found for one eval task.

    Attributes:
        name: As in :attr:`Score.tasks`.
        kind: ``task``, ``group`` or ``tag``.
        leaves: The tasks that it consists of.
        metric: The metric that counts.
        metrics: All metrics that it has.
        weight: Its weight in the objective.
        is_mean: Whether the metric is a mean over documents; otherwise a partial score is the metric of the
            documents scored so far.
        n_searched: Documents that the objective sees.
        n_holdout: Documents that only the holdout sees.
    """

    name: str
    kind: str
    leaves: tuple[str, ...]
    metric: str
    metrics: tuple[str, ...]
    weight: float
    is_mean: bool
    n_searched: int
    n_holdout: int


@dataclass(frozen=True)
class Description:
    """What a scorer will do.

    Attributes:
        tasks: Every eval task, those of the holdout included.
        n_chunks: Chunks that the searched documents are cut into.
        n_documents: Searched documents.
        n_requests: Requests of one full evaluation.
        n_tokens: Tokens that one full evaluation puts through the model.
        longest: Tokens in the longest sequence.
        n_padded, n_scored, n_cached: What an engine holds of a call at most; see ``Prepared``.
        chat_template: Whether prompts go through the tokenizer's chat template.
        chat_template_reason: Why, in words.
    """

    tasks: tuple[TaskDescription, ...]
    n_chunks: int
    n_documents: int
    n_requests: int
    n_tokens: int
    longest: int
    n_padded: int
    n_scored: int
    n_cached: int
    chat_template: bool
    chat_template_reason: str
