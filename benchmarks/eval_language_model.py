"""Time of one evaluation of a real language model, relative to lm-eval and to the bare forward passes.

    python benchmarks/eval_language_model.py [--model DIR] [--rounds N] [--json]

Three tasks through the model's chat template: questions with eight choices, questions with five fixed examples and four
choices, and answers of up to ten generated tokens. Each is timed as a study runs it, in chunks; at once; by
``lm_eval.simple_evaluate`` at its best batch size, on the same live model; and against the bound: forward passes of
exactly the tokens that must be computed, without padding, without attention to what is cached, and in the best batch;
the output layer where something is scored or chosen.
One thread; seconds of CPU time. The candidates take turns, and the best round counts. Scores are compared first.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from optuna_merge.evaluation.engines.forward import Forward
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask

ROOT = Path(__file__).resolve().parents[1]
MOST_OVER_LM_EVAL = {"eight_choices": 0.2, "five_examples": 0.2, "generated": 0.6}
MOST_OVER_BOUND = 1.3
MOST_OVER_ONCE = 1.1
LM_EVAL_BATCHES = (8, 32)
PASS_TOKENS = (256, 512, 1024)
WORDS = """apple river garden window purple mountain silver forest planet letter orange summer winter castle bridge
dragon pencil rocket island thunder""".split()
N_DOCUMENTS = {"eight_choices": 32, "five_examples": 24, "generated": 120}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "studies" / "smollm2_models" / "base", metavar="DIR")
    parser.add_argument("--task", choices=list(N_DOCUMENTS), action="append", help="only this task; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print each task's figures as a line of JSON")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        sys.exit(f"{options.model}: holds no model; make smollm2 makes one, or name another by --model")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_tasks(Path(name))
        bench = Bench(options.model, Path(name))
        figures = {}
        for task in options.task or N_DOCUMENTS:
            figures[task] = bench.measure(task, options.rounds)
            print(json.dumps({task: figures[task]}) if options.json else describe(task, figures[task]), flush=True)
    missed = [
        f"{task}: {figure} must be at most {most}, got {row[figure]:.2f}"
        for task, row in figures.items()
        for figure, most in [
            ("over_lm_eval", MOST_OVER_LM_EVAL[task]),
            ("over_bound", MOST_OVER_BOUND),
            ("over_once", MOST_OVER_ONCE),
        ]
        if row[figure] > most
    ]
    if missed:
        sys.exit("missed: " + "; ".join(missed))


class Bench:
    """One model, live for lm-eval and resident in the engine."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.engine = HFEngine(path, device="cpu")
        self.live = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.folder = folder
        self.load()

    def load(self) -> None:
        self.engine.load_weights((name, tensor) for name, tensor in self.live.state_dict().items())

    def measure(self, task: str, n_rounds: int) -> dict[str, Any]:
        terms = [EvalTask(task, metric="exact_match,none" if task == "generated" else "acc,none")]
        options: dict[str, Any] = {"task_search_path": [self.folder], "apply_chat_template": True}
        chunked = Scorer.build(self.engine, terms, **options)
        at_once = Scorer.build(self.engine, terms, **options, n_chunks=1)
        manager = TaskManager(include_path=str(self.folder), include_defaults=False)

        def ours(scorer: Scorer) -> float:
            return scorer.score_all().value

        def theirs(batch_size: int, limit: int | None = None) -> float:
            lm = HFLM(pretrained=self.live, tokenizer=self.tokenizer, batch_size=batch_size)
            results = lm_eval.simple_evaluate(
                lm,
                tasks=[task],
                task_manager=manager,
                bootstrap_iters=0,
                apply_chat_template=True,
                fewshot_as_multiturn=False,
                limit=limit,
            )["results"]
            return float(results[task][terms[0].metric])

        passes = self._passes(at_once)
        batch_size = min(
            LM_EVAL_BATCHES, key=lambda size: seconds(lambda: theirs(size, limit=N_DOCUMENTS[task] // 4))[0]
        )
        pass_tokens = min(PASS_TOKENS, key=lambda n: seconds(lambda: self._bare(n, 2048, 0, []))[0])
        times: dict[str, float] = {}
        for _ in range(n_rounds):
            values = set()
            for name, function in {
                "chunks": lambda: ours(chunked),
                "once": lambda: ours(at_once),
                "lm_eval": lambda: theirs(batch_size),
            }.items():
                self.load()  # what is kept between chunks is not kept between merges
                took, value = seconds(function)
                times[name] = min(took, times.get(name, took))
                values.add(value)
            assert len(values) == 1, f"{task}: the scores differ ({values}), so the times mean nothing"
            took, _ = seconds(lambda: self._bare(pass_tokens, *passes))
            times["bound"] = min(took, times.get("bound", took))
        return {
            "n_documents": N_DOCUMENTS[task],
            "n_chunks": chunked.n_chunks,
            "n_tokens": passes[0],
            "n_scored": passes[1],
            "n_generated": sum(passes[2]),
            "lm_eval_batch": batch_size,
            "seconds": times,
            "over_lm_eval": times["chunks"] / times["lm_eval"],
            "over_bound": times["chunks"] / times["bound"],
            "over_once": times["chunks"] / times["once"],
        }

    def _passes(self, scorer: Scorer) -> tuple[int, int, list[int]]:
        """Tokens that one evaluation computes, without padding; how many are scored; the rows of each decoding step."""
        steps: list[int] = []
        step = Forward.step

        def counted(forward: Forward, tokens: Any, *inputs: Any) -> Any:
            steps.append(len(tokens))
            return step(forward, tokens, *inputs)

        self.load()
        scorer.score_all()  # the first time, it is tried whether the model follows masks and caches
        Forward.step = counted  # type: ignore[method-assign]
        scorer.score_all()
        Forward.step = step  # type: ignore[method-assign]
        beginnings = sum(map(len, self.engine._prefixes.beginnings.tokens))
        found = scorer.describe()
        return found.n_tokens + beginnings, found.n_places, steps

    def _bare(self, pass_tokens: int, n_tokens: int, n_scored: int, steps: list[int]) -> None:
        """Run the decoder on that many tokens, and the output layer on the scored ones and on the rows of each step."""
        decoder, head = self.live.model, self.live.lm_head
        with torch.inference_mode():
            for at in range(0, n_tokens, pass_tokens):
                n = min(pass_tokens, n_tokens - at)
                n_rows = max(1, n // 64)
                tokens = torch.zeros((n_rows, math.ceil(n / n_rows)), dtype=torch.long)
                hidden = decoder(tokens, use_cache=False).last_hidden_state
                head(hidden.flatten(0, 1)[: n_scored * n // n_tokens])
            for n in steps:
                head(decoder(torch.zeros((n, 1), dtype=torch.long), use_cache=False).last_hidden_state)


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def describe(task: str, row: dict[str, Any]) -> str:
    times = row["seconds"]
    return (
        f"{task}: {row['n_documents']} documents in {row['n_chunks']} chunks, {row['n_tokens']} tokens computed,"
        f" {row['n_scored']} scored and {row['n_generated']} generated\n"
        f"  {times['chunks']:.1f} s in chunks, {times['once']:.1f} s at once ({row['over_once']:.2f})\n"
        f"  lm-eval, batches of {row['lm_eval_batch']}: {times['lm_eval']:.1f} s ({row['over_lm_eval']:.2f})\n"
        f"  bare forward passes: {times['bound']:.1f} s ({row['over_bound']:.2f})"
    )


def write_tasks(folder: Path) -> None:
    rnd = random.Random(0)

    def described(n: int) -> str:
        return ", ".join(f"a {a} {b}" for a, b in zip(rnd.sample(WORDS, n), rnd.sample(WORDS, n), strict=True))

    def choices(n: int) -> dict[str, Any]:
        offered = [described(1) for _ in range(n)]
        return {
            "text": f"In the box there are {described(3)}. What is under it? Answer with one thing.",
            "choices": offered,
            "gold": rnd.randrange(n),
        }

    def to_sort() -> dict[str, Any]:
        words = rnd.sample(WORDS, 3)
        return {"text": f"Sort these words alphabetically: {', '.join(words)}.", "gold": ", ".join(sorted(words))}

    multiple_choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    tasks: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
        "eight_choices": (lambda: choices(8), multiple_choice),
        "five_examples": (
            lambda: choices(4),
            {**multiple_choice, "num_fewshot": 5, "fewshot_config": {"sampler": "first_n", "split": "train"}},
        ),
        "generated": (
            to_sort,
            {
                "output_type": "generate_until",
                "doc_to_target": "gold",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10},
            },
        ),
    }
    for name, (make, settings) in tasks.items():
        files = {}
        for split, n in (("test", N_DOCUMENTS[name]), ("train", 5)):
            files[split] = str(folder / f"{name}_{split}.jsonl")
            Path(files[split]).write_text("\n".join(json.dumps(make()) for _ in range(n)))
        metric = "exact_match" if name == "generated" else "acc"
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "doc_to_text": "text",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


if __name__ == "__main__":
    main()
