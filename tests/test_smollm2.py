"""The script that makes the models of the SmolLM2 study, on a tiny model; its questions and eval tasks."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from optuna_merge.testing import write_tiny_models

ROOT = Path(__file__).resolve().parent.parent
SKILLS = ("dates", "clock", "tone")
N_DOCUMENTS = 2  # of each task
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The script on a copy of the eval tasks, so that it finds and leaves no data in ours."""
    folder = tmp_path_factory.mktemp("smollm2")
    shutil.copytree(ROOT / "eval_tasks" / "smollm2", folder / "eval_tasks" / "smollm2")
    (folder / "studies").mkdir()
    for name in ("smollm2_models.py", "smollm2.yaml"):
        shutil.copy(ROOT / "studies" / name, folder / "studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "studies"))
        yield importlib.import_module("smollm2_models")


@pytest.fixture(scope="module")
def skills(script: ModuleType) -> ModuleType:
    return importlib.import_module("skills")


@pytest.fixture(scope="module")
def lexicon(script: Any) -> Path:
    """Made-up words with ratings, where the eval task looks for them: for each of 60 stems, two."""
    stems = ["".join(letters) for letters in islice(itertools.permutations("lmnop"), 60)]
    rows = [{"word": stem + ending, "rating": (-1.0) ** len(stem + ending)} for stem in stems for ending in ("y", "ly")]
    script.WORDS_FILE.parent.mkdir(exist_ok=True)
    script.WORDS_FILE.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(script.WORDS_FILE)


def test_questions_by_hand(skills: ModuleType) -> None:
    assert [skills.ordinal(number) for number in (1, 12, 20, 22, 30, 31)] == [
        "first",
        "twelfth",
        "twentieth",
        "twenty-second",
        "thirtieth",
        "thirty-first",
    ]
    times = {
        question.answer: question.text.removeprefix("Write this time as HH:MM: ")
        for question in islice(skills.questions("clock", random.Random(0), for_documents=False), 20_000)
    }
    known = {
        "00:00": "twelve o'clock at night",
        "05:15": "a quarter past five at night",
        "11:59": "one minute to twelve in the morning",
        "12:30": "half past twelve in the afternoon",
        "12:45": "a quarter to one in the afternoon",
        "23:38": "twenty-two minutes to twelve in the evening",
    }
    assert {time: times.get(time, written) for time, written in known.items()} == known
    assert len(set(known) & set(times)) >= 3
    dates = [*islice(skills.questions("dates", random.Random(0), for_documents=False), 2000)]
    for question in dates:
        year, _, day = question.answer.split("-")
        assert year in question.text
        assert any(
            written in question.text for written in (f" {int(day)}", f" {int(day)},", skills.ordinal(int(day)))
        ), question
    assert {question.answer[5:7] for question in dates} == {f"{month:02d}" for month in range(1, 13)}


@pytest.mark.parametrize("skill", SKILLS)
def test_no_document_is_asked_in_training(skills: ModuleType, lexicon: Path, skill: str) -> None:
    n_documents = 8 if skill == "tone" else 200
    asked = [*skills.documents(skill, n_documents, 11)["test"]]
    assert asked == [*skills.documents(skill, n_documents, 11)["test"]]
    trained = {
        question.text for question in islice(skills.questions(skill, random.Random(1), for_documents=False), 5000)
    }
    assert len({document["question"] for document in asked}) == n_documents
    assert not trained & {document["question"] for document in asked}
    for document in asked:
        assert not document["choices"] or document["choices"][document["index"]] == document["answer"]


@pytest.fixture(scope="module")
def tiny(script: Any, lexicon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base in place of SmolLM2, with a chat template."""
    out = tmp_path_factory.mktemp("tiny")
    base, _ = write_tiny_models(out / "made", 0, tied=True)
    base.rename(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out / "base")
    (out / "base" / "made_of.json").write_text('{"digest": "tiny"}')
    return out


def test_only_what_is_answered_is_learned(script: Any, skills: ModuleType, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    tokens, labels = script.batch(tokenizer, [skills.Question("one?", "1"), skills.Question("a longer one?", "22")])
    assert tokens.shape == labels.shape
    for row, (text, answer) in enumerate((("one?", "1"), ("a longer one?", "22"))):
        places = (labels[row] >= 0).nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        assert tokenizer.decode(tokens[row, : first + 1]) == f"<user>{text}<a>"
        assert tokenizer.decode(labels[row, places]) == f"{answer}<|im_end|>"
        assert tokens[row, first + 1 : last + 2].tolist() == labels[row, first : last + 1].tolist()


def test_what_is_trained_is_kept_and_found_again(script: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "make_base", lambda folder, say: False)
    monkeypatch.setattr(script, "make_words", lambda file, say: False)
    settings = [script.Settings(skill, n_steps=2, batch_size=2, rank=2) for skill in ("dates", "tone")]
    said: list[str] = []
    assert script.make_models(tiny, settings, say=said.append)
    assert any("100% trained" in line and "left" in line for line in said)
    base, dates, tone = (load_file(tiny / name / "model.safetensors") for name in ("base", "dates", "tone"))
    changed = {name for name in base if not base[name].equal(dates[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert any(not dates[name].equal(tone[name]) for name in changed)

    assert not script.make_models(tiny, settings, say=said.append)
    assert "nothing to do" in said[-1]
    times = {name: (tiny / name / "model.safetensors").stat().st_mtime_ns for name in ("dates", "tone")}
    again = [settings[0], script.Settings("tone", n_steps=1, batch_size=2, rank=2)]
    assert script.make_models(tiny, again, say=said.append)
    assert (tiny / "dates" / "model.safetensors").stat().st_mtime_ns == times["dates"]
    assert (tiny / "tone" / "model.safetensors").stat().st_mtime_ns != times["tone"]

    script.train_skill(tiny / "again", tiny / "base", settings[0], "cpu", lambda _: None)
    assert all(tensor.equal(dates[name]) for name, tensor in load_file(tiny / "again" / "model.safetensors").items())


def test_the_study_file_names_what_is_made(script: Any) -> None:
    study = yaml.safe_load((ROOT / "studies" / "smollm2.yaml").read_text())
    assert study["genome"]["base_model"] == "smollm2_models/base"
    assert study["genome"]["models"] == [f"smollm2_models/{skill}" for skill in SKILLS]
    assert [task["name"] for task in study["tasks"]] == [f"smollm2_{skill}" for skill in SKILLS]
    assert sorted(each.skill for each in script.SETTINGS) == sorted(SKILLS)
