"""Draws a reproducible sample of a dataset and keeps it on disk, where an eval task reads it.

An eval task declares its sample in its YAML, under ``metadata.sample``: dataset, split, fields, size, seed and
drawing method. `prepare_data` draws it from the hub or from a local copy and writes it as JSON lines, with a
``.source.json`` beside it that says where the documents come from. `read_sample` reads it back and refuses a file that
was changed since. This file knows nothing of studies, prompts or models.

A local copy of ``org/name`` is looked for in these folders, in this order::

    DIR/org__name/   DIR/org/name/   DIR/name/

The folder may be written by ``datasets.save_to_disk`` (a `Dataset`, which is taken for the split, or a `DatasetDict`).
Or it may hold parquet, json, jsonl or csv files named as on the hub (``train-00000-of-00001.parquet``,
``data/train.jsonl``), such as a clone of the hub's repository; files whose names state no split are the train split. A
csv file may hold a list of texts as JSON or as Python prints it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pandas as pd
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import DataError, TaskError, first_line

__all__ = ["PreparedSample", "Provenance", "Sample", "prepare_data", "read_sample"]

logger = logging.getLogger(__name__)

Document = dict[str, Any]


class Sample(BaseModel):
    """The sample that an eval task's YAML declares under ``metadata.sample``.

    Attributes:
        dataset: Name on the hub, ``org/name``.
        config: The dataset's configuration (subset), where it has several.
        split: The split to draw from.
        revision: Commit, tag or branch of the dataset; the newest on the hub if not given.
        fields: Fields to keep, in this order, and what each holds: a text, a list of texts or an integer.
        empty: Draw only from rows in which these fields are empty (``""`` or null).
        n: Number of documents to draw.
        seed: Seed of the draw.
        method: ``datasets_shuffle`` takes the first rows after ``Dataset.shuffle(seed)``; ``pandas_sample`` takes those
            of ``DataFrame.sample(n, replace=False, random_state=seed)``. Both keep the order of the draw.
        file: File to write, relative to the YAML.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dataset: str = Field(pattern=r"^[^/]+/[^/]+$")
    config: str | None = None
    split: str
    revision: str | None = None
    fields: dict[str, Literal["text", "texts", "integer"]] = Field(min_length=1)
    empty: list[str] = []
    n: PositiveInt
    seed: NonNegativeInt
    method: Literal["datasets_shuffle", "pandas_sample"]
    file: str = Field(pattern=r"\.jsonl$")


@dataclass(frozen=True)
class Provenance:
    """Where a sample comes from: the content of its ``.source.json``, whose keys are these names.

    It holds no path and no date, so that the same documents give the same bytes.

    Attributes:
        revision: Commit of the dataset on the hub; None for a local copy, which does not state it.
        n_source: Rows in the split.
        n_matching: Rows that the sample was drawn from: those that ``empty`` allows.
        source_sha256: Digest of the split's rows in their order, with the fields of the sample only. It is the same
            for every layout of a copy, so samples with equal digests were drawn from equal data.
        sample_sha256: Digest of the JSON lines file.
    """

    dataset: str
    config: str | None
    split: str
    revision: str | None
    fields: Sequence[str]
    empty: Sequence[str]
    method: str
    seed: int
    n: int
    n_source: int
    n_matching: int
    source_sha256: str
    sample_sha256: str


@dataclass(frozen=True)
class PreparedSample:
    """A sample on disk.

    Attributes:
        task: Name of the eval task that declared it.
        path: The JSON lines file.
        is_changed: False if the file already held these bytes and was not written again.
        provenance: Where the documents come from.
    """

    task: str
    path: Path
    is_changed: bool
    provenance: Provenance

    def __str__(self) -> str:
        drawn = self.provenance
        matching = f" with empty {', '.join(drawn.empty)}" if drawn.empty else ""
        return (
            f"{self.task}: {drawn.n:,} of {drawn.n_matching:,} documents{matching} of {drawn.dataset} "
            f"({drawn.split}) by {drawn.method}, seed {drawn.seed} -> {self.path} "
            f"({'written' if self.is_changed else 'unchanged'}, sha256 {drawn.sample_sha256[:12]})"
        )


