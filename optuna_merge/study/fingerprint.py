"""The fingerprint of a study: everything that decides what its scores mean, and where its search began.

Knows what enters it; ``storage/fingerprint.py`` records it and compares it. Its bytes are kept in storages: a changed
key or value makes old studies refuse to resume.
"""

from __future__ import annotations

from typing import Any

from optuna_merge.config.search import IsotropicPrior
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.search.race import Spaces
from optuna_merge.storage import attributes
from optuna_merge.study.judges import make_judge
from optuna_merge.study.models import StudyModels
from optuna_merge.study.rivals import RivalModel


def study_fingerprint(
    config: StudyConfig, models: StudyModels, spaces: Spaces, scorer: Scorer, rival: RivalModel | None
) -> dict[str, Any]:
    """Readable name to a JSON value, for everything that a resumed study must not change."""
    has_several_objectives = len(config.objectives) > 1
    return {
        **merge_fingerprint(config, models, spaces),
        "tasks": [
            f"{task.weight:g} x {task.name} {task.metric}"
            + (f" for {config.objective_of(task)}" if has_several_objectives else "")
            for task in config.tasks
        ],
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
        "shuffle": config.shuffle,
        "holdout": None if config.holdout is None else config.holdout.model_dump(mode="json"),
        **_first_generation(config),
        "engine.backend": config.engine.backend,
        attributes.CHUNKS: scorer.n_chunks,
        attributes.REQUESTS: scorer.fingerprint()[:16],
        **({} if (judge := make_judge(config)) is None else {"judge": judge.identity}),
        **({} if rival is None else {"judge.against": f"{rival.name}, answers {rival.digest[:16]}"}),
        **({"engine.vllm": config.engine.vllm.deciding} if config.engine.backend == "vllm" else {}),
    }


def merge_fingerprint(config: StudyConfig, models: StudyModels, spaces: Spaces) -> dict[str, Any]:
    """The part of a study's fingerprint that decides which merge a trial's parameters stand for."""
    genome, refs, contents = config.genome, models.refs, models.contents
    labels = next(iter(spaces.values())).labels
    methods = list(spaces)
    return {
        "genome.models": list(labels),
        "genome.merge_method": methods if len(methods) > 1 else methods[0],
        "genome.layer_granularity": genome.layer_granularity,
        "genome.filters": list(genome.filters),
        "genome.normalize": genome.normalize,
        "genome.rescale": genome.rescale,
        "genome.smooth": genome.smooth,
        "genome.tokenizer_source": genome.tokenizer_source,
        "search.embed_group": config.search.embed_group,
        "search constants": {name: r.low for name, r in config.search.ranges.items() if r.is_constant},
        "search space": {name: [d.low, d.high] for space in spaces.values() for name, d in space.distributions.items()},
        "study.seed": config.study.seed,
        "dtype": refs.dtype,
        "content of base_model": None if refs.base is None else contents[refs.base][:16],
        **{f"content of {label}": contents[source][:16] for label, source in zip(labels, refs.sources, strict=True)},
    }


def _first_generation(config: StudyConfig) -> dict[str, Any]:
    """What CMA-ES reads only when the search begins; a resumed study would silently ignore a change."""
    cmaes, prior = config.study.cmaes, config.search.prior
    warm_start = config.search.warm_start
    is_isotropic = isinstance(prior, IsotropicPrior)
    starts = {name: found.start for name, found in config.search.ranges.items() if found.start is not None}
    return {
        "study.sampler.popsize": cmaes.popsize,
        "study.sampler.sigma0": cmaes.sigma0,
        "search.prior": prior.name if is_isotropic else prior.model_dump(mode="json", exclude={"name"}),
        "search starts": starts,
        attributes.SEARCH_START: None if config.search.start == "uniform" else config.search.start,
        "search.profile": None if config.search.start == "uniform" else config.search.profile,
        "search.warm_start": warm_start and {"study": warm_start.label, "n_best": warm_start.n_best},
        "random_init": config.random_init,
    }
