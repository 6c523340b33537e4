"""Rows of a fixed length out of the stream of documents of a store.

A row of T tokens is a dict of numpy arrays:

    tokens    int32[T]    stream[o : o + T]
    targets   int32[T]    stream[o + 1 : o + T + 1]: what comes after each token
    segments  int32[T]    1, 2, ...: the document of each input token; 0 is padding
    positions int32[T]    0, 1, ... from the begin of each document, or of the row
    weights   float32[T]  1 where the target is scored, else 0
    bytes     int32       UTF-8 bytes of the scored targets

Every document begins with end of text, so every token of every document is predicted
from its own document alone, and its last token predicts the end of text that follows.

`Windows` and `Packed` are endless: row i is a pure function of (seed, i), an epoch has
`len` rows and every epoch differs. `Evaluation` is finite and scores each token exactly
once.
"""

import functools
import hashlib
import itertools
from bisect import bisect_left, insort
from typing import Any, TypeAlias

import grain
import numpy as np

from lm.config import ConfigError
from lm.data.store import Store

Row: TypeAlias = dict[str, Any]  # of arrays and numbers of numpy

_BLOCK = 512  # rows that are packed together
_GROUP = 16  # blocks whose rows are shuffled together


def hashed(*values: int | str, bits: int = 64) -> int:
    """Returns a number made of the values, the same on every machine."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - bits)


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """Returns a permutation of range(count), the same on every machine."""
    random = np.random.Philox(key=hashed(*key)).random_raw(count)
    return np.argsort(random, kind="stable")


def uniforms(count: int, *key: int | str) -> np.ndarray:
    """Returns so many numbers in [0, 1), the same on every machine.

    SplitMix64 (Steele et al. 2014): a generator of numpy's takes longer to set up than to
    draw a row.
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(hashed(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def offsets(segments: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ... along each run of equal numbers."""
    here = np.arange(len(segments), dtype=np.int32)
    begins = here.copy()
    begins[1:] *= segments[1:] != segments[:-1]
    return here - np.maximum.accumulate(begins)


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """Returns the values with zeros after them."""
    row = np.zeros(length, values.dtype)
    row[: len(values)] = values
    return row


class _Rows(grain.MapDataset):
    """What all kinds of rows share."""

    def __init__(self, store: Store, length: int) -> None:
        super().__init__()
        self.store = store
        self.length = length
        self._ramp = np.arange(length, dtype=np.int32)
        self._ones = np.ones(length, np.int32)
        self._weights = np.ones(length, np.float32)
        for shared in (self._ramp, self._ones, self._weights):
            shared.flags.writeable = False

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self.row(int(index))

    def row(self, index: int) -> Row:
        raise NotImplementedError

    def _window(self, start: int) -> Row:
        """The row whose input begins at token `start`; its arrays may be shared."""
        stream = self.store.read(start, self.length + 1).astype(np.int32)
        tokens, targets = stream[:-1], stream[1:]
        begins = tokens == self.store.eot
        segments, positions = self._ones, self._ramp
        if begins[1:].any():
            segments = np.cumsum(begins, dtype=np.int32) + np.int32(not begins[0])
            positions = positions - np.maximum.accumulate(positions * begins)
        return {
            "tokens": tokens,
            "targets": targets,
            "segments": segments,
            "positions": positions,
            "weights": self._weights,
            "bytes": self.store.token_bytes[targets].sum(dtype=np.int32),
        }


class Windows(_Rows):
    """Windows side by side over the stream, in a grid that moves every epoch.

    So what falls on the border of two windows differs by epoch; the fewer than T tokens
    that no window covers differ too. `shuffle` (Grain's) gives the order within an
    epoch.
    """

    def __init__(self, store: Store, length: int, seed: int) -> None:
        super().__init__(store, length)
        _long_enough(store, length)
        if store.tokens // length >= 1 << 32:
            raise ConfigError(
                f"data.length={length} cuts {store.name} into 2**32 windows or more, "
                "too many to shuffle; use data.packing=documents or more length"
            )
        self._seed = seed
        self._phase = functools.lru_cache(maxsize=8)(self._draw)

    def _draw(self, epoch: int) -> int:
        return hashed("phase", self._seed, epoch) % self.store.tokens

    def __len__(self) -> int:
        return self.store.tokens // self.length

    def row(self, index: int) -> Row:
        epoch, row = divmod(index, len(self))
        return self._window(self._phase(epoch) + row * self.length)


class Packed(_Rows):
    """Whole documents, several to a row, a document longer than a row in pieces.

    The stream is cut into blocks of about 512 rows; which documents share a block
    changes with the epoch, because the cuts move. Within a block best fit decreasing
    packs the documents (Ding et al., 2024, "Fewer truncations improve language
    modeling"). Every block has the same number of rows, so that row i is found without
    planning what comes before it: a document that fits into no row whole is cut to fill
    the largest gaps, and padding is less than one row a block. A plan is made when a
    row of its block is first read, from the offsets of its documents only, and the rows
    of 16 blocks from all over the stream are shuffled together; so 10^9 documents need
    no more time or memory to start than ten.
    """

    def __init__(self, store: Store, length: int, seed: int) -> None:
        super().__init__(store, length)
        _long_enough(store, length)
        self._seed = seed
        self.blocks = max(1, store.tokens // (_BLOCK * length))
        widest = -(-store.tokens // self.blocks)  # tokens of a block, at most
        self.block_rows = -(-widest // length)
        # Threads may make the same plan twice, which is harmless.
        self._plan = functools.lru_cache(maxsize=4 * _GROUP)(self._make_plan)
        self._order = functools.lru_cache(maxsize=8)(self._make_order)

    def __len__(self) -> int:
        return self.blocks * self.block_rows

    def row(self, index: int) -> Row:
        epoch, at = divmod(index, len(self))
        group, at = divmod(at, _GROUP * self.block_rows)
        blocks, rows = self._order(epoch, group)
        block, row = divmod(int(rows[at]), self.block_rows)
        return self._gather(self._plan(epoch, int(blocks[block]))[row])

    def _make_order(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a group, and the order of their rows."""
        blocks = shuffled(self.blocks, "blocks", self._seed, epoch)
        blocks = blocks[group * _GROUP : (group + 1) * _GROUP]
        rows = len(blocks) * self.block_rows
        return blocks, shuffled(rows, "rows", self._seed, epoch, group)

    def _make_plan(self, epoch: int, block: int) -> list[list[tuple[int, int]]]:
        """For each row of a block the (start, tokens) of its pieces."""
        tokens = self.store.tokens
        phase = hashed("phase", self._seed, epoch) % tokens if self.blocks > 1 else 0
        start = phase + block * tokens // self.blocks
        stop = phase + (block + 1) * tokens // self.blocks
        edges = [np.array([start, stop])]
        for turn in (0, tokens):  # the block may reach over the end of the ring
            low, high = max(start - turn, 0), min(stop - turn, tokens)
            if low < high:
                edges.append(self.store.starts(low, high) + turn)
        edges = np.unique(np.concatenate(edges)).tolist()
        pieces = []
        for begin, end in itertools.pairwise(edges):
            for at in range(begin, end, self.length):
                pieces.append((at, min(self.length, end - at)))
        return best_fit(pieces, self.block_rows, self.length)

    def _gather(self, pieces: list[tuple[int, int]]) -> Row:
        names = ("tokens", "targets", "segments", "positions")
        row: Row = {name: np.zeros(self.length, np.int32) for name in names}
        row["weights"] = np.zeros(self.length, np.float32)
        streams = [self.store.read(start, count + 1) for start, count in pieces]
        counts = np.array([count for _, count in pieces], np.int64)
        used = int(counts.sum())
        if used:  # a row may be all padding
            np.concatenate([s[:-1] for s in streams], out=row["tokens"][:used])
            np.concatenate([s[1:] for s in streams], out=row["targets"][:used])
            segments = np.arange(1, len(pieces) + 1, dtype=np.int32)
            begins = (np.cumsum(counts) - counts).astype(np.int32)
            row["segments"][:used] = segments.repeat(counts)
            row["positions"][:used] = self._ramp[:used] - begins.repeat(counts)
            row["weights"][:used] = 1
        scored = row["targets"][:used]
        row["bytes"] = self.store.token_bytes[scored].sum(dtype=np.int32)
        return row


def best_fit(
    pieces: list[tuple[int, int]], rows: int, length: int
) -> list[list[tuple[int, int]]]:
    """Packs (start, tokens) pieces: the longest first, each where it just fits.

    A piece that fits nowhere whole waits; at the end such pieces are cut to fill the
    largest gaps. The room must do: sum of tokens <= rows * length, and no piece is
    longer than a row.
    """
    packed: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    gaps = [(length, row) for row in range(rows)]  # sorted
    waiting = []
    for start, count in sorted(pieces, key=lambda p: (-p[1], p[0])):
        fit = bisect_left(gaps, (count, -1))
        if fit == len(gaps):
            waiting.append((start, count))
            continue
        gap, row = gaps.pop(fit)
        packed[row].append((start, count))
        if gap > count:
            insort(gaps, (gap - count, row))
    for start, count in waiting:
        while count:
            gap, row = gaps.pop()
            part = min(gap, count)
            packed[row].append((start, part))
            start, count = start + part, count - part
            if gap > part:
                insort(gaps, (gap - part, row))
    return packed


class Evaluation(_Rows):
    """Windows that score every token of a store exactly once, in order.

    Window k begins at token k * stride and scores its last `stride` targets; those
    before are there as context only. The first window scores all it has, and the last
    is padded.
    """

    def __init__(self, store: Store, length: int, stride: int | None = None) -> None:
        super().__init__(store, length)
        self.stride = length if stride is None else stride
        if not 1 <= self.stride <= length:
            raise ConfigError(f"stride={stride} is not between 1 and length={length}")

    def __len__(self) -> int:
        beyond = max(0, self.store.tokens - self.length)
        return 1 + -(-beyond // self.stride)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.stride
        row = {k: v.copy() for k, v in self._window(start).items()}
        stop = min(self.length, self.store.tokens - start)
        for name in ("tokens", "targets", "segments", "positions", "weights"):
            row[name][stop:] = 0
        if index:
            row["weights"][: self.length - self.stride] = 0
        scored = row["targets"][row["weights"] > 0]
        row["bytes"] = self.store.token_bytes[scored].sum(dtype=np.int32)
        return row


def _long_enough(store: Store, length: int) -> None:
    if store.tokens < length:
        raise ConfigError(
            f"data.length={length} is longer than all of {store.name}, {store.tokens} "
            f"tokens; use more text or --set data.length={store.tokens}"
        )
