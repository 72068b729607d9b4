"""Backward passes of a transformers model: the gradient of every tensor, one at a time.

Knows batches, log-likelihoods and parameters. What is differentiated is a ``Goal``, what becomes of a gradient is the
sink's business.

    rows -> logits -> log-likelihoods -> goal.gradient -> gradient of the logits -> backward -> sink, tensor by tensor

A batch is taken back before the next one is computed, so that one batch's activations are held. If they do not fit into
memory, only those between the layers are kept and each layer is computed again on the way back; if that does not
suffice, batches are halved.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from optuna_merge.errors import EngineError, is_out_of_memory
from optuna_merge.evaluation.engine import Goal, Sink
from optuna_merge.evaluation.engines.batches import Item, Row, end_to_end
from optuna_merge.evaluation.engines.forward import Batch, Forward, at_least_float32
from optuna_merge.evaluation.engines.hf_weights import ResidentModel
from optuna_merge.evaluation.engines.language import Encoded
from optuna_merge.evaluation.engines.live_bytes import LiveBytes


class Planned:
    """Rows that are computed together; laid out as a forward pass when they are first needed, and kept."""

    def __init__(self, rows: Sequence[Row], encoded: Encoded, device: torch.device) -> None:
        """Remember what to lay out.

        Args:
            rows: At least one.
            encoded: The requests.
            device: Where the tensors go.
        """
        self.rows = rows
        self._encoded = encoded
        self._device = device

    @functools.cached_property
    def batch(self) -> Batch:
        """The inputs of the forward pass."""
        return Batch.of_rows(self.rows, self._encoded.items, self._device)

    @property
    def n_padded(self) -> int:
        """Tokens, padding included."""
        return len(self.rows) * max(map(len, self.rows))

    def parts(self, limit: int | None) -> list[Planned]:
        """The same rows in parts of at most ``limit`` tokens, padding included, or of one row; None: in one."""
        if limit is None or len(self.rows) == 1 or self.n_padded <= limit:
            return [self]
        by_length = sorted(self.rows, key=len, reverse=True)
        middle = (len(by_length) + 1) // 2
        halves = (Planned(rows, self._encoded, self._device) for rows in (by_length[:middle], by_length[middle:]))
        return [part for half in halves for part in half.parts(limit)]


class Backward:
    """Backward passes of one model.

    Attributes:
        recomputes: Whether each layer's activations are computed again on the way back instead of being kept.
        n_most_tokens: Padded tokens in a batch at most; None: as many as are planned.
    """

    def __init__(self, forward: Forward, weights: ResidentModel, device: torch.device) -> None:
        """Prepare to differentiate.

        Args:
            forward: The model's forward passes.
            weights: Its parameters.
            device: Where it is.
        """
        self._forward = forward
        self._weights = weights
        self._device = device
        self.recomputes = False
        self.n_most_tokens: int | None = None

    def run(self, encoded: Encoded, batches: Sequence[Planned], goal: Goal, sink: Sink) -> list[tuple[float, bool]]:
        """Score items and differentiate; see ``DifferentiableEngine.respond_with_gradient``.

        Args:
            encoded: The requests.
            batches: Rows that are computed together, the longest first.
            goal: A function of the requests' log-likelihoods.
            sink: Takes the gradients.

        Returns:
            The log-probability of each item, and whether greedy decoding would give it.
        """
        run = _Run(self, encoded, goal, sink)
        for planned in _torn(batches, encoded, goal):
            run.score(planned)
        with run.hooked(self._weights):
            for planned in batches:
                run.differentiate(planned)
        return run.answers

    def plan(self, encoded: Encoded, batches: Sequence[Sequence[Row]]) -> list[Planned]:
        """What :meth:`run` takes; to be kept for the next run on the same requests."""
        return [Planned(rows, encoded, self._device) for rows in batches]

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch, with a graph that leads back to the parameters."""
        with torch.enable_grad(), _recomputing(self._weights.model) if self.recomputes else contextlib.nullcontext():
            return self._forward.logits(batch)

    def score(self, batch: Batch) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The answer to each item of a batch, without a graph."""
        with torch.no_grad():
            return batch.answers(*self._forward.score(batch))

    def peak_bytes(self, n_rows: int, length: int, n_scored: int) -> int:
        """Most bytes that taking a batch back needs at once, beside the weights; nothing is computed on ``meta``.

        Args:
            n_rows: Rows of the batch.
            length: Tokens of each row.
            n_scored: Scored tokens of each row; below ``length``.
        """
        half = length // 2
        row = end_to_end(Row.of_prompt(0, [0] * half), Row.of_prompt(1, [0] * (length - half)))  # with a mask
        rows = [replace(row, scored=[(0, list(range(length - n_scored, length)))]) for _ in range(n_rows)]
        batch = Batch.of_rows(rows, [Item((0,), (0,) * n_scored)], self._device)
        parameters = [parameter for _, parameter in self._weights.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        handles = [cast(Any, each).register_post_accumulate_grad_hook(_drop) for each in parameters]
        try:
            with _kernel_for_attention(), LiveBytes() as live:
                logits = self.logits(batch)
                slopes = np.zeros(len(batch.wanted))
                torch.autograd.backward(logits, _gradient_of_logits(batch, logits.detach(), slopes))
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
        return int(live.peak)

    def save_memory(self, planned: Planned, exc: Exception) -> None:
        """Need less memory from now on, after a batch did not fit.

        Raises:
            EngineError: If there is no way to need less.
        """
        if not self.recomputes:
            self.recomputes = True
        elif len(planned.rows) == 1:
            raise EngineError(
                f"engine: the gradient of a sequence of {planned.n_padded} tokens does not fit into the memory of"
                f" {self._device}; use shorter prompts, a smaller dtype or a larger device"
            ) from exc
        else:
            self.n_most_tokens = planned.n_padded // 2
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _Run:
    """One call: what is known of the items, and which tensors have come for the batch that is taken back."""

    def __init__(self, backward: Backward, encoded: Encoded, goal: Goal, sink: Sink) -> None:
        self._backward = backward
        self._encoded = encoded
        self._goal = goal
        self._sink = sink
        self._came: set[str] = set()
        self._scale = 1.0
        self._fault: Exception | None = None  # of the sink, which is no reason to try again
        self._log_likelihoods = np.full(len(encoded.items), np.nan)
        self._request_of = np.zeros(len(encoded.items), dtype=np.int64)
        for request, items, _ in encoded.scored:
            self._request_of[items] = request
        self.answers: list[tuple[float, bool]] = [(0.0, False)] * len(encoded.items)

    def score(self, planned: Planned) -> None:
        """Learn the log-likelihoods of a batch."""
        for part in planned.parts(self._backward.n_most_tokens):
            try:
                self._learn(self._backward.score(part.batch))
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
                self._backward.save_memory(part, exc)
            else:
                continue
            self.score(part)

    def differentiate(self, planned: Planned, came: frozenset[str] = frozenset()) -> None:
        """Take a batch back.

        Args:
            planned: The batch.
            came: Tensors whose gradients have come for it, before memory ran out on the way back.
        """
        parts = planned.parts(self._backward.n_most_tokens)
        if len(parts) > 1:
            self.score(planned)  # a document's requests may be in different parts
        for part in parts:
            self._came = set(came)
            try:
                self._take_back(part.batch)
            except (MemoryError, RuntimeError) as exc:
                if self._fault is not None or not is_out_of_memory(exc):
                    raise
                self._backward.save_memory(part, exc)
            else:
                continue
            self.differentiate(part, frozenset(self._came))

    @contextlib.contextmanager
    def hooked(self, weights: ResidentModel) -> Iterator[None]:
        """Let each parameter hand its gradient out as soon as it is complete."""
        parameters = list(weights.parameters())
        handles = []
        for target, parameter in parameters:
            parameter.requires_grad_(True)
            deliver = functools.partial(self._deliver, weights, target)
            handles.append(cast(Any, parameter).register_post_accumulate_grad_hook(deliver))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)

    def _take_back(self, batch: Batch) -> None:
        logits = self._backward.logits(batch)
        self._learn(batch.answers(*batch.read(logits.detach())))
        slopes = self._slopes(batch)
        if slopes.any():
            self._scale = _scale(slopes, logits.dtype)
            torch.autograd.backward(logits, _gradient_of_logits(batch, logits.detach(), slopes * self._scale))

    def _deliver(self, weights: ResidentModel, target: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if target in self._came or gradient is None:
            return
        if self._scale != 1:
            gradient = gradient.float().div_(self._scale)
        try:
            for name, part in weights.gradients(target, gradient):
                self._sink(name, part)
        except Exception as exc:
            self._fault = exc
            raise
        self._came.add(target)

    def _learn(self, answers: Iterator[tuple[int, tuple[float, bool]]]) -> None:
        for item, answer in answers:
            self.answers[item] = answer
            self._log_likelihoods[item] = answer[0]

    def _slopes(self, batch: Batch) -> np.ndarray[Any, Any]:
        """Derivative of the goal by each wanted token's log-probability, ``[n_wanted]``."""
        of_requests = np.zeros(self._encoded.n_requests)
        np.add.at(of_requests, self._request_of, self._log_likelihoods)
        slopes = self._goal.gradient(of_requests)[self._request_of[batch.items]]
        return np.repeat(slopes, np.diff([*batch.starts, len(batch.wanted)]))


