"""The engine that runs a model with transformers, on top of lm-eval's ``HFLM``.

Text is turned into tokens and cut by lm-eval's own code, so that responses are lm-eval's. Log-likelihoods are computed
here: what many contexts begin with once for each load of weights (``beginnings.py``), each context once for all its
continuations (``batches.py``), logits only where something is scored (``forward.py``), and one transfer from the device
for each batch. So is greedy text (``generator.py``); lm-eval generates where a task samples or searches beams, and for
models that our decoder cannot run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from optuna_merge.errors import EngineError, is_out_of_memory
from optuna_merge.evaluation.engine import Goal, Prepared, Request, Response, Sink
from optuna_merge.evaluation.engines.backward import Backward, Planned
from optuna_merge.evaluation.engines.batches import PASS_TOKENS, Item, Row, make_batches, make_rows, one_by_one
from optuna_merge.evaluation.engines.beginnings import NO_BEGINNINGS, Beginnings, choose_beginnings
from optuna_merge.evaluation.engines.forward import Batch, Forward, attempt
from optuna_merge.evaluation.engines.generation import Generation
from optuna_merge.evaluation.engines.generator import Generator
from optuna_merge.evaluation.engines.hf_weights import ResidentModel
from optuna_merge.evaluation.engines.key_values import elements_of_a_token
from optuna_merge.evaluation.engines.language import Encoded, Language
from optuna_merge.evaluation.engines.prefixes import Prefixes
from optuna_merge.evaluation.engines.whole_rows import make_whole

Dtype = Literal["float32", "float16", "bfloat16"]

CUDA_BATCH_TOKENS = 8192
CPU_BATCH_ACTIVATIONS = 2**16
"""Batch tokens x hidden size on a CPU: more does not make a token cheaper, because activations leave the cache."""

SCORED_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of one batch at most (vocabulary x scored tokens); they are held in float32."""

CPU_KV_BYTES = 2**30
"""Keys and values of the texts that are generated at once on a CPU."""

PREFIX_SHARE = 1 / 4
"""Share of the room for keys and values that beginnings of many prompts may take."""

KV_SHARE = 1 / 4
"""Share of what the weights leave of a card that keys and values may take; sources that stay on it take the rest."""


@dataclass
class HFPrepared:
    """Requests, tokenized and grouped, with the batches of the last plan."""

    encoded: Encoded
    n_tokens: int
    cost: float
    n_padded: int
    n_scored: int
    n_cached: int
    n_places: int
    text_cost: float
    generation: tuple[tuple[int, Beginnings], Generation]
    plan: tuple[Any, list[Batch]] | None = field(default=None, repr=False)
    whole_plan: tuple[Any, list[Planned]] | None = field(default=None, repr=False)

    @property
    def n_requests(self) -> int:
        """Number of responses."""
        return self.encoded.n_requests

    @property
    def longest(self) -> int:
        """Tokens in the longest input sequence."""
        return self.encoded.longest


