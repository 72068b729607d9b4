"""Forward passes of a transformers model that compute logits only where something is scored or chosen.

Knows tensors, masks and positions. It does not know requests, texts or how rows were chosen (``batches.py``).

Departure from lm-eval: the softmax is taken in float32 whatever the model's dtype, where lm-eval rounds
log-probabilities to the model's dtype. In float32 both agree to rounding.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from optuna_merge.errors import EngineError, is_out_of_memory
from optuna_merge.evaluation.engines.batches import Item, Row
from optuna_merge.evaluation.engines.key_values import KeysAndValues

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

_PROBED, _MOST_PROBED = 16, 128
"""Least and most tokens of a row that is computed on trial."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Before:
    """What the rows of a forward pass continue.

    Attributes:
        layers: Keys and values, padded at the end; ``[n, n_heads, n_columns, head_dim]`` in each layer.
        lengths: Tokens of each row's own beginning; ``[n]``, at most ``n_columns``.
    """

    layers: KeysAndValues
    lengths: Tensor

    @property
    def n_columns(self) -> int:
        """Columns of the longest one."""
        return int(self.layers[0][0].shape[2])


@dataclass
class Batch:
    """The inputs of one forward pass, its tensors already on the device.

    Shapes: ``n`` rows, ``length`` tokens, ``n_scored`` different places, ``n_wanted`` tokens of continuations.
    """

    tokens: Tensor  # [n, length]
    positions: Tensor | None  # [n, length]; None if all rows are chains that start from nothing
    ends: Tensor | None  # [n, length]
    beginnings: list[int | None]  # [n], the number of what each row continues
    rows: Tensor  # [n_scored]
    columns: Tensor  # [n_scored]
    places: Tensor  # [n_wanted], index into the scored places
    wanted: Tensor  # [n_wanted], token ids
    items: list[int]  # indices of the scored items
    starts: list[int]  # where each item begins among the wanted tokens

    @classmethod
    def of_rows(cls, rows: Sequence[Row], items: Sequence[Item], device: torch.device) -> Batch:
        """Lay out rows as one forward pass.

        Args:
            rows: The rows.
            items: What the rows' scored indices refer to.
            device: Where the tensors go.
        """
        length = max(map(len, rows))
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        positions = np.zeros_like(tokens)
        # padding comes last and sees the padding before it in its row, so that no row of the mask is empty
        ends = np.full_like(tokens, length)
        places: dict[tuple[int, int], int] = {}
        place_of: list[int] = []
        wanted: list[int] = []
        scored: list[int] = []
        starts: list[int] = []
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row.tokens
            positions[number, : len(row)] = row.positions
            ends[number, : len(row)] = row.ends
            for item, nodes in row.scored:
                scored.append(item)
                starts.append(len(wanted))
                wanted.extend(items[item].continuation)
                place_of.extend(places.setdefault((number, node), len(places)) for node in nodes)
        where = np.array(list(places), dtype=np.int64).reshape(-1, 2)
        # attention without a mask has faster kernels
        is_tree = not all(row.is_chain and row.beginning is None for row in rows)

        def moved(array: Any) -> Tensor:
            return torch.as_tensor(array, device=device)

        return cls(
            tokens=moved(tokens),
            positions=moved(positions) if is_tree else None,
            ends=moved(ends) if is_tree else None,
            beginnings=[row.beginning for row in rows],
            rows=moved(where[:, 0]),
            columns=moved(where[:, 1]),
            places=moved(np.array(place_of, dtype=np.int64)),
            wanted=moved(np.array(wanted, dtype=np.int64)),
            items=scored,
            starts=starts,
        )

    def read(self, logits: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Log-probability of each wanted token, and whether it is the likeliest one; both ``[n_wanted]``.

        Args:
            logits: At the scored places, ``[n_scored, vocabulary]``.
        """
        logits = at_least_float32(logits)
        normalizer = logits.logsumexp(-1)
        log_probabilities = logits[self.places, self.wanted] - normalizer[self.places]
        greedy = logits.argmax(-1)[self.places] == self.wanted
        both = torch.stack([log_probabilities.double(), greedy.double()]).cpu().numpy()
        return both[0], both[1] == 1

    def answers(
        self, log_probabilities: np.ndarray[Any, Any], greedy: np.ndarray[Any, Any]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """What :meth:`read` returned, for each item: its log-probability, and whether greedy decoding would give it."""
        sums = np.add.reduceat(log_probabilities, self.starts)
        exact = np.logical_and.reduceat(greedy, self.starts)
        return zip(self.items, zip(sums.tolist(), exact.tolist(), strict=True), strict=True)


class Forward:
    """Forward passes that compute logits only where something is scored or chosen.

    Attributes:
        may_share: Whether the model's design allows several continuations in one row.
        may_continue: Whether it allows rows of different lengths to continue what is in a cache.
        window: Tokens that such a row may have at most; None: any number.
        vocabulary: Size of the output layer.
        width: Size of a hidden state.
        dtype: Of the model.
    """

    def __init__(self, model: Any) -> None:
        """Hook into the model's output layer."""
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        self.may_share = _takes_trees(model, config, self._parameters)
        chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        self.may_continue = self.may_share and not chunked and {"past_key_values", "use_cache"} <= set(self._parameters)
        # sliding_window, window_size, attention_window, attention_chunk_size ...
        windows = [
            value
            for key, value in config.to_dict().items()
            if re.search(r"window(?!_layers)|attention_chunk", key) and isinstance(value, int) and value > 1
        ]
        self.window = min(windows) if windows else None
        self.vocabulary = int(config.vocab_size)
        self.width = int(config.hidden_size)
        self.dtype = model.dtype
        self._scored: tuple[Tensor, Tensor] | None = None
        self._selected = False
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def close(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()

    def score(self, batch: Batch, before: Before | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Log-probability of each wanted token, and whether it is the likeliest one; both ``[n_wanted]``.

        Args:
            batch: The inputs.
            before: What its rows continue; required if any row continues something.
        """
        return batch.read(self.logits(batch, before))

    def prefill(self, prompts: Sequence[Sequence[int]], before: Before | None = None) -> tuple[Tensor, KeysAndValues]:
        """Compute prompts.

        Args:
            prompts: Tokens of each; not empty. They are padded at the end.
            before: What they continue.

        Returns:
            Float32 logits of the tokens that follow, ``[n, vocabulary]``, and the keys and values of all tokens: first
            the columns of ``before``, then those of the prompts.
        """
        length = max(map(len, prompts))
        device = self._model.device
        tokens = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in prompts], device=device)
        lasts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        cache = DynamicCache()
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": cache, "use_cache": True}
        if before is not None:
            ends = torch.full_like(tokens, tokens.shape[1])
            # padding stays within the model's window
            columns = torch.arange(tokens.shape[1], device=tokens.device).minimum(lasts[:, None])
            inputs["position_ids"] = before.lengths[:, None] + columns
            self._continue(inputs, ends, before)
        logits = self._run(inputs, torch.arange(len(tokens), device=tokens.device), lasts).float()
        return logits, [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]

    def is_causal(self, tokens: Sequence[int]) -> bool | None:
        """Whether what follows a token changes nothing of it: neither its row's later tokens nor padding.

        A configuration does not tell whether a model looks ahead, or counts a row's tokens from its end. None if this
        cannot be said.

        Args:
            tokens: Any tokens; at least one.

        Raises:
            EngineError: If the model scores the same tokens in two ways.
        """
        long = (list(tokens) * _PROBED)[: min(max(len(tokens), _PROBED), _MOST_PROBED)]
        half = len(long) // 2
        rows = [Row.of_prompt(0, long), Row.of_prompt(1, long[half:])]
        rows[0].scored = [(0, [half - 1])]
        together = self._at_ends(rows)
        apart = [self._at_ends([Row.of_prompt(0, part)]) for part in (long[:half], long[half:])]
        is_causal = self.agree(together, torch.cat(apart))
        if is_causal is False and not self.agree(together, self._at_ends(rows)):
            raise EngineError(
                f"{type(self._model).__name__}: equal inputs must have equal scores, got others the second time; a"
                " model that draws random numbers cannot be searched"
            )
        return is_causal

    def agree(self, ours: Tensor, theirs: Tensor) -> bool | None:
        """Whether logits are equal but for rounding; None if they are not finite.

        Args:
            ours: Logits of any shape.
            theirs: Logits of the same shape.
        """
        difference = float((ours - theirs).abs().mean() / theirs.std())
        if math.isnan(difference):
            return None
        return difference <= (1e-3 if self.dtype == torch.float32 else 0.1)

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Compute one more token of each row.

        Args:
            tokens: The tokens; ``[n, 1]``.
            positions: Their distances from the starts of their rows; ``[n, 1]``.
            mask: 0 where a column of the cache does not belong to the row; ``[n, n_columns]`` with the new column.
            cache: Holds the tokens before, and then these.

        Returns:
            Float32 logits of the tokens that follow, ``[n, vocabulary]``.
        """
        inputs = {"input_ids": tokens, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        rows = torch.arange(len(tokens), device=tokens.device)
        return self._run({**inputs, "attention_mask": mask}, rows, torch.zeros_like(rows)).float()

    def logits(self, batch: Batch, before: Before | None = None) -> Tensor:
        """Logits at the scored places, in the model's dtype, ``[n_scored, vocabulary]``; see :meth:`score`."""
        inputs: dict[str, Any] = {"input_ids": batch.tokens}
        if batch.ends is not None:
            inputs["position_ids"] = batch.positions
        if before is not None:
            assert batch.ends is not None
            inputs |= {"past_key_values": DynamicCache(), "use_cache": True}
            self._continue(inputs, batch.ends, before)
        else:
            if "use_cache" in self._parameters:
                inputs["use_cache"] = False
            if batch.ends is not None:
                inputs["attention_mask"] = _tree_mask(batch.ends, self.dtype)
        return self._run(inputs, batch.rows, batch.columns)

    def _at_ends(self, rows: Sequence[Row]) -> Tensor:
        """Logits at the scored places of some rows, ``[len(rows), vocabulary]``."""
        items = [Item((0,), (0,))] * len(rows)
        return self.logits(Batch.of_rows(rows, items, self._model.device))

    def _continue(self, inputs: dict[str, Any], ends: Tensor, before: Before) -> None:
        """Fill the inputs' cache, and let their rows see what they continue."""
        for number, (keys, values) in enumerate(before.layers):
            inputs["past_key_values"].update(keys, values, number)
        mask = _tree_mask(ends, self.dtype)
        is_hidden = torch.arange(before.n_columns, device=ends.device) >= before.lengths[:, None]
        seen = torch.zeros(is_hidden.shape, dtype=self.dtype, device=ends.device)
        seen.masked_fill_(is_hidden, torch.finfo(self.dtype).min)
        seen = seen[:, None, None].expand(-1, -1, ends.shape[1], -1)
        inputs["attention_mask"] = torch.cat([seen, mask], dim=-1)  # [n, 1, length, n_columns + length]

    def _run(self, inputs: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at some places of the inputs, ``[n_places, vocabulary]``."""
        self._scored, self._selected = (rows, columns), False
        try:
            logits = cast(Tensor, self._model(**inputs).logits)
        finally:
            self._scored = None
        return logits[0] if self._selected else logits[rows, columns]

    def _select(self, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Give the output layer the scored places only; what the model does to logits afterwards stays in force."""
        if self._scored is None or not args or args[0].dim() != 3:
            return None
        self._selected = True
        rows, columns = self._scored
        return (args[0][rows, columns].unsqueeze(0), *args[1:])  # [1, n_scored, hidden]


def attempt(compute: Callable[[], _T]) -> _T | None:
    """What ``compute`` returns; None if the model cannot be run that way.

    Raises:
        MemoryError, RuntimeError: If memory runs out.
    """
    try:
        return compute()
    except (TypeError, ValueError, NotImplementedError, AttributeError, LookupError, RuntimeError) as exc:
        if is_out_of_memory(exc):
            raise
        return None


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _takes_trees(model: Any, config: Any, parameters: Any) -> bool:
    """Whether attention follows the given mask and positions: no recurrence, no built-in distances such as ALiBi."""
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        {"position_ids", "attention_mask"} <= set(parameters)
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)
        and layers <= _ATTENTION_LAYERS
    )


def _tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[n, 1, length, length]``: token i sees token j if ``j <= i < ends[j]``."""
    index = torch.arange(ends.shape[1], device=ends.device)
    seen = (index[None, :, None] >= index[None, None, :]) & (index[None, :, None] < ends[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
