"""Studies whose answers are compared with those of a source: it answers before the first trial, and once."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError, StudyMismatchError, TaskError
from optuna_merge.report.summary import summarize
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.rivals import RIVALS_FOLDER
from optuna_merge.study.run import run_study
from optuna_merge.testing.engine import FakeEngine
from tests import processes
from tests.judging.judge_server import KEY, MODEL
from tests.judging.servers import JudgeServer, judge
from tests.study.test_judged_study import TASKS
from tests.study.test_objective import fake_objective

PAIRS = {"name": "judged_pairs", "metric": "preferred"}
LENGTH = {"name": "judged_pairs", "metric": "n_tokens", "weight": -0.001}

Write = Callable[..., Path]


@pytest.fixture
def write(study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """A function that writes a study file with 20 compared questions, 4 of them held out, and the task ``one``."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    shutil.copytree(TASKS, tmp_path / "judged")
    task = tmp_path / "judged" / "judged_pairs.yaml"
    text = task.read_text().replace("max_gen_toks: 512", "max_gen_toks: 8")
    first = "      - function: remove_whitespace\n"  # the judge is shown what filters before the rubric leave
    task.write_text(text.replace("      - function: custom", f"{first}      - function: custom"))
    questions = [{"question": f"What is {number} and {number}?"} for number in range(20)]
    (tmp_path / "judged" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))

    def written(server: JudgeServer, tasks: list[Any] | None = None, out: str = "out", **judge: Any) -> Path:
        judge = {"url": server.url, "model": MODEL, "key_variable": "JUDGE_KEY", **judge}
        return study_file(
            tasks=tasks or [PAIRS, LENGTH, "one"],
            task_search_path=["judged", "tasks"],
            study={"name": "tiny", "n_trials": 8, "seed": 3, "n_chunks": 4},
            holdout=0.2,
            judge=judge,
            storage_path=out,
        )

    return written


def made(path: Path, note: Callable[[str], None] = lambda _: None) -> MergeObjective:
    objective = fake_objective(path)
    objective.put_rivals(note)
    return objective


def n_loads(objective: MergeObjective) -> int:
    assert isinstance(objective.loader, LocalLoader)
    assert isinstance(objective.loader.engine, FakeEngine)
    return objective.loader.engine.n_loads


def test_the_best_source_answers_once_and_is_the_one_to_beat(write: Write, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        path, notes = write(server), []
        shown = CliRunner().invoke(app, ["check", str(path)]).output
        assert "; answers are compared with those of the best source, as the other tasks tell" in shown
        first = made(path, notes.append)
        assert [note.split(",")[0] for note in notes] == [
            "scoring model_0 on the other tasks",
            "scoring model_1 on the other tasks",
            "having model_0 answer",  # it is nearer to the engine's optimum
        ]
        line = r"judging: answers are compared with those of model_0, the source with the best score on the other tasks"
        assert re.match(line + r" \(model_0 0\.\d{4}, model_1 0\.\d{4}\)$", first.describe()[-1])
        assert not server.log()  # nothing has been judged yet
        run_study(first.config, first)
        score_holdout(open_started(first.config), first)
        rows = {row.name: row for row in summarize(open_started(first.config), first.config).rows}
        compared = "judged_pairs (preferred)"
        assert rows["model_0"].tasks[compared].value == 0.5  # with itself
        assert rows["model_1"].tasks[compared].value < 0.5  # it answers less of the questions
        assert rows["best merge"].tasks[compared].value >= 0.5
        held = rows["model_0"].holdout
        assert held is not None
        assert held.tasks[compared].value == 0.5
        assert set(server.answered().values()) == {1}

        # a later start takes the answers that are kept
        notes.clear()
        again = made(path, notes.append)
        assert (notes, n_loads(again)) == ([], 0)
        assert again.fingerprint() == first.fingerprint()

        # another answer, or another model's, is another study
        [file] = (tmp_path / "out" / RIVALS_FOLDER).glob("*.json")
        kept = json.loads(file.read_text())["answers"]["judged_pairs"]
        assert {answer["rival"] for answer in kept.values()} == {"right"}  # without the engine's blank
        file.write_text(file.read_text().replace('"right"', '"wrong"', 1))
        changed = made(path)
        with pytest.raises(StudyMismatchError, match=r"judge\.against"):
            run_study(changed.config, changed)
        file.write_text("{")
        with pytest.raises(StudyError, match=r"must hold the answers to compare with, got something else; restore it"):
            made(path)
        named = made(write(server, against=str(path_of(path, "model_1"))))
        assert named.describe()[-1] == "judging: answers are compared with those of model_1"
        with pytest.raises(StudyMismatchError, match=r"judge\.against"):
            run_study(named.config, named)


def path_of(study: Path, name: str) -> Path:
    models = yaml.safe_load(study.read_text())["genome"]["models"]
    return next(Path(model) for model in models if Path(model).name == name)


def test_workers_and_kills_leave_one_set_of_answers(write: Write, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        path = write(server)

        def start(name: str, seconds: float) -> None:
            def note(line: str) -> None:
                (tmp_path / name).open("a").write(f"{line}\n")
                time.sleep(seconds)

            made(path, note)

        with processes.forked(lambda: start("killed", 60)) as [process]:
            while not (tmp_path / "killed").exists():
                time.sleep(0.01)
            processes.kill(process)
        assert not list((tmp_path / "out" / RIVALS_FOLDER).glob("*.json"))
        with processes.forked(*[lambda name=name: start(name, 0.2) for name in ("a", "b")]) as running:
            for process in running:
                process.join(60)
                assert process.exitcode == 0
        assert (tmp_path / "a").exists() != (tmp_path / "b").exists()  # one answered, the other one waited
        assert len(list((tmp_path / "out" / RIVALS_FOLDER).glob("*.json"))) == 1


def test_where_no_source_can_be_the_fixed_one(write: Write, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        wrong: list[tuple[list[Any] | None, dict[str, str], str]] = [
            (
                [PAIRS, LENGTH],
                {},
                "judge.against must name a model if no other task tells which source is best, got best_source; name one"
                " of genome.models, or write the answers into the documents",
            ),
            (
                ["one"],
                {"against": "best_source"},
                "judge.against must be left out if no task compares answers or its documents name the fixed one, got"
                " 'best_source'; remove it, or that field of the documents",
            ),
            (
                None,
                {"against": "models/other"},
                "judge.against must be best_source or one of the models, got 'models/other'; spell it as in"
                " genome.models",
            ),
        ]
        for tasks, given, message in wrong:
            path = write(server, tasks, **given)
            for command in ("check", "run-study"):
                result = CliRunner().invoke(app, [command, str(path)])
                assert result.exit_code == 1, result.output
                [error] = [line for line in result.stderr.splitlines() if not line.startswith("reading models")]
                assert error.startswith("error: ")
                assert error.endswith(message), error
        assert not server.log()
        questions = path.parent / "judged" / "questions.jsonl"
        questions.write_text(questions.read_text().replace("}", ', "rival": "Two."}', 3))
        with pytest.raises(
            TaskError, match=r"'judged_pairs', document 3: must have the field 'rival', which others have"
        ):
            made(write(server))


def test_the_base_can_be_the_fixed_one(write: Write, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        path = write(server, [PAIRS])
        base = path_of(path, "model_0").parent / "base"
        objective = made(write(server, [PAIRS], against=str(base)))
        assert objective.describe()[-1] == "judging: answers are compared with those of base"
        assert n_loads(objective) == 1
