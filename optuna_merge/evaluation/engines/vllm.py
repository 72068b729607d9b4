"""The engine that runs a model with vLLM: started once, its weights overwritten by its own workers.

Text becomes tokens as for the transformers engine (``language.py``). Log-probabilities are asked for token by token
through the prefix cache (``next_tokens.py``, ``vllm_answers.py``); generation goes through vLLM's batching with
lm-eval's stop handling. ``vllm_instance.py`` starts and stops vLLM, ``vllm_worker.py`` runs in its workers. Importing
this file does not import vLLM.

Departure from lm-eval's vLLM model: the log-probabilities of a whole prompt are computed only where questions for the
next token would cost more. Inputs are cut where lm-eval's transformers model cuts them, not two tokens earlier.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.errors import EngineDiedError, EngineError
from optuna_merge.evaluation.engine import Prepared, Request, Response
from optuna_merge.evaluation.engines.generation import cut_prompt
from optuna_merge.evaluation.engines.hf_weights import ResidentModel
from optuna_merge.evaluation.engines.language import Encoded, Language
from optuna_merge.evaluation.engines.next_tokens import Plan, make_plan
from optuna_merge.evaluation.engines.vllm_answers import answer_plan, generate
from optuna_merge.evaluation.engines.vllm_instance import InstanceDiedError, VLLMInstance
from optuna_merge.evaluation.engines.vllm_worker import checked, open_folder, raise_first

_FOLDER_FACTORY = f"{open_folder.__module__}:{open_folder.__name__}"
_CPU_OPTIONS = {"max_num_batched_tokens": 2048, "block_size": 32}
_GPU_OPTIONS = {"max_num_batched_tokens": 8192, "block_size": 16}

_Result = TypeVar("_Result")


@dataclass
class VLLMPrepared:
    """Requests as questions to vLLM, and the length of sequences that they need; vLLM plans its own memory."""

    encoded: Encoded
    plan: Plan
    n_tokens: int
    needed_length: int
    n_padded: int = 0
    n_scored: int = 0
    n_cached: int = 0
    n_places: int = 0
    text_cost: float = 0.0

    @property
    def n_requests(self) -> int:
        """Number of responses."""
        return self.encoded.n_requests

    @property
    def cost(self) -> float:
        """As ``n_tokens``: vLLM packs its batches without padding."""
        return self.n_tokens

    @property
    def longest(self) -> int:
        """Tokens in the longest input sequence."""
        return self.encoded.longest


class VLLMEngine:
    """A vLLM engine that stays while its weights change; it starts when the first weights come.

    If vLLM dies, it is started again, loaded with the same weights and asked again. If it dies a second time between
    two loads, the engine gives up until the next load. If it dies before it has answered anything, the engine gives up
    at once.

    Attributes:
        dtype: The resident weights' dtype.
        device: The first worker's device.
        batch_tokens: Tokens that vLLM computes at once.
        tokenizer_name: As lm-eval names it.
        eot_text: Text of the end-of-sequence token.
    """

    def __init__(
        self,
        described: Callable[[], AbstractContextManager[Path]],
        *,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        weights_factory: tuple[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the tokenizer; vLLM is not looked for yet.

        Args:
            described: Opens a folder with ``config.json`` and tokenizer; weights there are not read.
            shapes: Name of each tensor of the checkpoint to its shape.
            dtype: ``float32``, ``float16`` or ``bfloat16``.
            weights_factory: For :meth:`load_made`: import path and argument of the factory that the workers call; see
                ``WeightsWorker.load_from``.
            options: Options of vLLM's ``LLM``, which override our defaults; ``in_process`` runs it in this process.
            trust_remote_code: Run model code that the folder brings.

        Raises:
            EngineError: If the tokenizer cannot be loaded, or an option is ours to set.
        """
        self.dtype = dtype
        self.device = "cuda:0" if torch.cuda.is_available() else "cpu"
        on_cpu = self.device == "cpu"
        given = {**(_CPU_OPTIONS if on_cpu else _GPU_OPTIONS), **(options or {})}
        self._instance = VLLMInstance(
            described, dtype=dtype, on_cpu=on_cpu, trust_remote_code=trust_remote_code, options=given
        )
        self.batch_tokens = int(given["max_num_batched_tokens"])
        self._block_size = int(given["block_size"])
        self._max_length: int | None = given.get("max_model_len")
        self._shapes = json.dumps({name: list(shape) for name, shape in shapes.items()})
        self._weights_factory = weights_factory
        self._language = _language(described, shapes, dtype, trust_remote_code)
        self.tokenizer_name = self._language.name
        self.eot_text = self._language.eot_text
        self._length = 1  # of the longest sequence that vLLM must take
        self._generates = False
        self._load_arguments: tuple[str, str, str] | None = None
        self._is_complete = False
        self._has_died = False
        self._has_answered = False
        self._spooled: TemporaryDirectory[str] | None = None

    @property
    def n_starts(self) -> int:
        """How often vLLM was started."""
        return self._instance.n_starts

    @property
    def n_computed(self) -> int:
        """Tokens of prompts that went through the model; those found in the prefix cache do not count."""
        return self._instance.n_computed

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._language.has_chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt, as lm-eval does."""
        return self._language.apply_chat_template(chat_history, add_generation_prompt)

    def resident(self, name: str) -> Tensor | None:
        """None: vLLM keeps weights in its workers, in shapes of its own."""
        return None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights; see ``Engine.load_weights``.

        The tensors go to the workers through files. :meth:`load_made` makes them in the workers instead.
        """
        self._is_complete = False
        self._spooled = TemporaryDirectory(prefix="optuna-merge-")
        shapes = {name: tuple(shape) for name, shape in json.loads(self._shapes).items()}
        for number, (name, tensor) in enumerate(checked(tensors, shapes, getattr(torch, self.dtype))):
            save_file({name: tensor.contiguous().cpu()}, Path(self._spooled.name) / f"{number:06}.safetensors")
        self._load((_FOLDER_FACTORY, "", self._spooled.name))

    def load_made(self, request: str) -> None:
        """Overwrite the weights with tensors that the workers make of a request.

        As with :meth:`load_weights`, the engine refuses to score until a load succeeds.

        Args:
            request: Plain text that the weights factory understands.

        Raises:
            NonFiniteMergeError: If a tensor holds NaN or infinity after rounding; names it.
            EngineError: If a tensor is unknown, missing, repeated or of another shape; names it.
            EngineDiedError: If vLLM dies twice during the load.
            OptunaMergeError: What the weights factory raises.
        """
        assert self._weights_factory is not None, "built without a weights factory"
        self._load((*self._weights_factory, request))

    def expect(self, requests: Sequence[Request]) -> float:
        """Nothing: vLLM finds by itself what prompts begin with, see ``Engine.expect``."""
        return 0.0

    def prepare(self, requests: Sequence[Request]) -> VLLMPrepared:
        """Tokenize requests and plan questions; see ``Engine.prepare``."""
        encoded = self._language.encode(requests)
        plan = make_plan(encoded.items, block_size=self._block_size)
        generated = [cut_prompt(tokens, request, self._language.window) for _, request, tokens in encoded.generated]
        needed = max(
            # vLLM counts the token that it is asked for, too
            [*(len(prompt) + 1 for prompt in plan.prompts), *(len(tokens) + n for tokens, n in generated)],
            default=1,
        )
        given = self._max_length
        if given is not None and needed > given:
            raise EngineError(
                f"engine.vllm.max_model_len must be at least {needed}, the longest prompt of the study's tasks and what"
                f" it generates, got {given}; raise it or leave it out"
            )
        self._length = max(self._length, needed if given is None else int(given))
        self._generates |= bool(generated)
        n_tokens = plan.n_tokens + sum(len(tokens) for tokens, _ in generated)
        return VLLMPrepared(encoded, plan, n_tokens, needed)

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer prepared requests; see ``Engine.respond``.

        Raises:
            EngineDiedError: If vLLM dies a second time since the last load.
        """
        assert isinstance(prepared, VLLMPrepared)
        if not self._is_complete:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        responses = self._surviving(lambda: self._respond(prepared))
        self._has_answered = True
        return responses

    def worker_process_ids(self) -> list[int]:
        """Process ids of the workers, the first worker's first; starts vLLM if it does not run."""
        self._start()
        return self._instance.worker_process_ids()

    def close(self) -> None:
        """Stop vLLM."""
        self._instance.stop()
        self._is_complete = False
        self._spooled = None

    def _load(self, arguments: tuple[str, str, str]) -> None:
        self._is_complete, self._has_died, self._load_arguments = False, False, arguments
        self._surviving(self._load_again)
        self._is_complete = True

    def _load_again(self) -> None:
        assert self._load_arguments is not None
        self._start()
        raise_first(self._instance.load(*self._load_arguments, self._shapes))

    def _start(self) -> None:
        self._instance.start(self._length, window=self._language.window, generates=self._generates)

    def _surviving(self, call: Callable[[], _Result]) -> _Result:
        """Return what ``call`` returns; if vLLM dies meanwhile, start and load it again and repeat the call once."""
        while True:
            try:
                if self._is_complete and not self._instance.holds(self._length):
                    self._load_again()
                return call()
            except InstanceDiedError as exc:
                self._instance.stop()
                if not self._has_answered:
                    self._is_complete = False
                    raise EngineError(f"engine: vLLM cannot run this model: {exc}; see its log above") from exc
                if self._has_died:
                    self._is_complete = False
                    raise EngineDiedError(
                        f"engine: vLLM must live through a trial, died twice over one: {exc}; see its log above"
                    ) from exc
                self._has_died = True

    def _respond(self, prepared: VLLMPrepared) -> list[Response]:
        # a cached prefix was computed with the weights before; and what is cached depends on what was asked before
        self._instance.forget_prefixes()
        encoded = prepared.encoded
        answers = answer_plan(self._instance, prepared.plan)
        if not encoded.generated:
            return encoded.responses(answers, [])
        texts = generate(self._instance, encoded, window=self._language.window, eos=self.eot_text)
        return encoded.responses(answers, texts)


def _language(
    described: Callable[[], AbstractContextManager[Path]],
    names: Iterable[str],
    dtype: str,
    trust_remote_code: bool,
) -> Language:
    with described() as folder:
        model = ResidentModel(
            folder,
            dtype=getattr(torch, dtype),
            device=torch.device("meta"),
            names=names,
            trust_remote_code=trust_remote_code,
        ).model
        return Language(model, folder, trust_remote_code=trust_remote_code)
