"""The forms of each key: short forms, keys without a value, options of a sampler, pruner or prior."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from optuna_merge.config.genome import GenomeConfig
from optuna_merge.config.pruner import WilcoxonConfig
from optuna_merge.config.sampler import CmaEsConfig, OptunaSamplerConfig, RandomSamplerConfig
from optuna_merge.config.search import Range, StructuredPrior
from optuna_merge.config.section import Section
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.tasks import TaskConfig
from tests.config.study_text import STUDY

SHORT_FORMS = [
    ("study: {sampler: random}", "study.sampler.name", "random"),
    ("study: {pruner: none}", "study.pruner.name", "none"),
    ("holdout: 0.3", "holdout.fraction", 0.3),
    ("holdout: {fraction: 0.3}", "holdout.fraction", 0.3),
    ("holdout: [other]", "holdout.tasks", (TaskConfig(name="other"),)),
    ("holdout: {tasks: [{name: other, weight: 2}]}", "holdout.tasks", (TaskConfig(name="other", weight=2.0),)),
    ("search: {weight: 0.5}", "search.ranges", {"weight": Range(low=0.5, high=0.5)}),
    ("search: {weight: [0, 2]}", "search.ranges", {"weight": Range(low=0.0, high=2.0)}),
    (
        "search: {weight: {low: 0.1, high: 2, start: 1}}",
        "search.ranges",
        {"weight": Range(low=0.1, high=2.0, start=1.0)},
    ),
    ("search: {embed_group: own, prior: {common: 0}}", "search.prior.common", 0.0),
    ("engine: {batch_size: 4}", "engine.batch_size", 4),
    ("engine: {device: cuda:1, dtype: bfloat16}", "dtype", "bfloat16"),
    ("limit: 0.25", "limit", 0.25),
    ("limit: 1", "limit", 1.0),
    ("shuffle: yes", "shuffle", True),  # YAML 1.1's other spelling of true
    ("study: {timeout: 1.0e+3}", "study.timeout", 1000.0),
]


@pytest.mark.parametrize(("text", "key", "expected"), SHORT_FORMS, ids=[text for text, _, _ in SHORT_FORMS])
def test_forms_of_a_value(load: Any, text: str, key: str, expected: Any) -> None:
    value = load(STUDY + text)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_task_may_be_its_name(load: Any) -> None:
    text = STUDY.replace("- name: letters", "- letters\n  - {name: digits, metadata: {eos_text: null}}")
    assert load(text).tasks == (TaskConfig(name="letters"), TaskConfig(name="digits", metadata={"eos_text": None}))


def test_a_range_knows_whether_it_is_constant() -> None:
    assert Range(low=1.0, high=1.0).is_constant
    assert not Range(low=0.0, high=1.0).is_constant


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a study file may leave out."""
    keys = []
    for name, field in model.model_fields.items():
        if name in ("path", "ranges") or (prefix == "" and name in ("genome", "tasks")):
            continue
        keys += [] if field.is_required() and name != "storage_path" else [f"{prefix}{name}"]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


NULLABLE = [*_keys(StudyConfig), "search.weight", *(_keys(GenomeConfig, "genome."))]


@pytest.mark.parametrize("key", NULLABLE)
def test_a_key_without_a_value_means_its_default(load: Any, key: str) -> None:
    if key == "genome.base_model":
        text = STUDY.replace("task_arithmetic", "linear").replace("base_model: base", "base_model:")
        assert load(text).genome.base_model is None
        return
    if key.startswith("genome."):
        text = STUDY.replace("tasks:", f"  {key.removeprefix('genome.')}:\ntasks:")
    else:
        *outer, last = key.split(".")
        text = STUDY + "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate([*outer, last]))
    assert load(text) == load(STUDY)


UNION_OPTIONS = [
    (section, name, option)
    for section, members in (
        ("study.sampler", (CmaEsConfig,)),
        ("study.pruner", (WilcoxonConfig,)),
        ("search.prior", (StructuredPrior,)),
    )
    for member in members
    for name in [member.model_fields["name"].default]
    for option in member.known_keys()
    if option != "name"
]


@pytest.mark.parametrize(("section", "name", "option"), [*UNION_OPTIONS, ("study.sampler", "tpe", "multivariate")])
def test_an_option_without_a_value_means_its_default(load: Any, section: str, name: str, option: str) -> None:
    outer, inner = section.split(".")
    assert load(f"{STUDY}{outer}: {{{inner}: {{name: {name}, {option}: }}}}\n") == load(
        f"{STUDY}{outer}: {{{inner}: {name}}}\n"
    )


def test_an_option_without_a_name_is_the_default_s(load: Any) -> None:
    text = "study: {sampler: {popsize: 5}, pruner: {name: , p_threshold: 0.2}}\nsearch: {prior: {common: 0.3}}\n"
    config = load(STUDY + text)
    assert config.study.sampler == CmaEsConfig(popsize=5)
    assert config.study.pruner == WilcoxonConfig(p_threshold=0.2)
    assert config.search.prior == StructuredPrior(common=0.3)


def test_the_options_of_a_sampler_or_pruner(load: Any) -> None:
    config = load(
        STUDY + "study: {sampler: {name: tpe, n_startup_trials: 20}, pruner: {name: wilcoxon, n_startup_steps: 2}}"
    )
    assert config.study.sampler == OptunaSamplerConfig.model_validate({"name": "tpe", "n_startup_trials": 20})
    assert (config.study.sampler.options, config.study.pruner.options) == (
        {"n_startup_trials": 20},
        {"n_startup_steps": 2},
    )
    assert config.study.cmaes == CmaEsConfig()
    assert load(STUDY + "study: {sampler: {sigma0: 0.1}}").study.cmaes.sigma0 == 0.1
    assert isinstance(load(STUDY + "study: {sampler: random}").study.sampler, RandomSamplerConfig)


@pytest.mark.parametrize("key", ["weight", "metric", "metadata"])
def test_a_key_of_a_task_without_a_value_means_its_default(load: Any, key: str) -> None:
    assert load(f"{STUDY}    {key}:\n") == load(STUDY)


def _sections(parent: type[Section] = Section) -> list[type[Section]]:
    """Every section that has keys."""
    found = [inner for section in parent.__subclasses__() for inner in (section, *_sections(section))]
    return [section for section in found if section.model_fields]


@pytest.mark.parametrize("section", _sections(), ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[Section]) -> None:
    attributes = (section.__doc__ or "").partition("Attributes:")[2]
    documented = {
        name.strip()
        for names in re.findall(r"^ {8}(\w[\w, ]*):", attributes, re.MULTILINE)
        for name in names.split(",")
    }
    # The tasks and sections that have a class of their own are documented there.
    own = {"genome", "tasks", "study", "engine", "search"} if section is StudyConfig else set()
    assert documented | own == set(section.model_fields)
