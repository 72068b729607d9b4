"""The section ``engine``: what runs the merged model.

Knows the options and which of them may change a score; does not know which devices there are.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from optuna_merge.config.section import OpenSection, Section

_VLLM_RESOURCES = frozenset(
    """
    block_size distributed_executor_backend enforce_eager gpu_memory_utilization in_process kv_cache_memory_bytes
    max_model_len max_num_batched_tokens max_num_seqs tensor_parallel_size
    """.split()
)
"""Options of vLLM that affect memory and speed only."""


class VLLMConfig(OpenSection):
    """Options of vLLM. Every other key is an argument of vLLM's ``LLM`` class.

    Attributes:
        gpu_memory_utilization: Fraction of a GPU's memory that vLLM takes; None: all that merging leaves free.
        max_model_len: Tokens in a prompt and its answer together; None: as many as the study's tasks need.
        tensor_parallel_size: GPUs that share the model.
        max_num_batched_tokens: Tokens computed in one batch; None: 8192, on a CPU 2048.
        enforce_eager: Run without CUDA graphs; None: without, unless a task generates text.
        quantization: How weights are quantized while they are scored, such as ``fp8``; None: not at all.
        kv_cache_memory_bytes: Size of the KV cache; None: the memory that is left, on a CPU 1 GiB.
        in_process: Run vLLM in this process instead of a separate one.
    """

    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    max_model_len: int | None = Field(None, ge=1)
    tensor_parallel_size: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    enforce_eager: bool | None = None
    quantization: str | None = None
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    in_process: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All options that the study file gives."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    @property
    def deciding(self) -> dict[str, Any]:
        """The given options that may change a score, and not only memory or speed."""
        return {name: value for name, value in sorted(self.options.items()) if name not in _VLLM_RESOURCES}


class EngineConfig(Section):
    """What runs the merged model and answers the eval tasks' requests.

    Attributes:
        backend: ``hf`` (transformers) or ``vllm``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        merge_device: Where tensors are merged; ``auto``: on ``device``.
        sources: Where the sources are kept: ``gpu``, ``host`` memory or ``disk``; ``auto``: the first of these that
            they fit into, or ``disk`` if tensors are merged on the CPU.
        dtype: Of the merged model, while it is scored and when it is exported; ``auto``: the base model's.
        batch_size: Sequences in one forward pass, if all are as long as the longest; ``auto``: by memory.
        trust_remote_code: Run Python code that comes in a model folder.
        vllm: Options of vLLM.
    """

    backend: Literal["hf", "vllm"] = "hf"
    device: str = "auto"
    merge_device: str = "auto"
    sources: Literal["auto", "gpu", "host", "disk"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    trust_remote_code: bool = False
    vllm: VLLMConfig = VLLMConfig()

    @field_validator("device", "merge_device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("auto, cpu, cuda or cuda:<index>")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_size(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError("auto or a whole number of at least 1")
        return value
