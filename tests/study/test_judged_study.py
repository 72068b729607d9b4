"""Studies whose answers are judged by a process of its own, through faults, kills, a budget and wrong set-ups."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

import optuna_merge
from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.errors import JudgeBudgetError
from optuna_merge.evaluation.ahead import Ahead
from optuna_merge.judging.rubric import Question
from optuna_merge.report.answers import shown_documents
from optuna_merge.report.artifacts import upload_answers
from optuna_merge.report.summary import summarize
from optuna_merge.storage import attributes
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.judges import judge_cost
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.testing.engine import FakeEngine
from tests import processes
from tests.judging.judge_server import KEY, MODEL
from tests.judging.servers import JudgeServer, judge
from tests.study.test_objective import fake_objective

TASKS = Path(optuna_merge.__file__).parents[1] / "eval_tasks" / "judged"
FAULTS = ["500", "429", "outside", "half", "death", "silence", "429", "half", "death", "outside"]
N_KILLS = 10
CONCURRENCY = 3

Make = Callable[..., MergeObjective]


@pytest.fixture
def make(study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """A function that makes the objective of a judged study: 24 questions searched, 6 held out."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    shutil.copytree(TASKS, tmp_path / "judged")
    questions = [{"question": f"What is {number} and {number}?", "rival": "Two."} for number in range(30)]
    for task in (tmp_path / "judged").glob("*.yaml"):
        task.write_text(task.read_text().replace("max_gen_toks: 512", "max_gen_toks: 8"))  # the models' window is 64
    (tmp_path / "judged" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))

    def made(
        server: JudgeServer,
        out: str,
        n_trials: int = 12,
        task: tuple[str, str] = ("judged_questions", "judge_score"),
        **options: Any,
    ) -> MergeObjective:
        options = {"url": server.url, "model": MODEL, "key_variable": "JUDGE_KEY", "timeout": 1.0, **options}
        path = study_file(
            tasks=[{"name": task[0], "metric": task[1]}],
            task_search_path="judged",
            study={"name": "tiny", "n_trials": n_trials, "seed": 3, "n_chunks": 4},
            holdout=0.2,
            judge={"concurrency": CONCURRENCY, **options},
            storage_path=out,
        )
        return fake_objective(path)

    return made


def ended(objective: MergeObjective) -> list[tuple[Any, ...]]:
    trials = open_started(objective.config).trials
    return [(t.state, t.params, t.value, t.intermediate_values) for t in trials]


@pytest.fixture
def undisturbed(make: Make, tmp_path: Path) -> list[tuple[Any, ...]]:
    with judge(tmp_path / "undisturbed server") as server:
        objective = make(server, "undisturbed")
        run_study(objective.config, objective)
        assert set(server.answered().values()) == {1}
        assert len(server.log()) > 24
    return ended(objective)


def test_every_answer_is_judged_once_through_faults_and_restarts(
    make: Make, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with judge(tmp_path / "server", *FAULTS) as server:
        objective = make(server, "out")
        run_study(objective.config, objective)
        assert ended(objective) == undisturbed
        assert {state for state, *_ in undisturbed} <= {TrialState.COMPLETE, TrialState.PRUNED}
        study = open_started(objective.config)
        score_holdout(study, objective)
        upload_answers(study, objective.config)
        assert set(server.answered().values()) == {1}
        n_asked = len(server.log())
        score_holdout(study, objective)
        cost = judge_cost(objective.config)
        assert cost is not None
        assert cost.n_replies == sum(server.answered().values()) + FAULTS.count("outside")
        assert server.n_starts == 1 + FAULTS.count("death")

        runner, path = CliRunner(), str(objective.config.path)
        line = f"judge: {cost.n_replies:,} replies, {cost.n_in:,} tokens in questions, {cost.n_out:,} in replies"
        outputs = [
            runner.invoke(app, ["status", path]).output,
            runner.invoke(app, ["report", path, "--html", str(tmp_path / "out" / "report.html")]).output,
            runner.invoke(app, ["status", path, "--json"]).output,
            runner.invoke(app, ["answers", path]).output,
        ]
        assert line in outputs[0]
        assert line in outputs[1]
        assert line in (tmp_path / "out" / "report.html").read_text()
        assert "best merge (trial" in outputs[3]
        assert len(server.log()) == n_asked
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) > 12
    assert not any(KEY.encode() in file.read_bytes() for file in written)
    assert not any(KEY in output for output in outputs)


