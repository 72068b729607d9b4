"""A fair sample of the architectures in ``docs/models.md``; ``python -m tests.architectures.walk`` tries all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.architectures import walk
from tests.architectures.examine import Outcome, examine
from tests.architectures.tiny import MODEL_TYPES, VISION_TYPES

SAMPLE = {
    "qwen3": "fast",  # dense, with grouped queries and normalized heads
    "starcoder2": "fast",  # biases and a sliding window
    "gemma3_text": None,  # tied, with sliding windows in some layers
    "falcon": None,  # attention beside the feed-forward part
    "qwen3_moe": None,  # experts that transformers fuses while loading
    "gpt_oss": None,  # experts that are stored fused
    "bloom": None,  # ALiBi: distances are built in
    "mamba2": None,  # states instead of attention
    "qwen3_next": None,  # linear and full attention by turns
    "zamba2": None,  # layers that share weights
    "cpmant": None,  # counts a row from its end, padding included
    "moshi": None,  # its cache forgets what its attention would see
    "youtu": "fast",  # transformers writes over a row after loading
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_is_merged_scored_and_exported(model_type: str, tmp_path: Path) -> None:
    outcome = examine(model_type, tmp_path, is_quick=True)
    assert outcome.status == "works", outcome.reason
    assert SAMPLE[model_type] in (None, outcome.notes)


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    outcome = examine("reformer", tmp_path, is_quick=True)
    assert outcome.status == "refused"
    assert re.search("equal inputs must have equal scores, got others the second time", outcome.reason)


def test_a_process_that_crashes_is_one_line_of_the_walk() -> None:
    assert walk.in_its_own_process("llama", lambda *_: os._exit(3)) == Outcome(
        "llama", "", "wrong", "its process ended with exit code 3"
    )


def test_the_table_has_a_row_for_each_architecture() -> None:
    causal, _, senses = walk.TABLE.read_text(encoding="utf-8").partition(walk._MARK)
    rows, seeing = (re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE) for text in (causal, senses))
    assert tuple(rows) == MODEL_TYPES
    assert seeing == sorted(set(seeing) & set(VISION_TYPES))
    assert {"llava", "qwen2_5_vl", "gemma3"} <= set(seeing)