def prepare_data(
    task_names: Sequence[str], task_search_path: Sequence[Path], copies_dir: Path | None = None
) -> list[PreparedSample]:
    """Draw and write the samples that eval tasks declare.

    Files are written once every sample is drawn; each is replaced as a whole or not at all.

    Args:
        task_names: Eval tasks, groups or tags, as a study names them. A name that is not in ``task_search_path`` is
            taken for a task of lm-eval, which brings its own dataset, and is skipped with a warning.
        task_search_path: Folders with eval task files; as in lm-eval, a later folder wins.
        copies_dir: Folder with local copies of the datasets, in the layouts of the module docstring; None to fetch
            them from the hub.

    Returns:
        One entry for each sample, in the order of ``task_names``; equal inputs give equal bytes.

    Raises:
        DataError: If no task declares a sample, a declaration is wrong, the dataset or a field of it is missing, it has
            too few rows, or the sample cannot be written.
    """
    declared = list(_declared_samples(task_names, task_search_path))
    if not declared:
        folders = ", ".join(map(str, task_search_path)) or "no folder"
        raise DataError(
            f"{', '.join(task_names)}: one of the eval tasks must declare a sample (metadata.sample in its YAML), "
            f"none found in {folders}; check task_search_path"
        )
    drawn = [(task, path, *_draw(sample, copies_dir)) for task, path, sample in declared]
    return [
        PreparedSample(task, path, is_changed=_write_sample(path, content, provenance), provenance=provenance)
        for task, path, content, provenance in drawn
    ]


def read_sample(path: Path, command: str) -> list[Document]:
    """Read a sample that `prepare_data` wrote.

    Args:
        path: The JSON lines file.
        command: The command line that makes the file; messages show it.

    Returns:
        The documents, in the order of the draw.

    Raises:
        TaskError: If the file is missing, unreadable or empty, or was changed since it was written.
    """
    try:
        content = path.read_bytes()
        provenance = _provenance_path(path)
        expected = json.loads(provenance.read_bytes())["sample_sha256"] if provenance.exists() else None
        documents = [json.loads(line) for line in content.decode().split("\n") if line]
    except FileNotFoundError:
        raise TaskError(f"{path}: the documents must be prepared first, no such file; run: {command}") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise TaskError(
            f"{path}: must be JSON lines with a readable .source.json, got {exc!r}; run: {command}"
        ) from exc
    if not documents:
        raise TaskError(f"{path}: must hold documents, got an empty file; run: {command}")
    actual = _digest(content)
    if expected is not None and actual != expected:
        raise TaskError(
            f"{path}: sha256 must be {expected[:12]} as in {provenance.name}, got {actual[:12]}: the file was "
            f"changed since it was made; run: {command}"
        )
    return documents


def _declared_samples(
    task_names: Sequence[str], task_search_path: Sequence[Path]
) -> Iterator[tuple[str, Path, Sample]]:
    """Yield eval task, file to write and sample, each file once."""
    for folder in task_search_path:
        if not folder.is_dir():
            raise DataError(f"task_search_path: must be a folder with eval task files, got {folder}")
    index = TaskManager(include_path=list(task_search_path), include_defaults=False).task_index
    seen: set[Path] = set()
    pending = list(reversed(task_names))
    while pending:
        name = pending.pop()
        if name not in index:
            logger.warning("%s: not in task_search_path, taken for a task of lm-eval, which brings its own data", name)
            continue
        entry = index[name]
        if entry.kind.name == "TAG":
            pending += sorted(entry.tags, reverse=True)
        elif entry.kind.name == "GROUP":
            pending += reversed(list(_member_names(entry.cfg["task"])))
        elif "sample" in (entry.cfg.get("metadata") or {}):
            sample = _parse_sample(entry.yaml_path, entry.cfg["metadata"]["sample"])
            path = entry.yaml_path.parent / sample.file
            if path not in seen:
                seen.add(path)
                yield name, path, sample


