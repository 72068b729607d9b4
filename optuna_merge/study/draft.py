"""Drafts a study file: from models and eval tasks, or from a mergekit-evolve file and its command line.

Knows how to find out what the models and tasks are and in which order to decide; the rules are in ``choices`` and
``checkpoints/ancestry``. A draft has passed ``check``.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optuna_merge.checkpoints.ancestry import adapter_base, find_base
from optuna_merge.checkpoints.compare import compare
from optuna_merge.checkpoints.output_heads import untie
from optuna_merge.checkpoints.reference import resolve
from optuna_merge.checkpoints.senses import complete
from optuna_merge.config.paths import absolute_storage
from optuna_merge.config.read import load_study, read_keys, replace_key
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.write import study_text
from optuna_merge.config.yaml_file import parse_yaml
from optuna_merge.errors import CheckpointError, ConfigError, TaskError, first_line
from optuna_merge.evaluation.description import Description
from optuna_merge.evaluation.loader import task_names
from optuna_merge.merging.placement import free_host_bytes
from optuna_merge.search.space import SearchSpace, model_labels
from optuna_merge.study.check import Check, check_study
from optuna_merge.study.choices import (
    Choice,
    choose_backend,
    choose_dtype,
    choose_granularity,
    choose_limit,
    choose_n_trials,
)
from optuna_merge.study.engines import build_scorer, make_describing_engine
from optuna_merge.study.models import StudyModels

NO_BASE = "none"
"""In place of a base model: merge without one."""

HOLDOUT = Choice(
    0.3,
    "only the report scores this share of the documents: the best of many trials looks better on the documents that"
    " chose it than it is",
)
_GIVEN = "given on the command line"
_EVOLVE = "as mergekit-evolve does"


@dataclass
class Draft:
    """A study file in the making.

    Attributes:
        path: The file, which need not exist.
        data: What it will say.
        reasons: Dotted key to the reason for its value.
    """

    path: Path
    data: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, reason: str = "") -> None:
        """Set a key, whatever was there.

        Raises:
            ConfigError: If something else than a section is in the way.
        """
        if problems := replace_key(self.data, key, value):
            raise ConfigError([problem.located(self.path, {}) for problem in problems])
        if reason:
            self.reasons[key] = reason

    def fill(self, key: str, choice: Choice) -> None:
        """Set a key that nobody has set."""
        section, _, name = key.rpartition(".")
        inside = self.data.get(section) or {} if section else self.data
        if not isinstance(inside, Mapping) or inside.get(name) is None:
            self.put(key, choice.value, choice.reason)

    def put_given(self, given: Mapping[str, Any]) -> None:
        """Set what the user has decided. Paths near the file become relative to it."""
        for key, value in given.items():
            plain = [self._near(item) for item in value] if isinstance(value, list) else self._near(value)
            self.put(key, plain, _GIVEN)

    def _near(self, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        folder = self.path.absolute().parent
        return os.path.relpath(value, folder) if value.is_relative_to(folder.parent) else str(value)

    def config(self) -> StudyConfig:
        """What it says so far.

        Raises:
            ConfigError: With one line for each problem.
        """
        return read_keys(self.data, self.path)


def draft_study(
    path: Path,
    models: Sequence[str],
    base: str | None,
    tasks: Sequence[str],
    given: Mapping[str, Any],
    card: int | None = None,
) -> tuple[Draft, Check]:
    """Draft a study of some models.

    Args:
        path: The study file; is not written.
        models: References of the sources, relative to the working directory. The base may be among them.
        base: Reference of the base; ``NO_BASE``: merge without one; None: find it.
        tasks: Names of eval tasks.
        given: Dotted key to value, of what the user has decided.
        card: Bytes of memory of the GPU that the study is meant for. Default: of the GPU here, if there is one.

    Returns:
        The draft, and what ``check`` says of it.

    Raises:
        OptunaMergeError: If something is missing or unusable, or the study does not fit.
    """
    if not tasks:
        folders = given.get("task_search_path", ())
        raise TaskError(f"--tasks must name eval tasks, got none; {_known_tasks(folders)}")
    draft = Draft(path, {"genome": {}})
    _put_models(draft, models, base)
    draft.put("tasks", [{"name": name} for name in tasks])
    draft.put("study.name", path.stem)
    draft.put_given(given)
    draft.fill("holdout", HOLDOUT)
    _fill_tokenizer(draft)
    config = draft.config()
    opened = StudyModels.open(config)
    engine = make_describing_engine(config, opened, card)
    found = build_scorer(config, engine, with_usual_metrics=True).describe()
    _put_metrics(draft, found)
    _fill_numbers(draft, opened, found, card)
    draft.fill("storage_path", Choice(_folder_of(path), "everything that the study writes"))
    return draft, _fit_into_a_night(draft, check_study(draft.config(), card), card)


def draft_from_evolve(path: Path, file: Path, given: Mapping[str, Any], card: int | None = None) -> tuple[Draft, Check]:
    """Draft a study from a mergekit-evolve file.

    Args:
        path: The study file; is not written.
        file: The mergekit-evolve file, or any study file. Models in it may be relative to its folder or, as
            mergekit-evolve has it, to the working directory.
        given: As for :func:`draft_study`.
        card: As for :func:`draft_study`.

    Raises:
        OptunaMergeError: As for :func:`draft_study`.
    """
    load_study(file, given)  # says what is wrong with its line
    data, _, _ = parse_yaml(file)
    draft = Draft(path, data)
    _move(draft, file.resolve().parent)
    draft.put_given(given)
    draft.fill("holdout", HOLDOUT)
    draft.fill("study.name", Choice(path.stem, ""))
    draft.fill("study.n_trials", Choice(100, f"{_EVOLVE}; baselines count"))
    draft.fill("engine.dtype", Choice("bfloat16", f"{_EVOLVE}; the exported model has it, too"))
    draft.fill("storage_path", Choice(_folder_of(path), "everything that the study writes"))
    return draft, check_study(draft.config(), card)


def describe_draft(draft: Draft, result: Check) -> str:
    """A draft in a line."""
    held_out = sum(task["n_holdout"] for task in result.tasks)
    config = draft.config()
    return (
        f"{config.genome.merge_method} of {len(config.sources)} models, {result.space['n_dimensions']} weights,"
        f" {result.n_trials} trials, {result.n_documents} documents searched and {held_out} held out"
    )


def draft_text(draft: Draft, result: Check, line: str, evolve: Path | None) -> str:
    """The text of the study file.

    Args:
        draft: The draft.
        result: What ``check`` says of it.
        line: The command line that runs it.
        evolve: The mergekit-evolve file that it comes from.
    """
    config = draft.config()
    models, tasks = _join(model_labels(config.sources)), _join([task.name for task in config.tasks])
    head = [
        f"Which merge of {models} scores best on {tasks}?",
        "",
        f"Written by optuna-merge init{f' from {evolve.name}' if evolve else ''}: {describe_draft(draft, result)}.",
        f"Memory: {result.memory_line}.",
    ]
    if result.trial_seconds is not None:
        seconds = sum(result.trial_seconds.values())
        whole = _duration(seconds * result.n_trials)
        head.append(f"Time: up to {_duration(seconds)} a trial and {whole} in all, by samples; pruning shortens it.")
    head += [f"Note: {warning}." for warning in result.warnings]
    head += ["docs/study-file.md describes every key.", "", f"Run it: {line}"]
    return study_text(draft.data, draft.reasons, head)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _put_models(draft: Draft, models: Sequence[str], base: str | None) -> None:
    folder = draft.path.absolute().parent
    starts = [Path.cwd()]
    references = [_with_its_base(reference, base) for reference in models]
    resolved = [resolve(reference) for reference in references]
    names = [model.name for model in resolved]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise CheckpointError(f"models must be different, got {references[index]} twice; leave one out")
    sources = list(references)
    if base == NO_BASE:
        method = Choice("linear", "a weighted mean, the usual merge without a base")
        if len(sources) < 2:
            raise CheckpointError(
                f"models must be two or more to be merged without a base, got {len(sources)}; add one"
            )
    else:
        reason = _GIVEN
        if base is None:
            ancestor = find_base(resolved)
            base, reason = ancestor.reference, ancestor.reason
        base_name = _resolve_base(base, reason)
        sources = [reference for reference, name in zip(references, names, strict=True) if name != base_name]
        if not sources:
            raise CheckpointError(f"models must be others than the base, got {base} alone; name its fine-tunes")
        method = Choice("task_arithmetic", "one weight for what each model learned; optuna-merge methods lists others")
    draft.put("genome.models", [moved(reference, starts, folder) for reference in sources])
    if base != NO_BASE:
        assert base is not None
        draft.put("genome.base_model", moved(base, starts, folder), reason)
    draft.put("genome.merge_method", method.value, method.reason)


def _resolve_base(base: str, reason: str) -> str:
    try:
        return resolve(base).name
    except CheckpointError as exc:
        raise CheckpointError(f"base model ({reason}): {first_line(exc)}; name its folder with --base") from exc


def _with_its_base(reference: str, base: str | None) -> str:
    """The reference of a model; an adapter alone gets the model that it was trained for in front."""
    folder = Path(reference).expanduser()
    if not folder.is_dir() or (trained_for := adapter_base(folder)) is None:
        return reference
    near = folder / trained_for
    if trained_for.startswith(".") and near.is_dir():
        trained_for = str(near.resolve())
    is_known = not trained_for.startswith((".", "/", "~")) or Path(trained_for).expanduser().is_dir()
    if not is_known and base in (None, NO_BASE):
        raise CheckpointError(
            f"{reference}: the adapter's model must be found, got {trained_for}, which is no folder here; write"
            f" MODEL+{reference}, or name the model with --base"
        )
    return f"{trained_for if is_known else base}+{reference}"


def moved(reference: str, starts: Sequence[Path], folder: Path) -> str:
    """A reference that means the same model in a file of another folder.

    Args:
        reference: Of a model, with or without adapter.
        starts: Folders to which it may be relative.
        folder: The other folder.

    Returns:
        A path relative to ``folder`` if it was a relative path of a folder; otherwise the reference itself.
    """
    if reference.startswith(("/", "~")) and "+" not in reference:
        return reference
    for start in starts:
        if not reference.startswith("/") and (start / reference).is_dir():
            relative = os.path.relpath(start / reference, folder)
            return relative if relative.startswith(".") else f"./{relative}"
    if "+" in reference:
        return "+".join(moved(part, starts, folder) for part in reference.split("+", 1))
    return reference


def _known_tasks(folders: Collection[str | Path]) -> str:
    names = task_names(list(folders))
    if names:
        return f"--task-search-path has {', '.join(names)}"
    return "lm-eval ls tasks lists lm-eval's; --task-search-path names a folder with your own"


def _fill_tokenizer(draft: Draft) -> None:
    """Set whose vocabulary the merge has, if the models' differ and nothing else keeps them from being merged."""
    opened = StudyModels.open(draft.config())
    views = untie(complete(opened.checkpoints))
    checkpoints = list(views.values())
    if not compare(checkpoints) or compare(checkpoints, "union"):
        return
    whole = checkpoints[0].whole
    if whole is not None and views[whole] is not checkpoints[0]:
        reference = views[whole].reference
        draft.fill(
            "genome.tokenizer_source", Choice(reference, "its configuration names tokens of images or sound by id")
        )
        return
    first = checkpoints[0].vocabulary() or {}
    if all((checkpoint.vocabulary() or {}).keys() <= first.keys() for checkpoint in checkpoints):
        draft.fill("genome.tokenizer_source", Choice("base", "vocabularies differ; the base has all tokens"))
    else:
        draft.fill("genome.tokenizer_source", Choice("union", "vocabularies differ; no model loses its tokens"))


