"""Rows of documents of two fields: several to a row, none of them cut but where asked for.

A plan says which documents share a row. It is made once, from the lengths of all of them
(10 microseconds a document), and is the same in every epoch; the order of its rows is not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import logging

from lm.config import ConfigError
from lm.data.packing import Row, shuffled
from lm.data.store import Store

Long = Literal[
    "refuse", "cut", "drop"
]  # what is done with a document that does not fit

_GROUP = 1024  # documents, from all over the store, that are packed together


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one side of a row holds."""

    field: str  # that says so, for messages
    tokens: int


class Records(grain.MapDataset):
    """Rows that hold each document of a store exactly once; row i is a function of i."""

    def __init__(
        self,
        store: Store,
        sizes: np.ndarray,
        limits: Sequence[Limit],
        long: Long,
        hopeless: np.ndarray | None = None,
        together: bool = True,
    ) -> None:
        """Plans the rows.

        Args:
            store: of two fields.
            sizes: int [documents, sides]: the tokens that each document puts on each side
                of a row.
            limits: of the sides.
            long: what becomes of documents with more.
            hopeless: bool [documents]: those that would be of no use cut.
            together: whether documents share rows.
        """
        super().__init__()
        self.store = store
        self.starts = store.starts(0, store.tokens).reshape(-1, 2)
        room = np.array([limit.tokens for limit in limits])
        if hopeless is None:
            hopeless = np.zeros(len(sizes), bool)
        kept = _fitting(store, sizes, limits, long, hopeless)
        cut = np.minimum(sizes[kept], room)
        if together:
            order, self._first = plan(cut, room, store.name)
        else:
            order, self._first = np.arange(len(kept)), np.arange(len(kept) + 1)
        self._order = kept[order]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self.row(int(index))

    def row(self, index: int) -> Row:
        raise NotImplementedError

    def documents(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the two texts of each document of a row, see `document`."""
        epoch, at = divmod(index, len(self))
        del epoch  # every epoch has the same rows
        of_row = self._order[self._first[at] : self._first[at + 1]]
        return [self.document(number) for number in of_row.tolist()]

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two texts of a document, end of text around both.

        `[eot] a b [eot]` and `[eot] c [eot]`: the one that ends the first begins the second.
        """
        first, second = self.starts[number].tolist()
        end = self.store.tokens
        if number + 1 < len(self.starts):
            end = int(self.starts[number + 1, 0])
        stream = self.store.read(first, end - first + 1).astype(np.int32)
        return stream[: second - first + 1], stream[second - first :]

    @property
    def kept(self) -> np.ndarray:
        """The numbers of the documents that are in a row, in the order of the store."""
        return np.sort(self._order)


def lengths(store: Store) -> np.ndarray:
    """Returns int [documents, 2]: the tokens of both texts, each with its end of text."""
    starts = store.starts(0, store.tokens)
    return np.diff(starts, append=store.tokens).reshape(-1, 2)


def _fitting(
    store: Store,
    sizes: np.ndarray,
    limits: Sequence[Limit],
    long: Long,
    hopeless: np.ndarray,
) -> np.ndarray:
    """Returns the numbers of the documents that rows will hold; says what is left out."""
    room = np.array([limit.tokens for limit in limits])
    over = (sizes > room).any(1)
    count = int(over.sum())
    if count and long == "refuse":
        longest = sizes.max(0)
        needed = " and ".join(
            f"{limit.field}={int(n)}" for limit, n in zip(limits, longest, strict=True)
        )
        raise ConfigError(
            f"{store.name}: {count} of {len(sizes)} documents are longer than a row; the "
            f"longest need {needed}; or set objective.long=cut or drop"
        )
    kept = np.flatnonzero(~over if long == "drop" else ~hopeless)
    if count:
        dropped = len(sizes) - len(kept)
        logging.warning(
            "%s: %d of %d documents are longer than a row: %d cut, %d dropped",
            *(store.name, count, len(sizes), count - dropped, dropped),
        )
    if not len(kept):
        raise ConfigError(f"{store.name}: no document fits into a row; use longer rows")
    return kept


def plan(
    sizes: np.ndarray, room: np.ndarray, *key: int | str
) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents into rows: the largest first, each where it leaves least room.

    Args:
        sizes: int [documents, sides], each at most `room`.
        room: int [sides] of a row.
        *key: chooses which documents are packed together.

    Returns:
        The documents in the order of rows, and where in it each row begins, and the end.
    """
    order, firsts = [], [0]
    share = (sizes / room).max(1)
    mixed = shuffled(len(sizes), "records", *key)
    for at in range(0, len(mixed), _GROUP):
        group = mixed[at : at + _GROUP]
        group = group[np.argsort(-share[group], kind="stable")]
        left = np.tile(room.astype(np.int64), (len(group), 1))
        rows: list[list[int]] = []
        for document in group.tolist():
            # One row beyond those in use is always empty.
            gaps = left[: len(rows) + 1] - sizes[document]
            tight = np.where(gaps.min(1) >= 0, gaps.sum(1), np.iinfo(np.int64).max)
            best = int(tight.argmin())
            if best == len(rows):
                rows.append([])
            rows[best].append(document)
            left[best] -= sizes[document]
        order += [document for row in rows for document in row]
        firsts += [len(row) for row in rows]
    return np.array(order, np.int64), np.cumsum(firsts)
