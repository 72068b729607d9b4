"""The vLLM engine: what can be tested without vLLM, and, marked ``vllm``, what its CPU build does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optuna_merge.errors import EngineDiedError, EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.engines.vllm import VLLMEngine
from optuna_merge.evaluation.engines.vllm_instance import require_vllm
from optuna_merge.internals.vllm import THREADS
from optuna_merge.testing.conformance import EngineConformance, TextRequest
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

# the smallest head that the CPU build's attention supports
HEAD_DIM = 32
CHOICES = [" A", " B", " C", " D"]
LONG = "the cat sat on the mat and the dog ran after the cat one two three four five six seven eight nine ten"
REQUESTS = [
    *(
        TextRequest("loglikelihood", (f"Question {i}: which letter comes next? Answer:", c))
        for i in range(3)
        for c in CHOICES
    ),
    *(TextRequest("loglikelihood", (LONG, c)) for c in (" A", " the mat", " the dog ran", " the dog sat", "x")),
    *(TextRequest("loglikelihood", (f"{LONG} {LONG} {LONG}", c)) for c in (" A", " B", " one two three")),
    TextRequest("loglikelihood", ("", "the cat")),
    TextRequest("loglikelihood_rolling", (LONG,)),
    TextRequest("loglikelihood_rolling", (f"{LONG} {LONG} {LONG}",)),
    TextRequest("generate_until", ("the dog", {"until": ["\n"], "max_gen_toks": 4})),
]
Resident = tuple[VLLMEngine, Path, list[dict[str, Tensor]]]
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def make(folder: Path, **options: Any) -> VLLMEngine:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    given = {"kv_cache_memory_bytes": 2**25, "in_process": True, **options}
    return VLLMEngine(lambda: contextlib.nullcontext(folder), shapes=shapes, dtype="float32", options=given)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def engine_of() -> Iterator[Callable[..., VLLMEngine]]:
    engines: list[VLLMEngine] = []

    def open_engine(folder: Path, **options: Any) -> VLLMEngine:
        engines.append(make(folder, **options))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def family(
    folder: Path, architecture: TinyArchitecture = "llama", **changes: Any
) -> tuple[Path, list[dict[str, Tensor]]]:
    base, others = write_tiny_models(folder, 2, architecture, head_dim=HEAD_DIM, spread=0.1, **changes)
    return base, [load_file(path / "model.safetensors") for path in (base, *others)]


def reads_folders() -> type:
    """A subclass of vLLM's ``LLM`` that loads the weights of its folder itself, whatever options it is given."""
    from vllm import LLM

    class ReadsFolders(LLM):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "load_format": "auto", "worker_extension_cls": ""})

    return ReadsFolders


def assert_close(responses: list[Any], expected: list[Any], tolerance: float = 1e-4) -> None:
    for response, other, request in zip(responses, expected, REQUESTS, strict=True):
        if isinstance(other, tuple):
            assert response[1] == other[1], request
            assert abs(response[0] - other[0]) <= tolerance * max(1, abs(other[0]) / 10), request
        elif isinstance(other, float):
            assert abs(response - other) <= tolerance * max(1, abs(other) / 10), request