def _put_metrics(draft: Draft, found: Description) -> None:
    share = round(1 / len(found.tasks), 4)
    tasks = []
    for task in found.tasks:
        weight = share if task.more_is_better else -share
        tasks.append({"name": task.name, "weight": weight, "metric": task.metric})
    draft.put("tasks", tasks, "the score is the sum of weight x metric; a negative weight minimises")


def _fill_numbers(draft: Draft, opened: StudyModels, found: Description, card: int | None) -> None:
    device = draft.config().engine.device
    on_gpu = device != "cpu" and bool(card or torch.cuda.is_available())
    n_searched = sum(task.n_searched for task in found.tasks)
    n_parameters = sum(math.prod(opened.template.shape(name)) for name in opened.names)
    n_models = len(opened.refs.sources)
    draft.fill("genome.layer_granularity", choose_granularity(opened.refs.n_layers, n_models, n_searched))
    space = SearchSpace(draft.config(), opened.refs)
    draft.fill("study.n_trials", choose_n_trials(len(space.baselines), len(space.distributions)))
    generates = found.text_cost > found.choice_cost
    has_vllm = importlib.util.find_spec("vllm") is not None
    draft.fill("engine.backend", choose_backend(generates=generates, on_gpu=on_gpu, has_vllm=has_vllm))
    draft.fill(
        "engine.dtype",
        choose_dtype(opened.refs.dtype, n_parameters, on_gpu=on_gpu, host_free=free_host_bytes()),
    )


