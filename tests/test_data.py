from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml

from optuna_merge.data import PreparedSample, prepare_data, read_sample
from optuna_merge.errors import DataError, TaskError
from tests.processes import obeying_permissions

N_ROWS = 60
SHUFFLED = {
    "dataset": "org/places",
    "split": "train",
    "fields": {"story": "text", "candidate_answers": "texts", "answer": "integer"},
    "n": 24,
    "seed": 9163,
    "method": "datasets_shuffle",
    "file": "data/places.jsonl",
}
SAMPLED = {
    "dataset": "org/chats",
    "split": "train",
    "fields": {"instruction": "text", "input": "text", "output": "text"},
    "empty": ["input"],
    "n": 20,
    "seed": 749,
    "method": "pandas_sample",
    "file": "data/chats.jsonl",
}
PLACES = [
    {
        "story": f"Block {i} is left of\n“block” {i + 1}.\u2028",
        "candidate_answers": [f"left's {i}", 'a "quoted" one', "NA"][: 2 + i % 2],
        "answer": i % 2,
        "extra": i,
    }
    for i in range(N_ROWS)
]
# Every third row has an input; the texts look like what pandas takes for a missing value.
CHATS = [
    {"instruction": f"Say {i}, please", "input": "" if i % 3 else f"like {i}", "output": "NA" if i % 5 else "None"}
    for i in range(N_ROWS)
]


def write_task(folder: Path, name: str, sample: dict[str, Any] | None, **keys: Any) -> None:
    folder.mkdir(exist_ok=True)
    metadata = {"version": 1.0} | ({"sample": sample} if sample else {})
    # The helper does not exist: preparing data must not run the code of a task.
    text = (
        yaml.safe_dump({"task": name, "metadata": metadata, **keys}, sort_keys=False)
        + "custom_dataset: !function absent.documents\n"
    )
    (folder / f"{name}.yaml").write_text(text)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_task(folder, "places", SHUFFLED)
    write_task(folder, "chats", SAMPLED)
    return folder


def save_jsonl(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_parquet(rows: list[dict[str, Any]], folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    for i, part in enumerate((rows[:35], rows[35:])):
        datasets.Dataset.from_list(part).to_parquet(data / f"train-{i:05}-of-00002.parquet")
    datasets.Dataset.from_list(rows[:5]).to_parquet(data / "test-00000-of-00001.parquet")


def save_csv(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "anything.csv", index=False)


def save_json(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True)
    listed = [row | {k: json.dumps(v) for k, v in row.items() if isinstance(v, list)} for row in rows]
    (folder / "train.json").write_text(json.dumps(listed))


def save_to_disk(rows: list[dict[str, Any]], folder: Path) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(folder)


def save_dict_to_disk(rows: list[dict[str, Any]], folder: Path) -> None:
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": split.select(range(3)), "train": split}).save_to_disk(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_jsonl(PLACES, folder / "org__places")
    save_jsonl(CHATS, folder / "org__chats")
    return folder


def kept(rows: list[dict[str, Any]], fields: dict[str, str]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in fields} for row in rows]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_samples_are_those_that_datasets_and_pandas_draw(tasks: Path, source: Path) -> None:
    prepared = prepare_data(["places", "chats"], [tasks], source)

    shuffled = datasets.Dataset.from_list(PLACES).shuffle(seed=9163).select(range(24)).to_list()
    assert lines(tasks / "data/places.jsonl") == kept(shuffled, SHUFFLED["fields"])
    frame = pd.DataFrame(CHATS)
    sampled = frame[frame["input"].map(len) < 1].sample(n=20, replace=False, random_state=749)
    assert lines(tasks / "data/chats.jsonl") == sampled.to_dict("records")
    assert [(p.task, p.path, p.is_changed) for p in prepared] == [
        ("places", tasks / "data/places.jsonl", True),
        ("chats", tasks / "data/chats.jsonl", True),
    ]


def test_the_draws_do_not_change_with_the_libraries(tasks: Path, source: Path) -> None:
    prepare_data(["places", "chats"], [tasks], source)
    assert [doc["story"].split()[1] for doc in lines(tasks / "data/places.jsonl")[:6]] == [
        "28",
        "17",
        "56",
        "44",
        "40",
        "38",
    ]
    chats = [doc["instruction"] for doc in lines(tasks / "data/chats.jsonl")[:6]]
    assert chats == [f"Say {i}, please" for i in (56, 41, 35, 59, 8, 20)]


@pytest.mark.parametrize(
    ("save", "place"),
    [
        (save_jsonl, "org/{}"),
        (save_json, "{}"),
        (save_csv, "org__{}"),
        (save_parquet, "org/{}"),
        (save_to_disk, "org__{}"),
        (save_dict_to_disk, "{}"),
    ],
)
def test_every_layout_gives_the_same_bytes(tasks: Path, source: Path, tmp_path: Path, save: Any, place: str) -> None:
    prepare_data(["places", "chats"], [tasks], source)
    files = {path.name: path.read_bytes() for path in (tasks / "data").iterdir()}
    assert sorted(files) == ["chats.jsonl", "chats.source.json", "places.jsonl", "places.source.json"]
    shutil.rmtree(tasks / "data")

    save(PLACES, tmp_path / "other" / place.format("places"))
    save(CHATS, tmp_path / "other" / place.format("chats"))
    prepare_data(["places", "chats"], [tasks], tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tasks / "data").iterdir()} == files


