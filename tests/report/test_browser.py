"""The dashboard in a real browser, on a small study and on a large one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from optuna_merge.config.read import load_study
from optuna_merge.report.dashboard import refresh
from optuna_merge.report.dashboard_server import Server, make_dashboard
from tests.report.test_dashboard import fill, open_study

optuna.logging.set_verbosity(optuna.logging.ERROR)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(params=[(30, 3, 3), (500, 25, 4)], ids=["small", "large"])
def dashboard(request: pytest.FixtureRequest, study_file: Callable[..., Path]) -> Iterator[Server]:
    path = study_file()
    path.write_text("# Which one?\n" + path.read_text())
    config = load_study(path)
    study = open_study(config)
    fill(study, *request.param)
    start = time.perf_counter()
    refresh(study, config)
    print(f"refresh {time.perf_counter() - start:.2f} s")
    server = make_dashboard(config, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()


def shown(url: str, folder: Path) -> tuple[str, set[str]]:
    """The page when it is drawn, and the hosts that the browser asked."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--log-net-log={log}", "--virtual-time-budget=20000", "--dump-dom", url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    asked = set(re.findall(r'"url":"https?://([\w.-]+)', log.read_text()))
    return run.stdout, asked


def test_the_study_in_the_browser(dashboard: Server, tmp_path: Path) -> None:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        answer = json.loads(urllib.request.urlopen(dashboard.url.replace("/dashboard/", "/api/")).read())
        seconds.append(f"{time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    page, asked = shown(dashboard.url, tmp_path)
    print(
        f"{len(answer['trials'])} trials: answers in {', '.join(seconds)}; drawn in {time.perf_counter() - start:.1f} s"
    )
    for found in (
        "Score by documents spent",
        "Weights of the best merge",
        "Mean weight of the population",
        "layers_02_02",
    ):
        assert found in page
    # The browser itself asks Google for updates and component lists.
    assert {host for host in asked if not host.endswith((".google.com", ".googleapis.com", ".gvt1.com"))} == {
        "127.0.0.1"
    }
    note, _ = shown(f"{dashboard.url}/note", tmp_path)
    for found in ("Which one?", "What is merged", "task_arithmetic", "optuna-merge run-study"):
        assert found in note
