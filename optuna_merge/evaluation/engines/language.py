"""Requests as tokens: text is encoded, paired and cut to a model's window as lm-eval does it for a Hugging Face model.

All engines tokenize here, so that a request is the same tokens for each of them. Knows nothing of weights: the model
that lm-eval wants to see may lie on the ``meta`` device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from optuna_merge.errors import EngineError, first_line
from optuna_merge.evaluation.engine import Request, Response
from optuna_merge.evaluation.engines.batches import Item
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.internals.lm_eval import encode_pair, get_rolling_token_windows, make_disjoint_window


@dataclass(frozen=True)
class Encoded:
    """Requests as tokens.

    Attributes:
        n_requests: Number of requests.
        items: What is scored.
        scored: For each scored request: its index, the indices of its items, and whether it is a rolling one, whose
            items are summed.
        generated: For each request answered by text: its index, the request, and the tokens of its context, not cut.
        longest: Tokens in the longest input sequence.
    """

    n_requests: int
    items: list[Item]
    scored: list[tuple[int, list[int], bool]]
    generated: list[tuple[int, Request, list[int]]]
    longest: int

    def responses(self, answers: Sequence[tuple[float, bool]], texts: Sequence[str]) -> list[Response]:
        """Responses to the requests, in their order.

        Args:
            answers: Log-probability of each item, and whether greedy decoding would give it.
            texts: Text for each of ``generated``.
        """
        responses: list[Response] = [0.0] * self.n_requests
        for index, items, rolling in self.scored:
            if rolling:
                responses[index] = float(sum(answers[item][0] for item in items))
            else:
                [responses[index]] = [answers[item] for item in items]
        for (index, _, _), text in zip(self.generated, texts, strict=True):
            responses[index] = text
        return responses


class Language:
    """The tokenizer of a model folder, as lm-eval uses it.

    Attributes:
        lm: lm-eval's model around the tokenizer.
        window: Tokens that one input may have.
        eot_text: Text of the end-of-sequence token.
    """

    def __init__(self, model: Any, folder: Path, *, trust_remote_code: bool) -> None:
        """Load the tokenizer.

        Args:
            model: A transformers model; only its configuration is read.
            folder: Holds the tokenizer.
            trust_remote_code: Run tokenizer code that the folder brings.

        Raises:
            EngineError: If there is no tokenizer, or it cannot be loaded.
        """
        self.lm = _language_model(model, folder, trust_remote_code)
        self.window: int = self.lm.max_length
        if self.window < 1:
            raise EngineError(
                f"{folder}: config.json must give a window of at least 1 token, got {self.window}; models without one"
                " cannot be scored"
            )
        self.eot_text = str(self.lm.tok_decode([self.lm.eot_token_id], skip_special_tokens=False))

    @property
    def name(self) -> str:
        """The tokenizer's name, as lm-eval spells it."""
        return cast(str, self.lm.tokenizer_name)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.lm.tokenizer, "chat_template", None) is not None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt, as lm-eval does."""
        return cast(str, self.lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))

    def encode(self, requests: Sequence[Request]) -> Encoded:
        """Turn requests into tokens; contexts are cut from the left to fit the window.

        Raises:
            EngineError: If a request has no tokens to score, or more of them than the window holds.
        """
        items: list[Item] = []
        scored: list[tuple[int, list[int], bool]] = []
        generated: list[tuple[int, Request, list[int]]] = []
        with quietly():
            for index, request in enumerate(requests):
                if request.request_type == "generate_until":
                    generated.append((index, request, self._prompt(request.args[0])))
                    continue
                pairs = self._pairs(request)
                rolling = request.request_type == "loglikelihood_rolling"
                scored.append((index, list(range(len(items), len(items) + len(pairs))), rolling))
                items.extend(self._item(*pair) for pair in pairs)
        longest = max(
            [
                *(len(tokens) for _, _, tokens in generated),
                *(len(item.context) + len(item.continuation) - 1 for item in items),
            ],
            default=0,
        )
        return Encoded(len(requests), items, scored, generated, longest)

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, as ``HFLM.tok_batch_encode`` makes them of one that is alone in its batch."""
        begin = getattr(self.lm.tokenizer, "bos_token", None)
        with_special = True if self.lm.add_bos_token is None else bool(self.lm.add_bos_token)
        if begin is not None and text.startswith(begin):
            with_special = False
        return cast("list[int]", self.lm.tok_encode(text, add_special_tokens=with_special))

    def _pairs(self, request: Request) -> list[tuple[list[int], list[int]]]:
        """Context and continuation tokens of a request, as ``HFLM.loglikelihood`` and ``loglikelihood_rolling``."""
        lm = self.lm
        if request.request_type == "loglikelihood_rolling":
            windows = get_rolling_token_windows(
                token_list=lm.tok_encode(request.args[0]),
                prefix_token=lm.prefix_token_id,
                max_seq_len=self.window,
                context_len=1,
            )
            return [make_disjoint_window(window) for window in windows]
        context, continuation = request.args[:2]
        if context != "":
            return [encode_pair(lm, context, continuation)]
        tokens = lm.tok_encode(continuation, add_special_tokens=False)
        if tokens and tokens[0] == lm.prefix_token_id:
            return [(tokens[:1], tokens[1:])]
        return [([lm.prefix_token_id], tokens)]

    def _item(self, context: list[int], continuation: list[int]) -> Item:
        if not continuation or not context:
            raise EngineError(
                f"request: context and continuation must have tokens, got {len(context)} and {len(continuation)}; "
                "correct the task's choices"
            )
        if len(continuation) > self.window:
            raise EngineError(
                f"request: continuation must fit the model's window of {self.window} tokens, "
                f"got {len(continuation)}; shorten the task's choices"
            )
        # cut from the left, as lm-eval does
        tokens = (context + continuation)[-(self.window + 1) :]
        n_context = len(tokens) - len(continuation)
        return Item(tuple(tokens[:n_context]), tuple(tokens[n_context:]))


class _CachingHFLM(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """Encodes a context once for all its continuations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoded = lru_cache(maxsize=256)(super().tok_encode)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self._encoded(string, add_special_tokens, **kwargs))


def _language_model(model: Any, folder: Path, trust_remote_code: bool) -> HFLM:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with quietly():
            return _CachingHFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=1)
    except (OSError, ValueError, ImportError, KeyError, AssertionError) as exc:
        if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.tiktoken")):
            raise EngineError(f"{folder}: must hold a tokenizer, found no file of one; copy it there") from exc
        raise EngineError(f"{folder}: the tokenizer cannot be loaded: {first_line(exc)}") from exc
