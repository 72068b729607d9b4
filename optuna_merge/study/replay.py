"""From a recorded trial back to its recipe.

Knows what a trial records and how a study file decodes it; loads no weights and reads no storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna_merge.errors import StudyError
from optuna_merge.recipe import Recipe
from optuna_merge.search.profile import Profile
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import end_of_ascent
from optuna_merge.study.models import StudyModels

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def recorded_recipe(
    trial: FrozenTrial, space: SearchSpace, models: StudyModels, profile: Profile | None = None
) -> Recipe:
    """The recipe that a trial was scored with.

    Args:
        trial: A trial that was merged, in any state.
        profile: That of its study, see :func:`shared_profile`; None if the study has none.
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
    if baseline is None:
        recipe = space.decode(trial.params, _recorded_profile(trial, profile))
    else:
        recipe = space.baseline_recipe(baseline)
    digest = models.identify(recipe)
    if digest != recorded:
        raise StudyError(
            f"trial {trial.number}: recipe must be the one that was scored ({recorded[:12]}), the study file and its"
            f" models now give {digest[:12]}; restore them"
        )
    return recipe


def shared_profile(trials: Sequence[FrozenTrial]) -> Profile | None:
    """The profile that the study's ascent has found; None if there is none, or not yet."""
    end = end_of_ascent(trials)
    return Profile.from_json(end.profile) if end is not None and end.profile else None


def _recorded_profile(trial: FrozenTrial, profile: Profile | None) -> Profile | None:
    recorded = trial.user_attrs.get(attributes.PROFILE)
    if recorded is not None and (profile is None or profile.digest != recorded):
        raise StudyError(
            f"trial {trial.number}: must be read with the profile of its study ({recorded[:12]}), got"
            f" {profile.digest[:12] if profile else 'none'}; pass the study that it belongs to"
        )
    return None if recorded is None else profile
