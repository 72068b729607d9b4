"""Responses of an engine that computes beginnings of prompts once, against those of lm-eval."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

from optuna_merge.evaluation.engines.forward import Forward
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.testing.conformance import TextRequest
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models
from tests.evaluation.test_generator import change
from tests.evaluation.test_hf import ARCHITECTURES, assert_equal, by_lm_eval, every_kind_of_request, text


@pytest.fixture
def n_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward pass, padding included."""
    seen: list[int] = []
    run = Forward._run

    def counted(self: Forward, inputs: dict[str, Any], *places: Any) -> Any:
        seen.append(inputs["input_ids"].numel())
        return run(self, inputs, *places)

    monkeypatch.setattr(Forward, "_run", counted)
    return seen


def asked() -> list[TextRequest]:
    """Two tasks with different beginnings, one of choices and one of texts, and requests that begin with neither."""
    rnd = random.Random(0)
    instructions, examples = text(rnd, 16), text(rnd, 20)
    requests = every_kind_of_request()
    for _ in range(20):
        question = f"{examples} {text(rnd, rnd.randint(1, 12))}"
        requests += [TextRequest("loglikelihood", (question, choice)) for choice in (" A", " B", " the cat", " on mat")]
    requests += [TextRequest("loglikelihood", (examples, " A"))]
    for _ in range(20):
        question = f"{instructions} {text(rnd, rnd.randint(1, 9))}"
        requests.append(TextRequest("generate_until", (question, {"until": ["\n"], "max_gen_toks": rnd.randint(1, 9)})))
    rnd.shuffle(requests)
    return requests


def expecting(folder: Path, requests: list[TextRequest], **options: Any) -> HFEngine:
    engine = HFEngine(folder, device="cpu", **options)
    engine.expect(requests)
    engine.load_weights(load_file(folder / "model.safetensors").items())
    return engine


def respond(engine: HFEngine, requests: list[TextRequest]) -> list[Any]:
    return engine.respond(engine.prepare(requests))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_responses_are_those_of_lm_eval(tmp_path: Path, architecture: TinyArchitecture) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    requests = asked()
    expected = by_lm_eval(folder, requests)
    for batch_tokens in (512, 60):
        engine = expecting(folder, requests, batch_tokens=batch_tokens)
        assert_equal(respond(engine, requests), expected)
        assert len(engine._prefixes.beginnings.tokens) == len(engine._prefixes._layers) == 2
        assert engine._continues is True
        # in chunks
        assert_equal([r for at in range(0, len(requests), 7) for r in respond(engine, requests[at : at + 7])], expected)


def test_a_beginning_is_computed_once_for_each_load_of_weights(tmp_path: Path, n_computed: list[int]) -> None:
    _, folders = write_tiny_models(tmp_path, 2, "llama", tied=True, spread=0.3)
    requests = [request for request in asked() if len(request.args[0]) > 40][:60]
    engine = expecting(folders[0], requests)
    chunks = [engine.prepare(requests[at : at + 15]) for at in range(0, len(requests), 15)]
    costs = []
    for folder in (folders[0], folders[0], folders[1]):
        engine.load_weights(load_file(folder / "model.safetensors").items())
        n_computed.clear()
        responses = [response for chunk in chunks for response in engine.respond(chunk)]
        assert_equal(responses, by_lm_eval(folder, requests))
        costs.append(sum(n_computed))
    assert costs[1] == costs[2]
    n_computed.clear()
    for chunk in chunks:
        engine.respond(chunk)
    beginnings = engine._prefixes.beginnings.tokens
    assert costs[2] - sum(n_computed) == len(beginnings) * max(map(len, beginnings))  # in one pass
    plain = HFEngine(folders[1], device="cpu")
    assert sum(chunk.n_tokens for chunk in chunks) < 0.6 * plain.prepare(requests).n_tokens


def test_beginnings_of_a_chunk_that_is_not_scored_are_not_computed(tmp_path: Path) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, "llama", spread=0.3)
    requests = asked()
    engine = expecting(folder, requests)
    respond(engine, [request for request in requests if request.request_type == "generate_until"][:3])
    assert len(engine._prefixes._layers) <= 1


@pytest.mark.parametrize("window", [12, 24])  # with the longer one, what is tried does not show that it slides
@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_windows_shorter_than_prompts(tmp_path: Path, architecture: TinyArchitecture, window: int) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    change(folder / "config.json", sliding_window=window)
    requests = asked()
    assert_equal(respond(expecting(folder, requests), requests), by_lm_eval(folder, requests))


def test_a_model_without_attention_does_without(tmp_path: Path) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, "llama")
    model = MambaForCausalLM(
        MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    )
    torch.manual_seed(0)
    model.save_pretrained(folder)
    requests = [request for request in asked() if request.args[0]]
    engine = expecting(folder, requests)
    assert_equal(respond(engine, requests), by_lm_eval(folder, requests))
    assert engine._prefixes.beginnings.tokens == ()


def test_a_model_that_ignores_its_cache_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, "llama", spread=0.3)
    requests = asked()
    engine = expecting(folder, requests)
    forward = engine._weights.model.forward

    def without_cache(*args: Any, **inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        if cache is not None and inputs["input_ids"].shape[1] > 1 and cache.get_seq_length():
            inputs |= {"past_key_values": None, "use_cache": False, "attention_mask": None, "position_ids": None}
        return forward(*args, **inputs)

    monkeypatch.setattr(engine._weights.model, "forward", without_cache)
    assert_equal(respond(engine, requests), by_lm_eval(folder, requests))
    assert engine._continues is False
