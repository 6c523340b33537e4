"""Span corruption: runs of tokens are cut out of the inputs and predicted one after the other.

Raffel et al. 2020, "Exploring the limits of transfer learning", section 3.1.4 (T5).
"""

import dataclasses

import numpy as np

from lm.batches.causal import CrossEntropy
from lm.config import ConfigError
from lm.data.packing import Row, offsets, padded, uniforms
from lm.data.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(CrossEntropy):
    """Predict runs of tokens, each from a sentinel that stands for it in the inputs."""

    rate: float = 0.15  # fraction of tokens that are cut out
    mean_span: float = 3.0  # tokens of a run
    sentinels: int = (
        100  # ids above the tokenizer's, the first one the highest, as in T5
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ConfigError(f"objective.rate={self.rate}: expected 0 < value < 1")
        if self.mean_span < 1 or self.sentinels < 1:
            raise ConfigError(
                f"objective.mean_span={self.mean_span} and sentinels={self.sentinels}: "
                "expected 1 or more"
            )

    @property
    def added(self) -> int:
        """Ids that the objective needs above those of the tokenizer."""
        return self.sentinels

    def counts(self, tokens: int) -> tuple[int, int]:
        """Returns how many of so many tokens are cut out, and in how many runs."""
        if tokens < 2:
            return 0, 0
        noise = min(max(round(tokens * self.rate), 1), tokens - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, tokens - noise)

    def sizes(self, length: int, isolate: bool) -> tuple[int, int]:
        """Returns the tokens of text that go into a row, and its targets, at most.

        Args:
            length: of the inputs.
            isolate: whether documents stay apart. Then a row has `length` tokens of text,
                which always fit; else as many as fill the inputs, as in T5.

        Raises:
            ConfigError: too few sentinels.
        """
        text = length
        if not isolate:
            while (text + 1) - self.counts(text + 1)[0] + self.counts(text + 1)[
                1
            ] <= length:
                text += 1
        noise, runs = self.counts(text)
        if runs > self.sentinels:
            raise ConfigError(
                f"objective.sentinels={self.sentinels}: data.length={length} makes {runs} "
                f"spans; set objective.sentinels={runs} or more"
            )
        return text, noise + (2 * runs if isolate else runs + 1)


def rows(
    objective: SpanCorruption,
    store: Store,
    shape: tuple[int, int],
    isolate: bool,
    seed: int,
    index: int,
    row: Row,
) -> Row:
    """Returns the inputs [T] and the targets [U] of a row of text; `shape` is (T, U).

        inputs, input_segments, input_positions  int32[T]  what an encoder reads
        tokens, targets, segments, positions     int32[U]  what a decoder reads and predicts
        weights                                  float32[U]

    A run never leaves its document: of one that would, the longest part is taken. With
    `isolate` end of text is never cut out. Sentinels count on through the row. The targets of
    a document, where it has any, close with end of text.
    """
    tokens, segments = row["tokens"], row["segments"]
    free = (segments > 0) & ((tokens != store.eot) | (not isolate))
    drawn = uniforms(len(tokens), "spans", seed, index)
    cut, first = _runs(objective, free, segments, drawn)
    sentinels = len(store.token_bytes) + objective.sentinels - np.cumsum(first)
    sentinels = sentinels.astype(np.int32)
    kept = (segments > 0) & (~cut | first)
    hidden, begins, home = tokens[cut], first[cut], segments[cut]
    # Each run with its sentinel before it, and end of text after the last of a document.
    apart = np.ones(len(home), np.int64)
    apart[1:] = home[1:] != home[:-1]
    place = np.arange(len(hidden)) + np.cumsum(begins) + np.cumsum(apart) - 1
    used = int(place[-1]) + 2 if len(place) else 0
    targets, owner = np.full(used, store.eot, np.int32), np.zeros(used, np.int32)
    for at, values, homes in (
        (place, hidden, home),
        (place[begins] - 1, sentinels[first], home[begins]),
    ):
        targets[at], owner[at] = values, homes
    owner = np.maximum.accumulate(owner)
    # What is predicted, one later: so each document begins after an end of text.
    given = np.full(used, store.eot, np.int32)
    given[1:] = targets[:-1]
    T, U = shape
    return {
        "inputs": padded(np.where(first, sentinels, tokens)[kept], T),
        "input_segments": padded(segments[kept], T),
        "input_positions": padded(offsets(segments[kept]), T),
        "tokens": padded(given, U),
        "targets": padded(targets, U),
        "segments": padded(owner, U),
        "positions": padded(offsets(owner), U),
        "weights": padded(np.ones(used, np.float32), U),
        "bytes": store.token_bytes[hidden].sum(dtype=np.int32),
        "index": row["index"],
    }


def _runs(
    objective: SpanCorruption, free: np.ndarray, segments: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the tokens to cut out; returns them and the first of each run, bool[tokens].

    The free tokens in a line are kept and cut by turns: two random compositions, of the
    number kept and of the number cut, into as many parts as there are runs.
    """
    cut, span = np.zeros(len(free), bool), np.zeros(len(free), np.int64)
    places = np.flatnonzero(free)
    noise, runs = objective.counts(len(places))
    if not runs:
        return cut, cut
    kept = len(places) - noise
    parts = np.empty(2 * runs, np.int64)
    parts[0::2] = _composition(kept, runs, drawn[: kept - 1])
    parts[1::2] = _composition(noise, runs, drawn[kept - 1 : len(places) - 2])
    span[places] = np.repeat(np.arange(2 * runs), parts)
    cut = span % 2 == 1
    first = cut.copy()
    first[1:] &= ~(cut[:-1] & (segments[1:] == segments[:-1]))
    if np.count_nonzero(first) > runs:  # some leave their document
        run = np.cumsum(first) - 1
        lengths, of = np.bincount(run[cut]), span[first]
        longest = np.lexsort((-lengths, of))
        good = np.zeros(len(lengths), bool)
        good[longest[np.unique(of[longest], return_index=True)[1]]] = True
        cut, first = cut & good[run], first & good[run]
    return cut, first


def _composition(total: int, parts: int, drawn: np.ndarray) -> np.ndarray:
    """Returns `parts` numbers of 1 or more with this total, each way as likely."""
    ends = np.empty(parts + 1, np.int64)
    ends[0], ends[-1] = 0, total
    if parts > 1:
        ends[1:-1] = np.sort(np.argpartition(drawn, parts - 2)[: parts - 1]) + 1
    return ends[1:] - ends[:-1]