def _torn(batches: Sequence[Planned], encoded: Encoded, goal: Goal) -> list[Planned]:
    """Batches that hold a part of a group: their log-likelihoods must be known before any of them is taken back."""
    rows_of = [(number, row) for number, planned in enumerate(batches) for row in planned.rows]
    batch_of = {item: number for number, row in rows_of for item, _ in row.scored}
    batches_of = {request: {batch_of[item] for item in items} for request, items, _ in encoded.scored}
    torn: set[int] = set()
    for group in goal.together:
        numbers = set().union(*(batches_of[request] for request in group))
        if len(numbers) > 1:
            torn |= numbers
    return [batches[number] for number in sorted(torn)]


def _gradient_of_logits(batch: Batch, logits: Tensor, slopes: np.ndarray[Any, Any]) -> Tensor:
    """Gradient of the sum of slope x log-probability of each wanted token; ``[n_scored, vocabulary]``."""
    gradient = at_least_float32(logits).softmax(-1)
    by_token = torch.as_tensor(slopes, dtype=gradient.dtype, device=gradient.device)
    by_place = gradient.new_zeros(len(gradient)).index_add_(0, batch.places, by_token)
    gradient.mul_(-by_place.unsqueeze(1))
    gradient.index_put_((batch.places, batch.wanted), by_token, accumulate=True)
    return gradient.to(logits.dtype)


class _Attention(torch.autograd.Function):
    """What attention in one kernel holds for the way back: not the probabilities. On ``meta`` torch holds these."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _kernel_for_attention() -> Iterator[None]:
    functional: Any = torch.nn.functional
    usual, attention = functional.scaled_dot_product_attention, cast(Any, _Attention)
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: attention.apply(query, key, value)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _scale(slopes: np.ndarray[Any, Any], dtype: torch.dtype) -> float:
    """What slopes are multiplied by, so that gradients do not vanish in float16; a power of two."""
    if dtype != torch.float16:
        return 1.0
    return float(2.0 ** -np.ceil(np.log2(np.abs(slopes).max())))


@contextlib.contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """Let each layer keep its inputs only; transformers itself does so in training mode alone, which drops out."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