class HFEngine:
    """A transformers model that stays on its device while its weights change.

    Attributes:
        dtype: The resident weights' dtype.
        device: Where they live; ``meta`` for an engine that only tokenizes.
        batch_tokens: Approximate number of padded tokens in a forward pass; halved when memory runs out.
        tokenizer_name: As lm-eval names it.
        eot_text: Text of the end-of-sequence token.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        names: Iterable[str] | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
        card: int = 0,
    ) -> None:
        """Build model and tokenizer from a checkpoint folder, which is not needed afterwards; its weights are not read.

        Args:
            path: Folder with ``config.json`` and tokenizer.
            dtype: The resident weights' dtype.
            device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:<i>``, or ``meta`` to hold no weights.
            batch_tokens: Approximate number of padded tokens in a forward pass; at least 1.
            names: Names of the tensors that will be loaded; None: those of the weights in the folder.
            trust_remote_code: Run model code that the folder brings.
            attention: An attention implementation of transformers; None lets it choose.
            card: Bytes of memory of the GPU that an engine on ``meta`` plans for; 0: it plans for a CPU.

        Raises:
            EngineError: If there is no such device, or model or tokenizer cannot be built.
        """
        target = _device(device)
        self.dtype: str = dtype
        self.device = str(target)
        folder = Path(path)
        self._weights = ResidentModel(
            folder,
            dtype=getattr(torch, dtype),
            device=target,
            names=names,
            trust_remote_code=trust_remote_code,
            attention=attention,
        )
        self._language = Language(self._weights.model, folder, trust_remote_code=trust_remote_code)
        self._forward = Forward(self._weights.model)
        self._backward = Backward(self._forward, self._weights, target)
        card = _memory(target) or card
        width = self._forward.width
        self.batch_tokens = _batch_tokens(bool(card), width) if batch_tokens == "auto" else batch_tokens
        logits = SCORED_LOGITS["cuda" if card else "cpu"]
        self._n_most_scored = max(1, logits // self._forward.vocabulary)
        self._prefixes = Prefixes(self._forward, target)
        self._n_most_cached = _n_most_cached(self._weights.model, card)
        self._generator = Generator(
            self._forward,
            self._prefixes,
            self._language,
            device=target,
            step_tokens=_step_tokens(bool(card), width),
            n_most_rows=self._n_most_scored,
            n_most_cached=self._n_most_cached,
        )
        self._continues: bool | None = None if self._forward.may_continue else False
        self._shares: bool | None = None if self._forward.may_share else False
        self._is_causal: bool | None = None
        self.tokenizer_name = self._language.name
        self.eot_text = self._language.eot_text

    @classmethod
    def tokenizer_only(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        batch_tokens: int | Literal["auto"] = "auto",
        trust_remote_code: bool = False,
        card: int = 0,
    ) -> HFEngine:
        """An engine that renders and prepares requests, but holds no weights and answers nothing."""
        return cls(
            path,
            dtype=dtype,
            device="meta",
            batch_tokens=batch_tokens,
            trust_remote_code=trust_remote_code,
            card=card,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._language.has_chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt, as lm-eval does."""
        return self._language.apply_chat_template(chat_history, add_generation_prompt)

    def resident(self, name: str) -> Tensor | None:
        """The tensor that the checkpoint tensor ``name`` is loaded into; see ``Engine.resident``."""
        return self._weights.resident(name)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights in place; see ``Engine.load_weights``."""
        if self.device == "meta":
            raise EngineError("engine: was built without weights, to tokenize only; build one on a device")
        with torch.no_grad():
            self._prefixes.forget()
            self._weights.load(tensors)

    def expect(self, requests: Sequence[Request]) -> float:
        """Choose which beginnings to compute once for each load of weights; see ``Engine.expect``."""
        if self._continues is False:
            return 0.0
        encoded = self._language.encode(requests)
        prompts = [tuple(tokens) for _, _, tokens in encoded.generated]
        self._continue_from(
            choose_beginnings(
                [*(item.context for item in encoded.items), *prompts],
                pass_tokens=PASS_TOKENS * self.batch_tokens,
                n_most_cached=int(PREFIX_SHARE * self._n_most_cached),
            )
        )
        n_tokens = sum(map(len, self._prefixes.beginnings.tokens))
        return n_tokens + PASS_TOKENS * self.batch_tokens * math.ceil(n_tokens / self.batch_tokens)

    def prepare(self, requests: Sequence[Request]) -> HFPrepared:
        """Tokenize and group requests; see ``Engine.prepare``."""
        encoded = self._language.encode(requests)
        batches = self._cut(encoded.items, self._shares is not False)
        generation = self._generator.plan(encoded.generated, self.batch_tokens)
        beginnings = self._prefixes.beginnings
        n_tokens = sum(len(row) for batch in batches for row in batch)
        sizes = [len(batch) * max(map(len, batch)) for batch in batches]
        cost = sum(sizes) + PASS_TOKENS * self.batch_tokens * len(batches)
        return HFPrepared(
            encoded,
            n_tokens + generation.n_tokens,
            cost + generation.cost,
            n_padded=max([generation.n_padded, *sizes]),
            n_scored=max([generation.n_together, *(sum(row.n_scored for row in batch) for batch in batches)]),
            n_cached=sum(map(len, beginnings.tokens)) + max([generation.n_cached, *map(_n_continued, batches)]),
            n_places=sum(row.n_scored for batch in batches for row in batch),
            text_cost=generation.cost,
            generation=((self.batch_tokens, beginnings), generation),
        )

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer prepared requests; see ``Engine.respond``."""
        assert isinstance(prepared, HFPrepared)
        if not self._weights.is_complete:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        while True:
            try:
                return self._respond(prepared)
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
                self._shrink(prepared, exc)

    def respond_with_gradient(self, prepared: Prepared, goal: Goal, sink: Sink) -> list[Response]:
        """Answer prepared requests and differentiate; see ``DifferentiableEngine.respond_with_gradient``."""
        assert isinstance(prepared, HFPrepared)
        if not self._weights.is_complete:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        encoded = prepared.encoded
        if encoded.generated:
            raise EngineError(
                "request: must be a log-likelihood to be differentiated, got generate_until; leave it out"
            )
        with torch.inference_mode():
            if self._is_causal is None and encoded.items:
                self._find_out_if_causal(encoded.items[0].context)
            if self._shares is None:
                self._shares = self._try_sharing(encoded.items)
        key = self._plan_key()
        if prepared.whole_plan is None or prepared.whole_plan[0] != key:
            rows = self._cut(encoded.items, self._shares is not False, whole=True)
            prepared.whole_plan = key, self._backward.plan(encoded, rows)
        return encoded.responses(self._backward.run(encoded, prepared.whole_plan[1], goal, sink), [])

    def gradient_bytes(self, longest: int, n_scored: int) -> tuple[int, int]:
        """Bytes that a gradient pass needs beside the weights, without computing one.

        Args:
            longest: Tokens of the longest sequence.
            n_scored: Most positions in one pass whose logits are needed.

        Returns:
            For a batch whose activations are kept, and for the least that is tried when memory is short: a single
            sequence whose layers are computed again on the way back.

        Raises:
            EngineError: If the engine holds weights.
        """
        if self.device != "meta":
            raise EngineError("engine: must hold no weights to be planned for; use tokenizer_only")
        longest = max(2, longest)
        n_rows = max(1, self.batch_tokens // longest)
        n_in_row = min(longest - 1, max(1, n_scored // n_rows))
        kept = self._backward.peak_bytes(n_rows, longest, n_in_row)
        self._backward.recomputes = True
        least = self._backward.peak_bytes(1, longest, n_in_row)
        self._backward.recomputes = False
        return kept, least

    def close(self) -> None:
        """Free the model's memory."""
        if hasattr(self, "_weights"):
            self._forward.close()
            del self._weights, self._language, self._forward, self._backward, self._prefixes, self._generator
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _respond(self, prepared: HFPrepared) -> list[Response]:
        encoded = prepared.encoded
        with torch.inference_mode():
            if self._is_causal is None and encoded.items:
                self._find_out_if_causal(encoded.items[0].context)
            if self._continues is None and self._prefixes.beginnings.tokens:
                self._continues = self._prefixes.is_right()
                if self._continues is False:
                    self._continue_from(NO_BEGINNINGS)
            if self._shares is None:
                self._shares = self._try_sharing(encoded.items)
            answers = self._score(encoded.items, self._batches(prepared))
        texts = self._generator.answer(encoded.generated, self._generation(prepared)) if encoded.generated else []
        return encoded.responses(answers, texts)

    def _find_out_if_causal(self, tokens: Sequence[int]) -> None:
        """Fall back to one item at a time if a row's tokens depend on what follows them."""
        self._is_causal = self._forward.is_causal(tokens)
        if self._is_causal is False:
            self._shares = self._continues = False
            self._continue_from(NO_BEGINNINGS)

    def _continue_from(self, beginnings: Beginnings) -> None:
        self._prefixes.forget()
        self._prefixes.beginnings = beginnings

    def _generation(self, prepared: HFPrepared) -> Generation:
        key = self.batch_tokens, self._prefixes.beginnings
        if prepared.generation[0] != key:
            prepared.generation = key, self._generator.plan(prepared.encoded.generated, self.batch_tokens)
        return prepared.generation[1]

    def _plan_key(self) -> tuple[Any, ...]:
        return self._shares is not False, self._is_causal, self.batch_tokens, self._prefixes.beginnings

    def _batches(self, prepared: HFPrepared) -> list[Batch]:
        key = self._plan_key()
        if prepared.plan is None or prepared.plan[0] != key:
            prepared.plan = key, self._planned(prepared.encoded.items, self._shares is not False)
        return prepared.plan[1]

    def _planned(self, items: Sequence[Item], share: bool) -> list[Batch]:
        device = torch.device(self.device)
        return [Batch.of_rows(rows, items, device) for rows in self._cut(items, share)]

    def _cut(self, items: Sequence[Item], share: bool, *, whole: bool = False) -> list[list[Row]]:
        beginnings = self._prefixes.beginnings if share else NO_BEGINNINGS
        window, n_tokens = self._forward.window, self.batch_tokens
        if self._is_causal is False:
            return one_by_one(items)
        rows = make_rows(items, share=share, longest_shared=window, beginnings=beginnings)
        if whole:
            rows = make_whole(rows, beginnings, batch_tokens=n_tokens, longest_shared=window)
        return make_batches(rows, batch_tokens=n_tokens, batch_scored=self._n_most_scored, longest_shared=window)

    def _score(self, items: Sequence[Item], batches: Sequence[Batch]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(items)
        for batch in batches:
            before = self._prefixes.before(batch.beginnings, self.batch_tokens)
            for item, answer in batch.answers(*self._forward.score(batch, before)):
                answers[item] = answer
        return answers

    def _try_sharing(self, items: Sequence[Item]) -> bool | None:
        """Whether continuations score the same in a shared row as apart; None if no row is shared.

        A configuration does not tell whether a model follows the mask and positions that it is given.
        """
        trees = [row for row in make_rows(items, share=True, longest_shared=self._forward.window) if not row.is_chain]
        if not trees:
            return None
        probe = [items[index] for index, _ in trees[0].scored]
        shared = attempt(lambda: self._score(probe, self._planned(probe, share=True)))
        if shared is None:
            return False
        apart = self._score(probe, self._planned(probe, share=False))
        per_token = [
            abs(a - b) / len(item.continuation) for (a, _), (b, _), item in zip(shared, apart, probe, strict=True)
        ]
        if not np.isfinite(per_token).all():
            return None
        return float(np.mean(per_token)) <= (1e-3 if self.dtype == "float32" else 0.1)

    def _shrink(self, prepared: HFPrepared, exc: Exception) -> None:
        prepared.plan = None
        if self.batch_tokens <= max(1, prepared.longest // 2):
            raise EngineError(
                f"engine: a sequence of {prepared.longest} tokens does not fit into the memory of {self.device}; "
                "use shorter prompts, a smaller dtype or a larger device"
            ) from exc
        self.batch_tokens //= 2
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _n_continued(batch: Sequence[Row]) -> int:
    """Tokens whose keys and values a batch holds: those of its beginnings, side by side, and again before its own."""
    n_before = max(row.n_before for row in batch)
    return len(batch) * (2 * n_before + max(map(len, batch))) if n_before else 0


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as exc:
        raise EngineError(f"engine: device must be auto, cpu, cuda or cuda:<i>, got '{device}'; correct it") from exc
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"engine: device '{device}' is not there ({torch.cuda.device_count()} CUDA devices found); use cpu or auto"
        )
    return torch.device("cuda:0") if target.type == "cuda" and target.index is None else target


def _memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 for other devices."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def _batch_tokens(on_gpu: bool, width: int) -> int:
    if on_gpu:
        return CUDA_BATCH_TOKENS
    return min(1024, max(512, CPU_BATCH_ACTIVATIONS // width))


def _step_tokens(on_gpu: bool, width: int) -> float:
    """Fixed cost of a decoding step in tokens of a full pass: reading the weights, and Python's time for each layer.

    On one CPU core it was 105 tokens at a width of 128, 43 at 256, 35 at 512 and 44 at 576.
    """
    return PASS_TOKENS * CUDA_BATCH_TOKENS if on_gpu else 36 + 69 * (128 / max(128, width)) ** 2


def _n_most_cached(model: Any, card: int) -> int:
    """Tokens whose keys and values there is room for."""
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    n_bytes = max(0, int(KV_SHARE * (card - weights))) if card else CPU_KV_BYTES
    elements = elements_of_a_token(model.config.get_text_config().to_dict())
    return int(n_bytes // max(1, elements * model.dtype.itemsize))
