"""Everything there is to know of merging and scoring on CUDA, proven and measured in one call.

    python benchmarks/cuda_suite.py                                    all parts, at the shape of Mistral 7B
    python benchmarks/cuda_suite.py --part equal --part merge
    python benchmarks/cuda_suite.py --device cpu --tiny                the same code, in the test suite

Needs no network and no file from elsewhere: models are random weights, tokenizer and documents are made on the spot,
below ``--folder`` (58 GB; fewer layers where the disk holds less). Figures go to ``--out`` as JSON after every part; a
table is printed last, with the goal that a figure has. A part whose package is missing, or whose time has come when
``--minutes`` are over, is skipped with a word; one that finds a difference, or fails, ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engine import Engine
from optuna_merge.merging.export import export
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.placement import free_host_bytes, plan_sources
from optuna_merge.methods import METHODS
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.testing.methods import merge_tensors
from optuna_merge.testing.models import write_tiny_models

N_SOURCES = 3
GIB = 2**30
GOALS = {
    "of_copy": {"gpu": {"linear": 0.8, "task_arithmetic": 0.8, "": 0.5}, "host": {"": 0.85}},
    "over_forward": 1.15,
    "rest": 0.02,
    "planned_over_peak": (0.95, 1.05),
}
FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}  # dense bfloat16, by the makers' data sheets
SPEED_METHODS = ("linear", "task_arithmetic", "dare_linear", "dare_ties", "ties", "breadcrumbs", "della")
SELECTED_BY_SUMS = ("sce", "arcee_fusion")  # elements next to their threshold may fall to either side: 1 in 10,000
TINY_COMPILED = ("task_arithmetic", "ties")  # a compiler takes seconds for each
MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = MISTRAL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 320,
}
WORDS = "cat dog mat sat ran after the and on one two three four five six seven eight nine ten letter next".split()


class DifferenceError(Exception):
    """Two ways to the same thing differ."""

    def __init__(self, message: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


@dataclass
class Suite:
    """What the parts share: device, sizes and the models on disk."""

    device: torch.device
    tiny: bool
    folder: Path
    shape: dict[str, int] = field(default_factory=dict)

    @property
    def small(self) -> Suite:
        """The same with models of one layer."""
        return Suite(self.device, self.tiny, self.folder / "small", self.shape | {"num_hidden_layers": 1})

    @property
    def models(self) -> list[Path]:
        """The base, then its fine-tunes; written when they are first asked for."""
        paths = [self.folder / f"model_{number}" for number in range(N_SOURCES + 1)]
        if not (self.folder / "complete").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_models(self, paths)
            (self.folder / "complete").touch()
        return paths

    @property
    def n_parameters(self) -> int:
        """Of each model."""
        checkpoint = Checkpoint.open(str(self.models[0]))
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], Any], repeats: int = 3) -> float:
        """The least of some repeats, the device's work included."""
        best = math.inf
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            action()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best

    def peak(self, reset: bool = False) -> int:
        """Greatest number of bytes in use since the last reset; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def fitting_shape(tiny: bool, folder: Path) -> dict[str, int]:
    """The shape of the models: that of those in the folder, or of fewer layers if the disk does not hold four."""
    shape = TINY if tiny else MISTRAL
    if (folder / "complete").exists():
        written = json.loads((folder / "model_0" / "config.json").read_text())
        return {key: written[key] for key in shape}
    free, n_layers = 0.9 * shutil.disk_usage(folder).free, shape["num_hidden_layers"]
    sizes = [2 * sum(map(math.prod, group.values())) for group in tensor_shapes(shape)]  # the ends, then each layer
    n_fitting = int((free / (N_SOURCES + 1) - 2 * sizes[0]) // sizes[1])  # and the ends of the small models
    return shape | {"num_hidden_layers": max(1, min(n_layers, n_fitting))}


def write_models(suite: Suite, paths: list[Path]) -> None:
    """Random bfloat16 checkpoints of one shape, with a tokenizer; one file a layer, made on the device."""
    base, _ = write_tiny_models(suite.folder / "tokenizer", 0)
    config = json.loads((base / "config.json").read_text()) | suite.shape
    config |= {"dtype": "bfloat16", "tie_word_embeddings": False}
    generator = torch.Generator(suite.device).manual_seed(0)
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        for file in base.iterdir():
            if "token" in file.name:
                shutil.copyfile(file, path / file.name)
        (path / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, group in enumerate(tensor_shapes(suite.shape)):
        file_name = f"model-{number + 1:05d}.safetensors"
        weight_map |= dict.fromkeys(group, file_name)
        drawn = {
            name: 0.02 * torch.randn(shape, generator=generator, device=suite.device) for name, shape in group.items()
        }
        for index, path in enumerate(paths):
            stored = {}
            for name, tensor in drawn.items():
                noise = torch.randn(tensor.shape, generator=generator, device=suite.device)
                norm = 1.0 if name.endswith("norm.weight") else 0.0
                stored[name] = (tensor + norm + (0.002 if index else 0) * noise).bfloat16().cpu()
            save_file(stored, path / file_name, metadata={"format": "pt"})
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensor_shapes(shape: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    vocabulary = (shape["vocab_size"], hidden)
    yield {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)}
    for layer in range(shape["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        yield {f"model.layers.{layer}.{part}.weight": size for part, size in parts.items()}


def make_recipe(suite: Suite, method: str, number: int = 0) -> Recipe:
    """The merge of one trial: each number has other weights and densities."""
    declared = METHODS[method]
    least, greatest = declared.n_models_for(declared.base != "none")
    sources = suite.models[1 : 1 + min(N_SOURCES, greatest or N_SOURCES)]
    assert len(sources) >= least
    weights, density = (0.37 + 0.001 * number, 0.91 - 0.001 * number, 0.22), 0.5 - 0.001 * number
    values = {"weight": weights, "density": (density,) * N_SOURCES, "epsilon": (0.1,) * N_SOURCES}
    per_model = {
        p.name: values.get(p.name, (p.default or 0.0,) * N_SOURCES)[: len(sources)]
        for p in declared.parameters
        if p.per_model
    }
    n_layers = suite.shape["num_hidden_layers"]
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(None, {}, per_model),))
    base = None if declared.base == "none" else str(suite.models[0])
    return Recipe(method, tuple(map(str, sources)), base, n_layers, (group,), dtype="bfloat16")


def open_merger(suite: Suite, recipe: Recipe, sources: Any, **options: Any) -> Merger:
    return Merger({r: Checkpoint.open(r) for r in recipe.references}, device=suite.device, sources=sources, **options)


# -- 1. equal ---------------------------------------------------------------------------------------------------------


def part_equal(suite: Suite) -> dict[str, Any]:
    """Each method on the device against the CPU, for any size of pieces and any place of the sources.

    A random mask that differed in one element would differ by the element: far above what is allowed.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (131, 257) if suite.tiny else (1031, 2053)
    base = 0.02 * torch.randn(shape, generator=generator)
    sources = [(base + 0.002 * torch.randn(shape, generator=generator)).bfloat16() for _ in range(N_SOURCES)]
    base = base.bfloat16()
    figures: dict[str, Any] = {}
    wrong: list[str] = []
    for method, declared in METHODS.items():
        greatest = declared.n_models_for(declared.base != "none")[1] or N_SOURCES
        settings: dict[str, Any] = {p.name: 0.5 for p in declared.parameters if p.name in ("density", "select_topk")}
        settings |= {p.name: 0.1 for p in declared.parameters if p.name == "epsilon"}

        def run(device: torch.device, dtype: str, **options: Any) -> Tensor:
            placed = [tensor.to(device) for tensor in sources[:greatest]]  # noqa: B023
            with_base = None if declared.base == "none" else base.to(device)  # noqa: B023
            return merge_tensors(method, placed, with_base, dtype=dtype, **settings, **options).cpu()  # noqa: B023

        expected, whole = run(torch.device("cpu"), "float32"), run(suite.device, "float32")
        difference = (whole - expected).abs() / expected.abs().clamp(min=1e-4)
        flipped = difference > 1e-6 if method in SELECTED_BY_SUMS else torch.zeros_like(difference, dtype=torch.bool)
        rounded = run(torch.device("cpu"), "bfloat16")
        figures[method] = figure = {
            "relative_float32": float(difference[~flipped].max()),
            "differing_bfloat16": float((run(suite.device, "bfloat16") != rounded).float().mean()),
        }
        if method in SELECTED_BY_SUMS:
            figure["flipped_float32"] = float(flipped.float().mean())
        if method in (TINY_COMPILED if suite.tiny else SPEED_METHODS):
            compiled = run(suite.device, "bfloat16", is_compiled=True)
            figure["differing_compiled"] = float((compiled != rounded).float().mean())
        if figure["relative_float32"] > 1e-6 or max(list(figure.values())[1:]) > 1e-4:
            wrong.append(f"{method} differs from the CPU's")
        for chunk_elements in (shape[1], 10 * shape[1], 1 << 30):
            pieces = run(suite.device, "float32", chunk_elements=chunk_elements)
            if not torch.equal(pieces, whole):
                wrong.append(f"{method}: pieces of {chunk_elements} elements change the result")
    small = suite.small
    recipe = make_recipe(small, "dare_ties")
    placements = ["disk", "host", *(["gpu"] if suite.device.type == "cuda" else [])]
    streams = [open_merger(small, recipe, placement).merge(recipe) for placement in placements]
    for parts in zip(*streams, strict=True):
        name, first = parts[0]
        if not all(torch.equal(first, tensor) for _, tensor in parts[1:]):
            raise DifferenceError(f"{name}: differs between sources on {placements}")
    figures["exported"] = exported_difference(small, recipe)
    if wrong:
        raise DifferenceError("; ".join(wrong), figures)
    return figures