def _fit_into_a_night(draft: Draft, result: Check, card: int | None) -> Check:
    """Leave documents out if the study would take longer than a night; returns what ``check`` then says."""
    if result.trial_seconds is None:
        return result
    sizes = [task["n_searched"] + task["n_holdout"] for task in result.tasks]
    merging = result.trial_seconds["merging"]
    limit = choose_limit(merging, sum(result.trial_seconds.values()) - merging, result.n_trials, sizes)
    if limit is None or "limit" in draft.data:
        return result
    draft.put("limit", limit.value, limit.reason)
    draft.put("shuffle", True)
    return check_study(draft.config(), card)


def _move(draft: Draft, start: Path) -> None:
    """Rewrite the relative paths of a file in the folder ``start``, so that they mean the same in the draft's."""
    folder = draft.path.absolute().parent
    genome = draft.data["genome"]
    starts = [start, Path.cwd()]  # mergekit-evolve's models are relative to the working directory
    genome["models"] = [moved(reference, starts, folder) for reference in genome["models"]]
    for key in ("base_model", "tokenizer_source"):
        if isinstance(genome.get(key), str):
            genome[key] = moved(genome[key], starts, folder)
    if folder.resolve() == start:
        return
    if draft.data.get("storage_path") is not None:
        draft.put("storage_path", _moved_path(draft.data["storage_path"], start, folder))
    if paths := draft.data.get("task_search_path"):
        paths = paths if isinstance(paths, list) else [paths]
        draft.put("task_search_path", [_moved_path(path, start, folder) for path in paths])
    study, search = draft.data.get("study") or {}, draft.data.get("search") or {}
    if study.get("storage") is not None:
        study["storage"] = absolute_storage(study["storage"], start)
    warm_start = search.get("warm_start")
    if isinstance(warm_start, str):
        search["warm_start"] = _moved_path(warm_start, start, folder)
    elif isinstance(warm_start, dict):
        for key, move in (("file", _moved_path), ("storage", lambda url, start, _: absolute_storage(url, start))):
            if warm_start.get(key) is not None:
                warm_start[key] = move(warm_start[key], start, folder)


def _folder_of(path: Path) -> str:
    """The folder for what a file's study writes; ``study.yaml`` and ``my_study.yaml`` say already what it is."""
    return path.stem if path.stem.endswith("study") else f"{path.stem}_study"


def _moved_path(path: str, start: Path, folder: Path) -> str:
    is_relative = not path.startswith(("/", "~"))
    return os.path.relpath(start / path, folder) if is_relative else path
