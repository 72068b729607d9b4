"""A study that races merge methods, on tiny models with a landscape whose optimum is a merge by ties."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.errors import ConfigError, NonFiniteMergeError, StudyError
from optuna_merge.merging.merger import Merger
from optuna_merge.report import dashboard
from optuna_merge.search.race import make_spaces, ranking, recorded_schedule, rounds_of, winner_of
from optuna_merge.search.space import AFTER_ASCENT_SIGMA
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import ascent_trial, end_of_ascent
from optuna_merge.storage.claims import enqueue
from optuna_merge.storage.trials import best_merge, generation
from optuna_merge.study.engines import build_scorer
from optuna_merge.study.export import export_trial
from optuna_merge.study.folder import BEST_CONFIG
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from optuna_merge.testing.engine import FakeEngine
from tests.processes import forked
from tests.study.killing import Killed

METHODS = ["task_arithmetic", "ties", "dare_ties", "della"]
N_TRIALS = 60


@pytest.fixture
def race_file(study_file: Callable[..., Path], tiny_models: Path) -> Callable[..., Path]:
    """A function that writes a study file whose methods are raced; its keywords replace keys."""

    def write(methods: Any = METHODS, n_chunks: int = 20, genome: Any = (), study: Any = (), **changes: Any) -> Path:
        models = [str(tiny_models / "model_0"), str(tiny_models / "model_1")]
        own = {"models": models, "base_model": str(tiny_models / "base"), "merge_method": methods, **dict(genome)}
        options = {"name": "tiny", "n_trials": N_TRIALS, "seed": 3, "n_chunks": n_chunks, "sampler": {"gp_every": 0}}
        options |= dict(study)
        return study_file(**{"gold": "0", "genome": own, "study": options, "search": {"density": 0.2}, **changes})

    return write


class Sharp(FakeEngine):
    """An engine that tells merges apart that are close to each other."""

    @property
    def skill(self) -> float:
        return super().skill ** 8


def ties_wins(path: Path, **overrides: Any) -> MergeObjective:
    """An objective whose score is best at one merge by ties."""
    config = load_study(path, overrides)
    models = StudyModels.open(config)
    merger = Merger(models.checkpoints)
    space = make_spaces(config, models.refs)["ties"]
    params = {name: 0.4 if "model_0" in name else 1.2 for name in space.distributions}
    engine = Sharp({name: tensor.clone() for name, tensor in merger.merge(space.decode(params))})
    return MergeObjective(config, models, LocalLoader(merger, engine), build_scorer(config, engine))


def record(study: optuna.Study) -> list[Any]:
    """All of a study's trials that must not depend on interruptions."""
    timed = (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
    return [
        (t.state, t.value, t.params, t.intermediate_values, {k: v for k, v in t.user_attrs.items() if k not in timed})
        for t in study.trials
    ]


def test_the_better_half_of_the_methods_stays_in_each_round_and_the_search_goes_on_within_the_winner(
    race_file: Callable[..., Path], tmp_path: Path
) -> None:
    objective = ties_wins(race_file())
    assert "".join(objective.describe()).count(
        "begins with a race of task_arithmetic (2 weights), ties (2 weights), dare_ties (2 weights), della (2 weights):"
        " 8 uniform merges and draws, 2 of each of 4 methods, then 2 of each of 2 methods; 20 merges on the first 5 of"
        " 20 chunks, as many documents as 5.0 full trials; then the winner alone"
    )
    assert run_study(objective.config, objective) == Outcome(N_TRIALS)
    study = open_started(objective.config)
    trials = study.trials
    # the baselines, with one uniform merge; the uniform merges of each method; two rounds; the winner
    planned = [(t.user_attrs.get(attributes.METHOD), t.user_attrs.get(attributes.RACE_ROUND)) for t in trials]
    uniform = [("task_arithmetic", 0)] * 3 + [("ties", 0)] + [("dare_ties", 0)] * 3 + [("della", 0)]
    assert planned[:11] == [uniform[0], (None, None), (None, None), (None, None), *uniform[1:]]
    assert planned[11:19] == [(method, 1) for method in METHODS] * 2
    second, third = rounds_of(trials, recorded_schedule(trials))[2:]
    assert len(second) == 2
    assert third == ["ties"]
    assert planned[19:23] == [(method, 2) for method in second] * 2
    best = ranking(trials, ["ties"], 5, 2)[0].trial
    assert planned[23:25] == [("ties", 3)] * 2
    # its uniform and its best merge, on every document
    assert [t.params for t in trials[23:25]] == [trials[6].params, best.params]
    assert planned[25:] == [("ties", None)] * (N_TRIALS - 25)
    assert winner_of(trials) == "ties"
    # every merge of the race is scored on the same chunks, and estimated against the first trial
    for trial in trials[4:23]:
        assert trial.state == TrialState.PRUNED
        assert list(trial.intermediate_values) == [0, 1, 2, 3, 4]
        ahead = [value - trials[0].intermediate_values[chunk] for chunk, value in trial.intermediate_values.items()]
        assert trial.user_attrs[attributes.PAIRED_ESTIMATE] == pytest.approx(trials[0].value + sum(ahead) / 5)
    assert all(name.startswith(f"{t.user_attrs[attributes.METHOD]}.layers_") for t in trials[4:] for name in t.params)
    # CMA-ES goes on where the race has left it: the first generation holds merges of the race
    drawn = [trial for trial in trials if trial.user_attrs.get(attributes.METHOD) == "ties" and generation(trial) == 0]
    assert {trial.user_attrs.get(attributes.RACE_ROUND) for trial in drawn} == {1, 2, None}
    # the winner's best merge is handed over, and every trial replays
    winner = best_merge(study)
    assert winner.value > max(trial.value for trial in trials[:4])
    assert yaml.safe_load((objective.config.storage_path / BEST_CONFIG).read_text())["merge_method"] == "ties"
    again = ties_wins(objective.config.path)
    for trial in trials:
        again.recipe(trial)
    assert again.recipe(trials[13]).method == "dare_ties"
    folder = export_trial(study, again.config, tmp_path / "model").folder
    assert yaml.safe_load((folder / "mergekit_config.yml").read_text())["merge_method"] == "ties"


def test_its_reports_show_the_race(race_file: Callable[..., Path], tmp_path: Path) -> None:
    few = {"n_documents": 24, "n_chunks": 8, "holdout": None, "study": {"n_trials": 26}}
    objective = ties_wins(race_file(["ties", "task_arithmetic"], **few))
    run_study(objective.config, objective)
    file, page = str(objective.config.path), tmp_path / "page.html"
    shown = invoke("report", file, "--html", str(page))
    line = r"race: ties has won against task_arithmetic; \d+ merges on 4 chunks, \d+ documents"
    assert re.search(line, shown)
    assert re.search(r"\n task_arithmetic .* -0\.\d+ ± 0\.\d+", shown)
    assert "uniform x1.5 (task_arithmetic)" not in shown  # never scored in full
    assert "The race: best merge of each method by documents spent on it" in page.read_text()
    assert re.search(line, invoke("status", file))
    assert "| ties |" in invoke("report", file, "--markdown")
    importances = json.loads(invoke("explain", file, "--json"))
    assert all(name.startswith("ties.") for name in importances["parameters"])
    assert list(importances["groups"]) == ["layers_00_01"]
    assert set(importances["models"]) == {"model_0", "model_1"}
    row = json.loads(invoke("report", file, "--json"))["race"]["rows"][1]
    study = open_started(objective.config)
    race = [t for t in study.trials if attributes.RACE_CHUNKS in t.user_attrs or attributes.RACE in t.user_attrs]
    own = [t for t in race if t.user_attrs[attributes.METHOD] == "task_arithmetic"]
    assert row["n_merges"] == len(own)
    assert row["value"] == pytest.approx(max(sum(t.intermediate_values[c] for c in range(4)) / 4 for t in own))
    dashboard.refresh(study, objective.config)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_race_of_four_that_is_killed_at_twenty_points_is_the_same(
    race_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"n_documents": 12, "n_chunks": 8, "holdout": None}
    objective = ties_wins(race_file(**few))

    def die_while_it_enqueues(n_enqueued: int) -> None:
        left = itertools.count(n_enqueued, -1)
        for name in ("add_trial", "enqueue_trial"):
            real = getattr(optuna.Study, name)

            def counted(*args: Any, _real: Any = real, **options: Any) -> None:
                if next(left) == 0:
                    os._exit(9)
                _real(*args, **options)

            monkeypatch.setattr(optuna.Study, name, counted)
        run_study(objective.config, objective)

    events = ["start", "chunk", "trial"]
    kills: list[Callable[[], Any]] = [
        lambda number=number: run_study(objective.config, objective, Killed(events[number % 3], 1 + 2 * (number % 3)))
        for number in range(15)
    ]
    for position, n_enqueued in ((0, 1), (1, 2), (4, 0), (8, 3), (13, 1)):
        kills.insert(position, lambda n_enqueued=n_enqueued: die_while_it_enqueues(n_enqueued))
    for kill in kills:
        with forked(kill) as [process]:
            process.join(120)
            assert process.exitcode == 9
    before = len(open_started(objective.config).trials)
    assert run_study(objective.config, objective) == Outcome(N_TRIALS)
    interrupted = record(open_started(objective.config))
    assert before > 24  # the last kill came after the race
    through = ties_wins(objective.config.path, storage_path="through")
    run_study(through.config, through)
    assert record(open_started(through.config)) == interrupted


def test_two_workers_run_one_race(race_file: Callable[..., Path]) -> None:
    few = {"n_documents": 12, "n_chunks": 8, "holdout": None, "study": {"n_trials": 45}}
    objective = ties_wins(race_file(["task_arithmetic", "ties", "della"], **few))

    def work() -> None:
        run_study(objective.config, objective)

    with forked(work, work) as workers:
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
    trials = open_started(objective.config).trials
    assert len(trials) == 45
    rounds = rounds_of(trials, recorded_schedule(trials))
    assert rounds[0] == rounds[1] == ["task_arithmetic", "ties", "della"]
    assert len(rounds[2]) == 2
    assert len(rounds[3]) == 1
    numbers = [t.user_attrs[attributes.RACE_ROUND] for t in trials if attributes.RACE_ROUND in t.user_attrs]
    assert numbers == sorted(numbers)
    for number, methods in enumerate(rounds[1:3], start=1):
        own = [t for t in trials if t.user_attrs.get(attributes.RACE_ROUND) == number]
        assert [t.user_attrs[attributes.METHOD] for t in own] == methods * (len(own) // len(methods))
        later = [
            t
            for t in trials
            if t.user_attrs.get(attributes.RACE_ROUND, 9) > number and attributes.METHOD in t.user_attrs
        ]
        assert max(t.datetime_complete for t in own) <= min(t.datetime_start for t in later)


def test_a_plain_loop_can_run_a_race_if_it_plans(race_file: Callable[..., Path]) -> None:
    objective = ties_wins(race_file(["ties", "task_arithmetic"], study={"n_trials": 30}, holdout=None))
    study = optuna.create_study(direction="maximize", sampler=objective.sampler(), pruner=objective.pruner())
    message = r"genome\.merge_method must be one method in a loop that does not plan a race, got ties, task_arithmetic;"
    with pytest.raises(StudyError, match=message):
        study.optimize(objective, n_trials=1)
    study = optuna.create_study(direction="maximize", sampler=objective.sampler(), pruner=objective.pruner())
    objective.enqueue_baselines(study)
    while winner_of(study.trials) is None:
        if not study.get_trials(states=(TrialState.WAITING,)):
            enqueue(study, objective.plan(study.trials))
        study.optimize(objective, n_trials=1)
    assert winner_of(study.trials) == "ties"


def test_the_winners_search_begins_with_an_ascent(study_file: Callable[..., Path], tiny_models: Path) -> None:
    """With real gradients; the race is scored on both chunks, so all of its merges are complete."""
    models = [str(tiny_models / "model_0"), str(tiny_models / "model_1")]
    genome = {"models": models, "base_model": str(tiny_models / "base"), "merge_method": ["della", "task_arithmetic"]}
    study_options = {"name": "tiny", "n_trials": 36, "seed": 3, "n_chunks": 2}
    path = study_file(n_documents=16, genome=genome, study=study_options, search={"start": "ascent"}, holdout=None)
    objective = MergeObjective.from_file(path)
    assert "then the winner alone, which begins with an ascent" in "".join(objective.describe())
    with forked(lambda: run_study(objective.config, objective, Killed("step", 3))) as [process]:
        process.join(120)
        assert process.exitcode == 9
    assert run_study(objective.config, objective) == Outcome(36)
    study = open_started(objective.config)
    trials, winner = study.trials, winner_of(study.trials)
    first, end = ascent_trial(trials), end_of_ascent(trials)
    assert first.user_attrs[attributes.METHOD] == winner
    assert all(attributes.RACE_ROUND in t.user_attrs or t.number in (1, 2, 3) for t in trials[: first.number])
    assert first.params == end.params
    drawn = [t for t in trials[first.number :] if attributes.RACE_ROUND not in t.user_attrs]
    assert len(drawn) > 5
    for trial in drawn:  # CMA-ES begins anew at the end of the ascent, and learns nothing from the race's points
        assert trial.user_attrs[attributes.METHOD] == winner
        assert trial.user_attrs[attributes.PROFILE] == first.user_attrs[attributes.PROFILE]
        away = [abs(trial.params[name] - value) for name, value in end.params.items() if name.endswith(".weight")]
        assert 0 < max(away) < 5 * AFTER_ASCENT_SIGMA
    assert all(attributes.PROFILE not in t.user_attrs for t in trials if t.number != first.number and t not in drawn)
    for trial in trials:
        objective.recipe(trial, study)


def test_a_method_whose_merges_all_fail_loses(race_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"n_documents": 12, "n_chunks": 8, "holdout": None, "study": {"n_trials": 26}}
    objective = ties_wins(race_file(["ties", "task_arithmetic"], **few))
    load = objective.loader.load

    def spoilt(recipe: Any) -> None:
        if recipe.method == "ties":
            raise NonFiniteMergeError("merge: must be finite, got NaN")
        load(recipe)

    monkeypatch.setattr(objective.loader, "load", spoilt)
    assert run_study(objective.config, objective) == Outcome(26)
    study = open_started(objective.config)
    assert winner_of(study.trials) == "task_arithmetic"
    assert best_merge(study).user_attrs[attributes.METHOD] == "task_arithmetic"


def test_config_errors(race_file: Callable[..., Path]) -> None:
    def problems(methods: Any, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load_study(race_file(methods, **changes))
        return str(caught.value)

    assert re.search(r"yaml:\d+: genome.merge_method must be a merge method or a list of them, got \[\]", problems([]))
    assert "genome.merge_method must be a merge method or a list of them, got ['ties', 1]" in problems(["ties", 1])
    twice = problems(["ties", "della", "ties"])
    assert re.search(r"yaml:\d+: genome.merge_method\[2\] must be different from the others, got 'ties' again", twice)
    assert "genome.merge_method[1] must be a known merge method, got 'tis'; did you mean 'ties'?" in problems(
        ["ties", "tis"]
    )
    unknown = problems(["ties", "karcher"])
    assert re.search(r"yaml:\d+: genome.base_model must be absent for karcher", unknown)
    no_base = problems(["linear", "ties"], genome={"base_model": None})
    assert re.search(r"yaml:\d+: genome.base_model must be given for ties, got nothing", no_base)
    assert "study.goal must be sum for several merge methods, got pareto" in problems(
        METHODS, study={"goal": "pareto", "sampler": "tpe"}
    )
    assert "search.warm_start must be absent for several merge methods" in problems(
        METHODS, search={"warm_start": "other.yaml"}
    )
    wrong = problems(["task_arithmetic", "linear"], search={"density": 0.5}, genome={"rescale": True})
    assert re.search(r"yaml:\d+: search.density must be a parameter of task_arithmetic or linear, got 'density'", wrong)
    assert re.search(r"yaml:\d+: genome.rescale must be absent for task_arithmetic or linear, got True", wrong)


def test_each_method_takes_the_keys_that_it_has(race_file: Callable[..., Path]) -> None:
    config = load_study(
        race_file(
            ["task_arithmetic", "ties"], genome={"rescale": True}, search={"density": [0.3, 0.6], "lambda": [0.5, 2]}
        )
    )
    names = {method: set(config.of_method(method).search.ranges) for method in config.method_names}
    assert names == {"task_arithmetic": {"lambda"}, "ties": {"density", "lambda"}}
    assert [config.of_method(method).genome.rescale for method in config.method_names] == [None, True]


def test_auto_names_methods_that_suit_the_models(race_file: Callable[..., Path], tiny_models: Path) -> None:
    assert load_study(race_file("auto")).method_names == tuple(METHODS)
    no_base = {"base_model": None}
    assert load_study(race_file("auto", genome=no_base, search={})).method_names == ("linear", "slerp", "multislerp")
    three = {**no_base, "models": [str(tiny_models / name) for name in ("model_0", "model_1", "base")]}
    assert load_study(race_file("auto", genome=three, search={})).method_names == ("linear", "multislerp")
    assert load_study(race_file(["ties"])).genome.merge_method == "ties"


def test_check_refuses_a_study_that_is_too_short_with_numbers(race_file: Callable[..., Path]) -> None:
    path = race_file(study={"n_trials": 59})
    message = (
        r"study\.yaml: study\.n_trials must be at least 60 for a race of 4 methods, got 59; it takes at least 20 merges"
        r" on 5 of 20 chunks, a third of all trials and a quarter of all documents"
    )
    with pytest.raises(StudyError, match=message):
        ties_wins(path).schedule()
