"""Scores and chunk results as JSON text, which lies in the files of studies."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.results import ChunkResult, Score, TaskScore
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask

VALUES: list[Any] = [True, 1, 10**30, 5e-324, -0.0, math.inf, -math.inf, None, "ü", {"tuple": [1.0, None]}]
DOCUMENTS: dict[str, dict[str, list[Any]]] = {"leaf": {"doc_id": list(range(len(VALUES))), "acc,none": VALUES}}


def test_results_and_scores_go_through_json_unchanged(engine: HFEngine, tasks: Path) -> None:
    terms = [EvalTask("early", metric="spread"), EvalTask("prose", metric="bits_per_byte"), EvalTask("letters")]
    scorer = Scorer.build(engine, terms, task_search_path=[tasks], n_chunks=3)
    results = [scorer.score_chunk(chunk) for chunk in range(3)]
    read = [ChunkResult.from_json(result.to_json()) for result in results]
    assert read == results
    score = scorer.total(results)
    assert scorer.total(read) == score
    assert Score.from_json(score.to_json()) == score
    with pytest.raises(TaskError, match="must hold each chunk once"):
        scorer.total([results[0], results[0]])


def test_the_text_is_that_of_the_fields() -> None:
    """As studies recorded it before: one line, the fields in their order, NaN and infinity by name."""
    tasks = {"a é": TaskScore("acc,none", math.nan, None, 3, 1.0), "b": TaskScore("x", math.inf, -math.inf, 3, -0.0)}
    score, result = Score(0.1 + 0.2, tasks, DOCUMENTS), ChunkResult(3, math.nan, DOCUMENTS)
    assert score.to_json() == json.dumps(asdict(score))
    assert result.to_json() == json.dumps(asdict(result))
    assert ChunkResult(0, 0, {}).to_json() == '{"chunk": 0, "score": 0, "documents": {}}'
    assert Score.from_json(score.to_json()).to_json() == score.to_json()
    assert ChunkResult.from_json(result.to_json()).to_json() == result.to_json()


def test_floats_keep_their_last_bit() -> None:
    rnd = random.Random(0)
    floats = [struct.unpack("d", rnd.randbytes(8))[0] for _ in range(2000)]
    floats = [number for number in floats if not math.isnan(number)]
    read = ChunkResult.from_json(ChunkResult(0, floats[0], {"leaf": {"x": floats}}).to_json())
    assert (read.score, read.documents["leaf"]["x"]) == (floats[0], floats)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "chunk: Field required"),
        ("[]", "Input should be an object"),
        ("torn", "Invalid JSON: expected ident at line 1 column 2"),
        ('{"chunk": 0, "score": 1, "documents": {"leaf": 3}}', "documents.leaf: Input should be an object"),
    ],
)
def test_a_text_that_is_not_readable(text: str, reason: str) -> None:
    with pytest.raises(TaskError) as caught:
        ChunkResult.from_json(text)
    message = f"chunk result: not readable ({reason}); it must be what ChunkResult.to_json wrote"
    assert str(caught.value) == message
    with pytest.raises(TaskError, match=r"^score: not readable \(.*; it must be what Score.to_json wrote$"):
        Score.from_json(text)