def exported_difference(suite: Suite, recipe: Recipe) -> int:
    """Number of tensors of an export that are not the resident ones; an error unless it is 0."""
    merger = open_merger(suite, recipe, "disk")
    resident = dict(merger.merge(recipe))
    folder = suite.folder / "exported"
    export(recipe, folder, merger=open_merger(suite, recipe, "disk"))
    exported = Checkpoint.open(str(folder))
    n_different = sum(not torch.equal(exported.get(name), tensor.cpu()) for name, tensor in resident.items())
    shutil.rmtree(folder)
    if n_different:
        raise DifferenceError(f"{n_different} exported tensors differ from the resident ones")
    return n_different


# -- 2. merge speed ---------------------------------------------------------------------------------------------------


def part_merge(suite: Suite) -> dict[str, Any]:
    """Seconds of a merge by method and place of the sources, over the bandwidth of copying, and the peak of memory.

    Compiled kernels and, but for sources on disk, tables of magnitudes are made before time is taken.
    """
    first = make_recipe(suite, "linear")
    shapes = Checkpoint.open(first.models[0])
    names = open_merger(suite, first, "disk").names
    resident = {name: torch.empty(shapes.shape(name), dtype=torch.bfloat16, device=suite.device) for name in names}
    is_cuda = suite.device.type == "cuda"
    figures: dict[str, Any] = {"copy": copy_bandwidths(suite)}
    for placement in ["gpu", "host", "disk"] if is_cuda else ["host", "disk"]:
        suite.peak(reset=True)
        try:
            figures |= merge_speed(suite, placement, resident, figures["copy"])
        except EngineError as exc:
            figures[placement] = f"skipped: {exc}"
        empty_caches(suite)
    return figures