def test_killed_ten_times_it_ends_as_if_nothing_had_happened(
    make: Make, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with judge(tmp_path / "server") as server:
        objective = make(server, "out")
        for _ in range(N_KILLS):
            before = len(server.log())
            with processes.forked(lambda: run_study(objective.config, objective)) as [process]:
                while process.is_alive() and len(server.log()) == before:
                    time.sleep(0.01)
        run_study(objective.config, objective)
        assert ended(objective) == undisturbed
        answered = server.answered()
        # only what was open when the process was killed is asked again
        assert sum(answered.values()) - len(answered) <= N_KILLS * CONCURRENCY


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_judging_it_ends_cleanly_and_asks_nothing_twice(
    make: Make, undisturbed: list[tuple[Any, ...]], tmp_path: Path, number: signal.Signals
) -> None:
    with judge(tmp_path / "server", *["slow"] * 9, "", *["slow"] * 9) as server:
        objective = make(server, "out")

        def run() -> None:
            (tmp_path / "outcome").write_text(repr(run_study(objective.config, objective)))

        for n_asked in (5, 15):
            with processes.forked(run) as [process]:
                while len(server.log()) < n_asked:
                    time.sleep(0.01)
                os.kill(process.pid or 0, number)
                process.join(20)
                assert process.exitcode == 0
            assert (tmp_path / "outcome").read_text() == "Outcome(n_finished=0, interrupted=True, timed_out=False)"
            assert {trial.state for trial in open_started(objective.config).trials} == {TrialState.WAITING}
            assert len(server.log()) <= n_asked + 2 * CONCURRENCY  # no question is begun any more
        run_study(objective.config, objective)
        assert ended(objective) == undisturbed
        assert {*Counter(line["prompt"] for line in server.log()).values()} == {1}


@pytest.mark.parametrize(("timeout", "n_signals"), [(3.0, 1), (600.0, 2)])
def test_interrupted_while_the_judge_never_answers_it_ends_soon(
    make: Make, tmp_path: Path, timeout: float, n_signals: int
) -> None:
    with judge(tmp_path / "server", "never") as server:
        objective = make(server, "out", timeout=timeout)
        with processes.forked(lambda: run_study(objective.config, objective)) as [process]:
            while len(server.log()) < CONCURRENCY:
                time.sleep(0.01)
            for _ in range(n_signals):
                os.kill(process.pid or 0, signal.SIGINT)
                time.sleep(1)
            process.join(10)
            assert process.exitcode == 0
    assert {trial.state for trial in open_started(objective.config).trials} == {TrialState.WAITING}


def test_a_budget_stops_the_study_and_a_larger_one_ends_it(
    make: Make, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with judge(tmp_path / "server") as server:
        objective = make(server, "out", budget=20)
        with pytest.raises(JudgeBudgetError, match=r"judge\.budget must leave questions to ask, got 20"):
            run_study(objective.config, objective)
        assert len(server.log()) == 20
        assert TrialState.FAIL not in {trial.state for trial in open_started(objective.config).trials}
        objective = make(server, "out", budget=1000)
        run_study(objective.config, objective)
        assert ended(objective) == undisturbed
        assert set(server.answered().values()) == {1}


def test_answers_are_compared_with_a_fixed_one_in_both_orders(make: Make, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        objective = make(server, "out", 6, ("judged_pairs", "preferred"))
        run_study(objective.config, objective)
        study = open_started(objective.config)
        rows = score_holdout(study, objective)
        answered = server.answered()
    assert set(answered.values()) == {1}
    assert 2 * 30 < len(answered) <= 2 * 2 * 30  # one or two different answers to 30 questions, in two orders
    assert sum("Answer A:\nTwo." in prompt for prompt in answered) == len(answered) / 2
    # an answer that is right is preferred; one that is as bad as the fixed answer ties
    kept = shown_documents(study, summarize(study, objective.config), objective.config)
    scores = {(answer.text, *answer.scores.values()) for document in kept for answer in document.answers}
    assert scores == {("right", 1.0), ("", 0.5)}, scores
    assert len(rows) == 6
    assert objective.scorer.describe().n_judged == 2 * 24


def test_the_next_chunk_is_answered_while_one_is_judged(make: Make, tmp_path: Path) -> None:
    with judge(tmp_path / "server") as server:
        objective = make(server, "out")
        objective.load(objective.space.baseline_recipe("uniform"))
        scorer = objective.scorer
        expected = [scorer.score_chunk(chunk) for chunk in range(scorer.n_chunks)]
    assert isinstance(objective.loader, LocalLoader)
    engine = objective.loader.engine
    assert isinstance(engine, FakeEngine)
    assert scorer.judge is not None
    before, ask, n_asked = engine.n_responses, scorer.judge.ask, 0

    def patient(questions: Sequence[Question]) -> list[float]:
        """Score questions only when the engine has answered the next chunk."""
        nonlocal n_asked
        n_asked += len(questions)
        deadline = time.monotonic() + 30
        while engine.n_responses - before < min(n_asked + 6, 24):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return ask(questions)

    [rubric] = scorer._terms[0].leaves[0].rubrics
    rubric.ask = patient
    ahead = Ahead(scorer)
    assert [ahead.score(chunk, chunk + 1 if chunk < 3 else None) for chunk in range(4)] == expected
    assert engine.n_responses - before == 24  # each chunk is answered once


def test_nonsense_fails_trials_with_the_reason_and_scores_nothing(make: Make, tmp_path: Path) -> None:
    with judge(tmp_path / "server", "nonsense") as server:
        objective = make(server, "out", n_trials=2)
        run_study(objective.config, objective)
        study = open_started(objective.config)
        failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
        assert len(failed) == 2
        assert {trial.state for trial in study.trials} == {TrialState.FAIL, TrialState.WAITING}
        reason = "judge judge-7b: must give a score, but 3 times the last line must be 'Score: <number>'"
        assert all(trial.user_attrs[attributes.FAILURE].startswith(reason) for trial in failed)
        assert summarize(study, objective.config).rows == []


def test_check_says_the_most_that_can_be_asked_and_finds_a_wrong_set_up(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    with judge(tmp_path / "server") as server:
        path = str(make(server, "out", budget=100).config.path)
        shown = runner.invoke(app, ["check", path])
        assert shown.exit_code == 0, shown.output
        most = 12 * 24 + (5 + 6) * 6  # 12 trials; on the holdout the 5 best merges and the 6 baselines
        line = (
            f"judge      judge-7b at {server.url}: at most {most} questions in the whole study; judge.budget allows 100"
        )
        assert line in shown.output
        for command in ("check", "run-study"):
            monkeypatch.delenv("JUDGE_KEY")
            wrong = runner.invoke(app, [command, path])
            assert wrong.exit_code == 1
            [error] = [line for line in wrong.stderr.splitlines() if not line.startswith("reading models")]
            assert error.startswith(
                "error: judge.key_variable must name an environment variable that is set, got JUDGE_KEY"
            )
            monkeypatch.setenv("JUDGE_KEY", KEY)
        wrong_set_ups = {
            "judge.url must be where a judge answers, got http://127.0.0.1:9/v1": {"url": "http://127.0.0.1:9/v1"},
            "judge.model must be one that": {"model": "other"},
        }
        for message, changed in wrong_set_ups.items():
            path = str(make(server, "out", **changed).config.path)
            wrong = runner.invoke(app, ["run-study", path])
            assert wrong.exit_code == 1
            [error] = [line for line in wrong.stderr.splitlines() if not line.startswith("reading models")]
            assert error.startswith(f"error: {message}")
        assert not server.log()
    assert not (tmp_path / "out").exists()
