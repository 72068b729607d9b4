"""What we rely on inside vLLM: a test that fails names the internal that changed, and what of ours depends on it.

The tests marked ``vllm`` need vLLM; ``tests/evaluation/test_vllm.py`` runs it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from optuna_merge.evaluation.engines.next_tokens import MAX_TOKENS
from optuna_merge.evaluation.engines.vllm_worker import WeightsWorker
from optuna_merge.internals import vllm as internals


def changed(internal: str, user: str) -> str:
    vllm = importlib.import_module("vllm")
    return f"vLLM {vllm.__version__} changed {internal}, which {user} depends on"


def code_of(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text()


def test_importing_it_does_not_import_vllm() -> None:
    code = "import sys, optuna_merge.internals.vllm; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_instance_that_is_dead_already_is_shut_down_in_silence() -> None:
    internals.shut_down(None, 0.1)


def test_threads_that_vllm_leaves_are_waited_for() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="MPClientEngineMonitor", daemon=True)
    thread.start()
    internals.join_threads(0.01)
    assert thread.is_alive()
    release.set()
    internals.join_threads(5)
    assert not thread.is_alive()


def test_kv_caches_that_are_tensors_are_zeroed() -> None:
    cache = torch.full((2,), torch.nan)
    internals.zero_kv_caches(SimpleNamespace(model_runner=SimpleNamespace(kv_caches=[cache, None])))
    assert cache.tolist() == [0, 0]


@pytest.mark.vllm
class TestInternals:
    def test_the_options_of_llm(self) -> None:
        ours = {
            "block_size",
            "disable_log_stats",
            "dtype",
            "enable_prefix_caching",
            "enforce_eager",
            "load_format",
            "max_logprobs",
            "max_model_len",
            "max_num_batched_tokens",
            "model",
            "seed",
            "trust_remote_code",
            "worker_extension_cls",
        }
        assert ours <= internals.option_names(), changed("the options of LLM", "VLLMInstance.start")

    def test_the_quantizations_that_options_name(self) -> None:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        assert {"fp8", "mxfp4"} <= set(QUANTIZATION_METHODS), changed("quantization", "--load-in-8bit, --load-in-4bit")

    def test_the_methods_of_llm(self) -> None:
        from vllm import LLM

        assert {"method", "args"} <= inspect.signature(LLM.collective_rpc).parameters.keys(), changed(
            "LLM.collective_rpc", "VLLMInstance.load"
        )
        assert hasattr(LLM, "reset_prefix_cache"), changed("LLM.reset_prefix_cache", "VLLMInstance.forget_prefixes")

    def test_sampling_parameters(self) -> None:
        from vllm import SamplingParams, sampling_params

        parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprob_token_ids=[3, 5])
        assert parameters.logprob_token_ids == [3, 5], changed("SamplingParams.logprob_token_ids", "answer_plan")
        assert sampling_params.MAX_LOGPROB_TOKEN_IDS >= MAX_TOKENS, changed(
            "MAX_LOGPROB_TOKEN_IDS", "next_tokens, which asks for so many at once,"
        )

    def test_the_engine_core_shuts_down(self) -> None:
        from vllm.v1.engine.core_client import EngineCoreClient

        message = changed("EngineCoreClient.shutdown", "shut_down, which ends vLLM's processes,")
        assert "timeout" in inspect.signature(EngineCoreClient.shutdown).parameters, message
        assert "self.engine_core" in code_of("vllm.v1.engine.llm_engine"), message

    def test_the_names_of_its_threads(self) -> None:
        names = re.findall(r'Thread\(.*?name="(\w+)"', code_of("vllm.v1.engine.core_client"), flags=re.DOTALL)
        message = changed("the names of its threads", "join_threads, which waits for them before Python ends,")
        assert names, message
        assert all(name.startswith(internals.THREADS) for name in names), f"{message}: {names}"

    def test_memory_of_this_process_is_freed(self) -> None:
        from vllm.distributed import parallel_state

        assert callable(parallel_state.cleanup_dist_env_and_memory), changed(
            "parallel_state.cleanup_dist_env_and_memory", "free_this_process"
        )

    def test_workers_reload_their_model(self) -> None:
        from vllm.v1.worker.cpu_worker import CPUWorker
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
        from vllm.v1.worker.gpu_worker import Worker

        message = changed("Worker.reload_weights", "reload_weights, which streams a merge into the model,")
        assert issubclass(CPUWorker, Worker), message
        assert hasattr(Worker, "reload_weights"), message
        assert "weights_iterator" in inspect.signature(GPUModelRunner.reload_weights).parameters, message
        assert hasattr(GPUModelRunner, "get_model"), changed("GPUModelRunner.get_model", "model_of")
        assert "self.kv_caches" in inspect.getsource(GPUModelRunner.__init__), changed(
            "GPUModelRunner.kv_caches", "zero_kv_caches, which keeps a NaN from the next merge,"
        )

    def test_our_methods_hide_none_of_a_worker(self) -> None:
        from vllm.v1.worker.cpu_worker import CPUWorker

        ours = {name for name in vars(WeightsWorker) if not name.startswith("__")}
        theirs = {name for owner in CPUWorker.__mro__ if owner is not WeightsWorker for name in vars(owner)}
        assert not ours & theirs, changed("the attributes of a worker", "WeightsWorker")

    def test_a_torn_reload_is_finished(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, layerwise

        message = changed("finalize_layerwise_reload", "reload_weights, which recovers from a refused merge,")
        assert callable(finalize_layerwise_reload), message
        assert list(inspect.signature(layerwise.finalize_layerwise_processing).parameters) == [
            "model",
            "model_config",
        ], message
        assert layerwise.logger.name == internals.RELOAD_LOGGER, changed("the name of its logger", "reload_weights")

    def test_a_head_is_packed_again(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

        message = changed("ParallelLMHead", "reload_weights, which packs a tied output layer on a CPU,")
        assert issubclass(ParallelLMHead, nn.Module), message
        assert hasattr(UnquantizedEmbeddingMethod, "process_weights_after_loading"), message

    def test_experts_keep_a_kernel(self) -> None:
        from vllm.model_executor.layers.fused_moe import fused_moe_method_base

        message = changed("FusedMoEMethodBase.moe_kernel", "reload_weights, which drops packed experts on a CPU,")
        assert "self.moe_kernel" in inspect.getsource(fused_moe_method_base), message

    def test_packed_experts_are_dropped(self) -> None:
        method: Any = SimpleNamespace(moe_kernel=object())
        module: Any = nn.Module()
        module.quant_method = method
        internals._forget_packed_experts(module)
        assert method.moe_kernel is None
