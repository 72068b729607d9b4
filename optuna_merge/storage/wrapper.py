"""A storage around another storage.

Knows every call that Optuna makes to a storage, and nothing of what a call means.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Result = TypeVar("Result")


class StorageWrapper(BaseStorage):
    """Passes every call on to another storage; subclasses change some of the calls.

    Args:
        backend: The other storage.
    """

    def __init__(self, backend: BaseStorage) -> None:
        self.backend = backend

    def pass_on(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make a call to the other storage; every call that is not overridden goes through here."""
        return call(*args)

    # --- studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:  # noqa: D102
        return self.pass_on(self.backend.create_new_study, directions, study_name)

    def delete_study(self, study_id: int) -> None:  # noqa: D102
        self.pass_on(self.backend.delete_study, study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.pass_on(self.backend.set_study_user_attr, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.pass_on(self.backend.set_study_system_attr, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:  # noqa: D102
        return self.pass_on(self.backend.get_study_id_from_name, study_name)

    def get_study_name_from_id(self, study_id: int) -> str:  # noqa: D102
        return self.pass_on(self.backend.get_study_name_from_id, study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:  # noqa: D102
        return self.pass_on(self.backend.get_study_directions, study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:  # noqa: D102
        return self.pass_on(self.backend.get_study_user_attrs, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:  # noqa: D102
        return self.pass_on(self.backend.get_study_system_attrs, study_id)

    def get_all_studies(self) -> list[Any]:  # noqa: D102
        return self.pass_on(self.backend.get_all_studies)

    # --- trials: written

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:  # noqa: D102
        return self.pass_on(self.backend.create_new_trial, study_id, template_trial)

    def set_trial_param(  # noqa: D102
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self.pass_on(self.backend.set_trial_param, trial_id, param_name, param_value_internal, distribution)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.pass_on(self.backend.set_trial_user_attr, trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.pass_on(self.backend.set_trial_system_attr, trial_id, key, value)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:  # noqa: D102
        self.pass_on(self.backend.set_trial_intermediate_value, trial_id, step, intermediate_value)

    def set_trial_state_values(  # noqa: D102
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        return self.pass_on(self.backend.set_trial_state_values, trial_id, state, values)

    # --- trials: read

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:  # noqa: D102
        return self.pass_on(self.backend.get_trial_id_from_study_id_trial_number, study_id, trial_number)

    def get_trial(self, trial_id: int) -> FrozenTrial:  # noqa: D102
        return self.pass_on(self.backend.get_trial, trial_id)

    def get_all_trials(  # noqa: D102
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self.pass_on(self.backend.get_all_trials, study_id, deepcopy, states)

    def remove_session(self) -> None:  # noqa: D102
        self.backend.remove_session()
