"""Texts that our decoder generates, against those of lm-eval with a batch size of 1."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.cache_utils import Cache

from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engine import Text
from optuna_merge.evaluation.engines.forward import Forward
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.testing.conformance import TextRequest
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models
from tests.evaluation.task_files import TEMPLATE
from tests.evaluation.test_hf import ARCHITECTURES, WINDOW, by_lm_eval, text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As SmolLM2: a Llama with a tied head, grouped queries and a chat template."""
    _, [folder] = write_tiny_models(tmp_path, 1, "llama", tied=True, spread=0.3)
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture
def n_step_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of every decoding step."""
    seen: list[int] = []
    step = Forward.step

    def counted(self: Forward, tokens: Any, *inputs: Any) -> Any:
        seen.append(len(tokens))
        return step(self, tokens, *inputs)

    monkeypatch.setattr(Forward, "step", counted)
    return seen


def change(file: Path, **settings: Any) -> None:
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**old, **settings}))


def loaded(folder: Path, **options: Any) -> HFEngine:
    engine = HFEngine(folder, device="cpu", **options)
    engine.load_weights(load_file(folder / "model.safetensors").items())
    return engine


def asked(prompt: str, **options: Any) -> TextRequest:
    return TextRequest("generate_until", (prompt, {"until": [], "max_gen_toks": 8, **options}))


def asked_at_random(n: int, seed: int = 0, **options: Any) -> list[TextRequest]:
    rnd = random.Random(seed)
    return [asked(text(rnd, rnd.randint(1, 25)), **{"max_gen_toks": rnd.randint(1, 12), **options}) for _ in range(n)]


def of_every_kind(folder: Path) -> list[TextRequest]:
    """Prompts of any length, some beyond the window, whose texts end by length and by stop texts of any length."""
    rnd = random.Random(4)
    plain = [asked(text(rnd, n), max_gen_toks=rnd.randint(1, 20)) for n in (1, 2, 3, 5, 8, 13, 21, 34, 55, 70)]
    requests = list(plain)
    for request, made in zip(plain, by_lm_eval(folder, plain), strict=True):
        prompt, options = request.args
        for length in (1, 2, 4):
            if len(made) > 2 * length:
                # most tokens are single bytes, so that a character and a stop text begin and end in the middle of them
                start = rnd.randrange(len(made) - length)
                requests.append(asked(prompt, **{**options, "until": [made[start : start + length], "never"]}))
    return requests


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_are_those_of_lm_eval(tmp_path: Path, architecture: TinyArchitecture) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    requests = of_every_kind(folder)
    engine = loaded(folder)
    assert engine.respond(engine.prepare(requests)) == by_lm_eval(folder, requests)
    assert engine._generator._decodes is True


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_windows_that_slide_over_prompts_and_texts(tmp_path: Path, architecture: TinyArchitecture) -> None:
    _, [folder] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    change(folder / "config.json", sliding_window=10)
    requests = of_every_kind(folder)
    engine = loaded(folder)
    assert engine.respond(engine.prepare(requests)) == by_lm_eval(folder, requests)
    assert engine._generator._decodes is True


def test_chats_end_at_the_tokens_that_the_model_names(model: Path) -> None:
    engine = loaded(model)
    rnd = random.Random(2)
    chats = [[{"role": "user", "content": text(rnd, n)}] for n in (1, 4, 9, 3)]
    requests = [asked(engine.apply_chat_template(chat), max_gen_toks=12) for chat in chats]
    without_ends = by_lm_eval(model, requests)
    change(model / "generation_config.json", eos_token_id=[1, *range(60, 160)])
    engine = loaded(model)
    responses = engine.respond(engine.prepare(requests))
    assert responses == by_lm_eval(model, requests)
    assert all(text != other for text, other in zip(responses, without_ends, strict=True))
    assert engine.prepare(requests).generation[1].prompts[-1].tokens.count(0) == 1  # the template's <s>, not another


def test_texts_say_how_they_ended(model: Path) -> None:
    engine = loaded(model)
    prompt = "the cat sat on the mat"
    [whole, sampled] = engine.respond(engine.prepare([asked(prompt), asked(prompt, do_sample=True, temperature=1.0)]))
    assert isinstance(whole, Text)
    assert isinstance(sampled, Text)
    assert (whole.n_tokens, whole.is_cut) == (8, True)
    # lm-eval samples and does not tell tokens: its text is encoded again
    n_encoded = len(AutoTokenizer.from_pretrained(model).encode(sampled, add_special_tokens=False))
    assert (sampled.n_tokens, sampled.is_cut) == (n_encoded, n_encoded >= 8)
    [stopped] = engine.respond(engine.prepare([asked(prompt, until=[whole[len(whole) // 2 :][:1]])]))
    assert isinstance(stopped, Text)
    assert not stopped.is_cut
    assert 1 <= stopped.n_tokens < 8


def test_rows_leave_and_others_take_their_places(model: Path, n_step_rows: list[int]) -> None:
    requests = [*asked_at_random(40), *asked_at_random(3, seed=1, max_gen_toks=40)]
    expected = by_lm_eval(model, requests)
    engine = loaded(model)
    assert engine.respond(engine.prepare(requests)) == expected
    at_once, n_step_rows[:] = list(n_step_rows[2:]), []  # without the two that the model was tried with
    assert at_once == sorted(at_once, reverse=True)  # all enter first
    assert max(at_once) > 30
    assert len(at_once) == 39  # the first token comes from the prompt's pass

    # nine places, which pieces of up to four rows take as they become free
    engine = loaded(model, batch_tokens=72)
    assert engine.respond(engine.prepare(requests)) == expected
    assert max(n_step_rows[2:]) == 9
    assert n_step_rows[2:] != sorted(n_step_rows[2:], reverse=True)
    assert sum(n_step_rows[2:]) == sum(at_once)


def test_little_room_for_keys_and_values(model: Path, n_step_rows: list[int]) -> None:
    requests = [*asked_at_random(20, max_gen_toks=3), *asked_at_random(3, seed=1, max_gen_toks=40)]
    expected = by_lm_eval(model, requests)
    for n_most_cached in (200, 1):
        n_step_rows.clear()
        engine = loaded(model)
        engine._generator._n_most_cached = n_most_cached
        prepared = engine.prepare(requests)
        assert engine.respond(prepared) == expected
        assert 1 <= max(n_step_rows[2:]) <= max(1, n_most_cached // 10)
        assert prepared.n_cached <= max(WINDOW, n_most_cached) + prepared.n_padded


def test_equal_requests_are_generated_once(model: Path, n_step_rows: list[int]) -> None:
    requests = [asked("the cat"), asked("the cat", max_gen_toks=3), asked("the cat"), asked("the cat", until=["x"])]
    engine = loaded(model)
    first, short, again, _ = engine.respond(engine.prepare(requests))
    assert [first, short, again] == [first, *by_lm_eval(model, requests)[1:3]]
    assert n_step_rows[2] == 3


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_of_the_model(model: Path, penalty: float) -> None:
    requests = asked_at_random(12, max_gen_toks=20)
    before = by_lm_eval(model, requests)
    change(model / "generation_config.json", repetition_penalty=penalty, temperature=0.6, top_p=0.9, do_sample=True)
    engine = loaded(model)
    responses = engine.respond(engine.prepare(requests))
    assert engine._generator._decodes is True
    assert responses == by_lm_eval(model, requests)
    assert responses != before


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"num_beams": 2}, {}),
        ({"no_repeat_ngram_size": 2}, {}),
        ({}, {"no_repeat_ngram_size": 2}),
        ({}, {"max_new_tokens": 5}),
        ({}, {"suppress_tokens": [5, 6, 7]}),
    ],
)
def test_lm_eval_answers_what_is_not_simply_greedy(
    model: Path, n_step_rows: list[int], options: dict[str, Any], settings: dict[str, Any]
) -> None:
    change(model / "generation_config.json", **settings)
    requests = asked_at_random(3, max_gen_toks=12, **options)
    if not settings:
        requests.insert(1, asked("the cat sat"))
    engine = loaded(model)
    assert engine.respond(engine.prepare(requests)) == by_lm_eval(model, requests)
    assert bool(n_step_rows) is not bool(settings)


def test_samples_are_drawn_in_batches_and_are_those_of_the_weights(model: Path, n_step_rows: list[int]) -> None:
    requests = asked_at_random(9, max_gen_toks=6, do_sample=True, temperature=1.0)
    engine = loaded(model)
    prepared = engine.prepare(requests)
    assert prepared.generation[1].batch_size > len(requests)
    state = torch.random.get_rng_state()
    assert engine.respond(prepared) == engine.respond(prepared)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not n_step_rows


def test_a_model_without_rows_of_keys_and_values(tmp_path: Path, model: Path) -> None:
    """A state-space model."""
    folder = tmp_path / "mamba"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MambaForCausalLM(
            MambaConfig(vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
        ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    requests = asked_at_random(4)
    engine = loaded(folder)
    assert engine.respond(engine.prepare(requests)) == by_lm_eval(folder, requests)
    assert engine._generator._decodes is False


@pytest.mark.parametrize("fault", ["deaf", "forgetful", "strict"])
def test_a_model_that_cannot_decode_rows_is_found_out(model: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked_at_random(6)
    expected = by_lm_eval(model, requests)
    forward = LlamaForCausalLM.forward

    def faulty(self: Any, *, past_key_values: Any = None, position_ids: Any = None, **inputs: Any) -> Any:
        is_ours = type(past_key_values) is Cache
        if is_ours and fault == "deaf":
            position_ids = None
        if is_ours and fault == "forgetful":
            past_key_values, inputs["attention_mask"] = None, None
        if is_ours and fault == "strict":
            raise TypeError("only caches of my own")
        return forward(self, past_key_values=past_key_values, position_ids=position_ids, **inputs)

    engine = loaded(model)
    monkeypatch.setattr(LlamaForCausalLM, "forward", faulty)
    assert engine.respond(engine.prepare(requests)) == expected
    assert engine._generator._decodes is False


def scarce(monkeypatch: pytest.MonkeyPatch, method: str, n_most: int) -> list[int]:
    """Let passes with more than ``n_most`` inputs run out of memory; the list holds the size of every pass."""
    seen: list[int] = []
    original = getattr(Forward, method)

    def run(self: Forward, tokens: Any, *inputs: Any) -> Any:
        seen.append(len(tokens) * max(map(len, tokens)))
        if seen[-1] > n_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, *inputs)

    monkeypatch.setattr(Forward, method, run)
    return seen


def test_out_of_memory_halves_the_rows_and_loses_no_text(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [*asked_at_random(4, max_gen_toks=1), *asked_at_random(30, seed=1, max_gen_toks=5)]
    expected = by_lm_eval(model, requests)
    engine = loaded(model)
    n_rows = scarce(monkeypatch, "step", 10)
    assert engine.respond(engine.prepare(requests)) == expected
    assert engine._generator.n_most_rows == 7  # 30, 15, 7
    assert engine.batch_tokens == 1024
    assert max(n_rows[4:]) == 7
    n_prompts = scarce(monkeypatch, "prefill", 10**6)
    n_rows.clear()
    assert engine.respond(engine.prepare(requests)) == expected
    assert max(n_rows) in (6, 7)
    assert sum(n_prompts) < 34 * 40  # each prompt once


def test_out_of_memory_in_the_pass_over_prompts_halves_the_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked_at_random(30)
    expected = by_lm_eval(model, requests)
    engine = loaded(model)
    n_tokens = scarce(monkeypatch, "prefill", 300)
    assert engine.respond(engine.prepare(requests)) == expected
    assert engine.batch_tokens in (128, 256)
    assert engine._generator.n_most_rows > 1000
    n_tokens.clear()
    scarce(monkeypatch, "prefill", 10)
    with pytest.raises(EngineError, match=r"a sequence of \d+ tokens does not fit into the memory of cpu"):
        engine.respond(engine.prepare(requests))


def test_out_of_memory_in_lm_eval_halves_its_batch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked_at_random(12, num_beams=2, max_gen_toks=4)
    expected = by_lm_eval(model, requests)
    engine = loaded(model)
    lm = engine._language.lm
    original, sizes = lm._model_generate, []

    def generate(context: Any, **inputs: Any) -> Any:
        sizes.append(len(context))
        if len(context) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(context=context, **inputs)

    monkeypatch.setattr(lm, "_model_generate", generate)
    assert engine.respond(engine.prepare(requests)) == expected
    assert max(sizes) == 12
    assert engine._generator.n_most_rows in (3, 4)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "a prompt must have tokens, got none"),
        ("the cat", {"max_gen_toks": 0}, "max_gen_toks must be at least 1, got 0"),
        (
            "the cat",
            {"max_gen_toks": WINDOW},
            f"max_gen_toks must be below the model's window of {WINDOW}, got {WINDOW}",
        ),
    ],
)
def test_texts_that_lm_eval_would_not_generate_are_refused(
    model: Path, prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        HFEngine.tokenizer_only(model).prepare([asked(prompt, **options)])


@pytest.mark.parametrize("special", [{}, {"add_bos_token": True}, {"bos_token": None}])
def test_prompts_have_the_tokens_of_lm_eval(model: Path, special: dict[str, Any]) -> None:
    change(model / "tokenizer_config.json", **special)
    engine = HFEngine.tokenizer_only(model)
    for prompt in ("the cat", "<s>the cat", "</s>the cat", " <s> x"):
        [(_, _, tokens)] = engine.prepare([asked(prompt)]).encoded.generated
        assert [tokens] == engine._language.lm.tok_batch_encode([prompt])[0].tolist()
