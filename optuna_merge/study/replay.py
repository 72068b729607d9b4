"""From a recorded trial back to its recipe.

Knows what a trial records and how a study file decodes it; loads no weights and reads no storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_merge.errors import StudyError
from optuna_merge.recipe import Recipe
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.study.models import StudyModels

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def recorded_recipe(trial: FrozenTrial, space: SearchSpace, models: StudyModels) -> Recipe:
    """The recipe that a trial was scored with.

    Args:
        trial: A trial that was merged, in any state.
        space: The search space of its study file.
        models: The checkpoints of its study file.

    Raises:
        StudyError: If the trial was not merged yet, or if the study file or its models have changed since, so that
            they give another recipe than the one whose digest the trial recorded.
    """
    recorded = trial.user_attrs.get(attributes.RECIPE_DIGEST)
    if recorded is None:
        raise StudyError(f"trial {trial.number}: must have been merged, it is {trial.state.name.lower()}; see status")
    baseline = trial.user_attrs.get(attributes.BASELINE)
    recipe = space.decode(trial.params) if baseline is None else space.baseline_recipe(baseline)
    digest = models.identify(recipe)
    if digest != recorded:
        raise StudyError(
            f"trial {trial.number}: recipe must be the one that was scored ({recorded[:12]}), the study file and its"
            f" models now give {digest[:12]}; restore them"
        )
    return recipe
