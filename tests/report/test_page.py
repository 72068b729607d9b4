from __future__ import annotations

import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.report import svg
from optuna_merge.report.page import page
from optuna_merge.report.pictures import Chart, HeatMap, Series
from optuna_merge.report.study_pictures import _ROLES, pictures_of_study
from optuna_merge.report.summary import Kind, summarize
from optuna_merge.storage import attributes
from tests.report.test_dashboard import fill
from tests.report.test_summary import front_study

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.fixture
def config(study_file: Callable[..., Path]) -> StudyConfig:
    path = study_file()
    path.write_text("# Is <one> & the other better?\n" + path.read_text())
    return load_study(path)


def make(config: StudyConfig, n_trials: int, n_groups: int, n_models: int, recipe: str = "") -> str:
    study = optuna.create_study(study_name="tiny", direction="maximize")
    fill(study, n_trials, n_groups, n_models)
    summary = summarize(study, config, 5)
    return page(summary, config, pictures_of_study(study, summary, config), recipe)


def test_pictures_are_well_formed_and_numbered(config: StudyConfig) -> None:
    text = make(config, 23, 2, 2, "models: [<b>]")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "nan" not in text.replace("nance", "").lower()
    assert "<h1>Is &lt;one&gt; &amp; the other better?</h1>" in text
    assert "models: [&lt;b&gt;]" in text


def test_every_text_of_the_report_is_escaped(config: StudyConfig) -> None:
    study = optuna.create_study(study_name="tiny", direction="maximize")
    fill(study, 23, 2, 2)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={attributes.FAILURE: "<script>alert(1)</script>"}))
    summary = summarize(study, config, 5)
    text = page(summary, config, pictures_of_study(study, summary, config))
    assert "<script" not in text
    assert "<li>trial 23: &lt;script&gt;alert(1)&lt;/script&gt;</li>" in text


def test_nothing_comes_from_elsewhere(config: StudyConfig) -> None:
    text = make(config, 23, 2, 2)
    assert "<script" not in text
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\"'\s<]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, nothing is fetched
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", text) == ["data:,"]


def test_the_front_is_a_table_and_a_picture(config: StudyConfig) -> None:
    study = front_study()
    summary = summarize(study, config)
    drawn = pictures_of_study(study, summary, config)
    text = page(summary, config, drawn)
    assert "<h2>The front</h2>" in text
    assert '<tr class="best"><td>merge</td><td>2</td><td>0.6000</td><td>0.6000</td><td>1.2000</td></tr>' in text
    [chart] = [picture for picture in drawn if picture.key == "tasks-1"]
    assert (chart.x_title, chart.y_title) == ("math", "poetry")
    [front] = [series for series in chart.series if series.name == "front"]
    assert list(zip(front.x, front.y, strict=True)) == [(0.1, 0.8), (0.6, 0.6)]  # of merges


def test_every_kind_of_row_has_a_colour(config: StudyConfig) -> None:
    """Also the end of an ascent that no longer is among the best merges."""
    assert set(_ROLES) == set(get_args(Kind))
    study = optuna.create_study(study_name="tiny", direction="maximize")
    fill(study, 23, 2, 2)
    study.add_trial(create_trial(value=0.51, user_attrs={attributes.ASCENT: True, attributes.DOCUMENTS: 60}))
    summary = summarize(study, config, 2)
    assert [row.name for row in summary.rows if row.kind == "ascent"] == ["end of the ascent"]
    assert "<td>end of the ascent</td>" in page(summary, config, pictures_of_study(study, summary, config))


def test_a_study_without_a_score(config: StudyConfig) -> None:
    study = optuna.create_study(study_name="tiny", direction="maximize")
    summary = summarize(study, config)
    text = page(summary, config, pictures_of_study(study, summary, config))
    assert "No trial is complete yet." in text
    assert "<svg" not in text


def test_a_chart_of_one_point_and_a_heat_map_of_one_value() -> None:
    for picture in (
        Chart("a", "t", "x", "y", [Series("one", "merge", [0], [0.5], ["first"])]),
        HeatMap("b", "t", "x", ["m"], ["all"], [[0.5]], 0.5, 0.5),
    ):
        drawing = svg.draw(picture)
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("n_trials", "n_groups", "n_models"), [(30, 3, 3), (500, 25, 4)])
def test_in_a_browser(config: StudyConfig, tmp_path: Path, n_trials: int, n_groups: int, n_models: int) -> None:
    start = time.perf_counter()
    text = make(config, n_trials, n_groups, n_models)
    took = time.perf_counter() - start
    (tmp_path / "page.html").write_text(text)
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}"]
    run = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=900, check=True
    )
    print(f"page of {n_trials} trials x {n_groups * n_models} dimensions: {took:.2f} s, {len(text) / 1e6:.2f} MB")
    for found in (
        "Weights of the best merge",
        "Mean weight of the population",
        "layers_02_02",
        "model_0",
        "one against",
    ):
        assert found in run.stdout
    assert run.stdout.count("<figure>") == 5
    assert len(text) < 2_000_000
