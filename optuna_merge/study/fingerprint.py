"""Everything that decides what a score of a study means."""

from __future__ import annotations

from typing import Any

from optuna_merge.config.sections import StudyConfig
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels


def merge_fingerprint(config: StudyConfig, models: StudyModels, space: SearchSpace) -> dict[str, Any]:
    """The part of a study's fingerprint that decides what a trial's parameters are merged to."""
    genome, refs, contents = config.genome, models.refs, models.contents
    return {
        "genome.models": list(space.labels),
        "genome.merge_method": genome.merge_method,
        "genome.layer_granularity": genome.layer_granularity,
        "genome.filters": list(genome.filters),
        "genome.normalize": genome.normalize,
        "genome.rescale": genome.rescale,
        "genome.smooth": genome.smooth,
        "genome.tokenizer_source": genome.tokenizer_source,
        "search.embed_group": config.search.embed_group,
        "search constants": {name: r.low for name, r in config.search.ranges.items() if r.is_constant},
        "search space": {name: [d.low, d.high] for name, d in space.distributions.items()},
        "study.seed": config.study.seed,
        "dtype": refs.dtype,
        "content of base_model": None if refs.base is None else contents[refs.base][:16],
        **{
            f"content of {label}": contents[source][:16]
            for label, source in zip(space.labels, refs.sources, strict=True)
        },
    }


def _first_generation(config: StudyConfig) -> dict[str, Any]:
    """What CMA-ES reads once, when it begins: a study that goes on would not notice that it has changed."""
    sampler, prior = config.study.sampler, config.search.prior
    warm_start = config.search.warm_start
    starts = {name: found.start for name, found in config.search.ranges.items() if found.start is not None}
    return {
        "study.sampler.popsize": sampler.popsize,
        "study.sampler.sigma0": sampler.sigma0,
        "search.prior": prior.name if prior.name == "isotropic" else prior.model_dump(mode="json", exclude={"name"}),
        "search starts": starts,
        "search.warm_start": warm_start and {"study": warm_start.label, "n_best": warm_start.n_best},
        "random_init": config.random_init,
    }
