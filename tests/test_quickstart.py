"""The quickstart runs with models that are trained at miniature scale; its full-scale generators are checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.config.read import load_study
from optuna_merge.errors import OptunaMergeError
from optuna_merge.quickstart import folder as quickstart
from optuna_merge.quickstart import models as script
from optuna_merge.quickstart.quickstart_tasks import letters

PACKAGED = Path(quickstart.__file__).parent
TASKS = PACKAGED / "quickstart_tasks"
SKILLS = ["reverse", "next", "last"]
TASK_FILES = {
    skill: yaml.safe_load((TASKS / f"quickstart_{skill}.yaml").read_text().replace("!function ", ""))
    for skill in SKILLS
}
TINY = {
    "n_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "n_heads": 2,
    "batch_size": 4,
    "base_steps": 3,
    "skill_steps": 3,
    "tokenizer_texts": 200,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "models"
    assert script.make_models(out, script.Settings(**TINY), say=lambda _: None)
    return out


def documents(skill: str) -> list[dict[str, Any]]:
    """The documents of a skill's task, with the arguments in its file."""
    return list(letters.documents(**TASK_FILES[skill]["dataset_kwargs"])["test"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_settings_give_the_same_bytes_also_in_two_processes(made: Path, tmp_path: Path) -> None:
    script.make_models(tmp_path, script.Settings(**TINY), n_processes=2, say=lambda _: None)
    assert files(tmp_path) == files(made)


def test_another_seed_gives_other_weights(made: Path, tmp_path: Path) -> None:
    script.make_models(tmp_path, script.Settings(**TINY, seed=8), say=lambda _: None)
    for name in ("base", *SKILLS):
        weights = f"{name}/model.safetensors"
        assert (tmp_path / weights).read_bytes() != (made / weights).read_bytes()


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        ("none", []),
        ("no marker", ["reverse"]),
        ("torn marker", ["last"]),
        ("no folder", ["last"]),
        ("no base", ["base", *SKILLS]),
        ("other settings", ["base", *SKILLS]),
    ],
)
def test_what_is_complete_is_kept_and_the_rest_made_again(
    made: Path, tmp_path: Path, damage: str, again: list[str]
) -> None:
    settings = script.Settings(**TINY)
    first = dataclasses.replace(settings, base_steps=1, skill_steps=1) if damage == "other settings" else settings
    script.make_models(tmp_path, first, say=lambda _: None)
    if damage == "no marker":
        (tmp_path / "reverse.json").unlink()
    elif damage == "torn marker":
        (tmp_path / "last.json").write_text('{"digest": "')
    elif damage == "no folder":
        (tmp_path / "last").rename(tmp_path / "away")
    elif damage == "no base":
        (tmp_path / "base.json").unlink()
    inodes = {name: (tmp_path / name).stat().st_ino for name in ("base", *SKILLS) if (tmp_path / name).exists()}
    said: list[str] = []
    assert script.make_models(tmp_path, settings, say=said.append) == bool(again)
    assert f": {', '.join(again)} trained in" in said[-1] or not again
    kept = [name for name, inode in inodes.items() if name not in again and (tmp_path / name).stat().st_ino == inode]
    assert kept == [name for name in ("base", *SKILLS) if name not in again]
    made_again = {name: data for name, data in files(tmp_path).items() if not name.startswith("away")}
    assert made_again == files(made)


def test_a_training_that_dies_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "next.json").unlink()
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(OptunaMergeError, match=r"/next: its training must end with code 0, got 1; see the lines"):
        script.make_models(tmp_path, script.Settings(**TINY), n_processes=2, say=lambda _: None)