def test_a_second_run_leaves_the_file_alone_and_says_so(tasks: Path, source: Path) -> None:
    (first,) = prepare_data(["places"], [tasks], source)
    stamp = first.path.stat().st_mtime_ns
    (second,) = prepare_data(["places"], [tasks], source)
    assert (first.is_changed, second.is_changed) == (True, False)
    assert second.path.stat().st_mtime_ns == stamp
    digest = hashlib.sha256(first.path.read_bytes()).hexdigest()[:12]
    assert str(second) == (
        f"places: 24 of 60 documents of org/places (train) by datasets_shuffle, seed 9163 -> {first.path} "
        f"(unchanged, sha256 {digest})"
    )


def test_provenance_lets_a_reader_check(tasks: Path, source: Path) -> None:
    (prepared,) = prepare_data(["chats"], [tasks], source)
    written = json.loads((tasks / "data/chats.source.json").read_text())
    everything = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHATS)
    assert written == {
        "dataset": "org/chats",
        "config": None,
        "split": "train",
        "revision": None,
        "fields": ["instruction", "input", "output"],
        "empty": ["input"],
        "method": "pandas_sample",
        "seed": 749,
        "n": 20,
        "n_source": 60,
        "n_matching": 40,
        "source_sha256": hashlib.sha256(everything.encode()).hexdigest(),
        "sample_sha256": hashlib.sha256(prepared.path.read_bytes()).hexdigest(),
    }
    assert "20 of 40 documents with empty input of org/chats" in str(prepared)


def test_another_seed_gives_other_documents(tasks: Path, source: Path) -> None:
    prepare_data(["places"], [tasks], source)
    before = (tasks / "data/places.jsonl").read_bytes()
    write_task(tasks, "places", SHUFFLED | {"seed": 9164})
    (prepared,) = prepare_data(["places"], [tasks], source)
    assert prepared.is_changed
    assert prepared.path.read_bytes() != before


def test_a_null_input_is_an_empty_one(tasks: Path, tmp_path: Path) -> None:
    save_jsonl([row | {"input": row["input"] or None} for row in CHATS], tmp_path / "nulls" / "org__chats")
    (prepared,) = prepare_data(["chats"], [tasks], tmp_path / "nulls")
    assert prepared.provenance.n_matching == 40
    assert {doc["input"] for doc in read_sample(prepared.path, "")} == {""}


def test_a_clone_with_a_configuration(tasks: Path, tmp_path: Path) -> None:
    clone = tmp_path / "source" / "org" / "places"
    save_jsonl(PLACES, clone / "large")
    save_jsonl(PLACES[:3], clone / "small")
    configs = [{"config_name": c, "data_files": [{"split": "train", "path": f"{c}/*"}]} for c in ("small", "large")]
    (clone / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    write_task(tasks, "places", SHUFFLED | {"config": "large"})
    (prepared,) = prepare_data(["places"], [tasks], tmp_path / "source")
    assert (prepared.provenance.config, prepared.provenance.n_source) == ("large", N_ROWS)


def test_groups_and_tags_lead_to_their_tasks_each_once(tasks: Path, source: Path) -> None:
    write_task(tasks, "chats", SAMPLED, tag="talk")
    inner = {"group": "inner", "task": [{"task": "chats"}]}
    (tasks / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["places", inner]}))
    assert [p.task for p in prepare_data(["both", "talk", "places"], [tasks], source)] == ["places", "chats"]


