"""Runs the examples of the README as they stand, on tiny models that take the names of their own.

They are the study of three 7 B models, and the study in Python of the quickstart's models.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.quickstart.folder import write_quickstart
from optuna_merge.quickstart.models import Settings
from optuna_merge.study.folder import OWNER_FILE
from optuna_merge.testing.models import write_tiny_models
from tests.checkpoints.test_vocabulary import extend
from tests.test_quickstart import TINY

ROOT = Path(__file__).parent.parent


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copies of ``studies/`` and ``eval_tasks/``; folders named like the hub's models, Hermes with two more tokens."""
    for name in ("studies", "eval_tasks"):
        skip = shutil.ignore_patterns("*.jsonl", "data", "quickstart_*", "*_study", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    base, models = write_tiny_models(tmp_path / "models", 3, "mistral", n_layers=16, dtype="bfloat16", spread=0.2)
    genome = yaml.safe_load((ROOT / "studies" / "spartqa_alpaca.yaml").read_text())["genome"]
    for reference, path in zip([genome["base_model"], *genome["models"]], [base, *models], strict=True):
        target = tmp_path / "studies" / reference
        target.parent.mkdir(exist_ok=True)
        if "Hermes" in reference:
            extend(path, target, ["<|im_end|>", "<|im_start|>"])
        else:
            shutil.copytree(path, target)
    return tmp_path


@pytest.fixture
def datasets_folder(tmp_path: Path) -> Path:
    spartqa = [
        {
            "story": f"The cat sat on mat {i}.",
            "question": "Which is left?",
            "candidate_answers": ["cat", "dog", "mat", "none"],
            "answer": i % 4,
        }
        for i in range(1100)
    ]
    alpaca = [
        {"instruction": f"Count to {i}.", "input": "x" if i % 3 == 0 else "", "output": "one two", "text": ""}
        for i in range(900)
    ]
    for name, rows in (("metaeval__spartqa-mchoice", spartqa), ("vicgalle__alpaca-gpt4", alpaca)):
        folder = tmp_path / "local" / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "local"


def test_the_example_runs_as_it_stands(project: Path, datasets_folder: Path, tmp_path: Path) -> None:
    study = project / "studies" / "spartqa_alpaca.yaml"
    before = invoke("check", study)
    assert before.exit_code == 1
    assert "optuna-merge prepare-data" in before.stderr

    prepared = invoke("prepare-data", study, "--from", datasets_folder)
    assert prepared.exit_code == 0, prepared.output
    assert len((project / "eval_tasks" / "data" / "spartqa_train.jsonl").read_text().splitlines()) == 1000
    assert len((project / "eval_tasks" / "data" / "alpaca_prompt_format.jsonl").read_text().splitlines()) == 500

    checked = invoke("check", study, "--json")
    assert checked.exit_code == 0, checked.output
    found = json.loads(checked.stdout)
    assert found["dtype"] == "bfloat16"
    assert found["space"]["n_dimensions"] == 2 * 3
    assert found["space"]["first"] == "layers_00_07.Dans-AdventurousWinds-Mk2-7b.weight"
    assert {task["name"]: task["weight"] for task in found["tasks"]} == {
        "alpaca_prompt_format": 0.4,
        "spartqa_train": 0.6,
    }

    run = invoke("run-study", study, "--n-trials", 9, "--no-merge-cuda")
    assert run.exit_code == 0, run.output
    assert "[9/9] trial 8" in run.stderr
    best = yaml.safe_load((project / "studies" / "spartqa_alpaca_study" / "best_config.yaml").read_text())
    assert best["merge_method"] == "task_arithmetic"
    assert best["out_dtype"] == "bfloat16"

    out = tmp_path / "merged"
    assert invoke("export", study, out).exit_code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 320


def test_the_study_in_python_runs_after_the_quickstart(tmp_path: Path) -> None:
    """What ``optuna-merge quickstart`` makes, smaller, then the block of the README word for word, twice."""
    study = write_quickstart(tmp_path / "studies", lambda _: None, Settings(**TINY))
    for task in (tmp_path / "studies" / "quickstart_tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("n_documents: 400", "n_documents: 40"))
    run = invoke("run-study", study, "--n-trials", 8)
    assert run.exit_code == 0, run.output
    ours, theirs = tmp_path / "studies" / "quickstart_study", tmp_path / "studies" / "plugin_study"
    before = {file: file.read_bytes() for file in ours.rglob("*") if file.is_file()}
    [block] = re.findall(r"```python\n(.*?MergeObjective.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for _ in range(2):
        shown = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "merge_method: task_arithmetic" in shown.stdout
        assert len([*theirs.glob("documents/*/*")]) == 50
    assert {file: file.read_bytes() for file in ours.rglob("*") if file.is_file()} == before
    owners = [json.loads((folder / OWNER_FILE).read_text()) for folder in (ours, theirs)]
    assert owners[0]["study"] == "quickstart"
    assert owners[0]["id"] != owners[1]["id"]
    assert invoke("report", study, "--json").exit_code == 0


def test_the_tutorial_from_its_first_line_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and commands as they stand, with smaller models than the quickstart's and fewer trials."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"```(?:python|yaml)\n# (my_tasks/\S+)\n(.*?)```", text, re.DOTALL):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines = [line.removeprefix("optuna-merge ") for line in lines if not line.startswith("pip install")]
    assert lines.pop(0) == "quickstart work --models-only"
    write_quickstart(Path("work"), lambda _: None, Settings(**TINY))
    for line in lines:
        few = ("--n-trials", "18") if line.startswith("run-study") else ()
        result = invoke(*line.split(), *few)
        assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} >= {"study.yaml", "report.html", "merged_model"}
    assert AutoModelForCausalLM.from_pretrained("merged_model").config.model_type == "llama"


def test_the_example_of_another_study_runs(tmp_path: Path) -> None:
    file = write_quickstart(tmp_path, lambda _: None, Settings(**TINY))
    for task in (tmp_path / "quickstart_tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("n_documents: 400", "n_documents: 20"))
    script = ROOT / "examples" / "merge_in_your_study.py"
    shown = subprocess.run(
        [sys.executable, str(script), str(file), "--n-trials", "9"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^best: 0\.\d+, trial \d, accuracy 0\.\d+$", shown.stdout, re.MULTILINE)
    assert "merge_method: task_arithmetic" in (tmp_path / "best_merge.yaml").read_text()