class TestWithoutVLLM:
    def test_it_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            EngineError, match=r"vllm must be installed to be used, found none; pip install 'vllm>=0.32'"
        ):
            require_vllm()

    def test_it_says_which_version_it_wants(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "vllm", raising=False)
        for version, is_enough in {"0.11.2": False, "0.31.9+cu130": False, "0.32.0": True, "1.0": True}.items():
            monkeypatch.setattr("importlib.metadata.version", lambda name, found=version: found)
            if is_enough:
                require_vllm()
                continue
            with pytest.raises(EngineError) as caught:
                require_vllm()
            assert f"must be of version 0.32 or later, found {version}; pip install" in str(caught.value)

    def test_it_tokenizes_as_the_transformers_engine_does(self, tmp_path: Path) -> None:
        base, _ = family(tmp_path)
        ours, theirs = make(base).prepare(REQUESTS), HFEngine(base, device="cpu").prepare(REQUESTS)
        assert ours.encoded == theirs.encoded
        assert ours.n_requests == len(REQUESTS)
        assert ours.longest == theirs.longest == 64
        # an input that fills the window, and the token that is asked for
        assert ours.needed_length == 65
        assert sum(len(whole.prompt) for whole in ours.plan.wholes) < ours.n_tokens

    def test_it_scores_nothing_before_a_load(self, tmp_path: Path) -> None:
        engine = make(family(tmp_path)[0])
        with pytest.raises(EngineError, match="load a merge first"):
            engine.respond(engine.prepare(REQUESTS))

    def test_options_that_cannot_be(self, tmp_path: Path) -> None:
        base, _ = family(tmp_path)
        with pytest.raises(EngineError, match=r"engine.vllm.load_format must be absent"):
            make(base, load_format="auto")
        with pytest.raises(EngineError, match=r"max_model_len must be at least 65, .* got 40; raise it"):
            make(base, max_model_len=40).prepare(REQUESTS)
        endless = TextRequest("generate_until", ("the dog", {"until": [], "max_gen_toks": 64}))
        with pytest.raises(EngineError, match="max_gen_toks must be below the model's window of 64, got 64"):
            make(base).prepare([endless])


@pytest.fixture(scope="class")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    """A family of models, and one engine for all tests of a class: each test finds it as the one before left it."""
    base, weights = family(tmp_path_factory.mktemp("family"))
    engine = make(base)
    engine.prepare(REQUESTS)
    yield engine, base, weights
    engine.close()


@pytest.mark.vllm
class TestVLLMEngine(EngineConformance):
    head_dim = HEAD_DIM

    @pytest.fixture(autouse=True)
    def _shared(self, resident: Resident) -> None:
        self._engine = resident[0]

    def make_engine(self, folder: Path) -> VLLMEngine:
        """Return the shared engine, which has the same shape, after a failed load."""
        with pytest.raises(EngineError, match="must be delivered"):
            self._engine.load_weights([])
        return self._engine


