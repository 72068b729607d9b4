"""Take the screenshots of the README from the quickstart study, which must have been run: ``make screenshots``.

Writes ``docs/dashboard.png`` and ``docs/report.png`` with a headless Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.report.dashboard import refresh
from optuna_merge.report.dashboard_server import make_dashboard
from optuna_merge.report.page import page
from optuna_merge.report.study_pictures import pictures_of_study
from optuna_merge.report.summary import summarize

DOCS = Path(__file__).parent


def main() -> None:
    """Take both screenshots."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium on this machine; install it")
    config = load_study(DOCS.parent / "studies" / "quickstart.yaml")
    study = open_started(config)
    refresh(study, config)
    summary = summarize(study, config, 3)
    server = make_dashboard(config, port=0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.html")
        report.write_text(page(summary, config, pictures_of_study(study, summary, config)), encoding="utf-8")
        shoot(browser, server.url, DOCS / "dashboard.png", "1280,2250", folder)
        shoot(browser, report.as_uri(), DOCS / "report.png", "1020,1500", folder)
    server.server.shutdown()
    thread.join()


def shoot(browser: str, url: str, target: Path, size: str, folder: str) -> None:
    """Take the screenshot of a page, once it is drawn."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/profile",
    ]
    options += ["--virtual-time-budget=15000", f"--window-size={size}", f"--screenshot={target}"]
    subprocess.run([browser, *options, url], check=True, capture_output=True, timeout=240)


if __name__ == "__main__":
    main()
