"""From the text that a `Data` config names to batches on the devices.

    coder = loader.tokenizer(data, vocab_size)
    stores = loader.stores(data, coder)
    dataset = loader.examples(data, stores, seed)
    rows = functools.partial(loader.local_rows, sharding)
    for batch in loader.batches(dataset, sizes=batch_size, rows=rows):
        batch = loader.to_devices(batch, sharding)

Example i is a pure function of (seed, i), and the batch of a step is a range of
examples: a run goes on from the index of the next unread example alone, on any number
of processes, each of which reads only its rows.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import grain
import jax
import numpy as np
from jaxtyping import Int

from lm import config
from lm.config import ConfigError
from lm.data import artifacts, packing, sources, store, workers
from lm.data import tokenizer as tokenizers
from lm.data.cleaning import Cleaning
from lm.data.pretrained import HuggingFace
from lm.data.store import Store
from lm.data.tokenizer import Bytes, SentencePiece, Tokenizer
from lm.data.words import Prepared, Words
from lm.sharding import names, order

Batch: TypeAlias = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which text, how it becomes tokens, and how tokens become examples."""

    source: tuple[
        str, ...
    ]  # tfds:NAME[/CONFIG][#FIELD], text:GLOB, jsonl:GLOB#FIELD[+FIELD]
    weights: tuple[float, ...] = ()  # of the sources, in examples; () goes by size
    split: str = "train"
    length: int = 1024  # tokens of an example
    packing: Literal["windows", "documents"] = "windows"
    isolate: bool = True  # attention stays in a document; False: a row is one segment
    tokenizer: Bytes | SentencePiece | HuggingFace = SentencePiece()
    cleaning: Cleaning = Cleaning()
    holdout: float = 0.01  # fraction of text and jsonl documents in "validation"
    tfds_dir: str = ""  # where TFDS keeps prepared data sets; "" for its default
    store_dir: str = ""  # for stores, local or remote; "" for $LM_CACHE or ~/.cache/lm
    workers: int = 0  # processes that tokenize; 0 for one a core
    threads: int = 2  # that make batches
    prefetch: int = 8  # batches made ahead

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("data.source is empty: name at least one source")
        if self.weights and len(self.weights) != len(self.source):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers for "
                f"{len(self.source)} sources"
            )
        if any(w <= 0 for w in self.weights):
            raise ConfigError(
                f"data.weights={self.weights}: every weight must be above 0"
            )
        if self.length < 1:
            raise ConfigError(f"data.length={self.length} must be at least 1")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"data.holdout={self.holdout} is not in [0, 1)")
        for name in ("workers", "threads", "prefetch"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)} must not be negative"
                )


def _found(data: Data, words: Words | None) -> list[sources.Source]:
    """Returns the sources of `data`, with their words changed where that is asked for."""
    found = [sources.find(spec, data.tfds_dir) for spec in data.source]
    if words is None or words == Words():
        return found
    return [Prepared(source, words) for source in found]


