"""Whose fine-tunes some models are, by their cards, their configurations and their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optuna_merge.checkpoints.ancestry import find_base, nearest_to_base
from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.reference import resolve
from optuna_merge.errors import CheckpointError
from optuna_merge.testing.models import write_tiny_models


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it, without cards."""
    base, sources = write_tiny_models(tmp_path_factory.mktemp("four"), 3, n_layers=2, spread=0.1)
    return [base, *sources]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, for folders of models without weights."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def describe(name: str, card: object = None, config: str | None = None) -> None:
    """A model folder with a card and a configuration that name what it was tuned from."""
    folder = Path(name)
    folder.mkdir(parents=True)
    if card is not None:
        (folder / "README.md").write_text(
            f"---\nbase_model: {json.dumps(card)}\n---\nText\n---\nbase_model: not/this\n"
        )
    (folder / "config.json").write_text(json.dumps({} if config is None else {"_name_or_path": config}))


def base_of(*names: str) -> str:
    return find_base([resolve(name) for name in names]).reference


def test_all_cards_name_it(folders: Path) -> None:
    describe("math", card="org/base")
    describe("code", card=["org/base", "org/other"], config="org/wrong")  # the card counts
    assert base_of("math", "code") == "org/base"
    assert base_of("math") == "org/base"
    assert find_base([resolve("math"), resolve("code")]).reason == "all models name it in the card or the configuration"


def test_the_configuration_says_it_where_no_card_does(folders: Path) -> None:
    describe("math", card="org/base")
    describe("code", config="org/base")
    assert base_of("code", "math") == "org/base"


def test_an_ancestor_further_back(folders: Path) -> None:
    describe("base")
    describe("chat", card="../base")
    describe("math", card="../chat")
    describe("code", card="../base")
    assert base_of("math", "code") == str(folders / "base")
    assert base_of("math", "chat") == "chat"  # nearer than the base of both, and one of them
    assert "or a model that was tuned from it" in find_base([resolve("math"), resolve("code")]).reason


def test_a_given_folder_may_be_a_copy_of_the_named_model(folders: Path) -> None:
    describe("copies/Base-7B")
    describe("math", card="org/base-7b")
    describe("code", card="org/base-7b")
    assert base_of("math", "copies/Base-7B", "code") == "copies/Base-7B"


def test_a_model_is_the_base_of_its_adapters(folders: Path) -> None:
    for name in ("base", "one", "two"):
        describe(name)
    assert base_of("base+one", "base+two") == str(folders / "base")


@pytest.mark.parametrize("matter", ["base_model: {a: b}", "base_model: [", "- a list", "base_model: /of/the/trainer"])
def test_a_card_that_says_nothing_of_use(matter: str, folders: Path) -> None:
    describe("math", card="org/base")
    describe("code")
    Path("code/README.md").write_text(f"---\n{matter}\n---\n")
    with pytest.raises(CheckpointError, match=r"got org/base by math, nothing by code, .* name it with --base"):
        find_base([resolve("math"), resolve("code")])


def test_weights_tell_a_base_from_its_fine_tunes(four: list[Path]) -> None:
    base, *sources = [Checkpoint.open(str(path)) for path in four]
    for index in range(4):
        models = [*sources[:index], base, *sources[index:]]
        found, cosine = nearest_to_base(models)
        assert found == index
        assert abs(cosine) < 0.1
    assert nearest_to_base([sources[0], base, sources[1]])[0] == 1
    assert nearest_to_base(sources)[0] is None  # seen from each, the others share the way back
    assert nearest_to_base([base, sources[0]])[0] is None
    assert nearest_to_base([base, base, sources[0]])[0] is None
    found = find_base([resolve(str(path)) for path in four])
    assert found.reference == str(four[0])
    assert "correct this line if they were not tuned from it" in found.reason
