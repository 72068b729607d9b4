"""What scoring returns, as plain data: the score of a model, of a term and of a chunk, and the documents behind it.

The text of :meth:`Score.to_json` and :meth:`ChunkResult.to_json` lies in the files of studies: it must stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from optuna_merge.errors import TaskError

_Read = TypeVar("_Read")

Documents = dict[str, dict[str, list[Any]]]
"""Leaf to its columns, parallel lists of plain JSON values in document order.

``doc_id``, each ``metric,filter``, and for generated texts the columns of ``answers.py``.
"""


@dataclass(frozen=True)
class Answers:
    """How the texts that one model generated for one term came about; see ``answers.py``.

    Attributes:
        n: Number of documents.
        n_tokens: Mean number of tokens of an answer.
        cut: Share of answers that ended only because they had ``max_gen_toks`` tokens.
        empty: Share that has no character but blanks.
        unread: Share in which the term's filter found nothing; None if the filter does not say.
    """

    n: int
    n_tokens: float
    cut: float
    empty: float
    unread: float | None


@dataclass(frozen=True)
class TaskScore:
    """What one term scored.

    Attributes:
        metric: ``metric,filter``.
        value: The metric as lm-eval aggregates it.
        stderr: Its standard error as lm-eval estimates it; None if lm-eval has no estimate or none was asked for.
        n_documents: Documents that were aggregated.
        weight: What the metric is multiplied by.
        answers: How the generated texts came about; None if there are none, or if an earlier version scored them.
    """

    metric: str
    value: float
    stderr: float | None
    n_documents: int
    weight: float
    answers: Answers | None = None


@dataclass(frozen=True)
class Score:
    """The score of one model over some documents.

    Attributes:
        value: Sum of weight x metric over the terms.
        tasks: Key of each term to its score.
        documents: The document values behind it.
    """

    value: float
    tasks: dict[str, TaskScore]
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal score; floats keep their last bit."""
        return json.dumps(_SCORE.dump_python(self, warnings=False))

    @classmethod
    def from_json(cls, text: str) -> Score:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no score.
        """
        return _read(_SCORE, text, "score", "Score.to_json")


@dataclass(frozen=True)
class ChunkResult:
    """What one model scored on one chunk.

    Attributes:
        chunk: Number of the chunk, in [0, ``n_chunks``).
        score: Sum of weight x metric, each metric aggregated over this chunk's documents.
        documents: The document values behind it.
    """

    chunk: int
    score: float
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal result; floats keep their last bit."""
        return json.dumps(_CHUNK_RESULT.dump_python(self, warnings=False))

    @classmethod
    def from_json(cls, text: str) -> ChunkResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no result of a chunk.
        """
        return _read(_CHUNK_RESULT, text, "chunk result", "ChunkResult.to_json")


@dataclass(frozen=True)
class Expectation:
    """What one model is expected to score on one chunk, if its answers were drawn by its own probabilities.

    Attributes:
        value: Sum of weight x expected metric over the terms that have a stand-in; 0 if none has.
        tasks: Key of each of these terms to its expected metric.
        scored: What the model did score; None if texts were needed for it and not generated.
    """

    value: float
    tasks: dict[str, float]
    scored: ChunkResult | None


@dataclass(frozen=True)
class HeldDocument:
    """A held-out document.

    Attributes:
        task: Name of its lm-eval task.
        document: Its number there.
        question: What is asked, without examples, system prompt and chat template.
        right: The right answer; empty if the task names none.
        weights: Each ``metric,filter`` that counts, to its weight in the score.
    """

    task: str
    document: int
    question: str
    right: str
    weights: dict[str, float]


_SCORE = TypeAdapter(Score)
_CHUNK_RESULT = TypeAdapter(ChunkResult)


def join(parts: Sequence[Documents]) -> Documents:
    """The values of several calls together, in document order."""
    joined: Documents = {}
    for part in parts:
        for name, columns in part.items():
            into = joined.setdefault(name, {})
            n_before, n_new = len(into.get("doc_id", ())), len(columns["doc_id"])
            for key in {**into, **columns}:  # a chunk that an earlier version scored has fewer columns
                into[key] = into.get(key, [None] * n_before) + columns.get(key, [None] * n_new)
    return {name: _in_order(columns) for name, columns in joined.items()}


def _in_order(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    order = sorted(range(len(columns["doc_id"])), key=columns["doc_id"].__getitem__)
    return {key: [values[i] for i in order] for key, values in columns.items()}


def _read(adapter: TypeAdapter[_Read], text: str, what: str, writer: str) -> _Read:
    try:
        return adapter.validate_json(text)
    except ValidationError as exc:
        [first, *_] = exc.errors(include_url=False)
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise TaskError(f"{what}: not readable ({reason}); it must be what {writer} wrote") from exc
