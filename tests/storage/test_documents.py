"""The files of document scores: what comes back after a kill, and who may write."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from optuna_merge.errors import StudyError, TrialTakenError
from optuna_merge.storage.documents import DocumentScores
from tests import processes


@pytest.fixture
def scores(tmp_path: Path) -> DocumentScores:
    return DocumentScores(tmp_path / "documents" / "mine")


def written(scores: DocumentScores, n_lines: int, digest: str = "digest") -> bytes:
    with scores.begin(3, digest) as documents:
        for line in lines(*range(n_lines)):
            documents.append(line)
    return scores.path(3).read_bytes()


def lines(*indices: int) -> list[str]:
    return [f'{{"chunk": {index}, "of": "é"}}' for index in indices]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_chunks_come_back_in_order(scores: DocumentScores) -> None:
    assert scores.read(3, "digest") == []
    whole = written(scores, 3)
    assert names(scores.path(3).parent) == ["trial_00003.jsonl"]
    assert scores.read(3, "digest") == lines(0, 1, 2)
    with scores.begin(3, "digest", lines(0, 1, 2)) as documents:
        assert scores.path(3).read_bytes() == whole
        documents.append("next")
        documents.sync()
    assert scores.read(3, "digest") == [*lines(0, 1, 2), "next"]
    assert scores.read(4, "digest") == []


def test_what_is_not_kept_is_dropped(scores: DocumentScores) -> None:
    written(scores, 3)
    with scores.begin(3, "digest", lines(2)):
        assert scores.read(3, "digest") == lines(2)
    with scores.begin(3, "digest"):
        assert scores.path(3).read_text() == "digest\n"


def test_lines_of_another_recipe_do_not_come_back(scores: DocumentScores) -> None:
    written(scores, 3)
    assert scores.read(3, "other") == []
    with scores.begin(3, "other"):
        assert scores.path(3).read_text() == "other\n"


@pytest.mark.parametrize("n_bytes", range(1, 25))
def test_a_torn_last_line_is_left_out(scores: DocumentScores, n_bytes: int) -> None:
    """Cut anywhere in the last line, also within the two bytes of its é."""
    whole = written(scores, 3)
    scores.path(3).write_bytes(whole[:-n_bytes])
    assert scores.read(3, "digest") == lines(0, 1)
    with scores.begin(3, "digest", lines(0, 1)) as documents:
        documents.append("again")
    assert scores.read(3, "digest") == [*lines(0, 1), "again"]


@pytest.mark.parametrize("content", ["", "dig", "\n", "digest"])
def test_of_a_file_torn_in_its_first_line_nothing_comes_back(scores: DocumentScores, content: str) -> None:
    written(scores, 0)
    scores.path(3).write_text(content)
    assert scores.read(3, "digest") == []


def test_an_owner_that_wakes_after_the_next_one_began_cannot_write(scores: DocumentScores) -> None:
    message = r"trial_00003.jsonl: trial 3 must be run by one process, another one has begun it"
    with scores.begin(3, "digest") as asleep:
        asleep.append(lines(0)[0])
        with scores.begin(3, "digest", scores.read(3, "digest")) as next_one:
            next_one.append(lines(1)[0])
            with pytest.raises(TrialTakenError, match=message):
                asleep.append(lines(1)[0])
            next_one.append(lines(2)[0])
    assert scores.read(3, "digest") == lines(0, 1, 2)


def test_a_kill_while_a_file_is_begun_loses_no_line(scores: DocumentScores) -> None:
    """A process resumes a trial again and again until it is killed."""
    kept = [f"{index} " + "x" * 5000 for index in range(300)]
    with scores.begin(3, "digest", kept):
        pass

    def resume() -> None:
        while True:
            with scores.begin(3, "digest", scores.read(3, "digest")):
                pass

    chance = random.Random(1)
    for _ in range(12):
        with processes.forked(resume):
            time.sleep(0.03 + chance.uniform(0, 0.03))
        assert scores.read(3, "digest") == kept


def test_scores_that_cannot_be_written(tmp_path: Path, scores: DocumentScores, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"trial_00003.jsonl: scores must be writable, got .*; make room and run again"
    whole = written(scores, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with scores.begin(3, "digest", lines(0, 1)) as documents:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StudyError, match=message):
                documents.sync()
            with pytest.raises(StudyError, match=message):
                scores.begin(3, "digest", lines(0))
        assert scores.path(3).read_bytes() == whole
        with processes.files_up_to(len(whole) + 10), pytest.raises(StudyError, match=message):
            documents.append("x" * 100)
    assert scores.read(3, "digest") == lines(0, 1)
    with scores.begin(3, "digest") as documents:
        scores.path(3).unlink()
        with pytest.raises(StudyError, match=message):
            documents.append("x")
    scores.path(3).mkdir()
    for call in (lambda: scores.begin(3, "digest"), lambda: scores.read(3, "digest")):
        with pytest.raises(StudyError, match=message):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=message):
        DocumentScores(tmp_path / "file" / "mine").begin(3, "digest")