def test_a_task_of_lm_eval_is_passed_over_with_a_warning(
    tasks: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="optuna_merge"):
        prepared = prepare_data(["arc_easy", "places"], [tasks], source)
    assert [p.task for p in prepared] == ["places"]
    assert [r.getMessage() for r in caplog.records if r.name.startswith("optuna_merge")] == [
        "arc_easy: not in task_search_path, taken for a task of lm-eval, which brings its own data"
    ]


def test_a_later_folder_wins_as_in_lm_eval(tasks: Path, source: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "mine", "places", SHUFFLED | {"n": 3})
    (prepared,) = prepare_data(["places"], [tasks, tmp_path / "mine"], source)
    assert (prepared.path, prepared.provenance.n) == (tmp_path / "mine/data/places.jsonl", 3)


class TestRefusals:
    def test_no_sample_declared(self, tasks: Path, source: Path) -> None:
        write_task(tasks, "plain", None)
        with pytest.raises(DataError, match=r"plain: one of the eval tasks must declare a sample .*none found in"):
            prepare_data(["plain"], [tasks], source)

    def test_no_such_task_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"task_search_path: must be a folder with eval task files, got .*nowhere"):
            prepare_data(["places"], [tmp_path / "nowhere"])

    def test_every_problem_of_a_declaration_at_once(self, tasks: Path) -> None:
        wrong = SHUFFLED | {"n": 0, "metod": "x", "method": "random"}
        del wrong["seed"]
        write_task(tasks, "places", wrong)
        with pytest.raises(DataError) as caught:
            prepare_data(["places"], [tasks])
        where = f"{tasks / 'places.yaml'}: metadata.sample."
        assert sorted(str(caught.value).splitlines()) == [
            f"{where}method must be 'datasets_shuffle' or 'pandas_sample', got 'random'",
            f"{where}metod must be one of dataset, config, split, revision, fields, empty, n, seed, method, file, "
            "got 'x'",
            f"{where}n must be greater than 0, got 0",
            f"{where}seed must be given",
        ]

    def test_empty_field_that_is_not_kept(self, tasks: Path) -> None:
        write_task(tasks, "places", SHUFFLED | {"empty": ["input"]})
        with pytest.raises(DataError, match=r"metadata.sample.empty must name fields of the sample, got \['input'\]"):
            prepare_data(["places"], [tasks])

    def test_no_local_copy_lists_what_was_looked_for(self, tasks: Path, tmp_path: Path) -> None:
        folders = rf"{tmp_path}/org__places/, {tmp_path}/org/places/, {tmp_path}/places/;"
        with pytest.raises(DataError, match=f"must hold a copy of org/places, found none of {folders}"):
            prepare_data(["places"], [tasks], tmp_path)

    @pytest.mark.parametrize("content", [None, "not json"])
    def test_unreadable_local_copy(self, tasks: Path, tmp_path: Path, content: str | None) -> None:
        (tmp_path / "places").mkdir()
        if content:
            (tmp_path / "places/train.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"places: must hold split train of org/places as parquet, .*, got \w+: "):
            prepare_data(["places"], [tasks], tmp_path)

    @pytest.mark.parametrize("save", [save_dict_to_disk, save_parquet])
    def test_split_that_is_not_there(self, tasks: Path, tmp_path: Path, save: Any) -> None:
        save(PLACES, tmp_path / "places")
        write_task(tasks, "places", SHUFFLED | {"split": "validation"})
        with pytest.raises(DataError, match="must hold split validation of org/places"):
            prepare_data(["places"], [tasks], tmp_path)

    def test_too_few_rows(self, tasks: Path, tmp_path: Path) -> None:
        save_jsonl(CHATS[:30], tmp_path / "chats")
        write_task(tasks, "chats", SAMPLED | {"n": 21})
        with pytest.raises(
            DataError, match=r"org/chats, split train: rows with empty input must be at least n=21, got 20"
        ):
            prepare_data(["chats"], [tasks], tmp_path)
        write_task(tasks, "chats", SAMPLED)
        assert len(lines(prepare_data(["chats"], [tasks], tmp_path)[0].path)) == 20

    def test_missing_field(self, tasks: Path, tmp_path: Path) -> None:
        save_jsonl([{"story": "s", "answers": ["a"], "answer": 0}] * 30, tmp_path / "places")
        with pytest.raises(DataError, match="fields must include candidate_answers, got story, answers, answer"):
            prepare_data(["places"], [tasks], tmp_path)

    @pytest.mark.parametrize(
        ("field", "value", "rule"),
        [
            ("story", None, "a text, got None"),
            ("answer", "B", "an integer, got 'B'"),
            ("answer", True, "an integer, got True"),
            ("candidate_answers", "left", "a list of texts, got 'left'"),
            ("candidate_answers", "['left' 'right']", r"a list of texts, got \"\['left' 'right'\]\""),
            ("candidate_answers", [1, 2], r"a list of texts, got \[1, 2\]"),
        ],
    )
    def test_field_of_another_kind(self, tasks: Path, tmp_path: Path, field: str, value: Any, rule: str) -> None:
        save_jsonl([row | {field: value} for row in PLACES], tmp_path / "places")
        with pytest.raises(DataError, match=f"org/places, split train, row 0: {field} must be {rule}"):
            prepare_data(["places"], [tasks], tmp_path)

    def test_no_network(self, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(DataError) as caught:
            prepare_data(["places"], [tasks])
        message = str(caught.value)
        assert message.startswith("org/places: must be readable from the hub, got ConnectionError: ")
        assert message.endswith("give a folder with a local copy: optuna-merge prepare-data FILE --from DIR")
        assert "\n" not in message

    def test_destination_that_cannot_be_written(self, tasks: Path, source: Path) -> None:
        (tasks / "data").write_text("a file where the folder should be")
        with pytest.raises(DataError, match=r"places.jsonl: must be writable, got File exists; make room"):
            prepare_data(["places"], [tasks], source)

    def test_read_only_destination(self, tasks: Path, source: Path) -> None:
        tasks.chmod(0o555)
        denied = r"places.jsonl: must be writable, got Permission denied"
        with obeying_permissions(), pytest.raises(DataError, match=denied):
            prepare_data(["places"], [tasks], source)

    def test_nothing_is_written_when_one_of_two_is_refused(self, tasks: Path, source: Path) -> None:
        shutil.rmtree(source / "org__chats")
        with pytest.raises(DataError, match="must hold a copy of org/chats"):
            prepare_data(["places", "chats"], [tasks], source)
        assert not (tasks / "data").exists()


def test_an_interrupted_write_leaves_the_old_file(tasks: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = prepare_data(["places"], [tasks], source)
    old = before.path.read_bytes()
    write_task(tasks, "places", SHUFFLED | {"n": 30})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match="must be writable, got No space left on device"):
        prepare_data(["places"], [tasks], source)
    assert before.path.read_bytes() == old
    assert sorted(p.name for p in before.path.parent.iterdir()) == ["places.jsonl", "places.source.json"]


def test_the_revision_is_read_from_where_the_hub_sent_the_files(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    url = f"hf://datasets/org/places@{commit}/data/train-00000-of-00001.parquet"

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        assert (path, name, split, revision) == ("org/places", None, "train", None)
        loaded = datasets.Dataset.from_list(PLACES)
        loaded.info.download_checksums = {url: {"num_bytes": 1, "checksum": None}}
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (prepared,) = prepare_data(["places"], [tasks])
    assert prepared.provenance.revision == commit


class TestReadSample:
    @pytest.fixture
    def prepared(self, tasks: Path, source: Path) -> PreparedSample:
        return prepare_data(["places"], [tasks], source)[0]

    def test_documents_in_the_order_of_the_draw(self, prepared: PreparedSample) -> None:
        assert read_sample(prepared.path, "prepare") == lines(prepared.path)

    def test_missing(self, tmp_path: Path) -> None:
        message = r"absent.jsonl: the documents must be prepared first, no such file; run: optuna-merge prepare-data x$"
        with pytest.raises(TaskError, match=message):
            read_sample(tmp_path / "absent.jsonl", "optuna-merge prepare-data x")

    def test_changed(self, prepared: PreparedSample) -> None:
        prepared.path.write_text(prepared.path.read_text().replace("Block 28 ", "Block 29 "))
        with pytest.raises(TaskError, match=r"must be \w{12} as in places.source.json, got \w{12}: .*; run: prepare"):
            read_sample(prepared.path, "prepare")

    def test_cut_off(self, prepared: PreparedSample) -> None:
        prepared.path.write_bytes(prepared.path.read_bytes()[:-10])
        with pytest.raises(TaskError, match=r"places.jsonl: must be JSON lines .*; run: prepare"):
            read_sample(prepared.path, "prepare")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(TaskError, match="must hold documents, got an empty file"):
            read_sample(tmp_path / "empty.jsonl", "prepare")
