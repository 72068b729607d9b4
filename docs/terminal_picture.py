"""Draw what a command printed as a picture of a terminal.

    optuna-merge report FILE | sed '/step of the ascent/,$d' | python docs/terminal_picture.py docs/terminal.svg COMMAND

COMMAND is the command line that the picture shows above its output.
"""

from __future__ import annotations

import sys
import textwrap
from html import escape
from pathlib import Path

WIDTH = 126  # characters
NO_BREAK = "\N{NO-BREAK SPACE}"  # several ordinary spaces would become one
CHARACTER, LINE, MARGIN = 7.25, 17, 18  # pixels


def main() -> None:
    """Read stdin, write the picture."""
    out, command = sys.argv[1:]
    lines = [f"$ {command}", ""]
    for line in sys.stdin.read().rstrip().splitlines():
        lines += textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]
    Path(out).write_text(picture([line.rstrip() for line in lines]), encoding="utf-8")


def picture(lines: list[str]) -> str:
    """An SVG of lines in a font of equal width, light on dark."""
    width, height = round(WIDTH * CHARACTER + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN
    texts = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (number + 0.75):.1f}" textLength="{len(line) * CHARACTER:.1f}"'
        f"{_style(line)}>{escape(line).replace(' ', NO_BREAK)}</text>"
        for number, line in enumerate(lines)
        if line.strip()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12" fill="#d8dee9">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#20242c"/>\n{texts}\n</svg>\n'
    )


def _style(line: str) -> str:
    if line.startswith("$ "):
        return ' fill="#8fbcbb"'
    return ' fill="#a3d9a5"' if line.startswith(" best merge  ") else ""


if __name__ == "__main__":
    main()
