"""Trials per hour of a study, compared with ``mergekit-evolve --in-memory`` on the same models and tasks.

    python benchmarks/search_speed.py [--study quickstart|smollm2] [--models DIR] [--peer DIR] [--trials N] [--json]

Models and tasks are those of the quickstart or of the SmolLM2 study (``make quickstart-models`` and
``python studies/smollm2_models.py`` make the models), with as many documents of each task as ``--documents`` says, no
chat template and no holdout. Every process runs one thread. The peer needs a virtual environment of its own (``make
peer``). It is started as its users start it, at the same priority, on a Ray that this script starts and stops. Its
rate leaves out the first generation, which also builds the model. Our rate is that of ``optuna-merge run-study``: with
the default settings, and scoring every document of every trial, in float32 and in bfloat16. The peer always uses
bfloat16; with ``--in-memory`` it scores request by request, whatever its ``--batch-size``. Start-up is left out on
both sides, and so are our baselines, because the search does not draw them.

Scores by time are the best score at the end of each generation of the peer, and after each of our trials that was
scored on every document, by seconds since the search began; our baselines, which can be the best, count as 0 seconds.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Landscape:
    """Models and tasks of a study in ``studies/``.

    Attributes:
        metrics: Skill to its metric; a skill has a model and a task.
        layer_granularity: Of the genome, so that it has nine weights.
        n_documents: Documents of each task.
        target: How many times the peer's rate ours must be; None: whatever it is.
    """

    metrics: dict[str, str]
    layer_granularity: int
    n_documents: int
    target: float | None


LANDSCAPES = {
    "quickstart": Landscape({"reverse": "acc,none", "next": "acc,none", "last": "acc,none"}, 2, 100, 15),
    "smollm2": Landscape(
        {"dates": "exact_match,digits", "clock": "exact_match,digits", "tone": "acc,none"}, 10, 20, None
    ),
}
TASKS = {
    "quickstart": ROOT / "optuna_merge" / "quickstart" / "quickstart_tasks",
    "smollm2": ROOT / "eval_tasks" / "smollm2",
}
POPULATION = 10  # of both searches, for nine weights
N_BASELINES = 7
OURS: dict[str, dict[str, Any]] = {
    "default": {"engine": {"dtype": "float32"}},
    "every document": {"engine": {"dtype": "float32"}, "study": {"pruner": "none"}},
    "every document, bfloat16": {"engine": {"dtype": "bfloat16"}, "study": {"pruner": "none"}},
}


@dataclass
class Ran:
    """What a search did.

    Attributes:
        rate: Trials per hour, without start-up.
        best: Seconds since the search began, and the best score by then; rising.
    """

    rate: float
    best: list[tuple[float, float]]

    def at(self, seconds: float) -> float | None:
        """The best score after some seconds; None if there was none yet."""
        scores = [score for when, score in self.best if when <= seconds]
        return scores[-1] if scores else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=list(LANDSCAPES), default="quickstart")
    parser.add_argument("--models", type=Path, metavar="DIR", help="default: where the study's script puts them")
    parser.add_argument("--documents", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-peer", metavar="DIR", help="virtual environment")
    parser.add_argument(
        "--trials", type=int, default=30, metavar="N", help="trials of each search; the peer's first ten do not count"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    models = options.models or ROOT / "studies" / f"{options.study}_models"
    if options.trials < 2 * POPULATION:
        parser.error(f"--trials must be at least {2 * POPULATION}, got {options.trials}")
    if not (models / "base" / "config.json").is_file():
        parser.error(f"{models} must hold the models of the study; run make {options.study}")
    if not (options.peer / "bin" / "mergekit-evolve").is_file():
        parser.error(f"{options.peer} must hold mergekit-evolve; run make peer")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that Ray is stopped
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_study(folder, models, options.study, options.documents)
        ran = {"mergekit-evolve": run_peer(options.peer, file, folder, options.trials)}
        ran |= {arm: run_ours(file, folder / arm, settings, options.trials) for arm, settings in OURS.items()}
    report(ran, as_json=options.json)
    target = LANDSCAPES[options.study].target
    if target is not None and ran["default"].rate < target * ran["mergekit-evolve"].rate:
        sys.exit(f"missed: at least {target} times")


def report(ran: dict[str, Ran], *, as_json: bool) -> None:
    """Print trials per hour, how many times the peer's rate that is, and the best scores by time."""
    peer = ran["mergekit-evolve"]
    last = peer.best[-1][0]
    moments = [last / 8, last / 4, last / 2, last]
    if as_json:
        rows = {
            arm: {"trials_per_hour": search.rate, "times": search.rate / peer.rate, "best": search.best}
            for arm, search in ran.items()
        }
        print(json.dumps(rows))
        return
    print(f"{'':28} trials per hour   times   best score after {', '.join(f'{m:.0f}' for m in moments)} s")
    for arm, search in ran.items():
        scores = [search.at(moment) for moment in moments]
        shown = "  ".join("    -" if score is None else f"{score:.3f}" for score in scores)
        print(f"{arm:28} {search.rate:15.0f} {search.rate / peer.rate:7.1f}   {shown}")


