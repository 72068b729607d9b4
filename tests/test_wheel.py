"""The wheel that the repository builds, in an environment without the repository: it carries the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. What the wheel depends on is borrowed from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert made.returncode == 0, made.stderr
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    installed = run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    [packages] = folder.glob("lib/*/site-packages")
    # As plain folders on the path: .pth files in them, such as that of an editable install, are not read.
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    return folder


@pytest.mark.wheel
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    listed = run("git", "ls-files", "optuna_merge", cwd=ROOT).stdout.split()
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(packed) == sorted(listed)


@pytest.mark.wheel
def test_one_command_from_the_wheel_alone(environment: Path, tmp_path: Path) -> None:
    where = run(environment / "bin" / "python", "-c", "import optuna_merge; print(optuna_merge.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(environment)), where.stderr
    program = environment / "bin" / "optuna-merge"
    first = run(program, "quickstart", "--n-trials", 8, "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    found = {row["name"]: row["holdout"]["value"] for row in json.loads(first.stdout)["rows"]}
    assert found["best merge"] > max(found[name] for name in ("reverse", "next", "last", "base")) + 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["studies"]

    again = run(program, "quickstart", "--n-trials", 9, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already holds the models of these settings" in again.stderr
    assert "[9/9] trial 8" in again.stderr
    checked = run(program, "check", "studies/quickstart.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
