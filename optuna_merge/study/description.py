"""What a study is about to search and score, in lines for the terminal.

Knows the parts of a study; runs nothing and prints nothing.
"""

from __future__ import annotations

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.search.ascent import Schedule
from optuna_merge.search.ascent_space import AscentSpace
from optuna_merge.search.build import make_sampler, never_prunes
from optuna_merge.search.race import RaceSchedule, Spaces
from optuna_merge.search.samplers import StableCmaEsSampler, population_size
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels


def describe_study(config: StudyConfig, models: StudyModels, spaces: Spaces, scorer: Scorer, device: str) -> list[str]:
    """One line for each thing that a user should know before the first trial.

    Args:
        config: The study file.
        models: Its checkpoints.
        spaces: The search space of each of its methods.
        scorer: Its eval tasks.
        device: Where the resident model lives.
    """
    tasks = scorer.describe()
    held_out = sum(task.n_holdout for task in tasks.tasks)
    space = next(iter(spaces.values()))
    sizes = " or ".join(f"{size}" for size in sorted({len(one.distributions) for one in spaces.values()}))
    lines = [
        f"search: {sizes} weights of {len(models.refs.sources)} models, {models.refs.n_layers} layers,"
        f" {' or '.join(spaces)}",
        f"scoring: {tasks.n_documents} documents in {tasks.n_chunks} chunks, {held_out} held out;"
        f" {models.refs.dtype} on {device}; chat template {tasks.chat_template_reason}",
    ]
    if len(spaces) > 1:
        lines.append(f"search: begins with {describe_race(config, spaces, scorer)}")
    elif config.search.start == "ascent":
        lines.append(f"search: begins {describe_ascent(config, models, space, scorer.n_chunks)}")
    if warm_start := config.search.warm_start:
        lines.append(f"search: starts from the {warm_start.n_best} best trials of {warm_start.label}")
    if len(config.objectives) > 1:
        lines.append(
            f"goal: a Pareto front of {', '.join(config.objectives)}; the best merge is the one with the largest sum"
        )
    lines += [line for line in (_population_line(config, space), never_prunes(config, scorer.n_chunks)) if line]
    if scorer.not_means:
        names = ", ".join(scorer.not_means)
        lines.append(f"pruning compares {names} on the chunks scored so far: the metric is not a mean over documents")
    return lines


def describe_ascent(config: StudyConfig, models: StudyModels, space: SearchSpace, n_chunks: int) -> str:
    """What the search begins with, in a few words."""
    n_steps = Schedule.draw(n_chunks, config.study.seed).n_steps
    moved = f"{len(space.distributions)} weights of layer groups"
    if config.search.profile == "tensor":
        moved = f"{AscentSpace(space, models.places, 'tensor').n} weights of single tensors"
    where = ", by transformers before vLLM starts" if config.engine.backend == "vllm" else ""
    return f"with an ascent, {n_steps} steps along the gradient of {moved}{where}"


def describe_race(config: StudyConfig, spaces: Spaces, scorer: Scorer) -> str:
    """The race of a study's methods, in a sentence.

    Raises:
        StudyError: If the study has too few trials for it.
    """
    documents = [scorer.n_documents_in(chunk) for chunk in range(scorer.n_chunks)]
    return RaceSchedule.make(spaces, config.study.n_trials, documents, str(config.path)).describe(
        spaces, documents, ascends=config.search.start == "ascent"
    )


def _population_line(config: StudyConfig, space: SearchSpace) -> str:
    """What several workers mean for CMA-ES; "" for one worker or another sampler."""
    n_workers, sampler = config.study.n_workers, make_sampler(config, space)
    if n_workers == 1 or not isinstance(sampler, StableCmaEsSampler):
        return ""
    population, usual = sampler.population_size, population_size(len(space.distributions))
    share = population / (population + n_workers - 1)
    if share < 0.8 or population == usual:
        return f"{n_workers} workers: CMA-ES learns from {share:.0%} of the trials, {population} in a generation"
    return (
        f"{n_workers} workers: generations of {population} trials instead of {usual}, so that CMA-ES learns from"
        f" {share:.0%} of the trials"
    )
