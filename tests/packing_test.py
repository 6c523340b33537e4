"""Rows hold each token where they should, and no token sees another document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import packing
from lm.data.store import Store

EOT = 0
LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=60)


class Ring(Store):
    """A store in memory in which every token but eot is its own place in the stream."""

    def __init__(self, lengths):
        self.name = "a ring"
        self.eot = EOT
        self.begins = np.cumsum([0, *lengths[:-1]])
        self.tokens = sum(lengths)
        self.stream = np.arange(self.tokens)
        self.stream[self.begins] = EOT
        self.token_bytes = np.arange(self.tokens, dtype=np.int32) % 7
        self.token_bytes[EOT] = 0

    def read(self, start, count):
        return self.stream[np.arange(start, start + count) % self.tokens].astype(
            np.uint16
        )

    def starts(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self.begins[(self.begins >= start) & (self.begins < stop)]


def places(row, ring):
    """The place in the stream of each scored target."""
    scored = row["weights"] > 0
    tokens, targets = row["tokens"][scored], row["targets"][scored]
    return np.where(targets != EOT, targets, (tokens + 1) % ring.tokens)


def check(row, ring):
    """Asserts what must be true of any row, and returns its places."""
    real = row["segments"] > 0
    tokens, targets, positions = row["tokens"], row["targets"], row["positions"]
    assert (row["weights"][~real] == 0).all()
    assert row["segments"][real].tolist() == sorted(row["segments"][real])
    at = 0
    for segment in range(1, row["segments"].max() + 1):
        mine = np.flatnonzero(row["segments"] == segment)
        assert mine.tolist() == list(range(at, at + len(mine)))  # none is left out
        at += len(mine)
        assert positions[mine].tolist() == list(range(len(mine)))
        assert EOT not in tokens[mine[1:]]  # one document only
        assert (targets[mine[:-1]] == tokens[mine[1:]]).all()
        last = ring.stream == tokens[mine[-1]] if tokens[mine[-1]] != EOT else None
        if last is not None:
            assert (
                targets[mine[-1]] == ring.read(int(np.flatnonzero(last)[0]) + 1, 1)[0]
            )
    scored = targets[row["weights"] > 0]
    assert row["bytes"] == ring.token_bytes[scored].sum()
    kinds = {k: v.dtype for k, v in row.items()}
    assert kinds.pop("weights") == np.float32 and set(kinds.values()) == {
        np.dtype("int32")
    }
    return places(row, ring)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_windows_cover_the_ring_from_another_place_every_epoch(lengths, length, seed):
    ring = Ring(lengths)
    if ring.tokens < length:
        return
    windows = packing.Windows(ring, length, seed)
    for epoch in range(3):
        rows = [windows[epoch * len(windows) + i] for i in range(len(windows))]
        seen = np.concatenate([check(row, ring) for row in rows])
        for row in rows:
            assert row["segments"].max() == 1 + (row["tokens"][1:] == EOT).sum()
        assert len(seen) == len(set(seen)) == len(windows) * length
        assert ring.tokens - len(seen) < length


def test_the_borders_of_windows_move_every_epoch():
    windows = packing.Windows(Ring([500, 500]), 10, 0)
    borders = {
        int(places(windows[epoch * 100], windows.store)[0]) % 10 for epoch in range(9)
    }
    assert len(borders) > 3


@given(LENGTHS, st.integers(2, 40), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_every_token_once_an_epoch(lengths, length, seed, block):
    ring = Ring(lengths)
    if ring.tokens < length:
        return
    old = packing._BLOCK, packing._GROUP
    packing._BLOCK, packing._GROUP = block, 2
    try:
        packed = packing.Packed(ring, length, seed)
        orders = []
        for epoch in range(3):
            rows = [packed[epoch * len(packed) + i] for i in range(len(packed))]
            seen = np.concatenate([check(row, ring) for row in rows])
            assert sorted(seen) == list(range(ring.tokens))
            orders.append(seen.tolist())
        padding = len(packed) * length - ring.tokens
        assert padding <= packed.blocks * length
        if len(packed) > 8:
            assert orders[0] != orders[1] and orders[1] != orders[2]
    finally:
        packing._BLOCK, packing._GROUP = old


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80))
def test_best_fit_cuts_only_what_fits_nowhere(counts):
    starts = np.cumsum([0, *counts]).tolist()
    pieces = list(zip(starts, counts, strict=False))
    rows = -(-sum(counts) // 16)
    packed = packing.best_fit(pieces, rows, 16)
    assert len(packed) == rows and max(sum(c for _, c in row) for row in packed) <= 16
    tokens = [
        t for row in packed for start, count in row for t in range(start, start + count)
    ]
    assert sorted(tokens) == list(range(sum(counts)))
    roomy = packing.best_fit(pieces, len(pieces), 16)
    assert sorted(p for row in roomy for p in row) == pieces  # whole, given the room


def test_short_documents_are_packed_whole_and_without_loss():
    lengths = np.random.default_rng(0).integers(2, 60, 5000).tolist()
    ring = Ring(lengths)
    ring.read = lambda start, count: np.zeros(count, np.uint16)
    packed = packing.Packed(ring, 128, 0)
    plan = [
        piece
        for block in range(packed.blocks)
        for row in packed._plan(0, block)
        for piece in row
    ]
    whole = {(int(b), n) for b, n in zip(ring.begins, lengths, strict=True)}
    kept = sum((start % ring.tokens, count) in whole for start, count in plan)
    assert kept > 0.99 * len(lengths)
    assert len(packed) * 128 < 1.003 * ring.tokens


@pytest.mark.parametrize("kind", [packing.Windows, packing.Packed])
def test_a_row_depends_on_seed_and_index_only(kind):
    ring = Ring([7, 23, 5, 40, 3] * 30)
    first, again, other = kind(ring, 16, 1), kind(ring, 16, 1), kind(ring, 16, 2)
    rows = [first[i] for i in range(300)]
    for i in np.random.default_rng(0).permutation(300).tolist():
        for name, value in again[i].items():
            np.testing.assert_array_equal(value, rows[i][name])
    assert any((other[i]["tokens"] != rows[i]["tokens"]).any() for i in range(5))


@given(LENGTHS, st.integers(1, 40), st.data())
@settings(max_examples=80, deadline=None)
def test_evaluation_scores_every_token_once(lengths, length, data):
    ring = Ring(lengths)
    stride = data.draw(st.integers(1, length))
    rows = packing.Evaluation(ring, length, stride)
    seen = [check(rows[i], ring) for i in range(len(rows))]
    assert np.concatenate(seen).tolist() == [*range(1, ring.tokens), 0]
    assert (
        sum(rows[i]["bytes"] for i in range(len(rows)))
        == ring.token_bytes[ring.stream].sum()
    )
    for i in range(1, len(rows)):  # context before what is scored
        assert (rows[i]["weights"][: length - stride] == 0).all()
        assert (rows[i]["segments"][: length - stride] > 0).all()


def test_what_does_not_fit_is_told():
    ring = Ring([5, 6])
    for kind in (packing.Windows, packing.Packed):
        kind(ring, 11, 0)[0]
        with pytest.raises(
            ConfigError, match=r"length=12 is longer.*11 tokens.*length=11"
        ):
            kind(ring, 12, 0)
    assert len(packing.Evaluation(ring, 2048)) == 1
    with pytest.raises(ConfigError, match="stride=9 is not between 1 and length=8"):
        packing.Evaluation(ring, 8, 9)
    with pytest.raises(IndexError):
        packing.Evaluation(ring, 4)[3]
