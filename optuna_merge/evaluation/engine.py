"""The seam between scoring and the libraries that run a model.

An engine holds one model of a fixed shape, overwrites its weights in place and answers requests. It knows nothing
of eval tasks, metrics or merging: a request is lm-eval's plain data, and a response is what lm-eval's own ``LM``
returns for it.

    load_weights(stream)  ->  respond(prepared)  ->  load_weights(stream)  ->  respond(prepared)  -> ...

``prepare`` does once everything that does not depend on weights. Importing this file imports neither torch nor lm-eval;
the engines are in ``engines/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["DifferentiableEngine", "Engine", "Goal", "MakingEngine", "Prepared", "Request", "Response", "Sink", "Text"]

Sink = Callable[[str, "Tensor"], None]
"""Takes the gradient of one tensor; see :meth:`DifferentiableEngine.respond_with_gradient`."""

Response = tuple[float, bool] | float | str
"""The answer to a request, by its kind.

``loglikelihood``: natural log-probability of the continuation, and whether greedy decoding would give it;
``loglikelihood_rolling``: natural log-probability of the whole text; ``generate_until``: the generated text, as a
:class:`Text` if the engine knows how it ended.
"""


class Text(str):
    """A generated text, and how it came about.

    Attributes:
        n_tokens: Tokens that the model generated for it, including those that ended it and are not part of the text.
        is_cut: Whether it ended only because it might have no more tokens.
    """

    n_tokens: int
    is_cut: bool

    def __new__(cls, text: str, n_tokens: int, is_cut: bool) -> Text:
        """Add to a text what is known about it."""
        made = super().__new__(cls, text)
        made.n_tokens, made.is_cut = n_tokens, is_cut
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles keep the attributes."""
        return Text, (str(self), self.n_tokens, self.is_cut)


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
    """Requests with all that an engine computed for them without the weights; opaque to everyone else.

    What follows ``longest`` is for planning memory and time; it is 0 for an engine that plans its own.

    Attributes:
        n_requests: Number of responses that :meth:`Engine.respond` will return.
        n_tokens: Tokens that go through the model to answer them, without padding and generated tokens.
        cost: The same with padding, plus the fixed cost of each forward pass and of the steps that generate text, in
            tokens; texts are taken to be as long as they may be.
        longest: Tokens in the longest input sequence.
        n_padded: Most tokens in one forward pass, padding included.
        n_scored: Most places in one forward pass whose logits are held.
        n_cached: Most tokens whose keys and values are held at once to generate text.
        n_places: Places whose logits are computed to score continuations, over all forward passes.
        text_cost: The part of ``cost`` that goes into generating texts.
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

    @property
    def n_places(self) -> int: ...  # noqa: D102

    @property
    def text_cost(self) -> float: ...  # noqa: D102


class Engine(Protocol):
    """One resident model whose weights change and whose shape does not.

    Attributes:
        dtype: The resident weights' dtype: ``float32``, ``float16`` or ``bfloat16``.
        device: Where they live: ``cpu`` or ``cuda:<i>``; ``meta`` for an engine without weights, which prepares
            requests but answers none.
        batch_tokens: Padded tokens that fill one forward pass; fewer leave the device partly idle.
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
            add_generation_prompt: Whether the prompt ends with the start of the assistant's turn; if not, the last
                message is left open.
        """
        ...

    def resident(self, name: str) -> Tensor | None:
        """The tensor that the checkpoint tensor ``name`` is loaded into; a merge may be written into it directly.

        Returns:
            The resident tensor itself, in the engine's dtype and on its device; None if there is no such tensor
            (another process owns it, or several checkpoint tensors are fused into one). Whoever writes into it must
            still deliver it through :meth:`load_weights`, in the same load.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the model's weights in place.

        The stream is consumed one tensor at a time and no tensor is kept. The engine refuses to score until a load
        succeeds, and again after a load that fails, until the next one succeeds.

        Args:
            tensors: Every tensor of the checkpoint once, in any order, with the checkpoint's names and shapes, of any
                float dtype, on any device; each is rounded once to ``dtype``. A tensor that :meth:`resident` returned
                is only checked.

        Raises:
            NonFiniteMergeError: If a tensor holds NaN or infinity after rounding; names it.
            EngineError: If a tensor is unknown, missing, repeated or of another shape; names it.
        """
        ...

    def expect(self, requests: Sequence[Request]) -> float:
        """Say which requests will be prepared, so that what many of them begin with need be computed only once.

        Responses do not depend on it. Call it before :meth:`prepare`; a second call replaces the first.

        Args:
            requests: All requests of a study.

        Returns:
            What computing it costs for each load of weights, in tokens, as ``Prepared.cost``.

        Raises:
            EngineError: As :meth:`prepare`.
        """
        ...

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Do everything that does not depend on weights: tokenizing, grouping by context, planning batches.

        Args:
            requests: Requests of any kinds, mixed in any way.

        Raises:
            EngineError: If a request cannot be answered by this model, such as a continuation longer than its window.
        """
        ...

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer prepared requests with the weights that are loaded.

        Equal weights give equal responses, no matter what was asked before.

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


class Goal(Protocol):
    """A differentiable function of log-likelihoods; ``expected.py`` has the one that a search climbs.

    Attributes:
        together: Numbers of the requests whose log-likelihoods must all be known to differentiate by one of them. Each
            request is in one of these groups at most; one that is in none has no influence.
    """

    @property
    def together(self) -> Sequence[Sequence[int]]: ...  # noqa: D102

    def gradient(self, log_likelihoods: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Derivatives by each log-likelihood.

        Args:
            log_likelihoods: One for each request, float64, ``[n_requests]``; NaN where it is not known yet.

        Returns:
            Float64, ``[n_requests]``; exact for each group that is known.
        """
        ...


class DifferentiableEngine(Engine, Protocol):
    """An engine that also says how log-likelihoods change with the weights."""

    def respond_with_gradient(self, prepared: Prepared, goal: Goal, sink: Sink) -> list[Response]:
        """Answer prepared requests, and differentiate a function of their log-likelihoods by every tensor.

        No gradient of the whole model is ever held: each tensor's is handed out and freed as soon as it is complete.
        So a tensor comes once for each batch of requests, in no particular order, and the sum of what came is its
        gradient. A tensor that never comes has a gradient of zero.

        Args:
            prepared: What :meth:`prepare` of this engine returned; none of them is answered by text,
                which has no log-likelihood.
            goal: The function.
            sink: Called with a tensor's name, as in :meth:`load_weights`, and a gradient of that tensor's shape, valid
                only during the call. A tied tensor comes under the name under which it is loaded.

        Returns:
            What :meth:`respond` returns, up to rounding.

        Raises:
            EngineError: As :meth:`respond`, and if a request is answered by text. What ``sink`` raises ends the pass.
        """
        ...


class MakingEngine(Engine, Protocol):
    """An engine whose workers make the tensors themselves, in the processes that hold the weights."""

    def load_made(self, request: str) -> None:
        """Overwrite the weights with tensors that the workers make of a request; see :meth:`Engine.load_weights`.

        Args:
            request: Plain text that says what to make.

        Raises:
            EngineDiedError: If the engine dies during the load, is started again and dies again.
        """
        ...
