"""The options of ``run-study``: all of mergekit-evolve's, and the same on every command over a study file."""

from __future__ import annotations

import ast
import json
import re
import shlex
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.cli.options import StudyArguments
from optuna_merge.cli.processes import worker_tasks
from optuna_merge.config.read import load_study
from optuna_merge.errors import EngineError, OptunaMergeError
from optuna_merge.study.engines import make_loader
from optuna_merge.study.models import StudyModels

ROOT = Path(__file__).parents[2]
OVER_A_STUDY = ("check", "status", "report", "dashboard", "explain", "export", "prepare-data")

# A value for each option of mergekit-evolve that takes one.
VALUES = {
    "--max-fevals": "7",
    "--strategy": "serial",
    "-s": "buffered",
    "--storage-path": "elsewhere",
    "--num-gpus": "1",
    "--random-seed": "5",
    "--batch-size": "4",
    "--sigma0": "0.2",
    "--wandb-project": "mine",
    "--wandb-entity": "me",
    "--task-search-path": "tasks",
    "--timeout": "1000",
    "--force-population-size": "5",
}

# What a machine without GPU or vLLM answers to the options that need them.
REFUSED = {
    **({} if find_spec("vllm") else {"--vllm": "vllm must be installed to be used"}),
    **(
        {}
        if torch.cuda.is_available()
        else {
            "--num-gpus": "device 'cuda:0' is not there",
            "--merge-cuda": "engine.merge_device must be a device of this machine, got cuda (0 CUDA devices found)",
        }
    ),
    "--load-in-8bit": "--load-in-8bit must be given for vLLM, got the transformers engine",
    "--load-in-4bit": "--load-in-4bit must be given for vLLM, got the transformers engine",
}

NEEDLESS = {
    "-s": "--strategy buffered has no effect: each worker takes the next trial as soon as it is free",
    "--strategy": "--strategy serial has no effect: each worker takes the next trial as soon as it is free",
    "--no-in-memory": "--no-in-memory has no effect: a merge is written straight into the model that is scored",
    "--reshard": "--reshard has no effect: tensors are read from the models' own files",
    "--allow-crimes": "--allow-crimes has no effect: models of different architectures are refused",
}


