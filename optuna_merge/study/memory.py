"""How much GPU memory a study needs, calculated from tensor shapes.

Knows shapes and a model's ``config.json``; uses no torch, no device and no files. All sizes are in bytes. The figures
are what our code is built to allocate, and upper bounds where a library decides: activations are those of a decoder
with a gated feed-forward part, and a merge may hold a module's tensors twice. "Card" means a GPU and its memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engines.key_values import elements_of_a_token
from optuna_merge.merging.sizes import HELD_BYTES, KERNEL_ELEMENTS, PIECE_ELEMENTS, SCRATCH_PIECES, STAGED_BYTES

Shapes = Mapping[str, Sequence[int]]

HIDDEN_COPIES = 12
"""vLLM: activations that live at once for each token, in units of the hidden width; the feed-forward part is extra."""

HIDDEN_IN_NORM, HIDDEN_IN_FEED_FORWARD = 7.5, 4
"""transformers: the same while a layer normalizes in float32, and while its feed-forward part runs; both measured."""

LOGIT_BYTES = 8
"""A logit in float32, and a copy of it while the softmax is taken."""

RUNTIME = 2**30
"""GPU memory that the driver and the libraries take, fragmentation included."""

SEQUENCES = 256
"""Sequences for which vLLM chooses the next token at once; it holds their logits in float32, twice."""

MOST_UTILIZATION = 0.92
"""Largest share of the card that vLLM is given."""

CPU_KV_CACHE_BYTES = 2**30
"""KV cache of vLLM on a CPU; by default it would take most of the host's memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """What fills the memory of a card, in bytes.

    Attributes:
        card: The card's memory; 0 if it is unknown or there is no card.
        weights: The resident model.
        merge_buffer: Tensors that are being merged and loaded.
        scoring: Activations and logits of the largest forward pass.
        gradient: What a step of the ascent needs to differentiate; 0 without an ascent.
        ascent: What an ascent in a process of its own takes before this engine starts; 0 without one.
        kv_cache: Keys and values of the prompts in flight; 0 for an engine that keeps none.
        kv_token: Keys and values of one token.
        runtime: Driver and libraries.
        sources: Sources that are kept on the card.
        n_cards: Number of cards that share weights and cache.
        takes_turns: Whether merging and scoring use the same memory, one after the other.
        itemsize: Bytes of a weight.
    """

    card: int
    weights: int
    merge_buffer: int
    scoring: int
    gradient: int = 0
    ascent: int = 0
    kv_cache: int = 0
    kv_token: int = 0
    runtime: int = 0
    sources: int = 0
    n_cards: int = 1
    takes_turns: bool = False
    itemsize: int = 4

    @property
    def working(self) -> int:
        """What merging and scoring need."""
        if self.takes_turns:
            return max(self.merge_buffer, self.scoring, self.gradient)
        return self.merge_buffer + self.scoring

    @property
    def used(self) -> int:
        """The sum of the parts, or what an ascent before them takes, if that is more."""
        return max(self.weights + self.working + self.kv_cache + self.runtime + self.sources, self.ascent)

    @property
    def left(self) -> int:
        """Bytes of the card that stay free; negative if the study does not fit."""
        return self.card - self.used

    @property
    def utilization(self) -> float:
        """Share of the card that vLLM may take: all but what merging needs, rounded down to hundredths."""
        return min(MOST_UTILIZATION, math.floor(100 * (1 - self.merge_buffer / self.card)) / 100)

    def check(self, longest: int = 0) -> None:
        """Raise an error if the study does not fit into the card.

        Args:
            longest: Number of tokens that the KV cache must hold at least.

        Raises:
            EngineError: If it does not fit; the message lists the parts and their sizes.
        """
        lacking = max(0, longest * self.kv_token - self.kv_cache)
        if self.card == 0 or self.left - lacking >= 0:
            return
        ways = f"engine.vllm.quantization: fp8 or engine.vllm.tensor_parallel_size: {2 * self.n_cards}"
        if self.takes_turns:
            ways = "a smaller engine.batch_size, or engine.backend: vllm with quantization"
            ways = f"search.start: uniform, {ways}" if self.working == self.gradient else ways
        narrower = "engine.dtype: bfloat16, " if self.itemsize > 2 else ""
        raise EngineError(
            f"engine: the study must fit into the card's {gib(self.card)}, needs {gib(self.used + lacking)}:"
            f" {self.parts(lacking)}; use a larger card, {narrower}{ways}"
        )

    def parts(self, lacking: int = 0) -> str:
        """The parts that are not 0, in words. ``lacking``: bytes to add to the KV cache."""
        parts = {
            "weights": self.weights,
            "KV cache": self.kv_cache + lacking,
            "merging": 0 if self.takes_turns else self.merge_buffer,
            "scoring": 0 if self.takes_turns else self.scoring,
            self._turns: self.working if self.takes_turns else 0,
            "sources": self.sources,
            "runtime": self.runtime,
        }
        return " + ".join(f"{gib(n_bytes)} {name}" for name, n_bytes in parts.items() if n_bytes)

    @property
    def _turns(self) -> str:
        return "merging, then scoring or a step of the ascent" if self.gradient else "merging, then scoring"

    def describe(self) -> str:
        """The plan in one line."""
        line = f"{gib(replace(self, ascent=0).used)} = {self.parts()}"
        if self.kv_token:
            line += f"; the cache holds {self.kv_cache // self.kv_token:,} tokens"
        if self.ascent:
            line += f"; before that {gib(self.ascent)} for the ascent"
        of = f" on each of {self.n_cards} cards" if self.n_cards > 1 else ""
        return line + (f"; {gib(self.left)} of {gib(self.card)} left{of}" if self.card else of) + " (estimated)"

    def as_dict(self) -> dict[str, int]:
        """Plain data, with ``device`` (the sum) and ``left``."""
        return {**asdict(self), "device": self.used, "left": self.left if self.card else 0}


def plan_hf(
    shapes: Shapes,
    config: Mapping[str, Any],
    *,
    itemsize: int,
    n_models: int,
    n_padded: int,
    n_scored: int,
    n_cached: int = 0,
    gradient: tuple[int, int] = (0, 0),
    card: int = 0,
) -> MemoryPlan:
    """Plan the memory of the transformers engine; a merge is written straight into its tensors.

    Args:
        shapes: Name to shape of the merged model's tensors.
        config: The model's ``config.json``.
        itemsize: Bytes of one element.
        n_models: Number of models that are merged, including the base.
        n_padded: Most tokens in one forward pass, including padding.
        n_scored: Most positions in one forward pass whose logits are needed.
        n_cached: Most tokens whose keys and values are held at once.
        gradient: Bytes that a gradient pass needs, see ``HFEngine.gradient_bytes``; zeros without an ascent.
        card: Bytes of the card's memory; 0 if unknown.
    """
    hidden, inner, vocabulary = _hidden(config), _inner(config), int(config.get("vocab_size") or 0)
    layer = max(HIDDEN_IN_NORM * hidden, HIDDEN_IN_FEED_FORWARD * hidden + 3 * inner) * n_padded * itemsize
    head = n_scored * vocabulary * LOGIT_BYTES  # by then the activations of the layers are freed
    plan = MemoryPlan(
        card=card,
        weights=_weights(shapes, itemsize),
        merge_buffer=_merging(shapes, itemsize, n_models, card) + _waiting(shapes, itemsize),
        scoring=int(max(layer, head)) + n_cached * elements_of_a_token(config) * itemsize,
        runtime=RUNTIME if card else 0,
        takes_turns=True,
        itemsize=itemsize,
    )
    if not any(gradient):
        return plan
    kept, least = (n_bytes + _pulling_back(shapes) for n_bytes in gradient)
    with_all = replace(plan, gradient=kept)
    return replace(plan, gradient=least) if card and with_all.left < 0 else with_all


def plan_vllm(
    shapes: Shapes,
    config: Mapping[str, Any],
    *,
    itemsize: int,
    n_models: int,
    card: int = 0,
    options: Mapping[str, Any] | None = None,
) -> MemoryPlan:
    """Plan the memory of the vLLM engine; its workers merge tensor by tensor while the sources stay on the host.

    Args:
        shapes: Name to shape of the merged model's tensors.
        config: The model's ``config.json``.
        itemsize: Bytes of one element.
        n_models: Number of models that are merged, including the base.
        card: Bytes of one card's memory; 0 if there is no card: then the options set the size of the cache.
        options: ``engine.vllm`` of the study file.
    """
    given = dict(options or {})
    n_cards = int(given.get("tensor_parallel_size", 1))
    tokens = int(given.get("max_num_batched_tokens", 8192))
    merge_buffer = 2 * _largest_module(shapes) * itemsize + _merging(shapes, itemsize, n_models, card)
    logits = 2 * 4 * SEQUENCES * int(config.get("vocab_size") or 0)
    plan = MemoryPlan(
        card=card,
        weights=_weights(shapes, itemsize, str(given.get("quantization") or "")) // n_cards,
        merge_buffer=merge_buffer,
        scoring=tokens * (HIDDEN_COPIES * _hidden(config) + 3 * _inner(config)) * itemsize // n_cards + logits,
        kv_token=elements_of_a_token(config) * itemsize // n_cards,
        runtime=RUNTIME if card else 0,
        n_cards=n_cards,
        itemsize=itemsize,
    )
    if "kv_cache_memory_bytes" in given:
        cache = int(given["kv_cache_memory_bytes"])
    else:
        share = float(given.get("gpu_memory_utilization", plan.utilization if card else 0))
        cache = max(0, int(share * card) - plan.weights - plan.scoring - plan.runtime)
    return MemoryPlan(**{**asdict(plan), "kv_cache": cache})


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24GB``, ``24GiB``, ``24G`` or ``24``; the last two mean GiB, as cards are sold.

    Raises:
        EngineError: If the text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g|)", text.strip().lower())
    if found is None or not float(found[1]):
        raise EngineError(f"card must be a size such as 24GB, got {text!r}; look it up in nvidia-smi")
    return int(float(found[1]) * (10**9 if found[2] == "gb" else 2**30))


def gib(n_bytes: float) -> str:
    """Format a size for people."""
    return f"{n_bytes / 2**30:.2f} GiB"


def _weights(shapes: Shapes, itemsize: int, quantization: str = "") -> int:
    """Bytes of the weights; a quantization stores the matrices inside layers in 8 bits, or in 4 and a shared scale."""
    in_matrices: float = itemsize
    if re.search("fp8|int8", quantization):
        in_matrices = 1
    elif quantization == "mxfp4":
        in_matrices = 1 / 2 + 1 / 32  # 32 elements share a scale of one byte
    total = 0
    for name, shape in shapes.items():
        is_matrix = len(shape) > 1 and re.search(r"\.\d+\.", name) is not None
        total += math.ceil(math.prod(shape) * (in_matrices if is_matrix else itemsize))
    return total


def _merging(shapes: Shapes, itemsize: int, n_models: int, card: int) -> int:
    """Bytes for merging on a card: the sources of one tensor and the next, and scratch. On a CPU they fit its cache."""
    if not card:
        return 0
    sizes = [math.prod(shape) for shape in shapes.values()]
    in_all_models = [n_models * size * itemsize for size in sizes]  # bytes of each tensor, summed over the models
    staged = max((n_bytes for n_bytes in in_all_models if n_bytes <= STAGED_BYTES), default=0)
    in_pieces = n_models * min(KERNEL_ELEMENTS, max(sizes)) * itemsize if max(in_all_models) > STAGED_BYTES else 0
    scratch = SCRATCH_PIECES * min(PIECE_ELEMENTS, max(sizes)) * 4
    return scratch + staged + max(staged, in_pieces)


def _pulling_back(shapes: Shapes) -> int:
    """Bytes of gradients in float32: those that are added up, and the largest one."""
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    return min(HELD_BYTES, sum(sizes)) + max(sizes)


def _waiting(shapes: Shapes, itemsize: int) -> int:
    """Bytes of experts' tensors that wait until all that are fused with them have come, and of the fused tensors."""
    has_experts = any(".experts." in name for name in shapes)
    return 2 * _largest_module(shapes) * itemsize if has_experts else 0


def _largest_module(shapes: Shapes) -> int:
    """Elements of the largest module: vLLM's loader may hold its tensors until a fused parameter is complete."""
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        module = name.partition(".experts.")[0] if ".experts." in name else name.rpartition(".")[0].rpartition(".")[0]
        modules[module] = modules.get(module, 0) + math.prod(shape)
    return max(modules.values())


def _hidden(config: Mapping[str, Any]) -> int:
    return int(config.get("hidden_size") or config.get("n_embd") or 0)


def _inner(config: Mapping[str, Any]) -> int:
    return int(config.get("intermediate_size") or 4 * _hidden(config))