def tokenizer(data: Data, vocab_size: int, words: Words | None = None) -> Tokenizer:
    """Returns the tokenizer of `data`, trained once and then kept beside the stores.

    Raises:
        ConfigError: a vocabulary that the text or the loaded model does not have.
    """
    chosen = data.tokenizer
    if not isinstance(chosen, SentencePiece) or chosen.path:
        coder = tokenizers.load(chosen)
        tokenizers.sizes_agree(coder, vocab_size)
        return coder
    found = _found(data, words)
    key = {
        "sources": [source.fingerprint(data.split) for source in found],
        "split": data.split,
        "holdout": data.holdout,
        "cleaning": config.to_json(data.cleaning),
        "tokenizer": config.to_json(chosen),
        "vocab_size": vocab_size,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def build(directory: pathlib.Path) -> dict[str, Any]:
        trained = tokenizers.train(chosen, vocab_size, _sample(data, chosen, found))
        for name, content in trained.files().items():
            (directory / name).write_bytes(content)
        return {"key": key}

    directory, _ = artifacts.obtain(data.store_dir, f"tokenizer-{digest}", build)
    return tokenizers.from_files(
        {
            p.name: p.read_bytes()
            for p in directory.iterdir()
            if p.name != artifacts.MANIFEST
        }
    )


def _sample(
    data: Data, chosen: SentencePiece, found: Sequence[sources.Source]
) -> Iterator[str]:
    """Yields at most `sample_bytes` of text, from all over every source."""
    parts = [source.parts(data.split) for source in found]
    sizes = [sum(part.size for part in some) for some in parts]
    scale = chosen.sample_bytes / max(sum(sizes), 1)
    for number, (source, some) in enumerate(zip(found, parts, strict=True)):
        job = workers.Job(
            cleaning=data.cleaning,
            files={},
            split=data.split,
            holdout=None if source.own_splits else data.holdout,
            dtype="",
        )
        left = sizes[number] * scale
        # A part gives no more than its share, so that the sample is not all from a few
        # parts.
        share = left if scale >= 1 else max(2 * left / max(len(some), 1), 1 << 20)
        for i in packing.shuffled(len(some), "sample", chosen.seed, number):
            taken = 0.0
            for texts, _ in job.documents(some[i]):
                text = "\n".join(texts)
                text = text[: int(min(left, share - taken)) + 1]
                yield text
                taken += len(text.encode())
                left -= len(text.encode())
                if taken >= share or left <= 0:
                    break
            if left <= 0:
                break


def stores(
    data: Data, coder: Tokenizer, split: str = "", words: Words | None = None
) -> list[Store]:
    """Returns the store of every source of `data`, building those that do not exist.

    Args:
        data: its `source`, `cleaning`, `holdout` and directories say what and where.
        coder: the tokenizer.
        split: of each source; "" for `data.split`.
        words: what is done to the words of the first field.
    """
    return [
        store.obtain(
            source,
            split or data.split,
            cleaning=data.cleaning,
            coder=coder,
            holdout=data.holdout,
            store_dir=data.store_dir,
            processes=data.workers,
        )
        for source in _found(data, words)
    ]


def examples(data: Data, parts: Sequence[Store], seed: int) -> grain.MapDataset:
    """Returns the endless training examples: rows of `packing` with an `index`."""

    def rows(part: Store, own: int) -> Any:
        if data.packing == "windows":
            return packing.Windows(part, data.length, own).shuffle(own)
        return packing.Packed(part, data.length, own)

    made = mixture(data, parts, seed, rows)
    return made if data.isolate else made.map(_joined)


def mixture(
    data: Data,
    parts: Sequence[Store],
    seed: int,
    make: Callable[[Store, int], Any],
) -> grain.MapDataset:
    """Returns the endless rows that `make` makes of each store and a seed of its own.

    Each source is shuffled anew every epoch of its own. The mixture interleaves the
    sources by index, evenly, to 1 % of the smallest weight. Each row gets its `index`.
    """
    rows = [
        make(part, packing.hashed("rows", seed, k, bits=32))
        for k, part in enumerate(parts)
    ]
    mixed = rows[0].repeat()
    if len(rows) > 1:
        weights = data.weights or [len(r) for r in rows]
        mixed = grain.MapDataset.mix([r.repeat() for r in rows], weights)
    return mixed.map_with_index(numbered)


def evaluation(data: Data, part: Store, stride: int | None = None) -> grain.MapDataset:
    """Returns the finite examples that score every token of a store exactly once.

    Args:
        data: its `length` and `isolate` are those of the examples.
        part: the store.
        stride: targets that an example scores, its last ones; None for all.
    """
    rows = packing.Evaluation(part, data.length, stride).map_with_index(numbered)
    return rows if data.isolate else rows.map(_joined)


def numbered(index: int, row: packing.Row) -> packing.Row:
    """Returns the row with its index, modulo 2**32."""
    return {**row, "index": np.uint32(index & 0xFFFFFFFF)}


def _joined(row: packing.Row) -> packing.Row:
    segments = np.minimum(row["segments"], 1)
    return {
        **row,
        "segments": segments,
        "positions": np.arange(len(segments), dtype=np.int32),
    }


def batches(
    dataset: grain.MapDataset,
    *,
    sizes: int | Callable[[int], int],
    rows: Callable[[int], np.ndarray] | None = None,
    start: int = 0,
    step: int = 0,
    threads: int = 2,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Iterates over this process's rows of the batches, made ahead by Grain's threads.

    A finite dataset ends with a batch filled up by rows of zeros: weight 0, segment 0.

    Args:
        dataset: of dicts of arrays.
        sizes: rows of the global batch, or a function of the step.
        rows: which of them this process needs, given the size (`local_rows`); None for
            all.
        start: index of the first example.
        step: number of the first step.
        threads: that make batches.
        prefetch: batches made ahead.
    """
    made = _Batches(dataset, sizes, rows or np.arange, start, step)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(made.to_iter_dataset(options))


class _Batches(grain.MapDataset):
    """Element k is the batch of step `step + k`."""

    def __init__(
        self,
        dataset: grain.MapDataset,
        sizes: int | Callable[[int], int],
        rows: Callable[[int], np.ndarray],
        start: int,
        step: int,
    ) -> None:
        super().__init__()
        self._dataset: Any = dataset
        self._sizes = sizes if callable(sizes) else lambda _: sizes
        self._rows = rows
        self._step = step
        self._firsts = [start]  # first example of each batch, as far as asked for
        self._lock = threading.Lock()
        self._end = len(dataset)
        self._length = sys.maxsize
        if self._end < sys.maxsize:
            self._length = 0
            while self._first(self._length) < self._end:
                self._length += 1

    def __len__(self) -> int:
        return self._length

    def _first(self, k: int) -> int:
        with self._lock:
            while len(self._firsts) <= k:
                size = self._sizes(self._step + len(self._firsts) - 1)
                self._firsts.append(self._firsts[-1] + size)
            return self._firsts[k]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        first = self._first(index)
        indices = self._rows(self._sizes(self._step + index)) + first
        parts = [self._dataset[i] for i in indices.tolist() if i < self._end]
        blank = len(indices) - len(parts)
        if blank:
            zeros = {k: np.zeros_like(v) for k, v in self._dataset[0].items()}
            parts += [zeros] * blank
        # np.array is three times as fast as np.stack here.
        return {name: np.array([part[name] for part in parts]) for name in parts[0]}


def local_rows(
    sharding: jax.sharding.NamedSharding, size: int
) -> Int[np.ndarray, " local"]:
    """Returns which of `size` rows this process's devices hold, sorted.

    Args:
        sharding: of a [batch, length] array.
        size: rows of the global batch.
    """
    shards = _shards(sharding, 0)
    if size % shards:
        raise ConfigError(
            f"a batch of {size} rows is not divisible by the {shards} shards of "
            f"{sharding.spec[0]}; use a multiple of {shards}"
        )
    held = _first_axes(sharding, 1).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def to_devices(
    batch: Batch, sharding: jax.sharding.NamedSharding
) -> dict[str, jax.Array]:
    """Forms the global arrays of a batch of which every process read its `local_rows`.

    Where devices split the length, the tokens of a row stand in the order of
    `lm.sharding.order`.

    Args:
        batch: arrays whose axis 0 is this process's rows and whose axis 1, if any, is
            the length.
        sharding: of a [batch, length] array, over any mesh; arrays of one axis use its
            first.
    """
    shards = _shards(sharding, 0)
    here = len(local_rows(sharding, shards))  # shards that this process holds
    size = len(next(iter(batch.values()))) // here * shards
    rows = local_rows(sharding, size)

    def place(array: np.ndarray) -> jax.Array:
        if array.ndim > 1:
            array = _ordered(array, _shards(sharding, 1))

        def piece(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, begin))
            return array[(slice(first, first + end - begin), *index[1:])]

        shape = (size, *array.shape[1:])
        return jax.make_array_from_callback(
            shape, _first_axes(sharding, array.ndim), piece
        )

    return {name: place(array) for name, array in batch.items()}


def _ordered(array: np.ndarray, shards: int) -> np.ndarray:
    return array if shards == 1 else array[:, order(array.shape[1], shards)]


def _shards(sharding: jax.sharding.NamedSharding, axis: int) -> int:
    """Into how many shards an axis of a batch is split."""
    axes = sharding.spec[axis] if len(sharding.spec) > axis else None
    return math.prod(sharding.mesh.shape[name] for name in names(axes))


def _first_axes(
    sharding: jax.sharding.NamedSharding, rank: int
) -> jax.sharding.NamedSharding:
    """The sharding of an array that has only the first `rank` axes of a batch."""
    spec = jax.sharding.PartitionSpec(*sharding.spec[:rank])
    return jax.sharding.NamedSharding(sharding.mesh, spec)
