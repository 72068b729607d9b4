"""Tokens that vLLM computes for multiple-choice tasks, relative to lm-eval's own vLLM model; answers are compared.

    python benchmarks/vllm_tokens.py [--documents N] [--json]

The model is random and made on the spot. Each question follows the same few examples, as in a few-shot task. Tokens
found in the prefix cache are not computed. The counts do not depend on the machine, the seconds do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from optuna_merge.evaluation.engines.vllm import VLLMEngine
from optuna_merge.testing.conformance import TextRequest
from optuna_merge.testing.models import write_tiny_models

TARGET = 0.3
WINDOW = 1024
WORDS = "cat dog mat sat ran after the and on one two three four five six seven eight nine ten letter next".split()
OPTIONS = {"kv_cache_memory_bytes": 2**28, "block_size": 32, "enforce_eager": True, "max_num_batched_tokens": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=50, metavar="N", help="questions of each kind")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    tasks = {
        "four letters": questions(options.documents, [" A", " B", " C", " D"]),
        "phrases of several tokens": questions(options.documents, None),
    }
    with tempfile.TemporaryDirectory() as folder:
        base, _ = write_tiny_models(Path(folder), 0, head_dim=32)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": WINDOW}))
        theirs = by_lm_eval(base, tasks)
        ours = by_engine(base, tasks)
    figures = {}
    for name, requests in tasks.items():
        difference = max(
            abs(ours[name]["responses"][i][0] - theirs[name]["responses"][i][0]) for i in range(len(requests))
        )
        figures[name] = {
            "requests": len(requests),
            "tokens": ours[name]["tokens"],
            "tokens of lm-eval": theirs[name]["tokens"],
            "ratio": ours[name]["tokens"] / theirs[name]["tokens"],
            "seconds over lm-eval's": ours[name]["seconds"] / theirs[name]["seconds"],
            "greatest difference": difference,
        }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, row in figures.items():
        print(
            name,
            *(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
            sep=", ",
        )
    met = "met" if figures["four letters"]["ratio"] <= TARGET else "missed"
    print(f"target: at most {TARGET} of lm-eval's tokens for four letters: {met}")


def questions(n: int, choices: list[str] | None) -> list[TextRequest]:
    """Four choices for each of ``n`` questions after five examples; None: phrases of one to three words."""
    rnd = random.Random(0)

    def words(n_words: int) -> str:
        return " ".join(rnd.choice(WORDS) for _ in range(n_words))

    examples = "".join(f"Question: {words(20)} Answer: {rnd.choice('ABCD')}\n\n" for _ in range(5))
    requests = []
    for _ in range(n):
        context = f"{examples}Question: {words(20)} Answer:"
        given = choices or [f" {words(rnd.randint(1, 3))}" for _ in range(4)]
        requests += [TextRequest("loglikelihood", (context, choice)) for choice in given]
    return requests


def by_engine(folder: Path, tasks: dict[str, list[TextRequest]]) -> dict[str, Any]:
    weights = load_file(folder / "model.safetensors")
    engine = VLLMEngine(
        lambda: contextlib.nullcontext(folder),
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        dtype="float32",
        options={**OPTIONS, "in_process": True, "max_model_len": WINDOW},
    )
    engine.load_weights(weights.items())
    results = {}
    for name, requests in tasks.items():
        prepared, before = engine.prepare(requests), engine.n_computed
        start = time.perf_counter()
        responses = engine.respond(prepared)
        results[name] = {
            "responses": responses,
            "seconds": time.perf_counter() - start,
            "tokens": engine.n_computed - before,
        }
    engine.close()
    return results


def by_lm_eval(folder: Path, tasks: dict[str, list[TextRequest]]) -> dict[str, Any]:
    found = importlib.metadata.version

    def version(name: str) -> str:
        """Find the version of vLLM's CPU build too, whose distribution has another name than lm-eval asks for."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return found(name)
        return found(f"{name}-cpu")

    importlib.metadata.version = version
    from lm_eval.models.vllm_causallms import VLLM

    lm = VLLM(pretrained=str(folder), dtype="float32", max_model_len=WINDOW, batch_size="auto", **OPTIONS)
    n_computed = 0
    generate = lm.model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_computed
        outputs = generate(*args, **{**kwargs, "use_tqdm": False})
        n_computed += sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
        return outputs

    lm.model.generate = counting
    results = {}
    for name, requests in tasks.items():
        instances = [Instance("loglikelihood", {}, request.args, 0) for request in requests]
        before, start = n_computed, time.perf_counter()
        responses = lm.loglikelihood(instances, disable_tqdm=True)
        results[name] = {
            "responses": responses,
            "seconds": time.perf_counter() - start,
            "tokens": n_computed - before,
        }
    lm.model.llm_engine.engine_core.shutdown()
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    main()
