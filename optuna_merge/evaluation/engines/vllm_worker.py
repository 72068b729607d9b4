"""The code that runs inside vLLM's workers: it makes tensors, checks them, and loads them into the resident model.

A worker is told what makes its tensors by an import path and plain text, so that only text goes between processes. It
knows nothing of merging.
"""

from __future__ import annotations

import importlib
import json
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
from optuna_merge.internals.vllm import model_of, reload_weights, zero_kv_caches

TensorMaker = Callable[[str], Iterator[tuple[str, Tensor]]]
"""Makes the tensors that a request, plain text, asks for; each is new, and nothing else refers to it."""

Answer = dict[str, str]
"""A worker's answer: empty if all went well, else ``error`` (the class name of one of our errors) and ``message``."""


class WeightsWorker:
    """Methods that vLLM adds to its workers (``worker_extension_cls``)."""

    device: Any
    model_config: Any

    def load_from(self, factory: str, argument: str, request: str, shapes: str, study: int) -> Answer:
        """Overwrite the weights with tensors that are made here.

        Of a tensor-parallel model each worker holds a part; each makes all tensors and keeps its part.

        Args:
            factory: ``module:function``; called once with ``argument`` and the device, it returns a tensor maker.
            argument: For the factory.
            request: For the tensor maker.
            shapes: JSON: name of each tensor that must come to its shape.
            study: Process id of the study, which the worker must not outlive.
        """
        if not self.__dict__.setdefault("_weights_watched", False):
            self.__dict__["_weights_watched"] = True
            _die_with(study)
        try:
            stream = self._tensor_maker(factory, argument)(request)
            expected = {name: tuple(shape) for name, shape in json.loads(shapes).items()}
            self._reload(checked(stream, expected, self.model_config.dtype))
        except OptunaMergeError as exc:
            return {"error": type(exc).__name__, "message": str(exc)}
        return {}

    def process_id(self) -> int:
        """Process id of this worker."""
        return os.getpid()

    def _tensor_maker(self, factory: str, argument: str) -> TensorMaker:
        opened: dict[tuple[str, str], TensorMaker] = self.__dict__.setdefault("_weights_makers", {})
        if (factory, argument) not in opened:
            opened.clear()
            module, _, function = factory.partition(":")
            opened[factory, argument] = getattr(importlib.import_module(module), function)(argument, str(self.device))
        return opened[factory, argument]

    def _reload(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        loaded = reload_weights(self, stream)
        _check_loaded(model_of(self), loaded, self.model_config.quantization)
        zero_kv_caches(self)


def open_folder(argument: str, device: str) -> TensorMaker:
    """A factory: what it returns reads a folder of safetensors files; the request is the folder's path."""

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
    """Pass on the tensors that may reach an engine, in its dtype.

    Args:
        stream: Names and tensors.
        shapes: Name of each tensor that must come to its shape.
        dtype: The engine's dtype.

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
    """Raise the first error among the workers' answers, as the class that it was there."""
    for answer in answers:
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])


def _die_with(study: int) -> None:
    """End this worker, and vLLM's process between it and the study, once the study is gone.

    vLLM keeps running when the process that started it is killed, and keeps the memory that the next start needs.
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
    """Refuse a checkpoint that lacks a weight; vLLM refuses one that it loads from a folder, but not at a reload."""
    if loaded is None or quantization is not None:
        return
    if lacking := sorted({name for name, _ in model.named_parameters()} - loaded):
        raise EngineError(
            f"{lacking[0]}: the checkpoint must hold every weight of vLLM's {type(model).__name__}, it lacks"
            f" {len(lacking)}; use engine.backend: hf"
        )
