"""``init``: the files that it writes pass ``check``, say what was found, and wrong input gives one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.config.read import load_study
from optuna_merge.testing.models import write_tiny_models
from tests.architectures.tiny import write_vision_models
from tests.checkpoints.test_senses import extended
from tests.conftest import write_task


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return error


def comment_above(text: str, key: str) -> str:
    """The comment above a key of a study file, in one line."""
    found = re.search(rf"((?:^ *#.*\n)*)^ *{key}:", text, re.MULTILINE)
    assert found is not None, text
    return " ".join(line.strip().removeprefix("# ") for line in found[1].splitlines())


@pytest.fixture
def home(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three models whose cards name their base, and a folder with two eval tasks."""
    for name in ("base", "model_0", "model_1"):
        shutil.copytree(tiny_models / name, tmp_path / "models" / name)
        if name != "base":
            card = "---\nlicense: mit\nbase_model: some-lab/base\n---\n# A fine-tune\n"
            (tmp_path / "models" / name / "README.md").write_text(card)
    write_task(tmp_path / "tasks", "one", 150)
    write_task(tmp_path / "tasks", "two", 50)
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODELS = ("models/model_0", "models/model_1")
TASKS = ("--tasks", "one,two", "--task-search-path", "tasks")


class TestFromModels:
    def test_the_file_says_what_was_found_and_passes_check(self, home: Path) -> None:
        models = ("models/base", *MODELS)
        made = invoke("init", *models, *TASKS, "--out", "studies/first.yaml", "--device", "cpu")
        assert made.exit_code == 0, made.output
        assert (
            "task_arithmetic of 2 models, 4 weights, 40 trials, 140 documents searched and 60 held out" in made.stdout
        )
        text = (home / "studies" / "first.yaml").read_text()
        assert text.startswith("# Which merge of model_0 and model_1 scores best on one and two?\n")
        assert re.search(r"^# Time: up to \S+ s a trial and \S+ s in all, by samples", text, re.MULTILINE)
        data = yaml.safe_load(text)
        assert data["genome"] == {
            "models": ["../models/model_0", "../models/model_1"],
            "base_model": "../models/base",
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
        }
        assert data["tasks"] == [{"name": name, "weight": 0.5, "metric": "acc,none"} for name in ("one", "two")]
        assert data["task_search_path"] == ["../tasks"]
        assert data["engine"] == {"device": "cpu", "backend": "hf", "dtype": "float32"}
        assert data["study"] == {"name": "first", "n_trials": 40}
        assert "All others name it in the card or the configuration" in comment_above(text, "base_model")
        assert comment_above(text, "layer_granularity").startswith("2 layers in 2 groups")
        assert comment_above(text, "n_trials").startswith("6 baselines, then about 7 trials for each of 4 weights")
        checked = invoke("check", "studies/first.yaml", "--json")
        assert checked.exit_code == 0, checked.output
        [warning] = json.loads(checked.stdout)["warnings"]
        assert warning.startswith("pruning: never, the documents make ")
        assert f"\n# Note: {warning}.\n" in text
        [line] = [line for line in made.stdout.splitlines() if line.startswith("next: ")]
        assert line.endswith("optuna-merge run-study studies/first.yaml")
        assert invoke(*line.split("optuna-merge ")[1].split(), "--n-trials", 7).exit_code == 0
        assert (home / "studies" / "first_study" / "best_config.yaml").exists()

    def test_without_cards_the_weights_tell_the_base(self, home: Path) -> None:
        for card in home.glob("models/*/README.md"):
            card.unlink()
        made = invoke("init", MODELS[0], "models/base", MODELS[1], *TASKS)
        assert made.exit_code == 0, made.output
        text = (home / "study.yaml").read_text()
        assert yaml.safe_load(text)["genome"]["base_model"] == "./models/base"
        assert "changed in unrelated directions (cosine 0.0" in comment_above(text, "base_model")

    def test_without_a_base_models_are_averaged(self, home: Path) -> None:
        made = invoke("init", *MODELS, "--base", "none", *TASKS, "--n-trials", 9, "--json")
        assert made.exit_code == 0, made.output
        config = load_study("study.yaml")
        assert (config.genome.merge_method, config.genome.base_model) == ("linear", None)
        assert config.study.n_trials == 9
        assert config.storage_path.name == "study"  # not study_study
        assert json.loads(made.stdout)["reasons"]["study.n_trials"] == "given on the command line"

    def test_metrics_are_those_of_the_tasks(self, home: Path) -> None:
        write_task(home / "tasks", "three", 150)
        file = home / "tasks" / "three.yaml"
        file.write_text(file.read_text().replace("metric: acc,", "metric: brier_score,").replace("true}", "false}"))
        made = invoke("init", *MODELS, "--base", "models/base", "--tasks", "one,three", *TASKS[2:])
        assert made.exit_code == 0, made.output
        tasks = yaml.safe_load((home / "study.yaml").read_text())["tasks"]
        assert tasks[1] == {"name": "three", "weight": -0.5, "metric": "brier_score,none"}

    def test_a_study_that_would_take_days_gets_fewer_documents(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("optuna_merge.study.choices.NIGHT_H", 1e-9)
        made = invoke("init", *MODELS, "--base", "models/base", *TASKS)
        assert made.exit_code == 0, made.output
        assert "105 documents searched and 45 held out" in made.stdout  # 100 of one and all 50 of two
        text = (home / "study.yaml").read_text()
        assert comment_above(text, "limit").startswith("Of each task, drawn at random: with all documents the study")
        config = load_study("study.yaml")
        assert (config.limit, config.shuffle) == (100, True)
        assert "105 documents in " in invoke("check", "study.yaml").stdout

    def test_adapters_get_their_model_and_share_it_as_base(
        self, home: Path, adapter: Callable[[str, str], None]
    ) -> None:
        adapter("lora_0", "../../models/base")
        adapter("lora_1", str(home / "models" / "base"))
        made = invoke("init", "adapters/lora_0", "adapters/lora_1", *TASKS)
        assert made.exit_code == 0, made.output
        genome = yaml.safe_load((home / "study.yaml").read_text())["genome"]
        base = str(home / "models" / "base")
        assert genome["models"] == [f"{base}+./adapters/lora_0", f"{base}+./adapters/lora_1"]
        assert genome["base_model"] == base
        adapter("lora_0", "/of/the/trainer")
        error = error_of(invoke("init", "adapters/lora_0", "adapters/lora_1", *TASKS, "--overwrite"))
        assert "the adapter's model must be found, got /of/the/trainer, which is no folder here" in error

    def test_a_model_that_sees_keeps_its_tokens(self, home: Path) -> None:
        whole, _ = write_vision_models("gemma3", home / "vision")
        extended(whole, home / "vision" / "more", "<image>")
        models = ("vision/more", "vision/language_1", *TASKS, "--base", "vision/language_0")
        made = invoke("init", *models, "--device", "cpu")
        assert made.exit_code == 0, made.output
        assert load_study("study.yaml").genome.tokenizer_source == "./vision/more"

    def test_other_vocabularies_are_united(self, home: Path) -> None:
        file = home / "models" / "model_0" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        last = max(tokenizer["model"]["vocab"].values())
        tokenizer["model"]["vocab"]["<|new|>"] = last + 1
        file.write_text(json.dumps(tokenizer))
        made = invoke("init", *MODELS, "--base", "models/base", *TASKS)
        assert made.exit_code == 0, made.output
        assert load_study("study.yaml").genome.tokenizer_source == "union"


@pytest.fixture
def adapter(home: Path) -> Callable[[str, str], None]:
    """A function that writes a LoRA adapter of rank 1 for the tiny models and the name of the model it says it has."""
    import torch
    from safetensors.torch import save_file

    def write(name: str, trained_for: str) -> None:
        folder = home / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": trained_for}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(len(list(home.glob("adapters/*"))))
        module = "base_model.model.model.layers.0.self_attn.o_proj"
        factors = {f"{module}.lora_{x}.weight": torch.randn(*shape, generator=generator) for x, shape in SHAPES.items()}
        save_file(factors, folder / "adapter_model.safetensors")

    return write


SHAPES = {"A": (1, 16), "B": (16, 1)}


class TestFromMergekitEvolve:
    @pytest.fixture
    def evolve(self, home: Path) -> Path:
        """A file of mergekit-evolve in a folder of its own, its models relative to the working directory."""
        genome = {"models": list(MODELS), "base_model": "models/base", "merge_method": "ties", "layer_granularity": 2}
        data: dict[str, Any] = {
            "genome": {**genome, "allow_negative_weights": True},
            "tasks": [{"name": "one", "weight": 0.3}, "two"],
            "limit": 40,
            "random_init": True,
        }
        (home / "evolve").mkdir()
        (home / "evolve" / "mine.yml").write_text(yaml.safe_dump(data))
        return Path("evolve/mine.yml")

    def test_file_and_command_line_become_one_file(self, home: Path, evolve: Path) -> None:
        line = ["--storage-path", "out", "--task-search-path", "tasks", "--max-fevals", 60, "--sigma0", 0.2]
        line += ["--force-population-size", 6, "--random-seed", 5, "--batch-size", 4, "--no-merge-cuda", "-s", "pool"]
        line += ["--timeout", 1000, "--num-gpus", 2, "--wandb", "--wandb-project", "mine", "--save-final-model"]
        made = invoke("init", "--from", evolve, "--out", "studies/mine.yaml", *line)
        assert made.exit_code == 0, made.output
        assert "--strategy pool has no effect" in made.stderr
        text = (home / "studies" / "mine.yaml").read_text()
        config = load_study(home / "studies" / "mine.yaml")
        assert config.genome.models == ("../models/model_0", "../models/model_1")
        assert config.genome.base_model == "../models/base"
        assert (config.genome.merge_method, config.genome.layer_granularity) == ("ties", 2)
        assert [(task.name, task.weight) for task in config.tasks] == [("one", 0.3), ("two", 1.0)]
        assert (config.limit, config.random_init, config.holdout and config.holdout.fraction) == (40, True, 0.3)
        assert config.storage_path.resolve() == home / "out"
        assert [path.resolve() for path in config.task_search_path] == [home / "tasks"]
        study, engine = config.study, config.engine
        assert (study.n_trials, study.n_workers, study.seed, study.timeout) == (60, 2, 5, 1000)
        assert (study.cmaes.sigma0, study.cmaes.popsize) == (0.2, 6)
        assert (engine.device, engine.merge_device, engine.batch_size, engine.dtype) == ("auto", "cpu", 4, "bfloat16")
        assert comment_above(text, "dtype").startswith("As mergekit-evolve does")
        run = "optuna-merge run-study studies/mine.yaml --wandb --save-final-model --num-gpus 2 --wandb-project mine"
        assert f"# Run it: {run}\n" in text
        checked = invoke("check", "studies/mine.yaml")
        assert checked.exit_code == 0, checked.output
        assert "population 6" in checked.stdout

    def test_a_study_file_beside_it_keeps_its_paths(self, home: Path, study_file: Callable[..., Path]) -> None:
        file = study_file(study={"name": "tiny", "storage": "journal://s.log"})
        made = invoke("init", "--from", file, "--out", "again.yaml")
        assert made.exit_code == 0, made.output
        before, after = load_study(file), load_study("again.yaml")
        assert after.model_copy(update={"path": before.path, "engine": before.engine}) == before.model_copy(
            update={"study": before.study.model_copy(update={"n_trials": 100})}
        )
        assert invoke("init", "--from", file, "--out", "studies/far.yaml").exit_code == 0
        far = load_study("studies/far.yaml")
        assert far.storage_path.resolve() == after.storage_path
        assert far.study.storage == after.study.storage

    def test_its_problems_have_its_lines(self, home: Path, evolve: Path) -> None:
        evolve.write_text(evolve.read_text().replace("ties", "tis").replace("limit: 40", "limit: -1"))
        made = invoke("init", "--from", evolve)
        assert re.search(r"mine.yml:5: genome.merge_method must be a known merge method, got 'tis'", made.stderr)
        assert re.search(r"mine.yml:\d+: limit must be greater than 0", made.stderr)
        assert not (home / "study.yaml").exists()


class TestWrongInput:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ([], "MODEL must name a model, got none; name fine-tunes, or a mergekit-evolve file with --from"),
            (["models/nope", *MODELS, *TASKS], "model 'models/nope' must be a folder or a model of the hub"),
            (
                MODELS,
                "--tasks must name eval tasks, got none; lm-eval ls tasks lists lm-eval's; --task-search-path names a",
            ),
            (
                [*MODELS, "--task-search-path", "tasks"],
                "--tasks must name eval tasks, got none; --task-search-path has",
            ),
            ([*MODELS, "--base", "models/base", "--tasks", "gsm8k"], "tasks[0].name must be no known benchmark's own"),
            ([*MODELS, MODELS[0], *TASKS], "models must be different, got models/model_0 twice; leave one out"),
            (
                [MODELS[0], "--base", "none", *TASKS],
                "models must be two or more to be merged without a base, got 1; add one",
            ),
            ([MODELS[0], "--base", MODELS[0], *TASKS], "models must be others than the base, got models/model_0 alone"),
            (
                [*MODELS, *TASKS],
                "base model (all models name it in the card or the configuration): model 'some-lab/base'",
            ),
            ([*MODELS, *TASKS, "--out", "no/where.yaml"], "no/where.yaml: --out must be in a folder that exists; make"),
            (["--from", "x.yml", "--base", "models/base"], "x.yml: study file must exist"),
            ([*MODELS, *TASKS, "--base", "models/base", "--load-in-8bit"], "--load-in-8bit must be given for vLLM"),
            (
                [*MODELS, *TASKS, "--base", "models/base", "--card", "big"],
                "card must be a size such as 24GB, got 'big'",
            ),
            (
                [*MODELS, *TASKS, "--base", "models/base", "--card", "0.01G"],
                "the study must fit into the card's 0.01 GiB",
            ),
        ],
    )
    def test_one_line_says_what_to_do(self, line: list[str], message: str, home: Path) -> None:
        error = error_of(invoke("init", *line))
        assert message in error
        assert not (home / "study.yaml").exists()

    def test_a_base_that_nobody_knows(self, home: Path) -> None:
        (home / "models" / "model_1" / "README.md").unlink()
        error = error_of(invoke("init", *MODELS, *TASKS))
        assert (
            "base model must be named by all models or be one of them, got some-lab/base by models/model_0, nothing by"
            " models/model_1, and their weights do not show it; name it with --base, or merge without one: --base none"
        ) in error

    def test_options_that_the_file_of_mergekit_evolve_decides(
        self, home: Path, study_file: Callable[..., Path]
    ) -> None:
        error = error_of(invoke("init", "--from", study_file(), "--out", "new.yaml", "--tasks", "one"))
        assert "--tasks must be left out with --from, got one; change it in" in error

    def test_a_file_that_exists_is_kept(self, home: Path) -> None:
        (home / "study.yaml").write_text("mine")
        error = error_of(invoke("init", *MODELS, *TASKS))
        assert "study.yaml: --out must be a new file, got one that exists; name another or add --overwrite" in error
        assert (home / "study.yaml").read_text() == "mine"
        assert invoke("init", *MODELS, "--base", "models/base", *TASKS, "--overwrite").exit_code == 0
        assert load_study("study.yaml").question.endswith("?")

    def test_models_that_do_not_fit_together(self, home: Path) -> None:
        _, [other] = write_tiny_models(home / "other", 1, "qwen2", n_layers=2)
        error = error_of(invoke("init", MODELS[0], other, "--base", "models/base", *TASKS))
        assert "architectures must match" in error
