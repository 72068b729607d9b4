"""Answers by text: greedy ones from our own decoder, all others from lm-eval.

Knows requests, their plan and memory that runs out; a text's tokens are the decoder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from optuna_merge.errors import is_out_of_memory
from optuna_merge.evaluation.engine import Request, Text
from optuna_merge.evaluation.engines.decoder import Decoder
from optuna_merge.evaluation.engines.forward import Forward
from optuna_merge.evaluation.engines.generation import GENERATION_SEED, Generation, cut_prompt, plan_generation
from optuna_merge.evaluation.engines.language import Language
from optuna_merge.evaluation.engines.prefixes import Prefixes
from optuna_merge.evaluation.quiet import quietly

_PROBED = 8
"""Tokens of the shorter one of two prompts that are continued on trial."""

Generated = Sequence[tuple[int, Request, list[int]]]
"""``Encoded.generated``."""


class Generator:
    """Generates the texts of one model.

    Attributes:
        n_most_rows: Rows in a batch at most; halved when memory runs out.
    """

    def __init__(
        self,
        forward: Forward,
        prefixes: Prefixes,
        language: Language,
        *,
        device: torch.device,
        step_tokens: float,
        n_most_rows: int,
        n_most_cached: int,
    ) -> None:
        """Prepare to generate.

        Args:
            forward: The model's forward passes.
            prefixes: The beginnings that it has computed.
            language: Its tokenizer.
            device: Where the model is.
            step_tokens: Fixed cost of a decoding step, in tokens of a full pass.
            n_most_rows: Rows in a batch at most.
            n_most_cached: Tokens whose keys and values there is room for.
        """
        self._forward = forward
        self._prefixes = prefixes
        self._language = language
        self._device = device
        self._decoder = Decoder(forward, prefixes, language.lm, device)
        self._decodes: bool | None = None if forward.may_continue else False
        self._pads: bool | None = None
        self._slides: bool | None = None
        self._step_tokens = step_tokens
        self._n_most_cached = n_most_cached
        self.n_most_rows = n_most_rows

    def plan(self, generated: Generated, batch_tokens: int) -> Generation:
        """Plan the answers to requests.

        Args:
            generated: The requests.
            batch_tokens: Tokens that fill a pass.

        Raises:
            EngineError: If a request cannot be answered by this model.
        """
        with quietly():
            return plan_generation(
                [(request, tokens) for _, request, tokens in generated],
                window=self._language.window,
                eos=self._language.eot_text,
                settings=self._decoder.settings,
                decodes=self._decodes is not False,
                beginnings=self._prefixes.beginnings,
                longest_continued=self._forward.window,
                batch_tokens=batch_tokens,
                step_tokens=self._step_tokens,
                n_most_rows=self.n_most_rows,
                n_most_cached=self._n_most_cached,
            )

    def answer(self, generated: Generated, plan: Generation) -> list[Text]:
        """Generate the texts, in the order of the requests.

        The tokens of a text that lm-eval generates are counted by encoding it; it does not tell them.

        Args:
            generated: The requests.
            plan: Their plan.

        Raises:
            MemoryError, RuntimeError: If memory runs out although no rows are left to do without.
        """
        if plan.prompts and self._decodes is None:
            with torch.inference_mode():
                self._decodes = self._decoder.is_right(plan.prompts[0].tokens)
        if plan.prompts and self._decodes and self._slides is None and self._outgrows_window(plan):
            self._slides = self._decodes = self._may_slide(plan.prompts[0].tokens)
        is_ours = [number is not None and bool(self._decodes) for number in plan.prompt_of]
        texts: dict[int, Text] = {}
        if any(is_ours):
            self._decode(plan, texts)
        others = [(request, tokens) for (_, request, tokens), ours in zip(generated, is_ours, strict=True) if not ours]
        theirs = iter(self._by_lm_eval(others, plan.batch_size) if others else ())
        return [
            texts[cast(int, number)] if ours else next(theirs)
            for number, ours in zip(plan.prompt_of, is_ours, strict=True)
        ]

    def _decode(self, plan: Generation, texts: dict[int, Text]) -> None:
        while True:
            n_rows = min(plan.n_rows, self.n_most_rows)
            try:
                with torch.inference_mode(), quietly():
                    return self._decoder.decode(plan, n_rows, texts)
            except (MemoryError, RuntimeError) as exc:
                # without a row that is decoded, the pass over the prompts was too large
                if not is_out_of_memory(exc) or self._decoder.n_rows <= 1:
                    raise
            self._halve(self._decoder.n_rows)

    def _by_lm_eval(self, asked: Sequence[tuple[Request, Sequence[int]]], batch_size: int) -> list[Text]:
        if self._pads is None and batch_size > 1 and len(asked) > 1:
            self._pads = self._may_pad(asked[0][1])
        made = self._made_by_lm_eval([request for request, _ in asked], batch_size if self._pads else 1)
        texts = []
        for (request, tokens), text in zip(asked, made, strict=True):
            n_tokens = len(self._language.lm.tok_encode(text, add_special_tokens=False))
            _, n_most = cut_prompt(tokens, request, self._language.window)
            texts.append(Text(text, n_tokens, n_tokens >= n_most))
        return texts

    def _made_by_lm_eval(self, requests: list[Request], batch_size: int) -> list[str]:
        lm = self._language.lm
        devices = [self._device] if self._device.type == "cuda" else []
        while True:
            lm.batch_size_per_gpu = min(batch_size, self.n_most_rows)
            try:
                with quietly(), torch.random.fork_rng(devices=devices):
                    torch.manual_seed(GENERATION_SEED)
                    return cast("list[str]", lm.generate_until(requests, disable_tqdm=True))
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc) or lm.batch_size_per_gpu <= 1:
                    raise
            self._halve(lm.batch_size_per_gpu)

    def _may_pad(self, tokens: Sequence[int]) -> bool:
        """Whether prompts that are padded to one length, as in lm-eval's batches, are continued as each alone.

        A configuration does not tell whether a model follows the mask that it is given.

        Args:
            tokens: Any tokens; at least one.
        """
        long = (list(tokens) * 2 * _PROBED)[: 2 * _PROBED]
        short = long[:_PROBED]
        padding = [self._language.lm.tokenizer.pad_token_id or 0] * _PROBED
        seen = [1] * len(long), [0] * _PROBED + [1] * _PROBED
        with quietly(), torch.inference_mode():
            together = self._first_logits([long, padding + short], seen)
            apart = [self._first_logits([part], [[1] * len(part)]) for part in (long, short)]
        return bool(self._forward.agree(together, torch.cat(apart, dim=1)))

    def _outgrows_window(self, plan: Generation) -> bool:
        """Whether a text may be longer, with its prompt, than what a layer of the model sees."""
        window = self._forward.window
        return window is not None and any(len(prompt.tokens) + prompt.n_most > window for prompt in plan.prompts)

    def _may_slide(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt is continued as by transformers, whose cache may drop what a layer of the model sees."""
        with quietly(), torch.inference_mode():
            ours = self._decoder.first_logits(tokens)
            theirs = self._first_logits([tokens], [[1] * len(tokens)])
        return bool(self._forward.agree(ours, theirs))

    def _first_logits(self, prompts: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the first two tokens that transformers generates, ``[2, len(prompts), vocabulary]``."""
        made = self._language.lm.model.generate(
            input_ids=torch.tensor(prompts, device=self._device),
            attention_mask=torch.tensor(seen, device=self._device),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(made.logits).float()

    def _halve(self, n_rows: int) -> None:
        self.n_most_rows = max(1, n_rows // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