def write_study(folder: Path, models: Path, study_name: str, n_documents: int | None) -> Path:
    """Write a study file for both, over copies of its models that the peer's transformers reads."""
    landscape = LANDSCAPES[study_name]
    for model in ("base", *landscape.metrics):
        copy = folder / "models" / model
        shutil.copytree(models / model, copy)
        rewrite(copy / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        config = json.loads((copy / "config.json").read_text())
        # as transformers wrote them before version 5
        rewrite(copy / "config.json", torch_dtype=config.get("dtype"), **config.get("rope_parameters") or {})
    study = {
        "genome": {
            "models": [str(folder / "models" / skill) for skill in landscape.metrics],
            "base_model": str(folder / "models" / "base"),
            "merge_method": "task_arithmetic",
            "layer_granularity": landscape.layer_granularity,
        },
        "tasks": [
            {"name": f"{study_name}_{skill}", "weight": 1 / 3, "metric": metric}
            for skill, metric in landscape.metrics.items()
        ],
        "limit": n_documents or landscape.n_documents,
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }
    path = folder / f"{study_name}.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def rewrite(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def run_peer(venv: Path, file: Path, folder: Path, n_trials: int) -> Ran:
    """Run mergekit-evolve; its rate is that from its second generation on."""
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
        *("--task-search-path", str(TASKS[file.stem]), "--no-save-final-model"),
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
        starts: list[tuple[float, int]] = []
        best: list[tuple[float, float]] = []
        end = 0.0
        lines = []
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                now = time.perf_counter()
                if line.startswith("Received"):
                    starts.append((now, int(line.split()[1])))
                    print(f"mergekit-evolve: generation {len(starts)} begins", file=sys.stderr)
                elif line.startswith("New best score:"):
                    best.append((now - starts[0][0], float(line.split()[-1])))
                elif "OPTIMIZATION COMPLETE" in line:
                    end = now
        finally:
            process.terminate()
            process.wait()
        if not end or len(starts) < 2:
            sys.exit(f"mergekit-evolve ended with {process.returncode}:\n{''.join(lines[-30:])}")
    finally:
        head.terminate()
        head.wait()
    return Ran(3600 * sum(n for _, n in starts[1:]) / (end - starts[1][0]), best)


def wait_for(log: Path, text: str, process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    """Wait until a log contains a text."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"ray did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def run_ours(file: Path, out: Path, settings: dict[str, Any], n_trials: int) -> Ran:
    """Run run-study; its rate is that from the first draw of the search on."""
    copy = file.with_name(f"{out.name.replace(' ', '_').replace(',', '')}.yaml")
    paths = {"task_search_path": str(TASKS[file.stem]), "storage_path": str(out)}
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
    best: list[tuple[float, float]] = []
    for trial in study.trials:
        if trial.state != TrialState.COMPLETE or (best and trial.values[0] <= best[-1][1]):
            continue
        assert trial.datetime_complete is not None
        best.append((max(0.0, (trial.datetime_complete - first).total_seconds()), trial.values[0]))
    return Ran(3600 * len(trials) / (last - first).total_seconds(), best)


if __name__ == "__main__":
    main()
