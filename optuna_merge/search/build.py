"""Making the sampler and the pruner that a study file asks for.

Knows which section of the file makes which class; knows nothing of how they draw or prune.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from optuna_merge.config.sampler import CmaEsConfig, OptunaSamplerConfig, RandomSamplerConfig
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import known_trials
from optuna_merge.search.named import GP_EVERY, make_gp, make_named_sampler
from optuna_merge.search.pruner import SignedRankPruner
from optuna_merge.search.race import Spaces, without_race_after_ascent
from optuna_merge.search.race_sampler import RaceSampler
from optuna_merge.search.samplers import StableCmaEsSampler, StableRandomSampler, population_size, with_estimate
from optuna_merge.search.space import UNIFORM_TOTALS, SearchSpace
from optuna_merge.search.warm_start import record_warm_start
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import ascent_trial, end_of_ascent
from optuna_merge.storage.trials import score_or_worst

if TYPE_CHECKING:
    import numpy as np

_PRUNERS: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
    "wilcoxon": SignedRankPruner,
    "none": optuna.pruners.NopPruner,
}


def make_sampler(config: StudyConfig, space: SearchSpace, population: int | None = None) -> optuna.samplers.BaseSampler:
    """Make the sampler of a study file.

    Args:
        config: The study file.
        space: Its search space.
        population: Trials in a generation of CMA-ES; None: as the study file says, or the default for its dimensions
            and workers.

    Raises:
        StudyError: If there is no sampler of that name, or it does not take its options.
    """
    import numpy as np

    options, seed = config.study.sampler, config.study.seed
    if isinstance(options, RandomSamplerConfig):
        return StableRandomSampler(seed=seed)
    if isinstance(options, OptunaSamplerConfig):
        return make_named_sampler(options.name, options.options, list(space.distributions), seed)

    starting = threading.Lock()

    def start(study: optuna.Study) -> Mapping[str, float]:
        with starting:  # threads of study.optimize may draw their first points at the same time
            end = end_of_ascent(known_trials(study))
            key = f"{attributes.START} {space.prefix}".rstrip() if end is None else attributes.START
            recorded: Mapping[str, float] | None = study.user_attrs.get(key)
            if recorded is None:
                if end is None:
                    uniform = best_uniform(study, space)
                    recorded = _point(study, config, space, uniform, np.random.default_rng(seed))
                else:
                    recorded = end.params
                study.set_user_attr(key, recorded)
            return recorded

    def covariance(study: optuna.Study) -> np.ndarray:
        return space.covariance(after_ascent=end_of_ascent(known_trials(study)) is not None)

    every = GP_EVERY if options.gp_every is None else options.gp_every
    return StableCmaEsSampler(
        space.distributions,
        seed=seed,
        start=start,
        covariance=covariance,
        popsize=population or options.popsize or population_size(len(space.distributions), config.study.n_workers),
        injected=make_gp(list(space.distributions), seed) if every else None,
        inject_every=every or 1,
        injects=_has_no_ascent if options.gp_every is None else None,
        learns_from=without_race_after_ascent,
    )


def _has_no_ascent(study: optuna.Study) -> bool:
    return ascent_trial(known_trials(study)) is None


def make_study_sampler(
    config: StudyConfig, spaces: Spaces, population: int | Mapping[str, int] | None = None
) -> optuna.samplers.BaseSampler:
    """Make the sampler of a study file, for all of its methods.

    In a race no merge is drawn by a Gaussian process: it has seen too few of its method.

    Args:
        config: The study file.
        spaces: The search space of each method.
        population: Trials in a generation of CMA-ES, for each method if there are several; None: as in
            :func:`make_sampler`.

    Raises:
        StudyError: As :func:`make_sampler`.
    """
    if len(spaces) == 1:
        assert not isinstance(population, Mapping)
        return make_sampler(config, next(iter(spaces.values())), population)
    sizes = population if isinstance(population, Mapping) else dict.fromkeys(spaces, population)
    in_race = config
    if isinstance(config.study.sampler, CmaEsConfig):
        alone = config.study.sampler.model_copy(update={"gp_every": 0})
        in_race = config.model_copy(update={"study": config.study.model_copy(update={"sampler": alone})})
    during, afterwards = (
        {name: make_sampler(one.of_method(name), space, sizes[name]) for name, space in spaces.items()}
        for one in (in_race, config)
    )
    return RaceSampler(during, afterwards)


def population_of(sampler: optuna.samplers.BaseSampler) -> int | dict[str, int] | None:
    """Trials in a generation of CMA-ES, for each method if there are several; None for other samplers."""
    if isinstance(sampler, RaceSampler):
        found = {name: population_of(one) for name, one in sampler.afterwards.items()}
        sizes = {name: size for name, size in found.items() if isinstance(size, int)}
        return sizes or None
    return sampler.population_size if isinstance(sampler, StableCmaEsSampler) else None


def make_pruner(config: StudyConfig, n_chunks: int) -> optuna.pruners.BasePruner:
    """Make the pruner of a study file.

    Args:
        config: The study file.
        n_chunks: Number of chunks that the documents are cut into.

    Raises:
        StudyError: If its first comparison would come after the last chunk.
    """
    name, options = config.study.pruner.name, config.study.pruner.options
    if options.get("n_startup_steps", 0) >= max(2, n_chunks):
        raise StudyError(
            f"{config.path}: study.pruner.n_startup_steps must be below the number of chunks, {n_chunks}, got"
            f" {options['n_startup_steps']}; lower it or raise study.n_chunks"
        )
    return _PRUNERS[name](**options)


def never_prunes(config: StudyConfig, n_chunks: int) -> str:
    """A line for the user if there are too few chunks for the default pruner ever to prune; "" if there are enough."""
    pruner = make_pruner(config, n_chunks)
    if not isinstance(pruner, SignedRankPruner) or pruner.n_least < n_chunks:
        return ""
    return (
        f"pruning: never, the documents make {n_chunks} chunk{'s' * (n_chunks != 1)} and it takes more than"
        f" {pruner.n_least}; use more documents or a larger study.n_chunks"
    )


def first_points(study: optuna.Study, config: StudyConfig, space: SearchSpace) -> Iterator[dict[str, float]]:
    """Where an ascent may begin: at the uniform merges, with what warm start and study file say in their place."""
    import numpy as np

    seen: list[dict[str, float]] = []
    for total in UNIFORM_TOTALS:
        point = _point(study, config, space, space.uniform(total), np.random.default_rng(config.study.seed))
        if point not in seen:
            seen.append(point)
            yield point


def _point(
    study: optuna.Study,
    config: StudyConfig,
    space: SearchSpace,
    uniform: Mapping[str, float],
    rng: np.random.Generator,
) -> dict[str, float]:
    return {**space.start(uniform, rng), **record_warm_start(study, config, space)}


def best_uniform(study: optuna.Study, space: SearchSpace) -> Mapping[str, float]:
    """Parameters of the best uniform merge that the study has scored; if it has scored none, of the first one."""
    scored = [
        trial
        for trial in map(with_estimate, study.get_trials(deepcopy=False))
        if trial.state == TrialState.COMPLETE
        and trial.user_attrs.get(attributes.BASELINE_KIND) == "uniform"
        and trial.params.keys() == space.distributions.keys()
    ]
    if not scored:
        return space.uniform()
    return max(scored, key=score_or_worst).params
