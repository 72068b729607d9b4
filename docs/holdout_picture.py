"""Draw the holdout scores of a study.

    optuna-merge report studies/quickstart.yaml --json | python docs/holdout_picture.py docs/quickstart.svg Quickstart

Writes a bar for each model with its standard error, and the best merge's lead over it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from optuna_merge.report.palette import LIGHT

WIDTH, ROW, LEFT, BAR = 760, 30, 150, 400


def main() -> None:
    """Read the report from standard input and write the picture."""
    parser = argparse.ArgumentParser(description="Draw the holdout scores of a study, whose report is read as JSON.")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("title", help="what the study is called")
    arguments = parser.parse_args()
    others = ("runner-up", "ascent")
    rows = [row for row in json.load(sys.stdin)["rows"] if row["holdout"] and row["kind"] not in others]
    height = 56 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="{LIGHT["ground"]}"/>',
        '<text x="14" y="26" font-size="15" font-weight="bold">',
        f"{arguments.title}: mean accuracy on documents that the search never saw</text>",
    ]
    for index, row in enumerate(rows):
        held = row["holdout"]
        y = 44 + ROW * index
        length = BAR * held["value"]
        error = BAR * (sum((task["stderr"] / len(held["tasks"])) ** 2 for task in held["tasks"].values()) ** 0.5)
        lead = "" if row["kind"] == "best" else f"best is {held['difference']:+.3f} ± {held['difference_stderr']:.3f}"
        weight = ' font-weight="bold"' if row["kind"] == "best" else ""
        middle = y + ROW / 2 - 2
        parts += [
            f'<text x="{LEFT - 10}" y="{middle + 5}" text-anchor="end"{weight}>{row["name"]}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 8}" fill="{LIGHT[row["kind"]]}"/>',
            f'<path d="M{LEFT + length - error:.1f} {middle - 1}h{2 * error:.1f}" stroke="{LIGHT["ink"]}"'
            ' stroke-width="2"/>',
            f'<text x="{LEFT + length + error + 8:.1f}" y="{middle + 5}"{weight}>{held["value"]:.3f}</text>',
            f'<text x="{WIDTH - 14}" y="{middle + 5}" text-anchor="end" fill="{LIGHT["quiet"]}">{lead}</text>',
        ]
    arguments.picture.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