@pytest.mark.vllm
class TestAgainstTheOthers:
    """The resident engine agrees with a fresh one and with the transformers engine, for several merges in a row."""

    @pytest.mark.parametrize(
        ("architecture", "tied", "options"),
        [
            ("llama", False, {}),
            ("llama", True, {}),
            ("qwen2", None, {}),
            ("mixtral", None, {}),
            ("llama", True, {"in_process": False}),
            ("mixtral", None, {"in_process": False, "tensor_parallel_size": 2}),
            ("llama", True, {"in_process": False, "tensor_parallel_size": 2}),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
    )
    def test_they_agree(
        self,
        architecture: TinyArchitecture,
        tied: bool | None,
        options: dict[str, Any],
        tmp_path: Path,
        engine_of: Callable[..., VLLMEngine],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        base, weights = family(tmp_path, architecture, tied=tied)
        engine, other = engine_of(base, **options), HFEngine(base, device="cpu")
        prepared, theirs = engine.prepare(REQUESTS), other.prepare(REQUESTS)
        responses = []
        for tensors in (*weights, weights[1]):
            engine.load_weights(tensors.items())
            other.load_weights(tensors.items())
            responses.append(engine.respond(prepared))
            assert_close(responses[-1], other.respond(theirs))
        assert responses[1] == responses[3] != responses[2]
        assert engine.n_starts == 1
        if options:
            return  # another test looks at what a worker process starts with
        engine.close()
        exported = tmp_path / "exported"
        shutil.copytree(base, exported)
        save_file(weights[1], exported / "model.safetensors", {"format": "pt"})
        fresh = engine_of(exported)
        again = fresh.prepare(REQUESTS)
        with monkeypatch.context() as patch:
            patch.setattr("vllm.LLM", reads_folders())
            fresh._start()
        fresh._is_complete = True
        assert fresh.respond(again) == responses[3]


@pytest.mark.vllm
class TestHazards:
    def test_the_prefix_cache_forgets_the_merge_before(self, resident: Resident) -> None:
        """Both merges get one prompt, longer than a block; if blocks were kept, the second would use the first's."""
        engine, base, weights = resident
        other = HFEngine(base, device="cpu")
        requests = [TextRequest("loglikelihood", (LONG, choice)) for choice in CHOICES]
        prepared, theirs = engine.prepare(requests), other.prepare(requests)
        assert prepared.longest > 32
        assert not prepared.plan.wholes
        for tensors in weights:
            engine.load_weights(tensors.items())
            other.load_weights(tensors.items())
            for response, expected in zip(engine.respond(prepared), other.respond(theirs), strict=True):
                assert isinstance(response, tuple)
                assert isinstance(expected, tuple)
                assert abs(response[0] - expected[0]) < 1e-4

    def test_grouping_changes_no_log_likelihood(self, resident: Resident) -> None:
        """Choices are scored alike in one question, each alone, and through the log-probabilities of whole prompts."""
        from vllm import SamplingParams

        engine, _, weights = resident
        requests = [r for r in REQUESTS if r.request_type == "loglikelihood" and len(r.args[0]) < 200]
        together = engine.prepare(requests)
        assert len(together.plan.questions) < len(requests)
        engine.load_weights(weights[0].items())
        responses = engine.respond(together)
        for request, item, response in zip(requests, together.encoded.items, responses, strict=True):
            [alone] = engine.respond(engine.prepare([request]))
            assert isinstance(alone, tuple)
            assert isinstance(response, tuple)
            assert alone[1] == response[1]
            assert abs(alone[0] - response[0]) < 1e-5
            tokens = [*item.context, *item.continuation]
            parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
            [output] = engine._instance._llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
            pairs = list(zip(tokens, output.prompt_logprobs, strict=True))[len(item.context) :]
            assert abs(sum(found[token].logprob for token, found in pairs) - response[0]) < 1e-5

    def test_activations_that_overflow_leave_no_trace(self, resident: Resident) -> None:
        """Finite weights may give infinite keys and values, which must not reach the next merge through the cache."""
        engine, _, weights = resident
        prepared = engine.prepare(REQUESTS)
        engine.load_weights(weights[0].items())
        expected = engine.respond(prepared)
        huge = {name: tensor * (1e38 if "v_proj" in name else 1) for name, tensor in weights[1].items()}
        huge = {name: tensor.clamp(-3e38, 3e38) for name, tensor in huge.items()}
        engine.load_weights(huge.items())
        assert not all(torch.tensor(r[0]).isfinite() for r in engine.respond(prepared) if isinstance(r, tuple))
        engine.load_weights(weights[0].items())
        assert engine.respond(prepared) == expected

    def test_nothing_that_is_not_finite_reaches_the_workers_model(self, resident: Resident, tmp_path: Path) -> None:
        engine, _, weights = resident
        name = list(weights[0])[-3]
        broken = {**weights[1], name: weights[1][name] * torch.nan}
        folder = tmp_path / "weights"
        prepared = engine.prepare(REQUESTS)
        engine.load_weights(weights[0].items())
        expected, n_starts = engine.respond(prepared), engine.n_starts
        for tensors, error, message in (
            (broken, NonFiniteMergeError, f"{name}: must be finite"),
            ({k: v for k, v in weights[1].items() if k != name}, EngineError, f"{name}: must be delivered"),
            ({**weights[1], "no.such": weights[1][name].clone()}, EngineError, "no.such: must be in the checkpoint"),
        ):
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / "model.safetensors")
            engine._weights_factory = ("optuna_merge.evaluation.engines.vllm_worker:open_folder", "")
            with pytest.raises(error, match=message):
                engine.load_made(str(folder))
            with pytest.raises(EngineError, match="load a merge first"):
                engine.respond(prepared)
            engine.load_weights(weights[0].items())
            assert engine.respond(prepared) == expected
        assert engine.n_starts == n_starts

    def test_sampling_and_stopping_are_repeatable(self, resident: Resident) -> None:
        engine, _, weights = resident
        greedy = {"until": [], "max_gen_toks": 8}
        sampled = {**greedy, "do_sample": True, "temperature": 1.0}
        prompts = [("the dog", greedy), ("the dog", sampled), ("the dog", {**greedy, "do_sample": False})]
        engine.load_weights(weights[0].items())
        prepared = engine.prepare([TextRequest("generate_until", prompt) for prompt in prompts])
        texts = engine.respond(prepared)
        assert engine.respond(prepared) == texts
        assert texts[0] == texts[2] != texts[1]
        text = texts[0]
        assert isinstance(text, str)
        stop = text[2:4]
        [cut] = engine.respond(engine.prepare([TextRequest("generate_until", ("the dog", {**greedy, "until": stop}))]))
        assert cut == text.split(stop)[0]
        with pytest.raises(EngineError, match="vLLM must know its generation_kwargs"):
            engine.respond(engine.prepare([TextRequest("generate_until", ("a", {**greedy, "num_beams": 4}))]))


@pytest.mark.vllm
class TestEnginesOfTheirOwn:
    def test_a_reset_that_is_refused_is_a_death(
        self, tmp_path: Path, engine_of: Callable[..., VLLMEngine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm import LLM

        base, weights = family(tmp_path)
        engine = engine_of(base)
        prepared = engine.prepare(REQUESTS[:4])
        engine.load_weights(weights[0].items())
        expected = engine.respond(prepared)
        with monkeypatch.context() as patch:
            patch.setattr(LLM, "reset_prefix_cache", lambda self: False)
            with pytest.raises(EngineDiedError, match="died twice over one: it did not forget its prefix cache"):
                engine.respond(prepared)
        with pytest.raises(EngineError, match="load a merge first"):
            engine.respond(prepared)
        engine.load_weights(weights[0].items())
        assert engine.respond(prepared) == expected
        assert engine.n_starts == 3

    def test_a_checkpoint_that_lacks_a_weight_is_refused(
        self, tmp_path: Path, engine_of: Callable[..., VLLMEngine]
    ) -> None:
        """The weight would stay random, because vLLM only logs this."""
        base, weights = family(tmp_path, tied=False)
        lacking = {name: tensor for name, tensor in weights[0].items() if name != "lm_head.weight"}
        shapes = {name: tuple(tensor.shape) for name, tensor in lacking.items()}
        engine = engine_of(base)
        engine._shapes = json.dumps(shapes)
        with pytest.raises(EngineError, match=r"lm_head.weight: the checkpoint must hold every weight of vLLM's Llama"):
            engine.load_weights(lacking.items())

    def test_an_option_that_vllm_does_not_have(self, tmp_path: Path, engine_of: Callable[..., VLLMEngine]) -> None:
        base, weights = family(tmp_path)
        with pytest.raises(
            EngineError, match=r"engine.vllm.max_num_seq must be an option .* did you mean 'max_num_seqs'"
        ):
            engine_of(base, max_num_seq=3).load_weights(weights[0].items())
        with pytest.raises(EngineError, match="vLLM cannot start: "):
            engine_of(base, quantization="nonsense").load_weights(weights[0].items())


@pytest.mark.vllm
def test_an_engine_that_dies_is_started_once_again(tmp_path: Path, engine_of: Callable[..., VLLMEngine]) -> None:
    base, weights = family(tmp_path)
    engine = engine_of(base, in_process=False)
    prepared = engine.prepare(REQUESTS)
    engine.load_weights(weights[0].items())
    expected = engine.respond(prepared)
    for pid in engine.worker_process_ids():
        assert pid != os.getpid()
        os.kill(pid, signal.SIGKILL)
    assert engine.respond(prepared) == expected
    assert engine.n_starts == 2
    for pid in engine.worker_process_ids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="vLLM must live through a trial, died twice over one"):
        engine.respond(prepared)
    engine.load_weights(weights[0].items())
    assert engine.respond(prepared) == expected
    assert engine.n_starts == 3
    engine.close()
    # a thread at work when the process ends can abort it
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]