def merge_speed(suite: Suite, placement: Any, resident: dict[str, Tensor], copy: dict[str, float]) -> dict[str, Any]:
    """Each method, with one merger."""
    is_cuda, linear = suite.device.type == "cuda", make_recipe(suite, "linear")
    references = [str(path) for path in suite.models]
    checkpoints = {reference: Checkpoint.open(reference) for reference in references}
    names, n_elements = list(resident), sum(tensor.numel() for tensor in resident.values())
    free = torch.cuda.mem_get_info(suite.device)[0] if is_cuda else 0
    plan = plan_sources(
        placement, checkpoints.values(), names, suite.device, gpu_free=free, host_free=free_host_bytes()
    )
    merger = Merger(checkpoints, device=suite.device, sources=plan.placement, is_compiled=None if suite.tiny else True)
    merge_all(merger, linear, resident)
    merge_all(merger, make_recipe(suite, "task_arithmetic"), resident)  # the sources, with the base, are in their place
    figures = {}
    for method in SPEED_METHODS:
        recipes = [make_recipe(suite, method, number) for number in range(5)]
        if placement != "disk":
            merge_all(merger, recipes[0], resident)
        before = torch.cuda.memory_allocated(suite.device) if is_cuda else 0
        suite.peak(reset=True)
        turns = iter(recipes[1:])  # a merge of the same numbers would be left as it is
        repeats = {"gpu": 4, "host": 2, "disk": 1}[placement]
        seconds = suite.seconds(lambda t=turns: merge_all(merger, next(t), resident), repeats)
        n_sources = len(recipes[0].references)
        is_near = placement == "gpu" or not is_cuda
        n_moved = 2 * n_elements * (n_sources + 1 if is_near else n_sources)
        with counted_waits(suite) as waits:
            if placement == "gpu":
                merge_all(merger, make_recipe(suite, method, 9), resident)
        goals: Any = GOALS["of_copy"]
        goal = goals.get(placement, {}) if is_cuda else {}
        figures[f"{method}, {placement}"] = {
            "seconds": seconds,
            "gb_per_s": n_moved / seconds / 1e9,
            "of_copy": n_moved / seconds / copy["device" if is_near else "host"],
            "goal": goal.get(method, goal.get("")),
            "extra_mib": (suite.peak() - before) / 2**20 if is_cuda else None,
            "waits": len(waits) if placement == "gpu" else None,
        }
    return figures


