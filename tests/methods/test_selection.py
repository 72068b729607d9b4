from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optuna_merge.methods import selection
from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.selection import kth_largest, largest, ranks


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
    )


def kept(inputs: MergeInput, band: selection.Band) -> list[int]:
    places = []
    for chunk in inputs.chunks():
        ones = band.apply(chunk, chunk.task_vector(0)).ne(0).nonzero().view(-1)
        places += [chunk.span.start + int(place) for place in ones]
    return places


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.5, -0.5, 1.0, -2.0, 3.0, 1e-30]), min_size=1, max_size=12),
    chunk_elements=st.integers(1, 13),
    data=st.data(),
)
def test_ranks_are_those_of_a_stable_sort(values: list[float], chunk_elements: int, data: st.DataObject) -> None:
    task_vector = torch.tensor(values).unsqueeze(1)  # rows of one element, so that pieces may be as small
    inputs = inputs_of(task_vector, chunk_elements)
    order = torch.sort(task_vector.view(-1).abs(), stable=True).indices
    first = data.draw(st.integers(0, len(values) - 1))
    last = data.draw(st.integers(first + 1, len(values)))
    band = ranks(inputs, 0, first, last)
    for _ in range(2):  # a second pass starts again
        assert kept(inputs, band) == sorted(order[first:last].tolist())
    n_kept = last - first
    descending = torch.sort(task_vector.view(-1).abs(), stable=True, descending=True).indices
    assert kept(inputs, largest(inputs, 0, n_kept)) == sorted(descending[:n_kept].tolist())


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
        expected = selection.Order(
            value.item(), int((magnitudes > value).count_nonzero()), int((magnitudes >= value).count_nonzero())
        )
        assert kth_largest(inputs, 0, k) == expected
        assert selection._from_bits(inputs, 0, k) == expected


@pytest.mark.parametrize("bracket", [(2.0, 3.0), (0.0, 0.001), (5.0, math.inf), (-1.0, 0.0)])
def test_a_bracket_that_misses_is_noticed(bracket: tuple[float, float]) -> None:
    task_vector = torch.linspace(0.1, 1.9, 50)
    inputs = inputs_of(task_vector)
    assert selection._from_bracket(inputs, 0, 25, *bracket) is None
