"""Classification: the second field of a document names the class of the first.

Shapes: T tokens of `data.length`.
"""

import dataclasses
from typing import Literal

import numpy as np

from lm.batches.records import Limit, Long, Records, lengths
from lm.config import ConfigError
from lm.data.cleaning import Cleaning
from lm.data.packing import Row, padded
from lm.data.store import Store
from lm.data.tokenizer import Tokenizer
from lm.data.words import Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Predict which of some labels a text has."""

    labels: tuple[
        str, ...
    ] = ()  # as the second field spells them; the order is their number
    words: Words = Words()  # what is done to the text before it is tokenized
    # Texts that are longer than a row; ends: the first and the last half of one are kept.
    long: Long | Literal["ends"] = "cut"

    def __post_init__(self) -> None:
        if len(set(self.labels)) < max(len(self.labels), 2):
            raise ConfigError(
                f"objective.labels={self.labels}: name the classes, two different ones or more"
            )


class Texts(Records):
    """Rows of `Classification`, one text a row.

    tokens, segments, positions  int32[T]  end of text, the text, and what the tokenizer puts
                                           after one; segment 1, then 0
    targets                      int32     the number of its label
    weights                      float32   1
    """

    def __init__(
        self,
        objective: Classification,
        store: Store,
        length: int,
        coder: Tokenizer,
        cleaning: Cleaning,
    ) -> None:
        self.length = length
        sizes = lengths(store)[:, :1]
        self._close = np.array(coder.close, np.int32)
        sizes = sizes + len(self._close)
        limits = [Limit("data.length", length)]
        self._ends = objective.long == "ends"
        long = "cut" if objective.long == "ends" else objective.long
        super().__init__(store, sizes, limits, long, together=False)
        self._labels = self._read(objective, coder, cleaning)

    def _read(
        self, objective: Classification, coder: Tokenizer, cleaning: Cleaning
    ) -> list[int]:
        """Looks up the label of every row, so that an unknown one is told at once."""
        spelt = [coder.encode(cleaning.clean(label)) for label in objective.labels]
        numbers: dict[tuple[int, ...], int] = {}
        for n, ids in enumerate(spelt):
            if (other := numbers.setdefault(tuple(ids.tolist()), n)) != n:
                raise ConfigError(
                    f"objective.labels: {objective.labels[other]!r} and "
                    f"{objective.labels[n]!r} are the same tokens to data.tokenizer"
                )
        found = []
        for index in range(len(self)):
            [(_, label)] = self.documents(index)
            number = numbers.get(tuple(label[1:-1].tolist()))
            if number is None:
                raise ConfigError(
                    f"{self.store.name}: a document has the label "
                    f"{coder.decode(label)!r}; objective.labels={objective.labels}"
                )
            found.append(number)
        return found

    def row(self, index: int) -> Row:
        [(text, _)] = self.documents(index)
        text, room = text[:-1], self.length - len(self._close)
        last = room // 2 if self._ends and len(text) > room else 0
        parts = (text[: room - last], text[len(text) - last :], self._close)
        text = np.concatenate(parts)
        real = padded(np.ones(len(text), np.int32), self.length)
        return {
            "tokens": padded(text, self.length),
            "segments": real,
            "positions": np.arange(self.length, dtype=np.int32) * real,
            "targets": np.int32(self._labels[index % len(self)]),
            "weights": np.float32(1),
        }
