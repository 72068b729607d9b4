"""Task files with documents made on the spot, and a scorer of them whose engine needs no model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from optuna_merge.testing.engine import FakeEngine

N_DOCUMENTS = 24
WORDS = ["cat", "dog", "mat", "sat", "one", "two", "three", "four", "letter", "next"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MEAN = {"aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, n_documents: int = N_DOCUMENTS, verbatim: str = "", **settings: Any) -> None:
    rnd = random.Random(name)
    rows = []
    for number in range(n_documents):
        choices = [" ".join(rnd.sample(WORDS, rnd.randint(1, 3))) for _ in range(4)]
        question = f"{number} {' '.join(rnd.sample(WORDS, 3))}"
        rows.append({"question": question, "choices": choices, "gold": rnd.randrange(4), "text": "the " + question})
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        **settings,
    }
    written = {key: value for key, value in task.items() if value is not None and f"{key}:" not in verbatim}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(written) + verbatim)


HELPERS = """
def process(doc, results):
    scores = [r[0] for r in results]
    return {"is_early": float(scores.index(max(scores)) < 2), "spread": (max(scores), min(scores))}

def widest(values):
    return max(high - low for high, low in values)
"""
EARLY = """
process_results: !function helpers.process
metric_list:
- {metric: is_early, aggregation: mean, higher_is_better: true}
- {metric: spread, aggregation: !function helpers.widest, higher_is_better: true}
"""


def write_all(folder: Path) -> Path:
    folder.mkdir()
    (folder / "helpers.py").write_text(HELPERS)
    write_task(folder, "letters", doc_to_choice=["A", "B", "C", "D"], tag=["choosing"])
    write_task(folder, "phrases", n_documents=30, tag=["choosing"])
    write_task(folder, "shots", fewshot_split="train", num_fewshot=1, doc_to_choice=["A", "B", "C", "D"])
    write_task(folder, "early", verbatim=EARLY)
    write_task(
        folder,
        "cloze",
        output_type="loglikelihood",
        doc_to_target=" {{choices[0]}}",
        doc_to_choice=None,
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **MEAN}],
    )
    write_task(
        folder,
        "prose",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        doc_to_choice=None,
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        folder,
        "telling",
        n_documents=10,
        output_type="generate_until",
        doc_to_target="t",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        filter_list=[
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        metric_list=[{"metric": "exact_match", **MEAN}],
    )
    for name, by_size in (("both", True), ("each", False)):
        group = {
            "group": name,
            "task": ["letters", "phrases"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


def fake(tasks: Path, **options: Any) -> tuple[FakeEngine, Scorer]:
    engine = FakeEngine({"w": torch.zeros(4)})
    terms = options.pop("terms", [EvalTask("right"), EvalTask("rarely", -2.0)])
    return engine, Scorer.build(engine, terms, task_search_path=[tasks], **options)


def loaded(engine: FakeEngine, distance: float) -> None:
    engine.load_weights([("w", torch.full((4,), distance))])
