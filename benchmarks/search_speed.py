"""Trials per hour of a study, compared with ``mergekit-evolve --in-memory`` on the same models and tasks.

    python benchmarks/search_speed.py [--quickstart DIR] [--peer DIR] [--trials N] [--json]

Models and tasks are the quickstart's (``python studies/quickstart_models.py`` makes the models), with 100 documents of
each task and no holdout. Every process runs one thread. The peer needs a virtual environment of its own (``make
peer``). It is started as its users start it, at the same priority, on a Ray that this script starts and stops. Its
rate leaves out the first generation, which also builds the model. Our rate is that of ``optuna-merge run-study``: with
the default settings, and scoring every document of every trial, in float32 and in bfloat16. The peer always uses
bfloat16; with ``--in-memory`` it scores request by request, whatever its ``--batch-size``. Start-up is left out on
both sides, and so are our baselines, because the search does not draw them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

ROOT = Path(__file__).resolve().parents[1]
TARGET = 15
SKILLS = ("reverse", "next", "last")
N_DOCUMENTS = 100
POPULATION = 10  # of both searches, for nine weights
N_BASELINES = 7
OURS: dict[str, dict[str, Any]] = {
    "default": {"engine": {"dtype": "float32"}},
    "every document": {"engine": {"dtype": "float32"}, "study": {"pruner": "none"}},
    "every document, bfloat16": {"engine": {"dtype": "bfloat16"}, "study": {"pruner": "none"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "studies" / "quickstart_models", metavar="DIR")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-peer", metavar="DIR", help="virtual environment")
    parser.add_argument(
        "--trials", type=int, default=30, metavar="N", help="trials of each search; the peer's first ten do not count"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    if options.trials < 2 * POPULATION:
        parser.error(f"--trials must be at least {2 * POPULATION}, got {options.trials}")
    if not (options.quickstart / "base" / "config.json").is_file():
        parser.error(f"{options.quickstart} must hold the quickstart's models; run studies/quickstart_models.py")
    if not (options.peer / "bin" / "mergekit-evolve").is_file():
        parser.error(f"{options.peer} must hold mergekit-evolve; run make peer")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that Ray is stopped
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_study(folder, options.quickstart)
        rates = {"mergekit-evolve": peer_rate(options.peer, file, folder, options.trials)}
        rates |= {arm: our_rate(file, folder / arm, settings, options.trials) for arm, settings in OURS.items()}
    report(rates, as_json=options.json)
    if rates["default"] < TARGET * rates["mergekit-evolve"]:
        print(f"missed: at least {TARGET} times", file=sys.stderr)
        sys.exit(1)


def report(rates: dict[str, float], *, as_json: bool) -> None:
    """Print trials per hour, and how many times the peer's rate that is."""
    peer = rates["mergekit-evolve"]
    if as_json:
        print(json.dumps({"trials_per_hour": rates, "times": {arm: rate / peer for arm, rate in rates.items()}}))
        return
    for arm, rate in rates.items():
        print(f"{arm:28} {rate:8.0f} trials per hour {rate / peer:8.1f} times")


def write_study(folder: Path, models: Path) -> Path:
    """Write the quickstart as a study file for both, over copies of its models that the peer's transformers reads."""
    for model in ("base", *SKILLS):
        shutil.copytree(models / model, folder / "models" / model)
        settings = folder / "models" / model / "tokenizer_config.json"
        settings.write_text(
            json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
        )
    study = {
        "genome": {
            "models": [str(folder / "models" / skill) for skill in SKILLS],
            "base_model": str(folder / "models" / "base"),
            "merge_method": "task_arithmetic",
            "layer_granularity": 2,
        },
        "tasks": [{"name": f"quickstart_{skill}", "weight": 1 / 3, "metric": "acc,none"} for skill in SKILLS],
        "limit": N_DOCUMENTS,
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def peer_rate(venv: Path, file: Path, folder: Path, n_trials: int) -> float:
    """Trials per hour of mergekit-evolve, from its second generation on."""
    path = os.pathsep.join([str(venv.resolve() / "bin"), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    arguments = [
        *(str(venv.resolve() / "bin" / "mergekit-evolve"), str(file), "--in-memory", "--no-merge-cuda"),
        *("--num-gpus", "1", "--max-fevals", str(n_trials), "--storage-path", str(folder / "peer")),
        *("--task-search-path", str(ROOT / "eval_tasks" / "quickstart"), "--no-save-final-model"),
        *("--random-seed", "1"),
    ]
    (folder / "peer").mkdir()
    # A Ray that nobody else uses: its own folder and port.
    ray = [str(venv.resolve() / "bin" / "ray"), "start", "--head", "--num-gpus=1", "--include-dashboard=false"]
    log = folder / "ray.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [*ray, "--block", "--port=6399", f"--temp-dir={folder / 'ray'}"],
            env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_for(log, "Ray runtime started", head)
        environment["RAY_ADDRESS"] = "127.0.0.1:6399"
        starts, end = [], 0.0
        lines = []
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Received"):
                    starts.append((time.perf_counter(), int(line.split()[1])))
                    print(f"mergekit-evolve: generation {len(starts)} begins", file=sys.stderr)
                elif "OPTIMIZATION COMPLETE" in line:
                    end = time.perf_counter()
        finally:
            process.terminate()
            process.wait()
        if not end or len(starts) < 2:
            sys.exit(f"mergekit-evolve ended with {process.returncode}:\n{''.join(lines[-30:])}")
    finally:
        head.terminate()
        head.wait()
    return 3600 * sum(n for _, n in starts[1:]) / (end - starts[1][0])


def wait_for(log: Path, text: str, process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    """Wait until a log contains a text."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"ray did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def our_rate(file: Path, out: Path, settings: dict[str, Any], n_trials: int) -> float:
    """Trials per hour of run-study, from the first draw of the search on."""
    copy = file.with_name(f"{out.name.replace(' ', '_').replace(',', '')}.yaml")
    paths = {"task_search_path": str(ROOT / "eval_tasks"), "storage_path": str(out)}
    copy.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **settings, **paths}))
    command = [sys.executable, "-m", "optuna_merge", "run-study", str(copy), "--n-trials", str(n_trials + N_BASELINES)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"run-study ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    study = optuna.load_study(study_name=copy.stem, storage=f"sqlite:///{out / 'study.db'}")
    trials = [t for t in study.trials if "baseline" not in t.user_attrs and t.state != TrialState.FAIL]
    first, last = trials[0].datetime_start, trials[-1].datetime_complete
    assert first is not None
    assert last is not None
    return 3600 * len(trials) / (last - first).total_seconds()


if __name__ == "__main__":
    main()
