"""How long a trial will take, estimated by running samples of it: a few tensors merged, a few layers computed.

Knows the study file, the models and what the eval tasks cost in tokens; needs no weights of a resident model.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.description import Description
from optuna_merge.evaluation.engines.speed import measure_speed
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import ParameterSet, Recipe
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels

_MERGED_ELEMENTS = 1 << 24

_SLOPE_PRICE = 3.0
"""Time of differentiating documents over that of scoring them: 2.85 to 3.1 measured, see ``docs/log.md``."""
_PULLBACK_PRICE = 1.0
"""Time of leading the gradient back through a merge over that of the merge: 0.5 to 1 measured for weighted sums."""


@dataclass(frozen=True)
class TrialSeconds:
    """What a trial takes that is scored on every document, in seconds.

    Attributes:
        merging: Merging and loading all tensors.
        choices: Scoring continuations, such as the choices of a question.
        texts: Generating texts, if each is as long as it may be.
    """

    merging: float
    choices: float
    texts: float


def estimate_trial(
    config: StudyConfig,
    models: StudyModels,
    space: SearchSpace,
    tasks: Description,
    *,
    batch_tokens: int,
    merge_device: torch.device,
    device: torch.device,
) -> TrialSeconds | None:
    """Estimate how long a trial takes with the transformers engine.

    Args:
        config: The study file.
        models: Its checkpoints.
        space: Its search space.
        tasks: What is scored.
        batch_tokens: Tokens that fill a pass.
        merge_device: Where models are merged.
        device: Where the resident model would live.

    Returns:
        The estimate; None if the device is not here or the model cannot be built with a few of its layers.
    """
    if "cuda" in (device.type, merge_device.type) and not torch.cuda.is_available():
        return None
    with models.described() as folder:
        speed = measure_speed(
            folder,
            dtype=getattr(torch, models.refs.dtype),
            device=device,
            batch_tokens=batch_tokens,
            trust_remote_code=config.engine.trust_remote_code,
        )
    if speed is None:
        return None
    return TrialSeconds(
        merging=_merging(models, _typical_recipe(config, space), merge_device),
        choices=tasks.choice_cost * speed.token + tasks.n_places * speed.place,
        texts=tasks.text_cost * speed.token,
    )


def estimate_ascent(trial: TrialSeconds, *, n_passes: float, n_steps: int) -> float:
    """Estimate how long an ascent takes, in seconds.

    Args:
        trial: What a trial takes.
        n_passes: How often each document is differentiated; the comparison of starts is not counted.
        n_steps: How often the model is merged, and the gradient led back through the merge.
    """
    return n_passes * _SLOPE_PRICE * (trial.choices + trial.texts) + n_steps * (1 + _PULLBACK_PRICE) * trial.merging


def _typical_recipe(config: StudyConfig, space: SearchSpace) -> Recipe:
    recipe = space.decode(space.uniform())
    if config.method.keeps == "nothing":
        return recipe
    # a trial adds the kept matrices as this one adds task vectors; making them can take hours
    equal = ParameterSet(shared={"lambda": 1.0}, per_model={"weight": (1.0,) * len(recipe.models)})
    groups = tuple(replace(group, parameter_sets=(equal,)) for group in recipe.groups)
    return replace(recipe, method="task_arithmetic", groups=groups, options={})


def _merging(models: StudyModels, recipe: Recipe, device: torch.device) -> float:
    """Merge the first tensors twice; the second time they have been read and have a place."""
    merger = Merger(models.views, device=device, tokenizer_source=models.refs.tokenizer_source, is_compiled=False)
    merged: dict[str, torch.Tensor] = {}
    n_merged = 0
    for name, tensor in merger.merge(recipe):
        merged[name] = tensor
        n_merged += tensor.numel()
        if n_merged >= _MERGED_ELEMENTS:
            break
    start = time.perf_counter()
    for _, (name, _) in zip(merged, merger.merge(recipe, out=merged.get), strict=False):
        assert name in merged
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds / n_merged * sum(math.prod(models.template.shape(name)) for name in models.names)
