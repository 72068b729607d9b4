"""What mkdocs adds to the pages of ``docs/``: pages that live elsewhere in the repository, and the command line.

The first page is the README, so links between files of the repository become links between pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from optuna_merge.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "README.ja.md": "ja.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "eval_tasks/README.md": "eval-tasks.md",
}
"""File of the repository to page of the site."""
COMPLETION = """
## Shell completion

`optuna-merge --install-completion` makes bash, zsh, fish or PowerShell complete commands and options with the tab key,
from the next shell on.
`optuna-merge --show-completion` prints what it would install.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs/``, and the files that pages link to, such as study files."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for link in sorted({link for page in (*PAGES, *_docs()) for link in _other_files(page)}):
        files.append(File.generated(config, link, abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that lead through the repository lead through the site."""
    homes = {target: source for source, target in PAGES.items()}
    source = homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return re.sub(r"\]\(([^)#:]+)(#[^)]*)?\)", lambda link: f"]({_on_site(source, link[1])}{link[2] or ''})", markdown)


def commands_page() -> str:
    """The reference of the command line, as markdown, from the program itself."""
    group: Any = get_command(app)
    parts = ["# Command line", group.help or "", "Results go to stdout, everything else to stderr. Exit codes: 0 done,"]
    parts[-1] += " 1 an expected error, which is named in one line, 2 wrong usage, 130 interrupted by Ctrl-C."
    parts.append(COMPLETION.strip())
    for name, command in group.commands.items():
        parts += [f"## {name}", *_command(name, command)]
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    names = {argument: argument.metavar or str(argument.name).upper() for argument in arguments}
    shown = " ".join(name if argument.required else f"[{name}]" for argument, name in names.items())
    yield f"```text\noptuna-merge {name} [OPTIONS] {shown}".rstrip() + "\n```"
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        lead, marker, example = text.partition("Example: ")
        yield f"```sh\n{example}\n```" if marker and not lead else _escaped(text)
    groups: dict[str, list[str]] = {}
    for parameter in command.params:
        if not parameter.hidden and parameter.param_type_name == "option":
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            spelled = " ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
            value = "" if parameter.is_flag else f" {parameter.metavar or parameter.type.name.upper()}"
            groups.setdefault(panel, []).append(f"| {spelled}{value} | {_escaped(parameter.help or '')} |")
    for argument, argument_name in names.items():
        yield f"`{argument_name}`: {_escaped(argument.help or '')}"
    for panel, rows in groups.items():
        yield "\n".join([f"| {panel} | |", "|---|---|", *rows])
    if command.epilog:
        yield _escaped(command.epilog)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _docs() -> list[str]:
    return [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]


def _links(page: str) -> set[str]:
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in found}


def _other_files(page: str) -> set[str]:
    return {
        link for link in _links(page) if link not in PAGES and not link.startswith("docs/") and (ROOT / link).is_file()
    }


def _on_site(source: str, link: str) -> str:
    """A link from a file of the repository, as a link from the page that it is on the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return PAGES.get(target, target.removeprefix("docs/"))
