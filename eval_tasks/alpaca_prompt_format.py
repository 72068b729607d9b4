"""Documents of the eval task alpaca_prompt_format: the prepared sample, each with the possible continuations."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from optuna_merge.data import read_sample
from optuna_merge.errors import TaskError

HERE = Path(__file__).resolve().parent
WRONG_CONTINUATIONS = ["<|im_end|>", "<|im_start|>", "### Instruction:", "USER:"]


def documents(eos_text: str = "</s>", data_dir: str = "data", **_metadata: object) -> dict[str, Dataset]:
    """Return the documents for lm-eval, which passes the task's ``metadata``.

    Args:
        eos_text: The model's end-of-sequence token as its tokenizer spells it. If it is one of the wrong continuations
            (``<|im_end|>`` for a ChatML model), that one is left out.
        data_dir: Folder of the prepared sample, absolute or relative to this file.

    Returns:
        One split, ``train``, with the fields instruction, input (empty), output, choices and answer (the index of
        ``eos_text``).

    Raises:
        TaskError: If the sample is not prepared, or ``eos_text`` is not a text.
    """
    if not isinstance(eos_text, str) or not eos_text.strip():
        raise TaskError(
            f"alpaca_prompt_format: metadata.eos_text must be the tokenizer's end-of-sequence token as text, "
            f"got {eos_text!r}"
        )
    # The right one comes last: among equal scores the first wins, so a model that cannot tell scores 0.
    choices = [text for text in WRONG_CONTINUATIONS if text != eos_text] + [eos_text]
    docs = read_sample(
        HERE / data_dir / "alpaca_prompt_format.jsonl", "optuna-merge prepare-data studies/spartqa_alpaca.yaml"
    )
    return {"train": Dataset.from_list([{**doc, "choices": choices, "answer": len(choices) - 1} for doc in docs])}
