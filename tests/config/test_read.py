"""The file itself, its paths, and what overrides replace in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.paths import absolute_storage
from optuna_merge.config.read import load_study
from optuna_merge.errors import ConfigError
from tests.config.study_text import STUDY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r": study file must be a mapping of keys, got nothing; optuna-merge init writes one"),
        ("# later\n", r": study file must be a mapping of keys, got nothing;"),
        ("- a\n", r": study file must be a mapping of keys, got \['a'\];"),
        ("just words", r": study file must be a mapping of keys, got 'just words';"),
        (STUDY + "study:\n\tname: x\n", r": study file must be YAML, got .*'\\t'.*line 8.*; correct that line"),
        (STUDY + "limit: [1\n", r": study file must be YAML, got .*line 7"),
        (STUDY + "---\n" + STUDY, r": study file must be YAML, got expected a single document"),
        (
            STUDY + "study: !!python/object:os.system {}\n",
            r": study file must be YAML, got could not determine a constr",
        ),
        (b"genome: \xff\xfe\n", r": study file must be readable text, got 'utf-8' codec .*; check the path"),
        (STUDY + "study: &s {name: *s}\n", r": study file must end, got an anchor within itself; write it out"),
    ],
)
def test_what_is_no_study_file(load: Any, text: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"my_study\.yaml" + expected) as caught:
        load(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_and_an_anchor_are_fine(load: Any) -> None:
    assert load(b"\xef\xbb\xbf" + STUDY.encode() + b"study: {<<: {seed: 3}, n_trials: 4}\n").study.seed == 3


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(STUDY)
    with pytest.raises(
        ConfigError, match=r"quikstart.yaml: study file must exist; did you mean .*/quickstart\.yaml\?$"
    ):
        load_study(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"study file must exist; give the path of a study file$"):
        load_study(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match=r"study file must be readable text, got .*[Dd]irectory.*; check the path$"):
        load_study(tmp_path)


def test_overrides_replace_what_the_file_says(load: Any) -> None:
    text = STUDY + "study: {sampler: cmaes, n_trials: 5}\nengine:\n"
    config = load(
        text,
        {
            "study.n_trials": 7,
            "study.sampler.popsize": 8,
            "engine.device": "cpu",
            "search.prior.common": 0.1,
            "limit": 3,
        },
    )
    assert (config.study.n_trials, config.study.sampler.name, config.study.sampler.popsize) == (7, "cmaes", 8)
    assert (config.engine.device, config.search.prior.common, config.limit) == ("cpu", 0.1, 3)


def test_overrides_are_checked_too(problems: Any) -> None:
    assert problems(STUDY, {"study.n_trials": 0, "nope": 1}) == [
        "my_study.yaml: nope must be a known key, got 'nope'; did you mean 'genome'?",
        "my_study.yaml: study.n_trials must be at least 1, got 0; raise it",
    ]
    # What the file has wrongly in the place of the section is not covered up.
    assert problems(STUDY + "study: mine\n", {"study.n_trials": 3}) == [
        "my_study.yaml:7: study must be a mapping of keys, got 'mine'; indent the keys below it"
    ]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a/study.db", "sqlite:////folder/a/study.db"),
        ("sqlite+pysqlite:///study.db", "sqlite+pysqlite:////folder/study.db"),
        ("journal://study.log", "journal:///folder/study.log"),
        ("sqlite:////a/study.db", "sqlite:////a/study.db"),
        ("journal:///a/study.log", "journal:///a/study.log"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_a_relative_storage_starts_at_a_folder(url: str, expected: str) -> None:
    assert absolute_storage(url, Path("/folder")) == expected


def test_an_override_has_no_line(problems: Any) -> None:
    assert problems(STUDY + "study: {n_trials: 3}\n", {"study.n_trials": 0}) == [
        "my_study.yaml: study.n_trials must be at least 1, got 0; raise it"
    ]
