from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.testing.conformance import EngineConformance, TextRequest
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

ARCHITECTURES: list[TinyArchitecture] = ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "mistral", "mixtral"]
WINDOW = 64  # of the tiny models, in tokens
WORDS = (
    "the cat sat on mat and dog ran after one two three four five Question: which letter comes? Answer: A B C".split()
)


class TestHFEngine(EngineConformance):
    def make_engine(self, folder: Path) -> HFEngine:
        return HFEngine(folder, device="cpu")


class TestHFEngineWithFusedExperts(EngineConformance):
    architecture: TinyArchitecture = "mixtral"

    def make_engine(self, folder: Path) -> HFEngine:
        return HFEngine(folder, device="cpu")


def text(rnd: random.Random, n_words: int) -> str:
    return " ".join(rnd.choice(WORDS) for _ in range(n_words))


def every_kind_of_request() -> list[TextRequest]:
    rnd = random.Random(0)
    pairs: list[tuple[str, str]] = []
    for ending in ("", " ", "\n\n", "  "):
        context = text(rnd, rnd.randint(3, 20)) + ending
        pairs += [(context, choice) for choice in (" A", " B", " C", "A")]
        pairs += [(context, " " + text(rnd, n)) for n in (1, 2, 3, 3)]
        pairs += [(context, " one two"), (context, " one two three"), (context, " one two three"), (context, "x")]
    pairs += [("", text(rnd, 3)), ("", " A"), ("", "<s>the cat"), ("<s>the cat", " sat"), ("a", text(rnd, 8))]
    long = text(rnd, 90)
    pairs += [(long, " A"), (long, " B"), (long, " " + text(rnd, 3)), (long, " " + text(rnd, 6))]
    rolling = ["", "cat", text(rnd, 12), text(rnd, 100)]
    generated = [(text(rnd, n), {"until": ["\n", "the"], "max_gen_toks": 6}) for n in (2, 9, 30)]
    generated += [(text(rnd, 70), {"until": [], "max_gen_toks": 3})]
    requests = [TextRequest("loglikelihood", pair) for pair in pairs]
    requests += [TextRequest("loglikelihood_rolling", (one,)) for one in rolling]
    requests += [TextRequest("generate_until", pair) for pair in generated]
    rnd.shuffle(requests)
    return requests


def by_lm_eval(folder: Path, requests: Sequence[TextRequest], dtype: str = "float32") -> list[Any]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=1, softmax_dtype="float32")
    responses: list[Any] = [None] * len(requests)
    for kind in {request.request_type for request in requests}:
        indices = [i for i, request in enumerate(requests) if request.request_type == kind]
        instances = [Instance(kind, {}, requests[i].args, 0) for i in indices]  # type: ignore[arg-type]
        for i, response in zip(indices, getattr(lm, kind)(instances, disable_tqdm=True), strict=True):
            responses[i] = response
    return responses


def assert_equal(responses: Sequence[Any], expected: Sequence[Any], tolerance: float = 1e-4) -> None:
    for response, other in zip(responses, expected, strict=True):
        if isinstance(other, tuple):
            assert response[0] == pytest.approx(other[0], abs=tolerance)
            assert response[1] == other[1]
        elif isinstance(other, str):
            assert response == other
        else:
            assert response == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_request_is_answered_as_by_lm_eval(tmp_path: Path, architecture: TinyArchitecture) -> None:
    base, [model] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    requests = every_kind_of_request()
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    expected = by_lm_eval(model, requests)
    assert_equal(engine.respond(engine.prepare(requests)), expected)
    assert engine._shares is True

    # the slow path that models without trees take
    engine._shares = False
    assert_equal(engine.respond(engine.prepare(requests)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tmp_path: Path, tied: bool) -> None:
    base, [model] = write_tiny_models(tmp_path, 1, "llama", tied=tied, spread=0.3)
    requests = every_kind_of_request()[:20]
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    assert_equal(engine.respond(engine.prepare(requests)), by_lm_eval(model, requests))


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_sliding_windows_shorter_than_the_prompts(tmp_path: Path, architecture: TinyArchitecture) -> None:
    base, [model] = write_tiny_models(tmp_path, 1, architecture, spread=0.3)
    for folder in (base, model):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 30}))
    short = [
        TextRequest("loglikelihood", (c, k)) for c in ("the cat", "one two") for k in (" sat on", " ran after", " A")
    ]
    requests = every_kind_of_request() + short
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    assert_equal(engine.respond(engine.prepare(requests)), by_lm_eval(model, requests))
    assert engine._shares is True


def byte_level(special: list[str]) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


