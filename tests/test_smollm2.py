"""SmolLM2 itself, from its package: converted, merged and scored as by lm-eval; and the script that fine-tunes it."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import optuna
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optuna_merge import MergeObjective
from optuna_merge.merging.export import export
from optuna_merge.study.loaders import LocalLoader
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


@pytest.fixture(scope="module")
def real(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's study file, with the base from its package and random adapters of it as the fine-tunes."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(ROOT / "eval_tasks" / "smollm2", folder / "eval_tasks" / "smollm2")
    models = folder / "studies" / "smollm2_models"
    models.mkdir(parents=True)
    try:
        script.make_base(models / "base")
        script.make_words(folder / "eval_tasks" / "data" / script.WORDS_FILE.name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package index does not serve the wheels of SmolLM2 and its words: {error}")
    for number, skill in enumerate(SKILLS):
        write_adapter(models / skill, seed=number)
    study = yaml.safe_load((ROOT / "studies" / "smollm2.yaml").read_text())
    study |= {"limit": N_DOCUMENTS, "holdout": None}
    study["genome"]["models"] = [f"smollm2_models/base+smollm2_models/{skill}" for skill in SKILLS]
    study["study"] |= {"n_chunks": 1}
    file = folder / "studies" / "smollm2.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def write_adapter(folder: Path, seed: int) -> None:
    """A random low-rank adapter of SmolLM2's first queries and values, in PEFT's layout."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random_state = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(0, 30, 5):
        for module, width in (("q_proj", 576), ("v_proj", 192)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn((2, 576), generator=random_state)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn((width, 2), generator=random_state)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_merge_of_smollm2_is_scored_as_by_lm_eval(real: Path, tmp_path: Path) -> None:
    objective = MergeObjective.from_file(real)
    loader = objective.loader
    assert isinstance(loader, LocalLoader)
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(dict.fromkeys(objective.space.distributions, 0.5))
    study.optimize(objective, n_trials=1)
    merged = export(objective.recipe(study.trials[0]), tmp_path / "merged", merger=loader.merger)

    lm = HFLM(pretrained=str(merged), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(real.parent.parent / "eval_tasks"), include_defaults=False)
    names = [f"smollm2_{skill}" for skill in SKILLS]
    found = lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, limit=N_DOCUMENTS, apply_chat_template=True, bootstrap_iters=0
    )
    metrics = {name: "acc,none" if name == "smollm2_tone" else "exact_match,digits" for name in names}
    values = [found["results"][name][metric] for name, metric in metrics.items()]
    assert study.trials[0].value == pytest.approx(0.3333 * sum(values), abs=1e-9)

    theirs = [instance for name in names for instance in instances(found["samples"][name])]
    ours = loader.engine.respond(loader.engine.prepare([request for request, _ in theirs]))
    assert len(ours) == 2 * N_DOCUMENTS + 2 * N_DOCUMENTS
    for answer, (request, expected) in zip(ours, theirs, strict=True):
        assert "<|im_start|>user" in request.args[0]
        if request.request_type == "generate_until":
            assert answer == expected
        else:
            assert answer == (pytest.approx(expected[0], abs=1e-4), expected[1])


def instances(samples: list[dict[str, Any]]) -> Iterator[tuple[Instance, Any]]:
    """The requests of lm-eval's log, and what the model answered."""
    for sample in samples:
        for arguments, [response] in zip(sample["arguments"], sample["resps"], strict=True):
            kind = "generate_until" if isinstance(response, str) else "loglikelihood"
            yield Instance(kind, sample["doc"], tuple(arguments), 0), response