def _member_names(members: str | Sequence[str | Mapping[str, Any]]) -> Iterator[str]:
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), list):  # a group that is defined inside a group
            yield from _member_names(member["task"])
        else:
            yield member.get("task") or member["group"]


def _parse_sample(yaml_path: Path, declaration: object) -> Sample:
    try:
        sample = Sample.model_validate(declaration)
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            where = ".".join(["metadata.sample", *map(str, error["loc"])])
            rule = {
                "missing": "must be given",
                "extra_forbidden": f"must be one of {', '.join(Sample.model_fields)}",
            }.get(error["type"], re.sub("^(Input|String) should ", "must ", error["msg"]))
            got = "" if error["type"] == "missing" else f", got {error['input']!r}"
            problems.append(f"{yaml_path}: {where} {rule}{got}")
        raise DataError("\n".join(problems)) from exc
    if unknown := set(sample.empty) - set(sample.fields):
        raise DataError(f"{yaml_path}: metadata.sample.empty must name fields of the sample, got {sorted(unknown)}")
    return sample


def _draw(sample: Sample, copies_dir: Path | None) -> tuple[bytes, Provenance]:
    """Draw the sample, as JSON lines, and say where it comes from."""
    # A local copy is converted in a temporary cache: the shared cache would keep a second copy forever.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:
        dataset = _load_local(sample, copies_dir, cache_dir) if copies_dir else _load_from_hub(sample)
        where = f"{sample.dataset}, split {sample.split}"
        if missing := [name for name in sample.fields if name not in dataset.column_names]:
            raise DataError(
                f"{where}: fields must include {', '.join(missing)}, got {', '.join(dataset.column_names)}; "
                "is this a copy of the right dataset?"
            )
        rows = dataset.select_columns(list(sample.fields)).to_list()
        revision = _revision(dataset) if copies_dir is None else None
        del dataset  # its memory maps keep the files of the folder open
    documents = [_document(sample, row, f"{where}, row {i}") for i, row in enumerate(rows)]
    matching = [i for i, doc in enumerate(documents) if not any(doc[name] for name in sample.empty)]
    if len(matching) < sample.n:
        condition = f" with empty {', '.join(sample.empty)}" if sample.empty else ""
        raise DataError(
            f"{where}: rows{condition} must be at least n={sample.n}, got {len(matching)}; "
            "use the whole dataset, or a smaller n in the eval task's metadata.sample"
        )
    content = _json_lines([documents[i] for i in _drawn_rows(sample, matching)])
    provenance = Provenance(
        dataset=sample.dataset,
        config=sample.config,
        split=sample.split,
        revision=revision,
        fields=tuple(sample.fields),
        empty=tuple(sample.empty),
        method=sample.method,
        seed=sample.seed,
        n=sample.n,
        n_source=len(documents),
        n_matching=len(matching),
        source_sha256=_digest(_json_lines(documents)),
        sample_sha256=_digest(content),
    )
    return content, provenance


def _load_from_hub(sample: Sample) -> datasets.Dataset:
    try:
        return datasets.load_dataset(sample.dataset, sample.config, split=sample.split, revision=sample.revision)
    # A missing network, proxy, login, dataset or split raises other errors in each version of four libraries.
    except Exception as exc:
        raise DataError(
            f"{sample.dataset}: must be readable from the hub, got {type(exc).__name__}: {first_line(exc)}; "
            "without a network, give a folder with a local copy: optuna-merge prepare-data FILE --from DIR"
        ) from exc


