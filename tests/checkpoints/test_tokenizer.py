from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from optuna_merge.checkpoints.tokenizer import copy_tokenizer, has_tokenizer_files, load_tokenizer, read_vocabulary
from optuna_merge.errors import CheckpointError


def added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def write_tokenizer(folder: Path, model: dict[str, Any], *tokens: dict[str, Any]) -> Path:
    keys = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", **keys, "added_tokens": list(tokens), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ({"type": "WordLevel", "vocab": {"b": 1, "a": 0}, "unk_token": "a"}, {"a": 0, "b": 1}),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}, {"a": 0, "b": 1, "ab": 2}),
        ({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}, {"<unk>": 0, "a": 1}),
    ],
    ids=["WordLevel", "BPE", "Unigram"],
)
def test_every_kind_of_model(model: dict[str, Any], vocabulary: dict[str, int], tmp_path: Path) -> None:
    n = len(vocabulary)
    write_tokenizer(tmp_path, model, added("<s>", n), added("</s>", n + 1))
    read = read_vocabulary(tmp_path, "it")
    assert read == vocabulary | {"<s>": n, "</s>": n + 1}
    assert list(read.values()) == sorted(read.values())


def test_a_token_has_the_id_that_it_is_encoded_as(tmp_path: Path) -> None:
    """A file may state another id for an added token that its model knows."""
    write_tokenizer(tmp_path, {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1}, "unk_token": "a"}, added("<s>", 7))
    assert read_vocabulary(tmp_path, "it") == {"a": 0, "<s>": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert AutoTokenizer.from_pretrained(tmp_path)("<s>")["input_ids"] == [1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "X"}}'])
def test_a_file_without_a_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    message = r"tokenizer.json: must hold a tokenizer, got: .+; fetch the model again$"
    with pytest.raises(CheckpointError, match=message) as caught:
        read_vocabulary(tmp_path, "it")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_tokenizer_json_is_read_by_transformers(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert read_vocabulary(tmp_path, "it") == {token: number for number, token in enumerate(tokens)}


def test_a_tokenizer_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install sentencepiece")

    texts = iter(["the cat sat on the mat", "a dog and a cat", "one two three four"] * 10)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "tokenizer"), vocab_size=24, minloglevel=2
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    vocabulary = read_vocabulary(tmp_path, "it")
    assert vocabulary is not None
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}.items() <= vocabulary.items()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, "it") is None
    assert not has_tokenizer_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it: tokenizer must be loadable, got: "):
        load_tokenizer(tmp_path, "it")


def test_its_files_are_copied_and_no_others(tiny_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "base", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(folder, tmp_path / "copy")
    copied = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert copied == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert has_tokenizer_files(folder)
    assert read_vocabulary(tmp_path / "copy", "it") == read_vocabulary(folder, "it")
