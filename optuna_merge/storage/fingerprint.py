"""The fingerprint of a study: what its scores mean, recorded once and compared at every start.

Knows names and JSON values; what belongs into a fingerprint is for others to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna

from optuna_merge.errors import StudyMismatchError
from optuna_merge.storage.attributes import FINGERPRINT, REQUESTS
from optuna_merge.storage.open import is_there, local_file, open_storage, storage_error


def recorded_fingerprint(url: str, name: str) -> Mapping[str, Any]:
    """The fingerprint that a study was started with; empty if it has not been started.

    Raises:
        StudyError: If the storage cannot be opened.
    """
    file = local_file(url)
    if file is not None and not is_there(file):
        return {}
    storage = open_storage(url)
    try:
        if name not in optuna.get_all_study_names(storage):
            return {}
        study = optuna.load_study(storage=storage, study_name=name)
        recorded: Mapping[str, Any] = study.user_attrs.get(FINGERPRINT, {})
    except Exception as exc:
        raise storage_error(url, exc) from exc
    return recorded


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Record the fingerprint of a new study; compare it with the recorded one if the study is not new.

    Args:
        study: The study, new or not.
        fingerprint: Readable name to JSON value.

    Raises:
        StudyMismatchError: If the study was made from something else; one line for each difference.
    """
    if FINGERPRINT not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StudyMismatchError(
                f"study {study.study_name!r} must be made by optuna-merge, its storage holds trials of something else;"
                " use a new study name or storage_path"
            )
        study.set_user_attr(FINGERPRINT, json.loads(json.dumps(fingerprint)))
    refuse_differences(study, fingerprint)


def refuse_differences(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Compare a fingerprint, or a part of one, with that of a study. A study without one passes.

    Raises:
        StudyMismatchError: With one line for each difference.
    """
    then, name = study.user_attrs.get(FINGERPRINT), study.study_name
    if then is None:
        return
    now = json.loads(json.dumps(fingerprint))
    changed = [key for key in now if then.get(key) != now[key]]
    if len(changed) > 1:  # the digest changes with its inputs, and they are named already
        changed = [key for key in changed if key != REQUESTS]
    lines = [
        f"study {name!r} was created with {key}={_shown(then.get(key))}, now it is {_shown(now[key])};"
        f" use a new study name or restore {_shown(then.get(key))}"
        for key in changed
    ]
    if lines:
        raise StudyMismatchError("\n".join(lines))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
