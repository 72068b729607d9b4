"""The seam between scoring and the libraries that run a model.

An engine holds one model of a fixed shape, overwrites its weights in place and answers requests. It knows nothing
of eval tasks, of metrics or of merging: a request is lm-eval's plain data, a response is what lm-eval's own
``LM`` returns for it.

    load_weights(stream)  ->  respond(prepared)  ->  load_weights(stream)  ->  respond(prepared)  -> ...

``prepare`` does everything that does not depend on weights, once. This file imports neither torch nor lm-eval when
it is loaded; ``hf.py`` and ``vllm.py`` are the engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine", "MakingEngine", "Prepared", "Request", "Response"]

Response = tuple[float, bool] | float | str
"""What answers a request, by its kind.

``loglikelihood``: natural log-probability of the continuation, and whether greedy decoding would give it;
``loglikelihood_rolling``: natural log-probability of the whole text; ``generate_until``: the generated text.
"""


class Request(Protocol):
    """One question to the model; lm-eval's ``Instance`` is one.

    Attributes:
        request_type: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
        args: ``(context, continuation)``, ``(text,)`` or ``(context, generation kwargs)``, by kind.
    """

    @property
    def request_type(self) -> str: ...  # noqa: D102

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102


class Prepared(Protocol):
    """Requests with all that an engine computed for them ahead of the weights; opaque to everyone else.

    Attributes:
        n_requests: How many responses :meth:`Engine.respond` will return.
        n_tokens: Tokens that one pass puts through the model, padding and generated tokens not counted.
        cost: The same with padding, and with what each forward pass takes before its first token, in tokens.
        longest: Tokens in the longest input sequence.
        n_padded: Tokens of one forward pass at most, padding included; 0 for an engine that plans its own memory.
        n_scored: Places of one forward pass whose logits are held, at most; likewise.
        n_cached: Tokens whose keys and values are held at once to generate text; likewise.
    """

    @property
    def n_requests(self) -> int: ...  # noqa: D102

    @property
    def n_tokens(self) -> int: ...  # noqa: D102

    @property
    def cost(self) -> float: ...  # noqa: D102

    @property
    def longest(self) -> int: ...  # noqa: D102

    @property
    def n_padded(self) -> int: ...  # noqa: D102

    @property
    def n_scored(self) -> int: ...  # noqa: D102

    @property
    def n_cached(self) -> int: ...  # noqa: D102


class Engine(Protocol):
    """One resident model whose weights change and whose shape does not.

    Attributes:
        dtype: Of the resident weights: ``float32``, ``float16`` or ``bfloat16``.
        device: Where they live: ``cpu`` or ``cuda:<i>``; ``meta`` for an engine without weights, which prepares
            requests but answers none.
        batch_tokens: Padded tokens that fill one forward pass; fewer at once waste the device.
        tokenizer_name: As lm-eval names it.
        has_chat_template: Whether :meth:`apply_chat_template` works.
        eot_text: Text of the end-of-sequence token.
    """

    @property
    def dtype(self) -> str: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def batch_tokens(self) -> int: ...  # noqa: D102

    @property
    def tokenizer_name(self) -> str: ...  # noqa: D102

    @property
    def has_chat_template(self) -> bool: ...  # noqa: D102

    @property
    def eot_text(self) -> str: ...  # noqa: D102

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt.

        Args:
            chat_history: Messages with ``role`` and ``content``.
            add_generation_prompt: Whether the prompt ends where the assistant starts to speak; otherwise the last
                message is left open.
        """
        ...

    def resident(self, name: str) -> Tensor | None:
        """The tensor that the checkpoint tensor ``name`` is loaded into, for writing into it without a copy.

        Returns:
            The resident tensor itself, in the engine's dtype and on its device; None where there is no such tensor
            (another process owns it, or several checkpoint tensors are fused into one). Who writes into it must
            still deliver it through :meth:`load_weights`, in the same load.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the model's weights in place.

        The stream is consumed one tensor at a time and no tensor is kept. Until a load has gone through, and after
        one that has not, the engine refuses to score; the next full load makes it right again.

        Args:
            tensors: Every tensor of the checkpoint once, in any order, under its name there, in its shape, of any
                float dtype and device; rounded once to ``dtype``. A tensor that :meth:`resident` gave is only checked.

        Raises:
            NonFiniteMergeError: If a tensor holds NaN or infinity after rounding; names it.
            EngineError: If a tensor is unknown, missing, repeated or of another shape; names it.
        """
        ...

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Do everything that does not depend on weights: tokenizing, grouping by context, planning batches.

        Args:
            requests: Of any kinds, mixed.

        Raises:
            EngineError: If a request cannot be answered by this model, such as a continuation longer than its window.
        """
        ...

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer prepared requests with the weights that are loaded.

        Equal weights give equal responses, whatever was asked before.

        Args:
            prepared: What :meth:`prepare` of this engine returned.

        Returns:
            One response for each request, in their order.

        Raises:
            EngineError: If no complete set of weights is loaded, or a single sequence does not fit into memory.
        """
        ...

    def close(self) -> None:
        """Free the device's memory; nothing else may be called afterwards. Closing twice is harmless."""
        ...


class MakingEngine(Engine, Protocol):
    """An engine whose workers make the tensors themselves, where the weights are."""

    def load_made(self, request: str) -> None:
        """Overwrite the weights with what the workers' source makes of a request; as :meth:`Engine.load_weights`.

        Args:
            request: Plain text that the source understands.

        Raises:
            EngineDiedError: If the engine dies over it, is started again and dies again.
        """
        ...
