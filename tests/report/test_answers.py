"""What models answered, from the holdout to the screen, the page and the artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.evaluation.engine import Prepared, Response, Text
from optuna_merge.internals.optuna import storage_of, study_id
from optuna_merge.report.answers import printable
from optuna_merge.report.artifacts import upload_answers
from optuna_merge.storage.trials import best_merges
from optuna_merge.study.answers_file import ANSWERS_FILE
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.holdout_file import HOLDOUT_FILE
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.testing.engine import FakeEngine, FakePrepared
from tests.study.test_objective import fake_objective

WILD = "<script>alert('&')</script>\x1b[31mred\x07 \u202egnp.exe\nsecond line\r\x9b2J"
"""What a model may write: markup, and characters that a terminal obeys."""

TASK = """
task: telling
custom_dataset: !function one_helper.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}} <b>"
doc_to_target: " right"
generation_kwargs: {until: ["<never>"], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


class WildEngine(FakeEngine):
    """Says ``right`` where the fake engine knows the answer, and something wild elsewhere."""

    def respond(self, prepared: Prepared) -> list[Response]:
        assert isinstance(prepared, FakePrepared)
        return [Text(WILD, 5, is_cut=False) if response == "" else response for response in super().respond(prepared)]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    [line] = result.stderr.splitlines()
    return line


@pytest.fixture
def objective(study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MergeObjective:
    monkeypatch.setattr("tests.study.test_objective.FakeEngine", WildEngine)
    path = study_file(
        80,
        gold="0",
        holdout=0.5,
        tasks=[{"name": "one"}, {"name": "telling", "metric": "exact_match", "weight": 2}],
        study={"name": "tiny", "n_trials": 8, "seed": 3, "n_chunks": 2, "pruner": "none"},
    )
    (tmp_path / "tasks" / "telling.yaml").write_text(TASK)
    objective = fake_objective(path)
    run_study(objective.config, objective)
    score_holdout(open_started(objective.config), objective)
    return objective


def test_answers_are_shown_side_by_side_where_models_differ(objective: MergeObjective, tmp_path: Path) -> None:
    path, study = objective.config.path, open_started(objective.config)
    best = best_merges(study, 1)[0].number
    shown = json.loads(invoke("answers", path, "--json", "--n", 100).stdout)
    assert len(shown) == 40 + 40
    assert [document["task"] for document in shown[:4]] == ["one", "telling"] * 2
    names = ["base", "model_0", "model_1", "best merge"]
    assert all([answer["model"] for answer in document["answers"]] == names for document in shown)
    for task, right in (("one", "A: right"), ("telling", "right")):
        own = [document for document in shown if document["task"] == task]
        differs = [document["differs"] for document in own]
        assert any(differs)
        assert differs == sorted(differs, reverse=True)
        for document in own:
            assert document["question"].startswith("Question one ")
            assert document["right"] == right
            for answer in document["answers"]:
                [score] = answer["scores"].values()
                assert (answer["text"] == right) == bool(score)
        # what is shown adds up to the score on the holdout
        row = next(row for row in score_holdout(study, objective) if row.trial == best)
        scores = [sum(document["answers"][-1]["scores"].values()) for document in own]
        assert sum(scores) / len(own) == pytest.approx(row.tasks[task].value)

    text = invoke("answers", path, "--n", 2).stdout
    assert text.startswith("── one, document ")
    assert "right: A: right\n\nbase (trial 5): acc " in text
    assert f"best merge (trial {best}): exact_match 1\n    right\n" in text
    assert text.endswith(f"2 of 80 held-out documents; scores differ on {sum(d['differs'] for d in shown)}\n")
    other = next(trial.number for trial in best_merges(study, 3) if trial.number != best)
    [document] = json.loads(invoke("answers", path, "--json", "--n", 1, "--trial", other).stdout)
    assert document["answers"][-1]["trial"] == other
    assert document["answers"][-1]["model"] != "best merge"

    report = invoke("report", path, "--html", tmp_path / "report.html").stdout
    for _ in range(2):
        upload_answers(study, objective.config)
    attrs = storage_of(study).get_study_system_attrs(study_id(study))
    [artifact] = [json.loads(value) for key, value in attrs.items() if key.startswith("artifacts:")]
    assert artifact["filename"] == "answers.jsonl"
    lines = (objective.config.storage_path / "artifacts" / artifact["artifact_id"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == shown
    assert "More answers: optuna-merge answers " in report
    assert "  best merge  right  [exact_match 1]\n" in report


def test_whatever_a_model_writes_is_shown_as_text(objective: MergeObjective, tmp_path: Path) -> None:
    path = objective.config.path
    harmless = "\\x1b[31mred\\x07 \\u202egnp.exe\nsecond line\\r\\x9b2J"
    assert printable(WILD).endswith(harmless)
    assert printable("né 👩‍🚀\tß\ud800") == "né 👩‍🚀\tß\\ud800"
    assert invoke("report", path, "--html", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in page
    assert "Question one" in page
    outputs = [page, *(invoke(command, path).stdout for command in ("answers", "report"))]
    for output in outputs:
        assert harmless.split("\n")[0] in output
        assert not set(output) & set("\x1b\x07\x9b\u202e\r")
    assert "<script" not in page
    assert page.count("<b>") == page.count("</b>")  # the question's own is escaped


def test_what_is_not_kept_says_what_to_run(objective: MergeObjective) -> None:
    path, out, study = objective.config.path, objective.config.storage_path, open_started(objective.config)
    assert "--trial must be the number of a trial, got 99" in error_of(invoke("answers", path, "--trial", 99))
    report = f"answers to the held-out documents must be kept, got none; run optuna-merge report {path}"
    (out / ANSWERS_FILE).unlink()
    # an earlier version wrote figures alone; the scores that it kept have no answers
    for file in (out / "holdout").iterdir():
        content = json.loads(file.read_text())
        for columns in content["documents"].values():
            del columns["answer"]
        file.write_text(json.dumps(content))
    line = error_of(invoke("answers", path))
    assert line == f"error: trial 5: {report.replace('run ', f'run rm {out / HOLDOUT_FILE} && ')}"
    before = (out / HOLDOUT_FILE).read_text()
    (out / HOLDOUT_FILE).unlink()
    assert error_of(invoke("answers", path)) == f"error: trial 5: {report}"
    score_holdout(study, objective)
    assert (out / HOLDOUT_FILE).read_text() == before
    assert invoke("answers", path).exit_code == 0
    engine = objective.loader.engine
    assert isinstance(engine, FakeEngine)
    n_loads = engine.n_loads
    score_holdout(study, objective)
    assert engine.n_loads == n_loads
    (out / ANSWERS_FILE).write_text("[]")
    assert "holdout_answers.json: must hold the answers" in error_of(invoke("answers", path))