def _load_local(sample: Sample, copies_dir: Path, cache_dir: str) -> datasets.Dataset:
    folder = _local_folder(sample.dataset, copies_dir)
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))[sample.split]
        if (folder / "state.json").exists():
            return datasets.load_from_disk(str(folder))
        # By default pandas reads the texts "NA", "None" and "" as missing.
        options = {"keep_default_na": False} if any(folder.rglob("*.csv")) else {}
        return datasets.load_dataset(
            str(folder.resolve()), sample.config, split=sample.split, cache_dir=cache_dir, **options
        )
    except Exception as exc:  # as above
        raise DataError(
            f"{folder}: must hold split {sample.split} of {sample.dataset} as parquet, json, jsonl or csv files or "
            f"in a folder written by datasets' save_to_disk, got {type(exc).__name__}: {first_line(exc)}"
        ) from exc


def _local_folder(dataset: str, copies_dir: Path) -> Path:
    candidates = [copies_dir / name for name in (dataset.replace("/", "__"), dataset, dataset.split("/")[1])]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked_for = ", ".join(f"{folder}/" for folder in candidates)
    raise DataError(
        f"{copies_dir}: must hold a copy of {dataset}, found none of {looked_for}; put its parquet, json, jsonl or csv "
        "files or a folder written by datasets' save_to_disk there"
    )


def _revision(dataset: datasets.Dataset) -> str | None:
    """The commit in the URLs that the dataset was downloaded from (``hf://datasets/org/name@<sha>/...``)."""
    urls = " ".join(dataset.info.download_checksums or {})
    commits = set(re.findall(r"@([0-9a-f]{40})/", urls))
    return commits.pop() if len(commits) == 1 else None


def _document(sample: Sample, row: Mapping[str, Any], where: str) -> Document:
    return {
        name: _field(row[name], kind, name in sample.empty, f"{where}: {name}") for name, kind in sample.fields.items()
    }


def _field(value: Any, kind: str, may_be_null: bool, where: str) -> Any:
    """The value as it is written to the sample, the same for every file format that it may come from."""
    if kind == "text" and value is None and may_be_null:
        return ""
    if kind == "texts" and isinstance(value, str):
        value = _parse_texts(value)
    if kind == "texts" and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "integer" and isinstance(value, int) and not isinstance(value, bool):
        return value
    rule = {"text": "a text", "texts": "a list of texts", "integer": "an integer"}[kind]
    raise DataError(f"{where} must be {rule}, got {value!r}; is this a copy of the right dataset?")


def _parse_texts(written: str) -> object:
    """Read a list that a csv file holds as JSON or as Python prints it; return the text itself if it is neither."""
    try:
        return json.loads(written)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return written
    # numpy prints ['a' 'b'], which Python reads as one text, 'ab'.
    return value if repr(value) == written.strip() else written


def _drawn_rows(sample: Sample, matching: list[int]) -> list[int]:
    """The row numbers that the method draws; they depend only on the number of rows."""
    if sample.method == "datasets_shuffle":
        shuffled = datasets.Dataset.from_dict({"row": matching}).shuffle(seed=sample.seed, keep_in_memory=True)
        return list(shuffled[: sample.n]["row"])
    return [int(row) for row in pd.Series(matching).sample(n=sample.n, replace=False, random_state=sample.seed)]


def _write_sample(path: Path, content: bytes, provenance: Provenance) -> bool:
    """Write the sample and its provenance; return whether the sample's bytes changed."""
    described = (json.dumps(asdict(provenance), indent=2, ensure_ascii=False) + "\n").encode()
    try:
        is_changed = _replace_if_changed(path, content)
        _replace_if_changed(_provenance_path(path), described)
    except OSError as exc:
        raise DataError(
            f"{path}: must be writable, got {exc.strerror or exc}; make room or give write access, then run this again"
        ) from exc
    return is_changed


def _replace_if_changed(path: Path, content: bytes) -> bool:
    if path.is_file() and path.read_bytes() == content:
        return False
    write_atomically(path, content)
    return True


def _provenance_path(path: Path) -> Path:
    return path.with_suffix(".source.json")


def _json_lines(documents: Sequence[Document]) -> bytes:
    return "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in documents).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