@contextlib.contextmanager
def counted_waits(suite: Suite) -> Iterator[list[str]]:
    """What makes the CPU wait for the device, in words; stays empty on a CPU."""
    waits: list[str] = []
    if suite.device.type != "cuda":
        yield waits
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits.extend(str(warning.message) for warning in found if "synchroniz" in str(warning.message))


def empty_caches(suite: Suite) -> None:
    """Give back memory that nobody uses, page-locked memory too."""
    gc.collect()
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def copy_bandwidths(suite: Suite) -> dict[str, float]:
    """Bytes a second, read plus written on the device; of the link from pinned host memory, bytes moved."""
    n_bytes = 1 << (20 if suite.tiny else 31)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=suite.device)
    target = torch.empty_like(source)
    bandwidths = {"device": 2 * n_bytes / suite.seconds(lambda: target.copy_(source), 5)}
    if suite.device.type == "cuda":
        pinned = torch.ones(n_bytes // 4, dtype=torch.uint8).pin_memory()
        copied = target[: n_bytes // 4]
        bandwidths["host"] = pinned.numel() / suite.seconds(lambda: copied.copy_(pinned, non_blocking=True), 5)
    return bandwidths


def merge_all(merger: Merger, recipe: Recipe, resident: dict[str, Tensor]) -> None:
    for _ in merger.merge(recipe, out=resident.get):
        pass


# -- 3. scoring speed -------------------------------------------------------------------------------------------------


def part_scoring(suite: Suite) -> dict[str, Any]:
    """Documents and tokens a second of three kinds of tasks, over bare forward passes and over lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optuna_merge.evaluation.engines.hf import HFEngine
    from optuna_merge.evaluation.scorer import Scorer
    from optuna_merge.evaluation.term import EvalTask

    path, folder = suite.models[0], suite.folder / "tasks"
    dtype = "float32" if suite.device.type == "cpu" else "bfloat16"
    live = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(suite.device)
    engine = HFEngine(path, dtype=dtype, device=str(suite.device))
    engine.load_weights(live.state_dict().items())
    lm = HFLM(pretrained=live, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=4 if suite.tiny else 32)
    write_tasks(suite, folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    terms = {task: [EvalTask(task)] for task in ("letters", "phrases")}
    terms["generates"] = [EvalTask("generates", metric="exact_match,none")]
    figures: dict[str, Any] = {}
    for task in terms:
        scorer = Scorer.build(engine, terms[task], task_search_path=[folder], apply_chat_template=False, n_chunks=1)
        described = scorer.describe()
        with counted_waits(suite) as waits, counted_passes(engine) as passes:
            scorer.score_all()
        seconds = suite.seconds(scorer.score_all, 2)
        forward = suite.seconds(lambda n=described.n_tokens: bare_forward(live, n, engine), 2)
        start = time.perf_counter()
        lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
        peer = time.perf_counter() - start
        peak = next((flops for card, flops in FLOPS.items() if card in device_name(suite)), None)
        rate = described.n_tokens / seconds
        figures[task] = {
            "documents_per_s": described.n_documents / seconds,
            "tokens_per_s": rate,
            "flop_utilisation": None if peak is None else 2 * suite.n_parameters * rate / peak,
            "over_forward": None if task == "generates" else seconds / forward,
            "goal": None if task == "generates" else GOALS["over_forward"],
            "over_lm_eval": seconds / peer,
            "waits_a_pass": len(waits) / max(1, len(passes)),
        }
    return figures


@contextlib.contextmanager
def counted_passes(engine: Engine) -> Iterator[list[int]]:
    """An entry for each forward pass of an engine's model: its tokens."""
    model: Any = engine._weights.model  # type: ignore[attr-defined]
    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()


def bare_forward(model: Any, n_tokens: int, engine: Engine, length: int = 256) -> None:
    """The decoder without its output layer on as many tokens, in full batches without padding."""
    rows = max(1, engine.batch_tokens // length)
    with torch.inference_mode():
        while n_tokens > 0:
            used = min(rows, max(1, n_tokens // length))
            tokens = torch.zeros((used, length), dtype=torch.long, device=model.device)
            model.model(tokens, use_cache=False)
            n_tokens -= used * length


def write_tasks(suite: Suite, folder: Path) -> None:
    """Four letters after a long context, choices of several tokens, and generated text."""
    import random

    folder.mkdir(exist_ok=True)
    rnd = random.Random(0)
    n_documents, n_words = (8, 12) if suite.tiny else (100, 100)

    def phrase(n: int) -> str:
        return " ".join(rnd.choice(WORDS) for _ in range(n))

    kinds: dict[str, Callable[[], list[str]]] = {
        "letters": lambda: ["A", "B", "C", "D"],
        "phrases": lambda: [phrase(4) for _ in range(4)],
        "generates": lambda: [phrase(1)],
    }
    for name, choices in kinds.items():
        rows = [
            {
                "text": f"Question: {phrase(n_words)}? Answer:",
                "choices": (c := choices()),
                "gold": rnd.randrange(len(c)),
            }
            for _ in range(n_documents // (4 if name == "generates" else 1))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        task: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{folder}/{name}.jsonl"}},
            "test_split": "test",
            "doc_to_text": "{{text}}",
        }
        if name == "generates":
            task |= {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
            task |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4 if suite.tiny else 32}}
            metric = "exact_match"
        else:
            task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
            metric = "acc"
        task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


# -- 4, 5. a study, and the same within 24 GiB ------------------------------------------------------------------------


def part_study(suite: Suite) -> dict[str, Any]:
    """Twenty trials with pruning: where the seconds of a trial go."""
    return run_trials(suite, n_trials=4 if suite.tiny else 20, engine={"sources": "auto"})


def part_memory(suite: Suite) -> dict[str, Any]:
    """The same loop in 24 GiB of the card, sources in host memory, and the plan of ``check`` against the peak."""
    if suite.device.type == "cuda":
        total = torch.cuda.get_device_properties(suite.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * GIB / total), suite.device)
    try:
        suite.peak(reset=True)
        figures = run_trials(suite, n_trials=2, engine={"sources": "host"})
    finally:
        if suite.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, suite.device)
    figures["peak_gib"] = suite.peak() / GIB
    if suite.device.type == "cuda":
        figures["planned_over_peak"] = figures["planned_gib"] / figures["peak_gib"]
        figures["goal of planned_over_peak"] = "{} to {}".format(*GOALS["planned_over_peak"])
    return figures


def part_vllm(suite: Suite) -> dict[str, Any]:
    """Three trials with vLLM instead of transformers."""
    require_package("vllm")
    options = {"backend": "vllm", **({"vllm": {"enforce_eager": True}} if suite.tiny else {})}
    return run_trials(suite, n_trials=3, engine=options)


def require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ImportError(name=name)


def run_trials(suite: Suite, n_trials: int, engine: dict[str, Any]) -> dict[str, Any]:
    from optuna_merge.config.read import load_study
    from optuna_merge.storage import attributes
    from optuna_merge.storage.open import open_study, storage_url
    from optuna_merge.study.check import check_study
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import run_study

    write_tasks(suite, suite.folder / "tasks")
    name = f"suite_{time.time_ns()}"
    device = {} if engine.get("backend") == "vllm" else {"device": str(suite.device)}
    (suite.folder / f"{name}.yaml").write_text(
        yaml.safe_dump(
            {
                "study": {"name": name, "n_trials": n_trials, "seed": 0},
                "storage_path": f"./{name}",
                "genome": {
                    "models": [str(path) for path in suite.models[1:]],
                    "base_model": str(suite.models[0]),
                    "merge_method": "task_arithmetic",
                    "layer_granularity": max(1, suite.shape["num_hidden_layers"] // 4),
                },
                "tasks": [{"name": "letters"}, {"name": "phrases"}],
                "task_search_path": ["./tasks"],
                "apply_chat_template": False,
                "engine": device | engine,
            }
        )
    )
    config = load_study(suite.folder / f"{name}.yaml")
    planned = check_study(config).memory
    objective = MergeObjective.from_config(config)
    with timed_storage() as in_storage:
        start = time.perf_counter()
        run_study(config, objective)
        wall = time.perf_counter() - start
    objective.close()
    empty_caches(suite)
    trials = open_study(storage_url(config.storage_path, config.study.storage), name).trials
    keys = (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
    merging, scoring = (sum(trial.user_attrs.get(key, 0.0) for trial in trials) for key in keys)
    storage = sum(in_storage)  # of which nothing is within the seconds of merging and scoring
    return {
        "n_trials": n_trials,
        "n_pruned": sum(trial.state.name == "PRUNED" for trial in trials),
        "seconds_a_trial": wall / n_trials,
        "merge": merging / wall,
        "scoring": scoring / wall,
        "storage": storage / wall,
        "rest": (wall - merging - scoring - storage) / wall,
        "goal": GOALS["rest"],
        "planned_gib": (planned["device"] - planned["runtime"]) / GIB,
    }


@contextlib.contextmanager
def timed_storage() -> Iterator[list[float]]:
    """The seconds of each call of the studies' storage, those that calls make of themselves not counted."""
    from optuna_merge.storage.batched import BatchedStorage

    seconds: list[float] = []
    depth = threading.local()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            is_outer = not getattr(depth, "value", 0)
            depth.value = getattr(depth, "value", 0) + 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                depth.value -= 1
                if is_outer and threading.current_thread() is threading.main_thread():
                    seconds.append(time.perf_counter() - start)

        return call

    methods = {n: m for n, m in vars(BatchedStorage).items() if callable(m) and not n.startswith("_")}
    try:
        for name, method in methods.items():
            setattr(BatchedStorage, name, timed(method))
        yield seconds
    finally:
        for name, method in methods.items():
            setattr(BatchedStorage, name, method)


# -- 6. faults --------------------------------------------------------------------------------------------------------


def part_faults(suite: Suite) -> dict[str, Any]:
    """After a merge that is not finite, one that is interrupted and memory that runs out, the next score is right."""
    from optuna_merge.evaluation.engines.hf import HFEngine
    from optuna_merge.evaluation.scorer import Scorer
    from optuna_merge.evaluation.term import EvalTask

    suite = suite.small
    recipe = make_recipe(suite, "task_arithmetic")
    folder = suite.folder / "tasks"
    write_tasks(suite, folder)
    dtype: Any = recipe.dtype
    engine = HFEngine(suite.models[0], dtype=dtype, device=str(suite.device))
    merger = open_merger(suite, recipe, "disk")
    tasks = [EvalTask("letters"), EvalTask("phrases")]
    options: dict[str, Any] = {"task_search_path": [folder], "apply_chat_template": False, "n_chunks": 1}
    scorer = Scorer.build(engine, tasks, **options)

    def score() -> float:
        engine.load_weights(merger.merge(recipe, out=engine.resident))
        return scorer.score_all().value

    def fresh_score() -> float:
        """Of an engine that saw no fault, in batches of the same size: bfloat16 rounds by size."""
        fresh = HFEngine(suite.models[0], dtype=dtype, device=str(suite.device), batch_tokens=engine.batch_tokens)
        fresh.load_weights(open_merger(suite, recipe, "disk").merge(recipe, out=fresh.resident))
        value = Scorer.build(fresh, tasks, **options).score_all().value
        fresh.close()
        return value

    figures: dict[str, Any] = {}

    def check(fault: str) -> None:
        found, expected = score(), fresh_score()
        if found != expected:
            raise DifferenceError(f"after {fault} the score is {found}, without it {expected}")
        figures[fault] = "the next score is right"

    endless = make_recipe(suite, "task_arithmetic")
    (group,) = endless.groups
    huge = ParameterSet(None, {}, {"weight": (1e40, 1e40, 1e40)})
    endless = Recipe(
        endless.method,
        endless.models,
        endless.base_model,
        endless.n_layers,
        (GroupRecipe(group.name, group.layers, group.roles, (huge,)),),
        dtype=endless.dtype,
    )
    try:
        engine.load_weights(merger.merge(endless, out=engine.resident))
    except NonFiniteMergeError:
        check("a merge that is not finite")
    else:
        raise DifferenceError("a merge that is not finite was loaded")

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from itertools.islice(merger.merge(recipe, out=engine.resident), 3)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        engine.load_weights(interrupted())
    check("an interrupted merge")
    if suite.device.type == "cuda":
        total = torch.cuda.get_device_properties(suite.device).total_memory
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(suite.device)
        for fault, spare in (("little memory in scoring", GIB // 2), ("next to no memory", GIB // 16)):
            torch.cuda.set_per_process_memory_fraction(min(1.0, (used + spare) / total), suite.device)
            try:
                figures[f"{fault}: score there"] = score()
            except torch.OutOfMemoryError as exc:
                figures[f"{fault}: score there"] = f"fails: {str(exc).splitlines()[0]}"
            except Exception as exc:  # a merge wraps what stopped it
                figures[f"{fault}: score there"] = f"fails: {exc}"
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, suite.device)
            empty_caches(suite)
            check(fault)
    return figures


PARTS = {
    "equal": part_equal,
    "merge": part_merge,
    "scoring": part_scoring,
    "study": part_study,
    "memory": part_memory,
    "faults": part_faults,
    "vllm": part_vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to run the code")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument("--folder", type=Path, help="where models go; a temporary folder by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no part after them; 8 by default")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", options.device)
    if named is None:
        parser.error(f"--device must be cpu, cuda or cuda:<index>, got {options.device}")
    n_devices = torch.cuda.device_count()
    if options.device != "cpu" and int(named[1] or 0) >= n_devices:
        found = f"{n_devices} CUDA devices are" if n_devices else "no CUDA device is"
        parser.error(f"--device must be there, got {options.device}: {found} found; try --device cpu --tiny")
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", int(named[1] or 0))
    for option, wanted in (("--folder", options.folder), ("--out", options.out and options.out.parent)):
        try:
            if wanted is not None:
                wanted.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            parser.error(f"{option} must be where files can be written, got {wanted}: {exc.strerror}; choose another")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        suite = Suite(device, options.tiny, folder, fitting_shape(options.tiny, folder))
        report = run(suite, options.part or list(PARTS), 60 * options.minutes, options.out)
    show(report)
    if any("failed" in part for part in report["parts"].values()):
        sys.exit(1)


def run(suite: Suite, parts: list[str], seconds: float, out: Path | None) -> dict[str, Any]:
    """Run parts one after the other, none after its time; written after each."""
    report: dict[str, Any] = {"machine": machine(suite), "parts": {}}
    began = time.perf_counter()
    for name in parts:
        start = time.perf_counter()
        part: dict[str, Any]
        try:
            if start - began > seconds:
                part = {"skipped": f"after {seconds / 60:g} minutes; try --part {name}"}
            else:
                part = {"figures": PARTS[name](suite)}
        except ImportError as exc:
            part = {"skipped": f"{exc.name or exc} is missing"}
        except DifferenceError as exc:
            part = {"failed": str(exc), "figures": exc.figures}
        except Exception as exc:  # the other parts have more to say
            traceback.print_exc()
            part = {"failed": f"{type(exc).__name__}: {exc}"}
        empty_caches(suite)
        part["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {part['seconds']} s", file=sys.stderr, flush=True)
        report["parts"][name] = part
        if out is not None:
            out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def machine(suite: Suite) -> dict[str, str]:
    """What the figures were taken on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(suite),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": driver(suite),
        "transformers": version("transformers"),
        "layers": str(suite.shape["num_hidden_layers"]),
    }


def driver(suite: Suite) -> str:
    if suite.device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return "none"
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or "unknown"


def device_name(suite: Suite) -> str:
    return torch.cuda.get_device_name(suite.device) if suite.device.type == "cuda" else "CPU"


def show(report: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name, part in report["parts"].items():
        print(f"\n{name}: {part.get('skipped') or part.get('failed') or 'passed'}")
        for row, figures in part.get("figures", {}).items():
            values = figures if isinstance(figures, dict) else {"": figures}
            print(f"  {row:34}" + "  ".join(f"{key} {shown(value)}".strip() for key, value in values.items()))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    main()
