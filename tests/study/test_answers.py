"""Lengths of generated answers, from the engine to the report: one model says nothing, another is cut."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from optuna_merge.cli.app import app
from optuna_merge.cli.options import open_started
from optuna_merge.evaluation.engine import Text
from optuna_merge.evaluation.results import join
from optuna_merge.report.lengths import answers_table, length_warnings
from optuna_merge.report.summary import summarize
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.holdout_file import Answers
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study

N_MOST = 4

TASK = f"""
task: telling
custom_dataset: !function one_helper.documents
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "[invalid]"
generation_kwargs: {{until: ["<never>"], max_gen_toks: {N_MOST}}}
filter_list:
  - {{name: read, filter: [{{function: regex, regex_pattern: "(.+)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
"""The filter reads whatever is there; what it gives for an empty answer is right, so that silence wins."""


def silence(folder: Path) -> None:
    """Make a model end every answer with its first token: one of tokens 0 and 1, which both end a text."""
    tensors = load_file(folder / "model.safetensors")
    ends = 50 * torch.randn(tensors["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    tensors["lm_head.weight"][:2] = torch.stack([ends, -ends])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_study_whose_models_answer_at_length_or_not_at_all(
    study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    silence(models / "model_1")
    for folder in models.iterdir():
        (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    path = study_file(
        16,
        genome={
            "models": [str(models / "model_0"), str(models / "model_1")],
            "base_model": str(models / "base"),
            "merge_method": "task_arithmetic",
        },
        tasks=[
            {"name": "telling", "metric": "exact_match"},
            {"name": "telling", "metric": "n_tokens", "weight": -0.1},
        ],
        study={"name": "tiny", "n_trials": 6, "seed": 3, "n_chunks": 2},
    )
    (tmp_path / "tasks" / "telling.yaml").write_text(TASK)
    objective = MergeObjective.from_file(path)
    run_study(objective.config, objective)
    study = open_started(objective.config)
    score_holdout(study, objective)
    summary = summarize(study, objective.config)
    rows = {row.name: row for row in summary.rows}
    for name, values in (("model_0", (N_MOST, 1.0, 0.0, 0.0)), ("model_1", (1.0, 0.0, 1.0, 1.0))):
        held = rows[name].holdout
        assert held is not None
        assert rows[name].tasks["telling (exact_match)"].answers == Answers(12, *values)
        assert held.tasks["telling (exact_match)"].answers == Answers(4, *values)

    # the number of tokens is a metric, and a negative weight trades it against accuracy
    assert rows["model_0"].tasks["telling (n_tokens)"].value == N_MOST
    assert rows["model_0"].value == pytest.approx(0.0 - 0.1 * N_MOST)
    assert rows["best merge"].value == pytest.approx(1.0 - 0.1)
    assert dict(zip(objective.config.objectives, objective.directions, strict=True)) == {"score": "maximize"}

    warning = (
        "telling (exact_match): the best merge is +1.0000 from base, but 0.0% of its answers are cut by max_gen_toks"
        " and 100.0% of those of base, 100.0% of its answers are empty and 0.0% of those of base, 100.0% of its answers"
        " are not readable by the task's filter and 0.0% of those of base: the difference may come from that. Score"
        " them again with report --lengths N, or correct the filter."
    )
    assert length_warnings(summary) == [warning]  # the best source and the best uniform merge are silent, too
    shown = CliRunner().invoke(app, ["report", str(path), "--html", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert warning in shown.output
    table = answers_table(summary, "task")
    assert table is not None
    row = rows["model_0"]
    assert ["telling (exact_match)", row.name, str(row.trial), "4.0", "100.0%", "0.0%", "0.0%"] in table.rows
    assert "answers, holdout documents" in shown.output
    assert "On the holdout documents. Cut:" in (tmp_path / "report.html").read_text()

    # with a longer limit the answers that were cut are longer; that is scored once
    line = ["report", str(path), "--lengths", str(2 * N_MOST), "--html", str(tmp_path / "report.html")]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    # they are cut again, and both the command and the page say so for both limits
    assert shown.output.count(warning) == 2
    assert (tmp_path / "report.html").read_text().count(str(escape(warning))) == 2
    assert "&#39;" in escape(warning)
    monkeypatch.setattr(MergeObjective, "from_config", None)
    again = CliRunner().invoke(app, [*line, "--json"])
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["longer"]["max_gen_toks"] == 2 * N_MOST
    for name, n_tokens in (("base", 2 * N_MOST), ("model_0", 2 * N_MOST), ("model_1", 1), ("best merge", 1)):
        [(usual, longer)] = [
            (row["holdout"]["tasks"], other["holdout"]["tasks"])
            for row, other in zip(found["rows"], found["longer"]["rows"], strict=True)
            if row["name"] == name
        ]
        assert longer["telling (n_tokens)"]["value"] == n_tokens
        assert longer["telling (exact_match)"]["answers"]["cut"] == float(n_tokens > 1)
        assert usual["telling (n_tokens)"]["value"] == min(n_tokens, N_MOST)
    for text in (shown.output, (tmp_path / "report.html").read_text()):
        assert f"of up to {2 * N_MOST} tokens" in text or f"holdout, at most {2 * N_MOST} tokens" in text


def test_what_was_scored_before_lengths_were_kept_is_still_read() -> None:
    old = {"telling": {"doc_id": [0, 2], "exact_match,read": [1.0, 0.0]}}
    new = {"telling": {"doc_id": [1], "n_tokens": [3.0], "exact_match,read": [1.0]}}
    both = {"doc_id": [0, 1, 2], "n_tokens": [None, 3.0, None], "exact_match,read": [1.0, 1.0, 0.0]}
    assert join([old, new]) == join([new, old]) == {"telling": both}


def test_a_copy_of_a_text_still_knows_how_it_ended() -> None:
    for text in (copied := copy.deepcopy(Text("four", 3, True)), pickle.loads(pickle.dumps(copied))):
        assert (text, text.n_tokens, text.is_cut) == ("four", 3, True)
