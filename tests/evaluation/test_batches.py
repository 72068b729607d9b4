from __future__ import annotations

import math
import random

from optuna_merge.evaluation.engines.batches import Item, Row, make_batches, make_rows
from optuna_merge.evaluation.engines.beginnings import Beginnings

ITEMS = [
    Item((1, 2, 3), (4, 5, 6)),
    Item((1, 2, 3), (7, 8)),
    Item((1, 2, 3), (9,)),
    Item((1, 2, 3), (4, 6, 1)),
    Item((5,), (9,)),
]


def test_a_context_and_a_common_beginning_are_computed_once() -> None:
    tree, single = make_rows(ITEMS, share=True)
    assert tree.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert tree.positions == [0, 1, 2, 3, 4, 4, 3]
    assert tree.ends == [7, 7, 7, 6, 5, 6, 7]
    # the continuation's first token is predicted by the context's last one
    assert sorted(tree.scored) == [(0, [2, 3, 4]), (1, [2, 6]), (2, [2]), (3, [2, 3, 5])]
    assert tree.n_scored == 5
    assert single == Row([5], [0], [1], [(4, [0])])
    assert single.is_chain
    assert not tree.is_chain


def test_without_sharing_only_prefixes_share_a_row() -> None:
    rows = make_rows(ITEMS, share=False)
    assert all(row.is_chain for row in rows)
    assert [row.tokens for row in rows] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 7], [5]]
    assert [row.scored for row in rows] == [[(2, [2]), (0, [2, 3, 4])], [(3, [2, 3, 4])], [(1, [2, 3])], [(4, [0])]]


def test_a_row_that_would_be_too_long_is_laid_out_apart() -> None:
    rows = make_rows(ITEMS, share=True, longest_shared=6)
    assert [row.tokens for row in rows] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7], [5]]


def test_every_item_reads_its_own_tokens_in_any_layout() -> None:
    rnd = random.Random(0)
    items = [
        Item(tuple(rnd.choices(range(3), k=rnd.randint(1, 3))), tuple(rnd.choices(range(3), k=rnd.randint(1, 5))))
        for _ in range(200)
    ]
    for share in (True, False):
        found = {}
        for row in make_rows(items, share=share, longest_shared=20):
            for index, nodes in row.scored:
                last = nodes[-1]
                seen = [j for j in range(last + 1) if last < row.ends[j]]
                assert [row.positions[j] for j in seen] == list(range(len(seen)))
                found[index] = ([row.tokens[j] for j in seen], len(nodes))
        expected = [(list(item.context + item.continuation[:-1]), len(item.continuation)) for item in items]
        assert [found[i] for i in range(len(items))] == expected


def chains(*lengths: int) -> list[Row]:
    return [Row.of_prompt(i, [0] * n) for i, n in enumerate(lengths)]


def lengths(batches: list[list[Row]]) -> list[list[int]]:
    return [[len(row) for row in batch] for batch in batches]


def test_batches_hold_about_what_was_asked() -> None:
    rows = chains(8, 4, 4, 4, 2)
    # 22 tokens in three batches, and a tenth
    assert lengths(make_batches(rows, batch_tokens=8, batch_scored=100)) == [[8], [4, 4], [4, 2]]
    assert lengths(make_batches(rows, batch_tokens=1000, batch_scored=2)) == [[8, 4], [4, 4], [2]]
    assert lengths(make_batches(rows, batch_tokens=1000, batch_scored=100)) == [[8, 4, 4, 4, 2]]
    assert make_batches([], batch_tokens=8, batch_scored=1) == []


def test_a_small_rest_joins_the_batch_before_it() -> None:
    assert lengths(make_batches(chains(*[4] * 10, 3), batch_tokens=40, batch_scored=10**6)) == [[*[4] * 10, 3]]
    # but not if that takes more padding than a pass is worth
    apart = make_batches(chains(*[20] * 10, *[1] * 10), batch_tokens=200, batch_scored=10**6)
    assert lengths(apart) == [[*[20] * 10, 1], [1] * 9]


def test_where_there_is_a_mask_short_rows_are_put_end_to_end() -> None:
    tree = Row([1, 2, 3, 4], [0, 1, 2, 2], [4, 4, 3, 4], [(9, [1, 2])])
    rows = [tree, *chains(2, 1, 1)]
    [[first, second]] = make_batches(rows, batch_tokens=100, batch_scored=100)
    assert first == tree
    assert second.positions == [0, 1, 0, 0]
    assert second.ends == [2, 2, 3, 4]
    assert second.scored == [(0, [1]), (1, [2]), (2, [3])]
    assert not second.is_chain


def test_chains_beyond_the_window_stay_out_of_masked_batches() -> None:
    tree = Row([1, 2, 3, 4], [0, 1, 2, 2], [4, 4, 3, 4], [(9, [1, 2])])
    batches = make_batches([*chains(6), tree, *chains(3)], batch_tokens=100, batch_scored=100, longest_shared=5)
    assert lengths(batches) == [[6], [4, 3]]


def test_short_rows_after_a_beginning_are_put_into_rows_of_about_its_length() -> None:
    beginnings = Beginnings([tuple(range(190))])
    rnd = random.Random(1)
    prompts = [tuple(range(190)) + (1000 + n,) * rnd.randint(26, 37) for n in range(24)]
    rows = make_rows([Item(prompt, (7, 8)) for prompt in prompts], share=True, beginnings=beginnings)
    lengths = [len(row) for row in rows]
    assert len(rows) == math.ceil(sum(lengths) / 190)
    assert len(rows) * max(lengths) <= 1.05 * sum(lengths)
    assert sorted(index for row in rows for index, _ in row.scored) == list(range(24))
