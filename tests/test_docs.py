"""The documentation keeps its promises: what it shows exists and, where that is cheap, runs.

Checked are command lines, study files, Python, links, and the names of files, folders and modules.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from typer.main import get_command

import optuna_merge
from optuna_merge.cli.app import app
from optuna_merge.config.engine import EngineConfig, VLLMConfig
from optuna_merge.config.genome import GenomeConfig
from optuna_merge.config.judge import JudgeConfig
from optuna_merge.config.pruner import WilcoxonConfig
from optuna_merge.config.read import load_study
from optuna_merge.config.sampler import CmaEsConfig
from optuna_merge.config.search import SearchConfig
from optuna_merge.config.study import StudyOptions
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.tasks import TaskConfig
from tests.test_architecture import PUBLIC

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "README.ja.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "eval_tasks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("benchmarks", "docs", "eval_tasks", "examples", "optuna_merge", "studies", "tests")
PATHS = {f"/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
PATHS |= {f"/{folder}" for folder in FOLDERS}
TREE_PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
TREE_PAGES += [ROOT / "docs" / "architecture.md", ROOT / "docs" / "benchmarks.md"]
"""Pages whose folders are ours; the other pages name those of a study."""


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def command_lines() -> list[str]:
    """The lines of blocks, to be typed as they stand."""
    shown = [line.removeprefix("exec ") for _, block in blocks("sh") for line in block.splitlines()]
    return sorted({line.split("#")[0].strip() for line in shown if line.startswith("optuna-merge ")})


def mentions() -> list[str]:
    """What sentences say of a command; arguments may be left out."""
    found = {line for page in PAGES for line in re.findall(r"`(optuna-merge [^`]+)`", page.read_text())}
    return sorted(found - set(command_lines()))


@pytest.mark.parametrize("line", command_lines())
def test_a_shown_command_line_parses(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = get_command(app).commands[name]
    with command.make_context(name, words) as context:  # raises what the program would print
        assert context.params


@pytest.mark.parametrize("line", mentions())
def test_a_mentioned_command_exists_with_its_options(line: str) -> None:
    words = line.split()[1:]
    group = get_command(app)
    command = group if words[0].startswith("--") else group.commands[words[0]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options


def test_there_are_command_lines_to_check() -> None:
    assert len(command_lines()) >= 30
    assert len(mentions()) >= 10


@pytest.mark.parametrize(
    "target", re.findall(r"(?:^|`)make ([a-z0-9-]+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
)
def test_a_shown_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "block"), [given for given in blocks("yaml") if "\ntask: " not in given[1]])
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
    sections = [
        StudyConfig,
        GenomeConfig,
        TaskConfig,
        StudyOptions,
        EngineConfig,
        VLLMConfig,
        SearchConfig,
        JudgeConfig,
    ]
    for section in sections:
        for key in section.known_keys():
            if key != "ranges":
                assert f"`{key}`" in text, key
    for member in (CmaEsConfig, WilcoxonConfig):
        for key in member.known_keys():
            assert f"{key}: " in text, key


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
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not target.startswith("https://"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The links to a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_folders_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`(?:python )?([\w/]+\.py)\b", text)) | set(re.findall(r"\bpython ([\w/]+\.py)\b", text))
    if page in TREE_PAGES:
        named |= {folder.rstrip("/") for folder in re.findall(r"`([\w/]+/)`", text)}
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in PATHS)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_exist(page: Path) -> None:
    for name in set(re.findall(r"`(optuna_merge(?:\.\w+)+)", page.read_text())):
        parts, found = name.split(".")[1:], importlib.import_module("optuna_merge")
        for part in parts:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_the_architecture_names_every_room() -> None:
    package = ROOT / "optuna_merge"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert {room for room in rooms if f"`{room}`" not in text} == set()


def test_the_summary_of_the_benchmarks_repeats_figures_of_the_details() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    _, _, rest = text.partition("## Summary\n")
    summary, _, details = rest.partition("\n## ")
    rows = [line.split("|")[1:-1] for line in summary.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 15
    known = set(re.findall(r"\d[\d,.]*\d|\d", details))
    for what, figure, _, _, date in rows:
        assert set(re.findall(r"\d[\d,.]*\d|\d", figure)) <= known, what
        assert not date.strip() or date.strip() in details, what


def test_pre_commit_has_the_tested_versions() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    names = [repo["repo"].rpartition("/")[2].removesuffix("-pre-commit") for repo in repos]
    assert names == ["ruff", "codespell"]
    assert [repo["rev"] for repo in repos] == [f"v{pinned[name]}" for name in names]


def test_the_workflow_runs_what_a_clean_checkout_must_pass() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["make"]
    assert job["steps"][-1]["run"] == "make ${{ matrix.line }}"
    lines = re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    # "make check test" is two jobs there
    wanted = [part for line in lines for part in ([line] if "=" in line else line.split())]
    assert sorted(job["strategy"]["matrix"]["line"]) == sorted(wanted)


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.stem
)
def test_an_issue_form_has_what_github_requires(form: Path) -> None:
    data = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= data.keys()
    ids = [item["id"] for item in data["body"]]
    assert len(set(ids)) == len(ids)
    assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in data["body"])


def test_the_citation_names_the_license_of_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text()


def test_every_page_is_on_the_site_and_the_reference_names_what_is_public() -> None:
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    nav = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert nav == {page.name for page in (ROOT / "docs").glob("*.md")} | {*hooks.PAGES.values(), "commands.md"}
    commands = hooks.commands_page()
    for name in get_command(app).commands:
        assert f"\n## {name}\n" in commands
    assert "| `--n-trials` `--max-fevals` N | Total number of trials, with baselines and earlier runs. |" in commands
    page = (ROOT / "docs" / "python.md").read_text()
    for module, names in PUBLIC.items():
        for name in names:
            home = f"optuna_merge.{optuna_merge._HOMES[name]}" if module == "optuna_merge" else module
            assert f"::: {home}.{name}\n" in page


def test_the_readmes_show_the_same_commands() -> None:
    shown = {
        page: {line.split("#")[0].strip() for of, block in blocks("sh") if of == page for line in block.splitlines()}
        for page in ("README.md", "README.ja.md")
    }
    assert "optuna-merge quickstart" in shown["README.ja.md"] <= shown["README.md"]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda picture: picture.name)
def test_a_picture_is_well_formed_and_on_a_page(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().attrib["viewBox"]
    assert any(f"{picture.name})" in page.read_text() for page in PAGES)
