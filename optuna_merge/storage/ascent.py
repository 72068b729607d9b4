"""What a trial that begins with the ascent records, so that another process can continue it, and what it ended with.

Everything is among the trial's system attributes. Texts are cut into pieces, because MySQL keeps 64 kB of an attribute.
Knows trials and texts; knows nothing of gradients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import known_state, trial_id
from optuna_merge.storage import attributes
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.writes import Write, write_trial

_HEAD = "optuna_merge:ascent"
_STEP = "optuna_merge:ascent:step"
_STATE = "optuna_merge:ascent:state"
_PROFILE = "optuna_merge:profile"

_PIECE = 30_000
"""Characters of a piece."""


@dataclass(frozen=True)
class AscentStep:
    """One step of an ascent, as it is shown.

    Attributes:
        expected: Expected score, on this step's documents, of the point from which the step goes.
        n_documents: Documents that were differentiated.
        seconds: Time that it took.
        params: Trial parameters of the point that it leads to, rounded.
        slope: Derivative of the expected score by each trial parameter that moves, where the step begins; empty in
            studies from before it was recorded.
    """

    expected: float
    n_documents: int
    seconds: float
    params: Mapping[str, float]
    slope: Mapping[str, float] = field(default_factory=dict)


def ascent_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The trial of a study that begins with the ascent; None if it has none.

    If one of Optuna's retry callbacks has enqueued it again, with all that it had recorded: the latest one.
    """
    return next((trial for trial in reversed(trials) if attributes.ASCENT in trial.user_attrs), None)


def is_ascending(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the study's ascent has yet to end: what is drawn then would not know where to begin."""
    trial = ascent_trial(trials)
    return trial is not None and not trial.state.is_finished() and _end_of(trial) is None


def steps_of(trial: FrozenTrial) -> list[AscentStep]:
    """The steps that a trial has recorded, in order."""
    n_steps = trial.system_attrs.get(_HEAD, {}).get("n_steps", 0)
    return [AscentStep(**trial.system_attrs[f"{_STEP}:{number}"]) for number in range(n_steps)]


def read_state(trial: optuna.Trial) -> dict[str, Any] | None:
    """The state after the last step that was recorded; None before the first."""
    recorded = known_state(trial).system_attrs
    head = recorded.get(_HEAD)
    if head is None:
        return None
    state: dict[str, Any] = json.loads(_join(recorded, f"{_STATE}:{head['n_steps'] % 2}", head["n_pieces"]))
    return state


@dataclass(frozen=True)
class AscentEnd:
    """What an ascent has found.

    Attributes:
        params: Trial parameters.
        profile: The profile, as JSON; "" without one.
    """

    params: Mapping[str, float]
    profile: str


def record_step(
    trial: optuna.Trial, steps: Sequence[AscentStep], state: Mapping[str, Any], end: AscentEnd | None
) -> None:
    """Record what a step has led to, at once. If the process is killed in between, the step before counts.

    Args:
        trial: A running trial.
        steps: All steps so far, of which the last is recorded.
        state: What the next step follows from.
        end: What was found; None before the last step.
    """
    n_steps = len(steps)
    pieces = _cut(json.dumps(state))
    # Two states take turns: a storage that writes one by one may be stopped in the middle of one.
    writes: list[tuple[str, Any]] = [(f"{_STATE}:{n_steps % 2}:{number}", piece) for number, piece in enumerate(pieces)]
    writes.append((f"{_STEP}:{n_steps - 1}", asdict(steps[-1])))
    head: dict[str, Any] = {"n_steps": n_steps, "n_pieces": len(pieces)}
    if end is not None:
        of_profile = _cut(end.profile)
        writes += [(f"{_PROFILE}:{number}", piece) for number, piece in enumerate(of_profile)]
        head |= {"end": dict(end.params), "n_profile_pieces": len(of_profile)}
    _write(trial, [*writes, (_HEAD, head)])


def end_of_ascent(trials: Sequence[FrozenTrial]) -> AscentEnd | None:
    """What the study's ascent has found; None without an ascent, before its end, or if the trial has failed."""
    trial = ascent_trial(trials)
    return None if trial is None or trial.state == TrialState.FAIL else _end_of(trial)


def _end_of(trial: FrozenTrial) -> AscentEnd | None:
    head = trial.system_attrs.get(_HEAD, {})
    if "end" not in head:
        return None
    return AscentEnd(head["end"], _join(trial.system_attrs, _PROFILE, head["n_profile_pieces"]))


def _cut(text: str) -> list[str]:
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def _join(recorded: Mapping[str, Any], prefix: str, n_pieces: int) -> str:
    return "".join(recorded[f"{prefix}:{number}"] for number in range(n_pieces))


def _write(trial: optuna.Trial, values: Sequence[tuple[str, Any]]) -> None:
    writes: list[Write] = [("system_attr", key, value) for key, value in values]
    if isinstance(trial.storage, BatchedStorage):
        trial.storage.write_trial(trial_id(trial), writes)
    else:
        write_trial(trial.storage, trial_id(trial), writes)
    known_state(trial).system_attrs = {**known_state(trial).system_attrs, **dict(values)}
