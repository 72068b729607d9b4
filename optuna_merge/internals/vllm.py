"""vLLM's internals that we use, as of the V1 engine of vLLM 0.32; no other file reaches past its public interface.

Public, and used directly elsewhere: ``LLM`` with ``generate``, ``collective_rpc``, ``reset_prefix_cache`` and its
option ``worker_extension_cls``, ``SamplingParams``, and the environment variables. ``tests/internals/test_vllm.py``
names what broke when vLLM changes. Importing this file does not import vLLM.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"
THREADS = ("MPClient", "EngineCore")
"""How the names begin of the threads that vLLM leaves in the process that started it."""


def option_names() -> set[str]:
    """Names of the options that vLLM's ``LLM`` takes."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    names = {*inspect.signature(EngineArgs).parameters, *inspect.signature(LLM.__init__).parameters}
    return names - {"self", "kwargs"}


def shut_down(llm: Any, timeout_s: float) -> None:
    """End the processes of an ``LLM``, which may be dead already."""
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown(timeout=timeout_s)


def join_threads(timeout_s: float) -> None:
    """Wait for the threads that vLLM leaves; one still at work when the interpreter ends can abort the process."""
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(timeout_s)


def free_this_process() -> None:
    """Free what an ``LLM`` that ran in this process leaves behind: process groups and memory."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def model_of(worker: Any) -> Any:
    """The model that is resident in a worker."""
    return worker.model_runner.get_model()


def reload_weights(worker: Any, stream: Iterable[tuple[str, Tensor]]) -> set[str] | None:
    """Stream tensors of a checkpoint into a worker's resident model.

    If the stream raises, the model is left with some of the new weights, ready for the next load.

    Returns:
        Names of the parameters that the model says it loaded; None if it does not say.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    model = model_of(worker)
    on_cpu = torch.device(worker.device).type == "cpu"
    if on_cpu:
        _forget_packed_experts(model)
    if worker.model_config.quantization is None:
        # it warns at each load of layers that have only buffers; a weight that is not loaded, our caller refuses
        logging.getLogger(RELOAD_LOGGER).setLevel(logging.ERROR)
    with torch.no_grad(), _recorded_loads(model) as loads:
        try:
            worker.reload_weights(weights_iterator=stream)
        except BaseException:
            # otherwise the model stays in the middle of this load, and the next one fails too
            finalize_layerwise_reload(model, worker.model_config)
            raise
    if on_cpu:
        _pack_heads_again(model)
    return loads[-1] if loads else None


def zero_kv_caches(worker: Any) -> None:
    """Zero a worker's KV caches.

    A NaN in them outlives the prompt that made it: attention multiplies what it masks by 0, and NaN stays NaN.
    """
    for cache in worker.model_runner.kv_caches:
        if isinstance(cache, Tensor):
            cache.zero_()


@contextlib.contextmanager
def _recorded_loads(model: Any) -> Iterator[list[set[str] | None]]:
    """Collect what each call of ``model.load_weights`` says that it loaded, while the context is open."""
    original = model.load_weights
    loads: list[set[str] | None] = []

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        loads.append(original(*args, **kwargs))
        return loads[-1]

    model.load_weights = load_weights
    try:
        yield loads
    finally:
        del model.load_weights


def _forget_packed_experts(model: Any) -> None:
    """On a CPU the experts' kernel keeps its own copy of the weights, which a reload would leave as it was."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_heads_again(model: Any) -> None:
    """On a CPU an output layer multiplies by a packed copy; a reload leaves out the copy of a tied output layer."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
