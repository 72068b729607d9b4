"""How a study begins where its file leaves that open: with the ascent, or at a uniform merge.

Knows the rules of ``search.start: auto``; what an ascent is stands in ``study/ascent.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from optuna_merge.config.contradictions import ascent_problems
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.search.ascent_space import AscentSpace
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels

LEAST_DOCUMENTS = 60
"""Searched documents with which the ascent was measured to help held-out scores; fewer were not tried (docs/log.md)."""

LEAST_TRIALS = 30
"""Trials of which the ascent, at the price of some ten full evaluations, does not take the larger part."""


def settle_start(
    config: StudyConfig, scorer: Scorer, lacking: Callable[[], str] = lambda: ""
) -> tuple[StudyConfig, str]:
    """Decide how a study begins if ``search.start`` is ``auto``.

    Args:
        config: The study file.
        scorer: Its eval tasks.
        lacking: Says what an ascent needs that is not here, such as memory; "" if all is there. Asked last.

    Returns:
        The study file with the decision in place of ``auto``, and, if ``auto`` is ``uniform``, the reason.

    Raises:
        TaskError: If the code of a task's ``gradient_target`` raises.
    """
    if config.search.start != "auto":
        return config, ""
    reason = _why_uniform(config, scorer) or lacking()
    search = config.search.model_copy(update={"start": "uniform" if reason else "ascent"})
    return config.model_copy(update={"search": search}), reason


def has_gradient(config: StudyConfig, scorer: Scorer) -> bool:
    """Whether the study's score has a gradient; for vLLM, the transformers engine finds it.

    Args:
        config: The study file.
        scorer: Its eval tasks.

    Raises:
        TaskError: If the code of a task's ``gradient_target`` raises.
    """
    return scorer.has_gradient(by_another_engine=config.engine.backend == "vllm")


def few_documents(config: StudyConfig, models: StudyModels, space: SearchSpace, n_documents: int) -> str:
    """A warning if the study file asks for an ascent by fewer documents than were measured to suffice; else empty.

    Args:
        config: The study file, with ``search.start`` settled.
        models: Its checkpoints.
        space: Its search space.
        n_documents: Searched documents.
    """
    if config.search.start == "uniform" or n_documents >= LEAST_DOCUMENTS:
        return ""
    n_weights = AscentSpace(space, models.places, config.search.profile).n
    return (
        f"the ascent moves {n_weights} weights by {n_documents} searched documents, fewer than {LEAST_DOCUMENTS}: it"
        " may fit these documents alone; look at the holdout, use more documents or search.start: uniform"
    )


def _why_uniform(config: StudyConfig, scorer: Scorer) -> str:
    for problem in ascent_problems(config):
        return f"an ascent must {problem.rule.replace('be uniform for', 'not be used with')}"
    if config.study.n_trials < LEAST_TRIALS:
        return f"an ascent pays from {LEAST_TRIALS} trials on, here are {config.study.n_trials}"
    if scorer.n_documents < LEAST_DOCUMENTS:
        return f"an ascent needs {LEAST_DOCUMENTS} searched documents, here are {scorer.n_documents}"
    if not has_gradient(config, scorer):
        return "no metric here has a gradient"
    return ""
