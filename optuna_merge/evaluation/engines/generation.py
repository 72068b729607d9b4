"""Which texts are generated together, and what that costs: prompts as tokens, their options, rows and passes.

Knows lm-eval's generation options; no tensors and no model.

A prompt is computed once, in a pass with others of about its length (a piece). Then it is a row of the one batch that
is decoded, a token a step, until its text has ended; then the row leaves and the next piece may come in. A step costs
nearly as much for one row as for thirty, so the batch holds as many rows as its memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engine import Request
from optuna_merge.evaluation.engines.batches import PASS_TOKENS, Row, make_batches
from optuna_merge.evaluation.engines.beginnings import Beginnings
from optuna_merge.internals.lm_eval import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs

GENERATION_SEED = 1234
"""Seeds sampling, for tasks that ask for it: equal weights give equal texts."""

ROW_TOKENS = 8
"""Rows are decoded together up to a batch's tokens over this: more make a row hardly cheaper."""

STEP_ROW_TOKENS = 1.5
"""Cost of a row in a step, in tokens of a full pass: each row's logits are computed, and its keys and values read."""

LM_EVAL_BATCHES = 4
"""lm-eval pads all prompts of a batch to one pass, which may have as many tokens as this number of our batches."""

_SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
_OF_A_TASK = _SAMPLING | {"until", "max_gen_toks", "do_sample", "num_beams", "repetition_penalty", "use_cache"}
_WITHOUT_EFFECT = _SAMPLING | {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "do_sample",  # lm-eval always passes it
    "early_stopping",
    "eos_token_id",  # is followed
    "length_penalty",
    "max_length",  # lm-eval always passes it
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefill_chunk_size",
    "renormalize_logits",
    "repetition_penalty",  # is followed
    "transformers_version",
    "use_cache",
}
"""Settings of a model's ``generation_config.json`` that do not change which token is the likeliest."""


@dataclass(frozen=True)
class Prompt:
    """One text to generate greedily; equal ones are generated once.

    Attributes:
        tokens: Of the prompt, cut to the window; not empty.
        until: The text ends before the first of these; the text of the end-of-sequence token is among them.
        n_most: Tokens of the text at most; at least 1.
        penalty: ``repetition_penalty`` of transformers; 1 for none.
    """

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    n_most: int
    penalty: float = 1.0


@dataclass(frozen=True)
class Generation:
    """The plan for the requests that are answered by text.

    Attributes:
        prompts: Different prompts, the longest first.
        beginnings: Number of the beginning that each prompt continues; None for none.
        n_before: Tokens of that beginning.
        batch_tokens: Tokens that fill a pass.
        prompt_of: For each request its prompt; None if lm-eval must answer it, because it samples or searches beams.
        pieces: Prompts that are computed in one pass, by number, in the order of ``prompts``.
        n_rows: Most rows in the batch that is decoded.
        n_most_cached: Most tokens whose keys and values are held at once, unless a single prompt needs more.
        n_together: Most texts that grow at the same time.
        batch_size: Requests in a batch of lm-eval's.
        n_tokens: Tokens of all prompts without their beginnings, repeated ones included.
        n_padded: Most tokens in one pass.
        n_cached: Tokens whose keys and values are held at once, if every text is as long as it may be.
        cost: As ``Prepared.cost``.
    """

    prompts: list[Prompt]
    beginnings: list[int | None]
    n_before: list[int]
    batch_tokens: int
    prompt_of: list[int | None]
    pieces: list[list[int]]
    n_rows: int
    n_most_cached: int
    n_together: int
    batch_size: int
    n_tokens: int
    n_padded: int
    n_cached: int
    cost: float

    def rest(self, number: int) -> tuple[int, ...]:
        """Tokens of a prompt after its beginning; not empty."""
        return self.prompts[number].tokens[self.n_before[number] :]


