"""Time of one evaluation, relative to lm-eval on the same live model and to the bare forward passes.

    python benchmarks/eval_speed.py [--quickstart DIR] [--json]

Measured on the quickstart's base model and tasks, if they exist (``make quickstart-models`` makes them),
and on two random models made on the spot: a small one with short prompts, where overhead dominates, and a larger one
with longer prompts, where arithmetic dominates. Each has three multiple-choice tasks; those of the random models offer
four letters, five words, or six phrases of several tokens. All figures come from this one run: the candidates take
turns, and the best of five counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from optuna_merge.testing.models import write_tiny_models

ROOT = Path(__file__).resolve().parents[1]
TARGET_LM_EVAL = 0.1
TARGET_FORWARD = 1.5

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "shape": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8},
        "documents": {"n_documents": 45, "n_words": 6},
    },
    "larger": {
        "shape": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8},
        "documents": {"n_documents": 16, "n_words": 30},
    },
}
WORDS = "cat dog mat sat ran after the and on one two three four five six seven eight nine ten letter next".split()


QUICKSTART_DOCUMENTS = 120  # as many of each task as the quickstart searches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "studies" / "quickstart_models", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    figures = {}
    if (options.quickstart / "base" / "config.json").is_file():
        tasks = [f"quickstart_{skill}" for skill in ("reverse", "next", "last")]
        folder = ROOT / "optuna_merge" / "quickstart" / "quickstart_tasks"
        figures["quickstart"] = measure(options.quickstart / "base", folder, tasks, limit=QUICKSTART_DOCUMENTS)
    with tempfile.TemporaryDirectory() as name:
        for size, settings in SIZES.items():
            folder = Path(name) / size
            path = write_model(folder, **settings["shape"])
            tasks = write_tasks(folder / "tasks", **settings["documents"])
            figures[size] = measure(path, folder / "tasks", tasks)
    report(figures, as_json=options.json)
    first = next(iter(figures))
    if figures[first]["over_lm_eval"] > TARGET_LM_EVAL or figures["larger"]["over_forward"] > TARGET_FORWARD:
        print(f"missed: must be at most {TARGET_LM_EVAL} ({first}) and {TARGET_FORWARD} (larger)", file=sys.stderr)
        sys.exit(1)


def measure(path: Path, task_folder: Path, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    engine = HFEngine(path)
    live = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine.load_weights((name, tensor) for name, tensor in live.state_dict().items())
    terms = [EvalTask(task) for task in tasks]
    options: dict[str, Any] = {"task_search_path": [task_folder], "apply_chat_template": False, "limit": limit}
    chunked = Scorer.build(engine, terms, **options)
    at_once = Scorer.build(engine, terms, **options, n_chunks=1)
    lm = HFLM(pretrained=live, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=32)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def peer() -> Any:
        return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, limit=limit)

    score, results = at_once.score_all(), peer()["results"]
    for task in tasks:
        assert score.tasks[task].value == results[task]["acc,none"], "the scores differ, so the times mean nothing"
    n_tokens = chunked.describe().n_tokens
    seconds = best_seconds(
        at_once=at_once.score_all,
        chunks=chunked.score_all,
        forward=lambda: bare_forward(live, n_tokens, engine.batch_tokens),
        lm_eval=peer,
    )
    return {
        "n_requests": chunked.describe().n_requests,
        "n_tokens": n_tokens,
        "n_chunks": chunked.n_chunks,
        "seconds": seconds,
        "over_lm_eval": seconds["chunks"] / seconds["lm_eval"],
        "over_forward": seconds["chunks"] / seconds["forward"],
        "chunks_over_once": seconds["chunks"] / seconds["at_once"],
    }


def report(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for name, row in figures.items():
        seconds = row["seconds"]
        print(f"{name}: {row['n_requests']} requests, {row['n_tokens']} tokens, {row['n_chunks']} chunks")
        print(f"  one evaluation: {seconds['chunks']:.3f} s in chunks, {seconds['at_once']:.3f} s at once")
        print(f"  relative to lm_eval.simple_evaluate ({seconds['lm_eval']:.2f} s): {row['over_lm_eval']:.3f}")
        print(f"  relative to bare forward passes ({seconds['forward']:.3f} s): {row['over_forward']:.2f}")
        print(f"  in chunks, relative to at once: {row['chunks_over_once']:.3f}")


def bare_forward(model: Any, n_tokens: int, batch_tokens: int, length: int = 64) -> None:
    """Run the decoder without its output layer on ``n_tokens`` tokens, in full batches without padding."""
    tokens = torch.zeros((batch_tokens // length, length), dtype=torch.long)
    n_full, rest = divmod(n_tokens, tokens.numel())
    with torch.inference_mode():
        for _ in range(n_full):
            model.model(tokens, use_cache=False)
        if rest >= length:
            model.model(tokens[: rest // length], use_cache=False)


def best_seconds(**functions: Callable[[], Any]) -> dict[str, float]:
    """The best of five times for each function; they take turns, so that a busy machine slows all alike."""
    seconds: dict[str, float] = dict.fromkeys(functions, float("inf"))
    for _ in range(5):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def write_model(folder: Path, **shape: int) -> Path:
    path, _ = write_tiny_models(folder, 0)
    config = AutoConfig.from_pretrained(path)
    heads = shape["hidden_size"] // 64
    config.update({**shape, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64})
    config.update({"max_position_embeddings": 2048})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def write_tasks(folder: Path, n_documents: int, n_words: int) -> list[str]:
    folder.mkdir()
    rnd = random.Random(0)

    def phrase(n: int) -> str:
        return " ".join(rnd.choice(WORDS) for _ in range(n))

    kinds: dict[str, Callable[[], list[str]]] = {
        "letters": lambda: ["A", "B", "C", "D"],
        "words": lambda: rnd.sample(WORDS, 5),
        "phrases": lambda: [phrase(3) for _ in range(6)],
    }
    for name, choices in kinds.items():
        rows = [
            {
                "text": f"Question: {phrase(n_words)}? Answer:",
                "choices": (c := choices()),
                "gold": rnd.randrange(len(c)),
            }
            for _ in range(n_documents)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/{name}.jsonl\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\n"
            "doc_to_target: gold\nmetric_list:\n- metric: acc\n  aggregation: mean\n  higher_is_better: true\n"
        )
    return list(kinds)


if __name__ == "__main__":
    main()
