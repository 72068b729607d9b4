"""What the documentation shows, command lines, study files, Python and links, is read here; run where that is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from optuna_merge.cli.app import app
from optuna_merge.config.read import load_study
from optuna_merge.config.genome import GenomeConfig
from optuna_merge.config.search import SearchConfig
from optuna_merge.config.study_config import StudyConfig

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "eval_tasks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def command_lines() -> list[str]:
    shown = [line for _, block in blocks("sh") for line in block.splitlines()]
    shown += [line for page in PAGES for line in re.findall(r"`(optuna-merge [^`]+)`", page.read_text())]
    return sorted({line.split("#")[0].strip() for line in shown if line.startswith("optuna-merge ")})


@pytest.mark.parametrize("line", command_lines())
def test_a_shown_command_exists_with_its_options(line: str) -> None:
    _, name, *words = line.split()
    command = get_command(app).commands[name]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options


def test_there_are_command_lines_to_check() -> None:
    assert len(command_lines()) >= 8


@pytest.mark.parametrize(
    "target", re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
)
def test_a_shown_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_a_shown_study_file_is_one(page: str, block: str, tmp_path: Path) -> None:
    data = yaml.safe_load(block)
    assert "genome" in data, page
    (tmp_path / "studies").mkdir()
    (tmp_path / "eval_tasks").mkdir()
    file = tmp_path / "studies" / "study.yaml"
    file.write_text(block)
    load_study(file)


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda file: file.name)
def test_a_study_of_the_project_loads_and_asks_a_question(file: Path) -> None:
    load_study(file)
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "study-file.md").read_text()
    for section in (StudyConfig, GenomeConfig, SearchConfig):
        for key in section.model_fields:
            if key not in ("path", "ranges"):
                assert f"`{key}`" in text, key


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_shown_python_compiles(page: str, block: str) -> None:
    compile(block, page, "exec")


def test_the_samplers_example_runs() -> None:
    [block] = [block for _, block in blocks("python") if "StableCmaEsSampler(space" in block]
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", f"{block}\nassert study.best_value < 0.5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