def mergekit_evolve() -> click.Command:
    """mergekit-evolve's command, without its body: the module imports ray, which we do not install."""
    spec = find_spec("mergekit")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "scripts" / "evolve.py"
    [main] = [
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    main.body, main.args = [ast.Pass()], ast.parse("lambda **_: 0", mode="eval").body.args
    names: dict[str, Any] = {"click": click}
    exec(compile(ast.fix_missing_locations(ast.Module([main], [])), str(source), "exec"), names)
    return names["main"]


THEIRS = [parameter for parameter in mergekit_evolve().params if isinstance(parameter, click.Option)]
SPELLINGS = [
    (spelling, option)
    for option in THEIRS
    for spelling in (*option.opts, *option.secondary_opts)
    if spelling.startswith("-")
]


class Recorder:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parsed(file: Path, *line: str) -> StudyArguments:
    """What ``run-study`` reads from its command line."""
    given = get_command(app).commands["run-study"].make_context("run-study", [str(file), *line]).params
    del given["as_worker"]
    return StudyArguments(**given)


def with_value(spelling: str) -> list[str]:
    return [spelling, VALUES[spelling]] if spelling in VALUES else [spelling]


def errors_of(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_the_list_is_mergekit_evolves() -> None:
    assert len(SPELLINGS) >= 32
    assert {spelling for spelling, option in SPELLINGS if not option.is_flag} == set(VALUES)


@pytest.mark.parametrize("spelling", REFUSED)
def test_what_this_machine_lacks_is_refused(spelling: str, study_file: Callable[..., Path]) -> None:
    run = invoke("run-study", study_file(), *with_value(spelling))
    [error] = errors_of(run)
    assert run.exit_code == 1
    assert REFUSED[spelling] in error
    assert "; " in error, "it says what to do instead"


@pytest.mark.parametrize("spelling", [spelling for spelling, _ in SPELLINGS if spelling not in REFUSED])
def test_run_study_takes_each_option_of_mergekit_evolve_alone(
    spelling: str, study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = parsed(study_file(), *with_value(spelling))
    given.load()
    assert [line[: len(NEEDLESS.get(spelling, ""))] for line in given.needless()] == [
        line for needless, line in NEEDLESS.items() if needless == spelling
    ]


@pytest.mark.parametrize("which", [0, -1], ids=["first spellings", "last spellings"])
def test_a_study_runs_with_all_options_of_mergekit_evolve(
    which: int, study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option has more than two spellings, so both lines together have all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    spellings = [[spelling for spelling, its in SPELLINGS if its is option] for option in THEIRS]
    assert max(map(len, spellings)) == 2
    accepted = [[spelling for spelling in each if spelling not in REFUSED] for each in spellings]
    line = [each[which] for each in accepted if each]
    file = study_file(n_documents=8, study={"name": "tiny", "n_chunks": 1}, holdout=None)
    run = invoke("run-study", file, *[word for spelling in line for word in with_value(spelling)])
    assert run.exit_code == 0, run.output
    effects = [text for text in run.stderr.splitlines() if "has no effect" in text]
    expected = sorted(NEEDLESS[spelling] for spelling in line if spelling in NEEDLESS)
    assert [text[: len(start)] for text, start in zip(sorted(effects), expected, strict=True)] == expected
    assert (tmp_path / "elsewhere" / "best_config.yaml").exists()


def test_the_page_says_what_each_option_of_mergekit_evolve_does() -> None:
    text = (ROOT / "docs" / "from-mergekit-evolve.md").read_text()
    cells = re.findall(r"^\| (`-.*?) \|", text, re.MULTILINE)
    listed = [spelling for cell in cells for spelling in re.findall(r"`(-[\w-]+)", cell)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {spelling for spelling, _ in SPELLINGS}
    for spelling, line in NEEDLESS.items():
        [row] = [row for row in text.splitlines() if row.startswith("|") and f"`{spelling}" in row.split("|")[1]]
        assert "no effect" in row, line


class TestWhatAnOptionDoes:
    def overrides(self, line: str, study_file: Callable[..., Path], **changes: Any) -> dict[str, Any]:
        """What an option replaces in a study file."""
        return parsed(study_file(**changes), *shlex.split(line)).overrides()

    @pytest.mark.parametrize(
        ("line", "overrides"),
        [
            ("--force-population-size 5", {"study.sampler.popsize": 5}),
            ("--i-understand-the-depths-of-the-evils-i-am-unleashing", {"allow_benchmark_tasks": True}),
            ("--no-trust-remote-code", {"engine.trust_remote_code": False}),
            ("--no-vllm", {"engine.backend": "hf"}),
            ("--num-gpus 1 --merge-cuda", {"engine.device": "cuda:0", "engine.merge_device": "auto"}),
            ("--num-gpus 2", {"engine.device": "cuda:0", "study.n_workers": 2}),
            ("--num-gpus 2 --workers 4", {"engine.device": "cuda:0", "study.n_workers": 4}),
            ("--devices cuda:1,cuda:0", {"engine.device": "cuda:1", "study.n_workers": 2}),
            (
                "--devices cuda:1,cuda:0 --vllm",
                {"engine.device": "auto", "study.n_workers": 2, "engine.backend": "vllm"},
            ),
            ("--load-in-8bit --vllm", {"engine.backend": "vllm", "engine.vllm.quantization": "fp8"}),
            ("--load-in-4bit --vllm", {"engine.backend": "vllm", "engine.vllm.quantization": "mxfp4"}),
            ("--allow-crimes --no-reshard -s pool --in-memory", {}),
        ],
    )
    def test_it_replaces_keys(self, line: str, overrides: dict[str, Any], study_file: Callable[..., Path]) -> None:
        assert self.overrides(line, study_file) == overrides

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--devices cuda:0,", r"--devices must be names separated by commas, got 'cuda:0,'; try cuda:0,cuda:1"),
            ("--devices cuda:0 --num-gpus 2", r"--devices must be given alone, got --num-gpus too; leave one of them"),
            ("--device cpu --num-gpus 2", r"--device must be given alone, got --num-gpus too; leave one of them out"),
            ("--load-in-8bit --load-in-4bit", r"--load-in-8bit must be given alone, got --load-in-4bit too; leave"),
            ("--load-in-4bit", r"--load-in-4bit must be given for vLLM, got the transformers engine, .*; add --vllm"),
        ],
    )
    def test_a_contradiction_is_refused(self, line: str, message: str, study_file: Callable[..., Path]) -> None:
        with pytest.raises(OptunaMergeError, match=message):
            self.overrides(line, study_file)

    def test_an_option_of_cmaes_for_another_sampler_is_refused(self, study_file: Callable[..., Path]) -> None:
        file = study_file(study={"name": "tiny", "sampler": "random"})
        [error] = errors_of(invoke("run-study", file, "--force-population-size", 5))
        assert "study.sampler.popsize must be absent for random, got 5" in error

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_quantization_that_needs_a_gpu_is_refused_on_a_cpu(self, study_file: Callable[..., Path]) -> None:
        config = load_study(study_file(), {"engine.backend": "vllm", "engine.vllm.quantization": "fp8"})
        with pytest.raises(EngineError, match=r"engine.vllm.quantization must be left out on a CPU, got fp8; vLLM"):
            make_loader(config, StudyModels.open(config))

    def test_each_worker_of_vllm_sees_its_own_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        given = {"study.n_workers": 2}
        own = [
            {"number": 1, "overrides": {**given, "engine.device": "cuda:0"}, "gpu": "0"},
            {"number": 2, "overrides": {**given, "engine.device": "cuda:0"}, "gpu": "1"},
        ]
        assert worker_tasks(given, ["cuda:0", "cuda:1"], vllm=True) == own
        assert [task["gpu"] for task in worker_tasks(given, [None, None], vllm=True)] == [None, None]
        shared = worker_tasks(given, ["cuda:0", "cuda:1"], vllm=False)
        assert [(task["overrides"]["engine.device"], task["gpu"]) for task in shared] == [
            ("cuda:0", None),
            ("cuda:1", None),
        ]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5ebe9f43")
        assert [task["gpu"] for task in worker_tasks({}, ["cuda:0", "cuda:1"], vllm=True)] == ["2", "GPU-5ebe9f43"]
        with pytest.raises(OptunaMergeError, match=r"CUDA_VISIBLE_DEVICES must show cuda:2, got 2,GPU-5ebe9f43; ask"):
            worker_tasks({}, ["cuda:2"], vllm=True)

    def test_the_final_model_is_the_best_merge(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file()
        run = invoke("run-study", file, "--n-trials", 7, "--save-final-model", "--json")
        assert run.exit_code == 0, run.output
        assert f"final model: {tmp_path / 'out' / 'final_model'}" in run.stderr
        assert json.loads(run.stdout)["best_trial"] is not None
        assert invoke("export", file, tmp_path / "best").exit_code == 0
        ours, best = (
            load_file(path / "model.safetensors") for path in (tmp_path / "out" / "final_model", tmp_path / "best")
        )
        assert ours.keys() == best.keys()
        assert all(ours[name].equal(best[name]) for name in best)
        again = invoke("run-study", file, "--n-trials", 8, "--save-final-model")
        assert again.exit_code == 0, again.output
        merged = yaml.safe_load((tmp_path / "out" / "final_model" / "mergekit_config.yml").read_text())
        assert merged == yaml.safe_load((tmp_path / "out" / "best_config.yaml").read_text())

    def test_the_line_to_export_trusts_the_code_that_the_study_trusted(self) -> None:
        given = StudyArguments(file=Path("a b.yaml"), seed=3, trust_remote_code=True)
        assert (
            given.next_line("export", "OUT") == "optuna-merge export 'a b.yaml' OUT --random-seed 3 --trust-remote-code"
        )


class TestTheSameLineWithAnotherVerb:
    @pytest.mark.parametrize("command", OVER_A_STUDY)
    def test_it_has_every_option_of_run_study(self, command: str) -> None:
        def options(name: str) -> dict[str, Any]:
            found = get_command(app).commands[name].params
            spelled = [(opt, param) for param in found for opt in (*param.opts, *param.secondary_opts)]
            assert len({opt for opt, _ in spelled}) == len(spelled), "each spelling belongs to one option"
            return {opt: param.name for opt, param in spelled if opt.startswith("-")}

        ours = options("run-study")
        del ours["--as-worker"]
        assert {opt: name for opt, name in options(command).items() if opt in ours} == ours

    def test_it_runs(self, study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        study = {"name": "tiny", "n_trials": 3, "pruner": "none", "n_chunks": 2}
        file = study_file(n_documents=16, task_search_path=None, engine=None, study=study)
        line = ["--max-fevals", 16, "--storage-path", tmp_path / "elsewhere", "--task-search-path", tmp_path / "tasks"]
        line += ["--storage", f"journal://{tmp_path}/study.log", "--device", "cpu", "--workers", 1]
        line += ["--batch-size", 4, "--sigma0", 0.2, "--force-population-size", 5, "--random-seed", 5]
        line += ["--timeout", 1000, "--no-merge-cuda", "--no-vllm", "--wandb", "--wandb-project", "p"]
        line += ["--tracker", f"{__name__}.Recorder", "--no-trust-remote-code", "--in-memory", "-s", "pool"]
        line += ["--i-understand-the-depths-of-the-evils-i-am-unleashing", "--save-final-model", "--no-reshard"]
        line += ["--no-allow-crimes", "--json"]
        run = invoke("run-study", file, *line)
        assert run.exit_code == 0, run.output
        assert len(json.loads(run.stdout)["rows"]) >= 6
        (tmp_path / "elsewhere" / "holdout.json").unlink()  # so the report must open everything, too
        for command in ("check", "status", "report", "explain", "export"):
            again = invoke(command, file, *([tmp_path / "OUT"] if command == "export" else []), *line)
            assert again.exit_code == 0, (command, again.output)
            assert isinstance(json.loads(again.stdout), dict)
            assert "has no effect" not in again.stderr
        assert "population 5" in invoke("check", file, *line[:-1]).stdout

    def test_the_dashboard_opens_what_was_run(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file(holdout=None)
        line = ["--max-fevals", 1, "--storage-path", tmp_path / "elsewhere", "-s", "pool", "--json"]
        assert invoke("run-study", file, *line).exit_code == 0
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = invoke("dashboard", file, *line, "--port", port)
        [error] = errors_of(result)
        assert f"127.0.0.1:{port}: must be an address to listen on" in error

    def test_prepare_data_reads_what_was_run(self, study_file: Callable[..., Path], tmp_path: Path) -> None:
        file = study_file(task_search_path=None)
        prepared = invoke("prepare-data", file, "--task-search-path", tmp_path / "tasks", "-s", "pool", "--num-gpus", 2)
        [error] = errors_of(prepared)
        assert "declare" in error
