from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optuna_merge.methods import selection
from optuna_merge.methods.function import MergeInput


def inputs_of(task_vector: torch.Tensor, chunk_elements: int = 1 << 18) -> MergeInput:
    return MergeInput(
        name="t",
        base=torch.zeros_like(task_vector),
        models=(task_vector,),
        per_model={},
        shared={},
        switches={},
        seed=0,
        identities=("",),
        device=task_vector.device,
        chunk_elements=chunk_elements,
        kernel_elements=1 << 24,
    )


def kept(inputs: MergeInput, n_largest: int, *, is_early: bool) -> list[int]:
    parted = selection.split(inputs, 0, n_largest, is_early=is_early)
    places = []
    for chunk in inputs.chunks():
        ones = parted.keep(chunk, chunk.task_vector(0)).ne(0).nonzero().view(-1)
        places += [chunk.span.start + int(place) for place in ones]
    return places


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.5, -0.5, 1.0, -2.0, 3.0, 1e-30, 1e-44]), min_size=1, max_size=12),
    chunk_elements=st.integers(1, 13),
    n_entries=st.sampled_from([0, 3, 1 << 20]),
    data=st.data(),
)
def test_the_largest_are_those_of_a_stable_sort(
    values: list[float], chunk_elements: int, n_entries: int, data: st.DataObject
) -> None:
    task_vector = torch.tensor(values).unsqueeze(1)  # rows of one element, so that pieces may be as small
    inputs = inputs_of(task_vector, chunk_elements)
    n_largest = data.draw(st.integers(0, len(values)))
    magnitudes = task_vector.view(-1).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_N_ENTRIES", n_entries)
        descending = torch.sort(magnitudes, stable=True, descending=True).indices
        assert kept(inputs, n_largest, is_early=True) == sorted(descending[:n_largest].tolist())
        ascending = torch.sort(magnitudes, stable=True).indices
        assert kept(inputs, n_largest, is_early=False) == sorted(ascending[len(values) - n_largest :].tolist())


@pytest.mark.parametrize("kind", ["normal", "few values", "striped", "one outlier"])
def test_the_kth_largest_of_a_large_tensor(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    task_vector = torch.randn(400, 1024, generator=generator)
    if kind == "few values":
        task_vector = (task_vector * 2).round() / 64
    if kind == "striped":
        task_vector *= torch.logspace(-6, 6, 1024)
    if kind == "one outlier":
        task_vector[3, 3] = 1e30
    inputs = inputs_of(task_vector, 100_000)
    magnitudes = task_vector.abs().view(-1)
    ordered = magnitudes.sort(descending=True).values
    for k in (1, 2, 1000, 204_800, 409_000, 409_600):
        value = ordered[k - 1]
        n_above, n_equal = int((magnitudes > value).count_nonzero()), int((magnitudes == value).count_nonzero())
        assert selection.kth_largest(inputs, selection.magnitudes(inputs, 0), k) == (value.item(), n_above, n_equal)


def test_the_histogram_is_made_once() -> None:
    inputs = inputs_of(torch.linspace(-1, 1, 1000).view(10, 100))
    selection.kth_largest(inputs, selection.magnitudes(inputs, 0), 10)
    key = (*selection.magnitudes(inputs, 0).key, inputs.name)
    remembered = inputs.memory[key]
    selection.kth_largest(inputs, selection.magnitudes(inputs, 0), 900)
    assert inputs.memory[key] is remembered


def test_a_bin_of_few_values_is_searched_once() -> None:
    inputs = inputs_of((torch.arange(4000) % 3 + 1).float().view(40, 100))
    n_above = n_equal = 4000 // 3
    assert selection.kth_largest(inputs, selection.magnitudes(inputs, 0), n_above + 1) == (2.0, n_above, n_equal)
    bins = inputs.memory[(*selection.magnitudes(inputs, 0).key, inputs.name, "bins")]
    (remembered,) = bins.values()
    assert selection.kth_largest(inputs, selection.magnitudes(inputs, 0), n_above + 9) == (2.0, n_above, n_equal)
    assert list(bins.values()) == [remembered]
