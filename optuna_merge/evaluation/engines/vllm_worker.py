"""What runs inside vLLM's workers: tensors from a source, checked, into the model that is resident there.

The worker is told where its tensors come from by an import path and plain text, so that nothing but text goes
between processes. It knows nothing of merging. Written for the V1 engine of vLLM 0.32.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optuna_merge import errors
from optuna_merge.errors import EngineError, NonFiniteMergeError, OptunaMergeError

Source = Callable[[str], Iterator[tuple[str, Tensor]]]
"""Makes the tensors that a request, which is plain text, asks for: each a new one that nothing else refers to."""

Answer = dict[str, Any]
"""What a worker says: ``n_tensors``, or ``error`` (a class of ours) and ``message``."""


class WeightsWorker:
    """Methods that vLLM adds to its workers (``worker_extension_cls``)."""

    model_runner: Any
    device: Any
    model_config: Any
    reload_weights: Callable[..., None]

    def load_from(self, factory: str, argument: str, request: str, shapes: str, study: int) -> Answer:
        """Overwrite the weights with what a source makes.

        The worker's part of a tensor-parallel model is filled; each worker makes all tensors itself.

        Args:
            factory: ``module:function``; called once with ``argument`` and the device, it returns a source.
            argument: For the factory.
            request: For the source.
            shapes: JSON: name of every tensor that must come to its shape.
            study: Process that the worker must not outlive.
        """
        if not self.__dict__.setdefault("_weights_watched", False):
            self.__dict__["_weights_watched"] = True
            _die_with(study)
        try:
            stream = self._source(factory, argument)(request)
            expected = {name: tuple(shape) for name, shape in json.loads(shapes).items()}
            return {"n_tensors": self._reload(checked(stream, expected, self.model_config.dtype))}
        except OptunaMergeError as exc:
            return {"error": type(exc).__name__, "message": str(exc)}

    def process_id(self) -> int:
        """Of the worker."""
        return os.getpid()

    def _source(self, factory: str, argument: str) -> Source:
        opened: dict[tuple[str, str], Source] = self.__dict__.setdefault("_weights_sources", {})
        if (factory, argument) not in opened:
            opened.clear()
            module, _, function = factory.partition(":")
            opened[factory, argument] = getattr(importlib.import_module(module), function)(argument, str(self.device))
        return opened[factory, argument]

    def _reload(self, stream: Iterator[tuple[str, Tensor]]) -> int:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        on_cpu = torch.device(self.device).type == "cpu"
        if on_cpu:
            _forget_packed_experts(model)
        if self.model_config.quantization is None:
            # at each load it warns of layers that only have buffers; of weights, _check_loaded says it
            logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        counted = _Counted(stream)
        with torch.no_grad(), _Recorded(model) as loaded:
            try:
                self.reload_weights(weights_iterator=counted)
            except BaseException:
                # otherwise the model stays between two loads, and the next one does too
                finalize_layerwise_reload(model, self.model_config)
                raise
        _check_loaded(model, loaded.names, self.model_config.quantization)
        if on_cpu:
            _pack_heads_again(model)
        for cache in self.model_runner.kv_caches:
            # a NaN left there outlives the prompt that made it: masked attention multiplies it by 0
            if isinstance(cache, Tensor):
                cache.zero_()
        return counted.n


def open_folder(argument: str, device: str) -> Source:
    """A source that reads a folder of safetensors files; the request is the folder's path."""

    def stream(folder: str) -> Iterator[tuple[str, Tensor]]:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    # a copy: what safetensors returns is a live map of the file
                    yield name, file.get_tensor(name).to(device, copy=True)

    return stream


def checked(
    stream: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on that may reach an engine, in its dtype.

    Args:
        stream: Names and tensors.
        shapes: Every tensor that must come.
        dtype: Of the engine.

    Raises:
        NonFiniteMergeError: If a tensor holds NaN or infinity after rounding; it is not passed on.
        EngineError: If a tensor is unknown, repeated, of another shape or missing; names it.
    """
    missing = dict.fromkeys(shapes)
    for name, tensor in stream:
        if name not in missing:
            rule = "be delivered once, came twice" if name in shapes else "be in the checkpoint, is not"
            raise EngineError(f"{name}: must {rule}; correct the merge")
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(
                f"{name}: shape must be {list(shapes[name])}, got {list(tensor.shape)}; correct the merge"
            )
        del missing[name]
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if not is_finite(tensor):
                raise NonFiniteMergeError(f"{name}: must be finite, got NaN or infinity; this merge cannot be scored")
        yield name, tensor
    if missing:
        raise EngineError(
            f"{next(iter(missing))}: must be delivered, got nothing ({len(missing)} missing); correct the merge"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of a floating dtype holds neither NaN nor infinity."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    # NaN fails every comparison
    return bool((low > -torch.inf) & (high < torch.inf))


def raise_first(answers: Iterable[Answer]) -> None:
    """Raise what a worker refused for, as the error of ours that it was."""
    for answer in answers:
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])


class _Counted:
    def __init__(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        self._stream = stream
        self.n = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self._stream:
            self.n += 1
            yield pair


class _Recorded:
    """Keeps which parameters the model says it loaded, while the context is open."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.names: set[str] | None = None

    def __enter__(self) -> _Recorded:
        original = self._model.load_weights

        def load_weights(*args: Any, **kwargs: Any) -> Any:
            self.names = original(*args, **kwargs)
            return self.names

        self._model.load_weights = load_weights
        return self

    def __exit__(self, *exc: object) -> None:
        del self._model.load_weights


def _die_with(study: int) -> None:
    """End this worker, and vLLM's process between it and the study, once the study is gone.

    vLLM stays when the process that started it is killed, and with it the memory that the next start needs.
    """
    parent = os.getppid()
    if os.getpid() == study or study not in (parent, _parent_of(parent)):
        return

    def watch() -> None:
        while os.getppid() == parent and (parent == study or _parent_of(parent) == study):
            time.sleep(0.5)
        if parent != study and os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="study-watch").start()


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _check_loaded(model: Any, loaded: set[str] | None, quantization: str | None) -> None:
    """What vLLM checks when it loads from a folder, and only logs when it reloads."""
    if loaded is None or quantization is not None:
        return
    if lacking := sorted({name for name, _ in model.named_parameters()} - loaded):
        raise EngineError(
            f"{lacking[0]}: the checkpoint must hold every weight of vLLM's {type(model).__name__}, it lacks"
            f" {len(lacking)}; use engine.backend: hf"
        )


def _forget_packed_experts(model: Any) -> None:
    """On a CPU the experts' kernel keeps weights of its own, which a reload would leave as they were."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_heads_again(model: Any) -> None:
    """On a CPU an output layer multiplies by a packed copy; a tied one is not among the layers that are reloaded."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
