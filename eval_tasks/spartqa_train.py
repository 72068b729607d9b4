"""Documents of the eval task spartqa_train: the prepared sample, with a letter for each candidate answer."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from optuna_merge.data import read_sample
from optuna_merge.errors import TaskError

HERE = Path(__file__).resolve().parent
LETTERS = ["A", "B", "C", "D"]


def documents(data_dir: str = "data", **_metadata: object) -> dict[str, Dataset]:
    """Return the documents for lm-eval, which passes the task's ``metadata``.

    Args:
        data_dir: Folder of the prepared sample, absolute or relative to this file.

    Returns:
        One split, ``train``, with the fields story, question, candidate_answers, answer (the index of the right
        candidate) and choices (one letter for each candidate).

    Raises:
        TaskError: If the sample is not prepared, or a document does not have 2 to 4 candidates with one of them right.
    """
    path = HERE / data_dir / "spartqa_train.jsonl"
    docs = read_sample(path, "optuna-merge prepare-data studies/spartqa_alpaca.yaml")
    for number, doc in enumerate(docs, start=1):
        n_candidates = len(doc["candidate_answers"])
        if not 2 <= n_candidates <= len(LETTERS):
            raise TaskError(
                f"{path}, line {number}: candidate_answers must be 2 to {len(LETTERS)}, got {n_candidates}; "
                "the choices are the letters A to D"
            )
        if not 0 <= doc["answer"] < n_candidates:
            raise TaskError(
                f"{path}, line {number}: answer must be the index of one of {n_candidates} candidates, "
                f"got {doc['answer']}"
            )
        doc["choices"] = LETTERS[:n_candidates]
    return {"train": Dataset.from_list(docs)}