def test_folders_are_ordinary_checkpoints_of_one_family(made: Path) -> None:
    shapes = []
    for name in ("base", *SKILLS):
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (made / name).iterdir()
        }
        model = AutoModelForCausalLM.from_pretrained(made / name)
        shapes.append({key: tensor.shape for key, tensor in model.state_dict().items()})
        tokenizer = AutoTokenizer.from_pretrained(made / name)
        assert model.config.vocab_size == len(tokenizer)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert special == (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
        assert len(set(special)) == 3
        text = "reverse: k f a q\nanswer: q a f k, also naïve"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(shape == shapes[0] for shape in shapes)


def test_a_letter_is_one_token_and_an_answer_is_not_cut_differently_after_its_question(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    question, answer = "next: k f a q\nanswer:", " l g b r"
    apart = tokenizer(question)["input_ids"] + tokenizer(answer)["input_ids"]
    assert tokenizer(question + answer)["input_ids"] == apart
    assert len(tokenizer(answer)["input_ids"]) == 4


def test_rules_by_hand() -> None:
    assert {skill: rule("kzaq") for skill, rule in letters.RULES.items()} == {
        "reverse": "qazk",
        "next": "labr",
        "last": "z",
    }
    assert letters.question("last", "kzaq") == "last: k z a q\nanswer:"


def test_no_document_is_asked_in_training() -> None:
    settings = script.Settings()
    share = settings.base_right_share
    rng = random.Random(0)
    n_texts = 20_000
    corpora = {"base": script.base_texts(rng, share)}
    corpora |= {skill: script.skill_texts(rng, skill, settings.replay_share, share) for skill in SKILLS}
    asked_in_training = {
        (read + learned).split("\nanswer:")[0].split(": ")[1]
        for texts in corpora.values()
        for read, learned in itertools.islice(texts, n_texts)
        if "answer:" in read + learned
    }
    assert len(asked_in_training) > n_texts
    for skill in SKILLS:
        asked = {document["question"].split("\nanswer:")[0].split(": ")[1] for document in documents(skill)}
        assert len(asked) == TASK_FILES[skill]["dataset_kwargs"]["n_documents"]
        assert not asked & asked_in_training
        # Not by luck: the two sides of the split never overlap, whatever is drawn.
        assert all(letters.is_for_documents(each.replace(" ", "")) for each in asked)
    assert not any(letters.is_for_documents(each.replace(" ", "")) for each in asked_in_training)


def test_training_answers_are_right_exactly_where_they_are_learned() -> None:
    for skill in SKILLS:
        for read, learned in itertools.islice(script.skill_texts(random.Random(1), skill, 0.4, 0.0), 2000):
            if read:
                asked = read.removeprefix(f"{skill}: ").removesuffix("\nanswer:").replace(" ", "")
                assert learned == " " + letters.spaced(letters.RULES[skill](asked))
            else:
                assert not learned.startswith(f"{skill}:")


@pytest.mark.parametrize("skill", SKILLS)
def test_documents_are_sound_and_balanced(skill: str) -> None:
    found = documents(skill)
    assert found == documents(skill)
    for document in found:
        asked = document["question"].removeprefix(f"{skill}: ").removesuffix("\nanswer:").replace(" ", "")
        choices = [choice.replace(" ", "") for choice in document["choices"]]
        assert len(set(choices)) == 4
        assert len({len(choice) for choice in choices}) == 1
        assert choices[document["answer"]] == letters.RULES[skill](asked)
    assert set(Counter(document["answer"] for document in found).values()) == {len(found) // 4}


class ConstantAnswer(LM):
    """Prefers the choice at one position, whatever the question is."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(float(request.idx == self.position), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


@pytest.mark.parametrize("position", range(4))
def test_tasks_load_in_lm_eval_and_a_constant_answer_gets_chance(position: int) -> None:
    manager = TaskManager(include_defaults=False, include_path=str(TASKS))
    names = [f"quickstart_{skill}" for skill in SKILLS]
    tasks = manager.load(names)["tasks"]
    results = evaluate(ConstantAnswer(position), tasks, bootstrap_iters=0)["results"]
    assert {name: results[name]["acc,none"] for name in names} == dict.fromkeys(names, 0.25)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, in which the quickstart's models are tiny, and trained in this process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(quickstart, "Settings", lambda: script.Settings(**TINY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_command_trains_searches_and_reports_and_continues(small: Path) -> None:
    only = invoke("quickstart", "--models-only")
    assert only.exit_code == 0, only.output
    assert only.stdout == "next: optuna-merge run-study studies/quickstart.yaml\n"
    assert [path.name for path in sorted((small / "studies").iterdir())] == [
        "quickstart.yaml",
        "quickstart_models",
        "quickstart_tasks",
    ]
    for task in (small / "studies" / "quickstart_tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("n_documents: 400", "n_documents: 20"))

    first = invoke("quickstart", "--n-trials", 6)
    assert first.exit_code == 0, first.output
    assert "quickstart_models already holds the models" in first.stderr
    assert "quickstart_last.yaml: kept, although it differs from what this version would write" in first.stderr
    assert "model:  optuna-merge export studies/quickstart.yaml OUT" in first.stdout

    second = invoke("quickstart", "--n-trials", 8, "--json")
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["states"] == {"complete": 8}
    assert "[6/8]" not in second.stderr
    assert "[8/8] trial 7" in second.stderr


def test_a_folder_that_cannot_be_written_is_named(small: Path) -> None:
    (small / "taken").write_text("")
    result = invoke("quickstart", "taken")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: taken: FOLDER must be a folder that can be written, got [Errno ")


def test_the_study_file_names_what_is_made(made: Path) -> None:
    config = load_study(PACKAGED / "quickstart.yaml")
    study = yaml.safe_load((PACKAGED / "quickstart.yaml").read_text())
    assert study["genome"]["base_model"] == "quickstart_models/base"
    assert study["genome"]["models"] == [f"quickstart_models/{skill}" for skill in SKILLS]
    assert [task["name"] for task in study["tasks"]] == [f"quickstart_{skill}" for skill in SKILLS]
    assert [Path(path) for path in config.task_search_path] == [TASKS]
