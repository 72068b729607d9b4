"""Greedy decoding: the likeliest token after another, for all rows of a batch at once.

Knows tokens and where lm-eval ends a text. It does not know requests, nor how the plan was made (``generation.py``).
Texts are those of lm-eval with a batch size of 1: its larger batches run on until every text has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from optuna_merge.evaluation.engine import Text
from optuna_merge.evaluation.engines.forward import Before, Forward, attempt
from optuna_merge.evaluation.engines.generation import Generation, Prompt
from optuna_merge.evaluation.engines.key_values import KeysAndValues
from optuna_merge.evaluation.engines.prefixes import Prefixes
from optuna_merge.evaluation.engines.row_cache import RowCache
from optuna_merge.internals.lm_eval import postprocess_generated_text, stop_lookback

_PROBED = 8
"""Tokens of the shorter one of two rows that are decoded on trial."""

_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}


class Decoder:
    """Greedy decoding with one model.

    Attributes:
        settings: What the model's ``generation_config.json`` sets.
        n_rows: Rows in the batch at present; after an error, when it occurred.
    """

    def __init__(self, forward: Forward, prefixes: Prefixes, lm: Any, device: torch.device) -> None:
        """Read what ends a text.

        Args:
            forward: The model's forward passes.
            prefixes: The beginnings that it has computed.
            lm: lm-eval's model around the tokenizer.
            device: Where the model is.
        """
        self._forward = forward
        self._prefixes = prefixes
        self._lm = lm
        self._device = device
        self.settings = _settings(lm.model.generation_config)
        ends = lm.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._lookbacks: dict[str, int] = {}
        self.n_rows = 0

    def decode(self, plan: Generation, n_most_rows: int, texts: dict[int, Text]) -> None:
        """Generate the planned texts.

        Args:
            plan: The plan.
            n_most_rows: Most rows in the batch.
            texts: Prompt number to text. Those that are there are not generated; a new one is put there as soon as it
                has ended, so that it is not lost when memory runs out.
        """
        pieces = _pieces(plan, n_most_rows, texts)
        n_waiting = sum(map(len, pieces))
        batch = RowCache(n_most_rows=n_most_rows, n_most_cached=plan.n_most_cached, device=self._device)
        made: dict[int, list[int]] = {}
        self.n_rows = 0
        while pieces or batch.rows:
            while pieces and batch.has_room(*_size([plan.prompts[number] for number in pieces[0]])):
                piece = pieces.pop(0)
                n_waiting -= len(piece)
                before = self._prefixes.before([plan.beginnings[number] for number in piece], plan.batch_tokens)
                logits, layers = self._forward.prefill([plan.rest(number) for number in piece], before)
                made |= {number: [] for number in piece}
                has_ended = self._extend(piece, plan, logits, made, texts)
                _enter(batch, plan, piece, layers, before, has_ended, n_waiting)
                self.n_rows = len(batch.rows)
                del layers
            if batch.rows:
                numbers = [row.number for row in batch.rows]
                logits = self._step(batch, [made[number][-1] for number in numbers])
                batch.leave(self._extend(numbers, plan, logits, made, texts))
                self.n_rows = len(batch.rows)

    def is_right(self, tokens: Sequence[int]) -> bool | None:
        """Whether a batch that rows leave gives what each row gives alone; None if this cannot be said.

        A configuration does not tell whether a model follows the mask, the positions and the cache that it is given.

        Args:
            tokens: Any tokens; at least one.
        """
        found = attempt(lambda: self._try(tokens))
        return False if found is None else self._forward.agree(*found)

    def first_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits of the first two tokens that continue a prompt, ``[2, 1, vocabulary]``."""
        batch = RowCache(n_most_rows=1, n_most_cached=len(tokens) + 2, device=self._device)
        logits, layers = self._forward.prefill([tokens])
        batch.enter([(0, len(tokens), 2)], layers, 0)
        return torch.stack([logits, self._step(batch, logits.argmax(-1).tolist())])

    def _try(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of two rows that are decoded together, and of each alone."""
        long = tuple((list(tokens) * 2 * _PROBED)[: 2 * _PROBED + 2])
        batch = RowCache(n_most_rows=2, n_most_cached=4 * len(long), device=self._device)
        _, layers = self._forward.prefill([long[:-2], long[_PROBED:-2]])
        batch.enter([(0, 2 * _PROBED, 2), (1, _PROBED, 2)], layers, 0)
        decoded = [self._step(batch, [long[-2]] * 2)]
        batch.leave([True, False])
        decoded.append(self._step(batch, [long[-1]]))
        whole = [self._forward.prefill([part])[0] for part in (long[:-1], long[_PROBED:-1], long[_PROBED:])]
        return torch.cat(decoded), torch.cat(whole)

    def _step(self, batch: RowCache, tokens: Sequence[int]) -> Tensor:
        positions, mask = batch.inputs()
        return self._forward.step(torch.tensor(tokens, device=self._device)[:, None], positions, mask, batch.cache)

    def _extend(
        self,
        numbers: Sequence[int],
        plan: Generation,
        logits: Tensor,
        made: Mapping[int, list[int]],
        texts: dict[int, Text],
    ) -> list[bool]:
        """Append the likeliest token to each text; return which ones have ended."""
        prompts = [plan.prompts[number] for number in numbers]
        if any(prompt.penalty != 1 for prompt in prompts):
            _penalize(logits, prompts, [made[number] for number in numbers])
        has_ended = []
        for number, prompt, token in zip(numbers, prompts, logits.argmax(-1).tolist(), strict=True):
            made[number].append(token)
            has_stopped = self._has_stopped(prompt, made[number])
            has_ended.append(has_stopped or len(made[number]) >= prompt.n_most)
            if has_ended[-1]:
                text = postprocess_generated_text(self._lm.tok_decode(made[number]), list(prompt.until), None)
                texts[number] = Text(text, len(made[number]), is_cut=not has_stopped)
        return has_ended

    def _has_stopped(self, prompt: Prompt, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self._ends:
            return True
        tails: dict[int, str] = {}
        for text in prompt.until:
            if text not in self._lookbacks:
                self._lookbacks[text] = stop_lookback(self._lm.tokenizer, text)
            n = min(len(tokens), self._lookbacks[text])
            if n not in tails:
                tails[n] = self._lm.tok_decode(tokens[-n:], skip_special_tokens=False)
            if text in tails[n]:
                return True
        return False


def _settings(config: GenerationConfig) -> Mapping[str, Any]:
    known = vars(cast(Any, GenerationConfig)())
    return {
        key: value
        for key, value in vars(config).items()
        if key in known and value is not None and value is not False and _NEUTRAL.get(key) != value
    }


def _pieces(plan: Generation, n_most_rows: int, texts: Mapping[int, Text]) -> list[list[int]]:
    """Pieces of at most ``n_most_rows`` prompts that have no text yet."""
    missing = [[number for number in piece if number not in texts] for piece in plan.pieces]
    return [piece[at : at + n_most_rows] for piece in missing for at in range(0, len(piece), n_most_rows)]


def _size(prompts: Sequence[Prompt]) -> tuple[int, int, int]:
    """Rows, the longest one's tokens, and the most tokens that any may come to have in addition."""
    return len(prompts), max(len(prompt.tokens) for prompt in prompts), max(prompt.n_most for prompt in prompts)


def _enter(
    batch: RowCache,
    plan: Generation,
    piece: Sequence[int],
    layers: KeysAndValues,
    before: Before | None,
    has_ended: Sequence[bool],
    n_waiting: int,
) -> None:
    stay = [index for index, ended in enumerate(has_ended) if not ended]
    if not stay:
        return
    parts = None if before is None else (before.n_columns, before.lengths[stay])
    if len(stay) < len(piece):
        layers = [(keys[stay], values[stay]) for keys, values in layers]
    prompts = [(piece[index], plan.prompts[piece[index]]) for index in stay]
    # the last token of a text is never an input
    rows = [(number, len(prompt.tokens), prompt.n_most - 1) for number, prompt in prompts]
    batch.enter(rows, layers, n_waiting, parts)


def _penalize(logits: Tensor, prompts: Sequence[Prompt], made: Sequence[Sequence[int]]) -> None:
    """Apply ``repetition_penalty`` as transformers does, in place."""
    seen = [[*prompt.tokens, *tokens] for prompt, tokens in zip(prompts, made, strict=True)]
    longest = max(map(len, seen))
    # padded with a token that is there anyway
    index = torch.tensor([[*row, *row[:1] * (longest - len(row))] for row in seen], device=logits.device)
    penalties = torch.tensor([[prompt.penalty] for prompt in prompts], device=logits.device)
    found = logits.gather(1, index)
    logits.scatter_(1, index, torch.where(found < 0, found * penalties, found / penalties))
