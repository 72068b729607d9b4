from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from optuna_merge.report import page, palette, svg
from optuna_merge.report.pictures import Role


def test_every_ground_has_every_role() -> None:
    assert list(palette.LIGHT) == list(palette.DARK) == list(palette.PAPER)
    assert set(get_args(Role)) <= set(palette.LIGHT)


def test_every_variable_that_a_page_uses_is_in_the_palette() -> None:
    rendered = page.pictures_page("title", [])
    assert set(re.findall(r"var\(--(\w+)\)", rendered + svg.STYLE)) <= set(palette.LIGHT)


def test_css_has_a_block_for_each_ground() -> None:
    blocks = re.findall(r":root \{ (.*?) \}", palette.css())
    assert len(blocks) == 3
    assert [re.findall(r"--merge: (#\w+);", block) for block in blocks] == [["#5b8fc9"], ["#6ea3dd"], ["#5b8fc9"]]


def test_colours_are_written_in_the_palette_only() -> None:
    for file in Path(page.__file__).parent.iterdir():
        if file.suffix in (".py", ".j2") and file.name != "palette.py":
            assert not re.search(r"#[0-9a-fA-F]{6}\b", file.read_text()), file.name