def metaspace_bpe(special: list[str]) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    alphabet = list("abcdefghijklmnopqrstuvwxyzABCQ:?.")
    return tokenizer, trainers.BpeTrainer(
        vocab_size=160, special_tokens=[*special, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )


def unigram_with_bos(special: list[str]) -> tuple[Tokenizer, Any]:
    """As sentencepiece: a space before the text, and a beginning-of-sequence token added by the tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=90, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
    )


@pytest.mark.parametrize("kind", [byte_level, metaspace_bpe, unigram_with_bos])
def test_tokenizers_of_several_kinds(tmp_path: Path, kind: Any) -> None:
    base, [model] = write_tiny_models(tmp_path, 1, "llama", spread=0.3)
    tokenizer, trainer = kind(["<s>", "</s>", "<pad>"])
    rnd = random.Random(1)
    tokenizer.train_from_iterator([text(rnd, 8) for _ in range(200)], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    for folder in (base, model):
        wrapped.save_pretrained(folder)
    assert len(wrapped) <= 320
    requests = every_kind_of_request()
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    assert_equal(engine.respond(engine.prepare(requests)), by_lm_eval(model, requests))


def test_bfloat16_is_scored_with_a_float32_softmax(tmp_path: Path) -> None:
    base, [model] = write_tiny_models(tmp_path, 1, "llama", spread=0.3, dtype="bfloat16")
    requests = [r for r in every_kind_of_request() if r.request_type != "generate_until"]
    engine = HFEngine(base, device="cpu", dtype="bfloat16")
    engine.load_weights(load_file(model / "model.safetensors").items())
    responses = engine.respond(engine.prepare(requests))
    for response, other in zip(responses, by_lm_eval(model, requests, "bfloat16"), strict=True):
        ours, theirs = (r[0] if isinstance(r, tuple) else r for r in (response, other))
        assert ours == pytest.approx(theirs, abs=0.3, rel=0.02)


def test_out_of_memory_halves_the_batch_and_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine(base, device="cpu", batch_tokens=1024)
    engine.load_weights(load_file(base / "model.safetensors").items())
    requests = [r for r in every_kind_of_request() if r.request_type == "loglikelihood"]
    prepared = engine.prepare(requests)
    expected = engine.respond(prepared)
    forward = type(engine._forward).score
    limit = 200

    def scarce(self: Any, batch: Any, before: Any) -> Any:
        if batch.tokens.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, before)

    monkeypatch.setattr(type(engine._forward), "score", scarce)
    assert_equal(engine.respond(prepared), expected)
    assert engine.batch_tokens in (256, 128)
    limit = 50
    with pytest.raises(EngineError, match="a sequence of 64 tokens does not fit into the memory of cpu"):
        engine.respond(prepared)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("the cat", ""), "must have tokens, got .* and 0"),
        (("the cat", " " + "one " * 90), f"must fit the model's window of {WINDOW} tokens"),
    ],
)
def test_requests_that_lm_eval_would_not_answer_are_refused(tmp_path: Path, pair: Any, message: str) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    with pytest.raises(EngineError, match=message):
        HFEngine(base, device="cpu").prepare([TextRequest("loglikelihood", pair)])


def test_the_plan_computes_each_context_once(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine.tokenizer_only(base)
    context = "the cat sat on the mat and the dog"
    n_context = engine.prepare([TextRequest("loglikelihood", (context, " A"))]).n_tokens
    letters = [TextRequest("loglikelihood", (context, choice)) for choice in (" A", " B", " C", " D")]
    assert engine.prepare(letters).n_tokens == n_context
    n_one = engine.prepare([TextRequest("loglikelihood", (context, " one two"))]).n_tokens
    n_both = engine.prepare([*letters, TextRequest("loglikelihood", (context, " one two"))]).n_tokens
    assert n_both == n_one > n_context


def test_an_engine_without_weights_tokenizes_and_refuses_the_rest(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine.tokenizer_only(base)
    assert (engine.device, engine.eot_text, engine.has_chat_template) == ("meta", "</s>", False)
    prepared = engine.prepare([TextRequest("loglikelihood", ("the cat", " sat"))])
    assert all(p.device.type == "meta" for p in engine._weights.model.parameters())
    with pytest.raises(EngineError, match="was built without weights"):
        engine.load_weights([])
    with pytest.raises(EngineError, match="load a merge first"):
        engine.respond(prepared)


def test_a_model_that_reads_no_trees_is_found_out(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(base / "model.safetensors").items())
    forward = engine._weights.model.forward

    def deaf(attention_mask: Any = None, position_ids: Any = None, **inputs: Any) -> Any:
        return forward(**inputs)

    engine._weights.model.forward = deaf  # type: ignore[assignment]
    requests = every_kind_of_request()[:40]
    assert_equal(engine.respond(engine.prepare(requests)), by_lm_eval(base, requests))
    assert engine._shares is False


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu7", "device must be auto, cpu, cuda or cuda:<i>, got 'tpu7'"), ("cuda:99", "device 'cuda:99' is not there")],
)
def test_devices_that_are_not_there(tmp_path: Path, device: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        HFEngine(tmp_path, device=device)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="transformers cannot build the model"):
        HFEngine(tmp_path, device="cpu")
    base, _ = write_tiny_models(tmp_path, 0)
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EngineError, match="must hold a tokenizer, found no file of one; copy it there"):
        HFEngine(base, device="cpu")


def test_sampled_texts_are_those_of_the_weights(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine(base, device="cpu")
    engine.load_weights(load_file(base / "model.safetensors").items())
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    prepared = engine.prepare([TextRequest("generate_until", ("the cat", sampled))])
    torch.manual_seed(1)
    first = engine.respond(prepared)
    state = torch.random.get_rng_state()
    assert engine.respond(prepared) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_cost_counts_padding_and_passes(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    engine = HFEngine(base, device="cpu", batch_tokens=60)
    one, long = (TextRequest("loglikelihood", (context, " A")) for context in ("one", "one three"))
    alone = engine.prepare([one])
    assert alone.cost == alone.n_tokens + 10  # a sixth of a batch
    n_long = engine.prepare([long]).n_tokens
    padded = engine.prepare([one, long])
    assert padded.n_tokens == 1 + n_long
    assert padded.cost == 2 * n_long + 10
