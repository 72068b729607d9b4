from __future__ import annotations

import random

from optuna_merge.evaluation.batches import Item, Row, make_batches, make_rows

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


def test_batches_hold_about_what_was_asked() -> None:
    rows = [Row([0] * n, [], [n] * n, [(0, [0])]) for n in (8, 4, 4, 4, 2)]
    lengths = [[len(row) for row in batch] for batch in make_batches(rows, batch_tokens=8, batch_scored=100)]
    assert lengths == [[8], [4, 4], [4, 2]]
    assert [len(batch) for batch in make_batches(rows, batch_tokens=1000, batch_scored=2)] == [2, 2, 1]
    assert [len(batch) for batch in make_batches(rows, batch_tokens=1000, batch_scored=100)] == [5]
    assert make_batches([], batch_tokens=8, batch_scored=1) == []
