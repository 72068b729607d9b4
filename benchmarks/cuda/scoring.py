"""Part ``scoring``: documents and tokens a second of three eval tasks.

Knows the speed of scoring. Does not merge: all scores are those of the base.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cuda.inputs import Inputs, write_tasks
from benchmarks.cuda.measuring import TARGETS, counted_waits, device_name, least_seconds
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask

FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}
"""Dense bfloat16 operations a second, from the makers' data sheets."""

TASKS = {
    "letters": EvalTask("letters"),
    "phrases": EvalTask("phrases"),
    "generates": EvalTask("generates", metric="exact_match,none"),
}


def part_scoring(inputs: Inputs) -> dict[str, Any]:
    """Measure each eval task, relative to bare forward passes and to ``lm_eval.simple_evaluate``."""
    path = inputs.models[0]
    dtype: Any = "bfloat16" if inputs.is_cuda else "float32"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.to(inputs.device)
    engine = HFEngine(path, dtype=dtype, device=str(inputs.device))
    engine.load_weights(model.state_dict().items())
    peer = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=4 if inputs.tiny else 32)
    folder = write_tasks(inputs)
    return {task: task_speed(inputs, task, engine, model, peer, folder) for task in TASKS}


def task_speed(inputs: Inputs, task: str, engine: HFEngine, model: Any, peer: HFLM, folder: Path) -> dict[str, Any]:
    """The figures of one eval task.

    Args:
        inputs: Whose base is scored.
        task: A name in ``TASKS``.
        engine: Ours, with the weights loaded.
        model: The same model as transformers has it.
        peer: lm-eval's engine over ``model``.
        folder: Of the eval tasks.
    """
    scorer = Scorer.build(engine, [TASKS[task]], task_search_path=[folder], apply_chat_template=False, n_chunks=1)
    described = scorer.describe()
    with counted_waits(inputs.device) as waits, counted_passes(type(model)) as passes:
        scorer.score_all()
    seconds = least_seconds(inputs.device, scorer.score_all, 2)
    bare = least_seconds(inputs.device, lambda: bare_forward(model, described.n_tokens, engine.batch_tokens), 2)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    start = time.perf_counter()
    lm_eval.simple_evaluate(peer, tasks=[task], task_manager=manager, bootstrap_iters=0)
    peer_seconds = time.perf_counter() - start
    rate = described.n_tokens / seconds
    flops = next((flops for card, flops in FLOPS.items() if card in device_name(inputs.device)), None)
    is_generated = task == "generates"  # a bare pass over the prompt is no measure of generated text
    return {
        "documents_per_s": described.n_documents / seconds,
        "tokens_per_s": rate,
        "flop_utilisation": None if flops is None else 2 * inputs.n_parameters * rate / flops,
        "over_forward": None if is_generated else seconds / bare,
        "goal": None if is_generated else TARGETS["over_forward"],
        "over_lm_eval": seconds / peer_seconds,
        "waits_a_pass": len(waits) / max(1, len(passes)),
    }


@contextlib.contextmanager
def counted_passes(kind: type) -> Iterator[list[None]]:
    """Collect an entry for each forward pass of any model of a class."""
    passes: list[None] = []

    def count(module: torch.nn.Module, args: Any) -> None:
        if type(module) is kind:
            passes.append(None)

    hook = register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def bare_forward(model: Any, n_tokens: int, batch_tokens: int, length: int = 256) -> None:
    """Run the decoder without its output layer over ``n_tokens`` tokens, in full batches without padding."""
    rows = max(1, batch_tokens // length)
    with torch.inference_mode():
        while n_tokens > 0:
            used = min(rows, max(1, n_tokens // length))
            tokens = torch.zeros((used, length), dtype=torch.long, device=model.device)
            model.model(tokens, use_cache=False)
            n_tokens -= used * length
