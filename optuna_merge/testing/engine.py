"""An engine with a known optimum, which needs no model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engine import Prepared, Request, Response, Text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FakePrepared:
    """Requests as :class:`FakeEngine` keeps them; it counts a character as a token."""

    requests: tuple[Request, ...]
    n_tokens: int
    longest: int
    n_padded: int = 0
    n_scored: int = 0
    n_cached: int = 0
    n_places: int = 0
    text_cost: float = 0.0

    @property
    def n_requests(self) -> int:
        """Number of responses."""
        return len(self.requests)

    @property
    def cost(self) -> float:
        """As ``n_tokens``: there is no forward pass."""
        return self.n_tokens


class FakeEngine:
    """An engine without a model: its skill is a known function of the weights, best at a known point.

    The skill is ``exp(-mean squared distance of the weights to the optimum)``, in (0, 1]. Each context has a difficulty
    in [0, 1), a hash of its text. The right continuation is more likely than any other if and only if the skill exceeds
    the difficulty. So over many documents whose right choice is :attr:`right`, accuracy equals the skill, a better
    merge passes every document that a worse one passes, and a search has a known optimum.

    Attributes:
        right: The continuation, or generated text, that is right for every context.
        n_loads: Number of completed loads.
        n_responses: Number of responses given.
    """

    dtype = "float32"
    device = "cpu"
    batch_tokens = 1
    tokenizer_name = "fake"
    has_chat_template = False
    eot_text = "</s>"

    def __init__(self, optimum: Mapping[str, Tensor], *, right: str = " right") -> None:
        self._optimum = {name: tensor.float() for name, tensor in optimum.items()}
        self._skill: float | None = None
        self.right = right
        self.n_loads = 0
        self.n_responses = 0

    @property
    def skill(self) -> float:
        """Skill of the weights that are loaded.

        Raises:
            EngineError: If no complete set of weights is loaded.
        """
        if self._skill is None:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        return self._skill

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse, because there is no template."""
        raise EngineError("engine: the tokenizer must have a chat template, got none; do not apply it")

    def resident(self, name: str) -> Tensor | None:
        """None: no tensor is resident."""
        return None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Measure the distance to the optimum; the stream is checked as by every engine."""
        self._skill = None
        distance = 0.0
        missing = dict.fromkeys(self._optimum)
        for name, tensor in tensors:
            if name not in missing:
                what = "be delivered once" if name in self._optimum else "be in the checkpoint"
                raise EngineError(f"{name}: must {what}; correct the merge")
            if tensor.shape != self._optimum[name].shape:
                shapes = f"{list(self._optimum[name].shape)}, got {list(tensor.shape)}"
                raise EngineError(f"{name}: shape must be {shapes}; correct the merge")
            if not tensor.isfinite().all():
                raise NonFiniteMergeError(f"{name}: must be finite, got NaN or infinity; this merge cannot be scored")
            distance += float((tensor.float().cpu() - self._optimum[name]).square().mean())
            del missing[name]
        if missing:
            raise EngineError(f"{next(iter(missing))}: must be delivered, got nothing; correct the merge")
        self._skill = math.exp(-distance / max(1, len(self._optimum)))
        self.n_loads += 1

    def expect(self, requests: Sequence[Request]) -> float:
        """Nothing; see ``Engine.expect``."""
        return 0.0

    def prepare(self, requests: Sequence[Request]) -> FakePrepared:
        """Keep the requests."""
        lengths = [sum(len(part) for part in request.args if isinstance(part, str)) for request in requests]
        return FakePrepared(tuple(requests), sum(lengths), max(lengths, default=0))

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer rightly wherever the skill exceeds the difficulty of the context."""
        assert isinstance(prepared, FakePrepared)
        skill = self.skill
        self.n_responses += prepared.n_requests
        return [self._answer(request, skill) for request in prepared.requests]

    def close(self) -> None:
        """Forget the weights."""
        self._skill = None

    def _answer(self, request: Request, skill: float) -> Response:
        text = request.args[0]
        if request.request_type == "loglikelihood_rolling":
            return len(text) * (skill - 2.0)
        digest = hashlib.sha256(text.encode()).digest()
        surplus = skill - int.from_bytes(digest[:6], "big") / 2**48
        if request.request_type == "generate_until":
            text = self.right if surplus > 0 else ""
            return Text(text, len(text), is_cut=False)
        is_right = request.args[1] == self.right
        return (-1.0 + surplus if is_right else -1.0), is_right == (surplus > 0)