def plan_generation(
    requests: Sequence[tuple[Request, Sequence[int]]],
    *,
    window: int,
    eos: str,
    settings: Mapping[str, Any],
    decodes: bool,
    beginnings: Beginnings,
    longest_continued: int | None,
    batch_tokens: int,
    step_tokens: float,
    n_most_rows: int,
    n_most_cached: int,
) -> Generation:
    """Plan the answers by text.

    Args:
        requests: The requests, and the tokens of their prompts.
        window: Tokens of the model's window.
        eos: Text of the end-of-sequence token, which ends every text.
        settings: What ``generation_config.json`` of the model sets.
        decodes: Whether our own loop can decode for this model; if not, lm-eval answers all requests.
        beginnings: What prompts may continue instead of being computed whole.
        longest_continued: Tokens of a prompt that may do so, at most; None: any number.
        batch_tokens: Tokens that fill a pass.
        step_tokens: Fixed cost of a step, in tokens of a full pass.
        n_most_rows: Rows that a step may have at most.
        n_most_cached: Tokens whose keys and values there is room for.

    Raises:
        EngineError: If a prompt is empty, or a text would fill the window.
    """
    found: list[tuple[Prompt, bool]] = []
    for request, tokens in requests:
        prompt, is_greedy = _read(request, tokens, window, eos, settings)
        found.append((prompt, decodes and is_greedy))
    ours = sorted({prompt for prompt, is_ours in found if is_ours}, key=_longest_first)
    others = [prompt for prompt, is_ours in found if not is_ours]
    numbers = {prompt: number for number, prompt in enumerate(ours)}
    longest = max((len(prompt.tokens) for prompt, _ in found), default=0)
    span = max((len(prompt.tokens) + prompt.n_most for prompt, _ in found), default=0)
    n_rows = max(1, min(batch_tokens // ROW_TOKENS, n_most_rows))
    n_at_once = max(1, min(n_rows, n_most_cached // max(1, span)))
    batch_size = max(1, min(n_at_once, LM_EVAL_BATCHES * batch_tokens // max(1, longest)))
    rows = [_row(number, prompt, beginnings, longest_continued) for number, prompt in enumerate(ours)]
    batches = make_batches(rows, batch_tokens=batch_tokens, batch_scored=n_at_once)
    pieces = [[number for row in batch for number, _ in row.scored] for batch in batches]
    passes = [len(batch) * max(map(len, batch)) for batch in batches]
    n_in_batch = min(batch_size, len(others))
    n_together = min(n_rows, max(len(ours), n_in_batch))
    n_passes = len(pieces) + math.ceil(len(others) / batch_size)
    n_steps = _n_steps(ours, n_at_once) + _n_steps(others, batch_size)
    return Generation(
        ours,
        [row.beginning for row in rows],
        [row.n_before for row in rows],
        batch_tokens,
        [numbers[prompt] if is_ours else None for prompt, is_ours in found],
        pieces,
        n_rows=n_rows,
        n_most_cached=n_most_cached,
        n_together=n_together,
        batch_size=batch_size,
        n_tokens=sum(len(rows[numbers[prompt]]) if is_ours else len(prompt.tokens) for prompt, is_ours in found),
        n_padded=max([*passes, *(n_in_batch * len(prompt.tokens) for prompt in others)], default=0),
        # and those of a piece, with what it continues, before it enters
        n_cached=min(max(span, n_most_cached), n_together * span)
        + max((len(batch) * max(row.n_before + len(row) for row in batch) for batch in batches), default=0),
        cost=sum(passes)
        + sum(len(prompt.tokens) for prompt in others)
        + n_passes * PASS_TOKENS * batch_tokens
        + n_steps * step_tokens
        + STEP_ROW_TOKENS * sum(prompt.n_most - 1 for prompt in [*ours, *others]),
    )


def cut_prompt(tokens: Sequence[int], request: Request, window: int) -> tuple[list[int], int]:
    """Cut a context from the left, so that the window has room for the text, and say how long the text may be.

    Raises:
        EngineError: If the text alone would fill the window, or there is nothing to answer.
    """
    wanted = int(normalize_gen_kwargs(request.args[1])["max_gen_toks"])
    if wanted >= window:
        raise EngineError(
            f"request: max_gen_toks must be below the model's window of {window}, got {wanted}; lower it in the task"
        )
    if wanted < 1:
        raise EngineError(f"request: max_gen_toks must be at least 1, got {wanted}; raise it in the task")
    if not tokens:
        raise EngineError("request: a prompt must have tokens, got none; correct the task's doc_to_text")
    cut, n_generated = maybe_truncate(list(tokens), wanted, window, verbose=False)
    return cut, n_generated


def _read(
    request: Request, tokens: Sequence[int], window: int, eos: str, settings: Mapping[str, Any]
) -> tuple[Prompt, bool]:
    """A request as a prompt, and whether its text is simply the likeliest token after another."""
    cut, n_most = cut_prompt(tokens, request, window)
    options: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
    until = handle_stop_sequences(options["until"], eos)
    is_greedy = (
        options.keys() <= _OF_A_TASK
        and not options["do_sample"]
        and options.get("num_beams", 1) == 1
        and options.get("use_cache", True)
        and settings.get("num_beams", 1) == 1
        and settings.keys() - {"num_beams"} <= _WITHOUT_EFFECT
        and all(isinstance(text, str) for text in until)
    )
    penalty = float(options.get("repetition_penalty") or settings.get("repetition_penalty") or 1)
    return Prompt(tuple(cut), tuple(map(str, until)), n_most, penalty), is_greedy


def _longest_first(prompt: Prompt) -> tuple[Any, ...]:
    return -len(prompt.tokens), -prompt.n_most, prompt.tokens, prompt.until, prompt.penalty


def _row(number: int, prompt: Prompt, beginnings: Beginnings, longest: int | None) -> Row:
    # the text itself is decoded from a cache that follows the model's window
    beginning = beginnings.of(prompt.tokens, 0, longest)
    return Row.of_prompt(number, prompt.tokens, beginning, beginnings.length(beginning))


def _n_steps(prompts: Sequence[Prompt], n_at_once: int) -> int:
    """Decoding steps, if every text is as long as it may be; a prompt's pass gives the first token."""
    lengths = [prompt.n_most - 1 for prompt in prompts]
    return max(max(lengths, default=0), math.ceil(sum(lengths) / n_at_once))
