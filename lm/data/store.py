"""The token store: text tokenized once, then read by index from memory-mapped files.

A store holds one split of one source as a stream of documents, `[eot] t0 t1 ...` each,
in the order of the source. A document of several fields is several such texts, one after
the other. The stream is cut into shards of whole documents: `tokens-00000` (uint16, or
uint32 for vocabularies above 65,536) and `starts-00000` (uint64, where in the shard each
text begins). The same text, cleaning and tokenizer
give the same bytes, whatever the number of workers; together they make the name of the
store, so that a store is never used for anything but what it was made of.
"""

import contextlib
import hashlib
import json
import pathlib
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32, Int64, UInt

from lm import config
from lm.config import ConfigError
from lm.data import artifacts, sources, tokenizer, workers
from lm.data.cleaning import Cleaning

FORMAT = 1  # raise it whenever the bytes of a store would change
_SHARD = 1 << 28  # tokens
_BAR = 4 << 20  # bytes of text from which on a progress bar is shown


class Store:
    """A finished store. Its stream is a ring: after the last token comes the first."""

    def __init__(self, path: pathlib.Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.name: str = facts["name"]  # source and split, for messages
        # documents, tokens, bytes of text, and dropped documents: empty, duplicates
        self.counts: dict[str, int] = facts["counts"]
        self.tokens: int = self.counts["tokens"]
        self.eot: int = facts["eot"]
        self.fields: tuple[str, ...] = tuple(facts.get("fields", ("text",)))
        self.token_bytes: Int32[np.ndarray, " vocab"] = np.fromfile(
            path / "token_bytes", np.int32
        )
        shards = range(len(facts["shards"]))
        self._tokens = [_map(path / f"tokens-{i:05}", facts["dtype"]) for i in shards]
        self._starts = [_map(path / f"starts-{i:05}", "uint64") for i in shards]
        # The token that begins each shard, and the end.
        self._first = [0, *np.cumsum(facts["shards"]).tolist()]

    def read(self, start: int, count: int) -> UInt[np.ndarray, " count"]:
        """Returns tokens [start, start + count) of the ring, a view where it can."""
        piece = self._piece(start, count)
        if len(piece) == count:
            return piece
        pieces, left = [piece], count - len(piece)
        while left:
            pieces.append(self._piece(start + count - left, left))
            left -= len(pieces[-1])
        return np.concatenate(pieces)

    def _piece(self, start: int, count: int) -> np.ndarray:
        """The first of these tokens, as many as one shard holds."""
        start %= self.tokens
        shard = bisect_right(self._first, start) - 1
        offset = start - self._first[shard]
        return self._tokens[shard][offset : offset + count]

    def starts(self, start: int, stop: int) -> Int64[np.ndarray, " documents"]:
        """Returns which tokens in [start, stop) begin a text; not over the end."""
        found = [np.empty(0, np.int64)]
        for first, last, starts in zip(
            self._first, self._first[1:], self._starts, strict=False
        ):
            if first < stop and start < last:
                low, high = np.searchsorted(
                    starts, [max(start - first, 0), stop - first]
                )
                found.append(starts[low:high].astype(np.int64) + first)
        return np.concatenate(found)

    def __repr__(self) -> str:
        c = self.counts
        text = (
            f"{self.name}: {c['documents']} documents, {c['tokens']} tokens, "
            f"{c['bytes']} bytes"
        )
        if c["duplicates"] or c["empty"]:
            text += f"; dropped {c['duplicates']} duplicates, {c['empty']} empty"
        return text


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    # A plain array over the map: slices of np.memmap itself cost microseconds.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def obtain(
    source: sources.Source,
    split: str,
    *,
    cleaning: Cleaning,
    coder: tokenizer.Tokenizer,
    holdout: float = 0.01,
    store_dir: str = "",
    processes: int = 0,
) -> Store:
    """Opens the store of a split, building it first where it does not exist.

    Args:
        source: where the text comes from.
        split: one of its splits; "train" or "validation" where it has none of its own.
        cleaning: what is done to the text.
        coder: the tokenizer.
        holdout: fraction of the documents in "validation" where the source has no
            splits.
        store_dir: where stores are kept, local or remote; "" for $LM_CACHE or
            ~/.cache/lm.
        processes: that tokenize; 0 for one a core.

    Raises:
        ConfigError: an unknown split, bad text (named), no text at all, a full or
            read-only disk.
    """
    _known_split(source, split, holdout)
    fraction = None if source.own_splits else holdout
    key = {
        "format": FORMAT,
        "source": source.fingerprint(split),
        "split": split,
        "holdout": fraction,
        "cleaning": config.to_json(cleaning),
        "tokenizer": coder.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{source.spec}-{split}").strip("-")[:60]
    dtype = "uint16" if coder.size <= 1 << 16 else "uint32"
    job = workers.Job(cleaning, coder.files(), split, fraction, dtype)

    def build(directory: pathlib.Path) -> dict[str, Any]:
        coder.token_bytes.tofile(directory / "token_bytes")
        counts, shards = _write(
            directory, job, source.parts(split), source.spec, processes
        )
        if not counts["documents"]:
            raise ConfigError(_nothing(source, split, holdout, counts))
        return {
            "name": f"{source.spec} ({split})",
            "key": key,
            "dtype": job.dtype,
            "eot": coder.eot,
            "fields": source.fields,
            "counts": counts,
            "shards": shards,
        }

    return Store(*artifacts.obtain(store_dir, f"{label}-{digest}", build))


def _known_split(source: sources.Source, split: str, holdout: float) -> None:
    if not source.own_splits and split not in ("train", "validation"):
        raise ConfigError(
            f"data.split={split}: {source.spec} has the splits train and validation "
            f"(data.holdout={holdout} of its documents)"
        )


def _nothing(
    source: sources.Source, split: str, holdout: float, counts: dict[str, int]
) -> str:
    why = f"{counts['empty']} empty documents" if counts["empty"] else "no document"
    fix = "name a source with text"
    if not source.own_splits:
        why += f" in {split!r} (data.holdout={holdout}, by hash of the document)"
        fix += ", cut it into more documents (text:FILE#16k), or change data.holdout"
    return f"data.source={source.spec}: no text, {why}; {fix}"


def _write(
    directory: pathlib.Path, job: workers.Job, parts: Any, title: str, processes: int
) -> tuple[dict[str, int], list[int]]:
    """Writes the shards of a store; returns its counts and the tokens of each shard."""
    counts: dict[str, int] = dict.fromkeys(
        ("documents", "tokens", "bytes", "empty", "duplicates"), 0
    )
    shards: list[int] = []
    seen: set[int] = set()
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(_progress(title, sum(p.size for p in parts)))
        chunks = stack.enter_context(
            contextlib.closing(workers.run(job, parts, processes))
        )
        shard = stack.enter_context(contextlib.ExitStack())
        files: tuple[BinaryIO, BinaryIO] | None = None
        for part, chunk in zip(parts, chunks, strict=True):
            keep = _unseen(chunk.digests, seen) if job.cleaning.duplicates else None
            tokens, lengths, sizes = chunk.tokens, chunk.lengths, chunk.bytes
            if keep is not None and not keep.all():
                tokens = tokens[np.repeat(keep, lengths.sum(1))]
                lengths, sizes = lengths[keep], sizes[keep]
            counts["empty"] += chunk.empty
            counts["duplicates"] += len(chunk.lengths) - len(lengths)
            counts["documents"] += len(lengths)
            counts["tokens"] += len(tokens)
            counts["bytes"] += int(sizes.sum())
            if len(lengths):
                if files is None or shards[-1] >= _SHARD:
                    shard.close()
                    names = [
                        f"{kind}-{len(shards):05}" for kind in ("tokens", "starts")
                    ]
                    opened = [
                        shard.enter_context(open(directory / n, "wb")) for n in names
                    ]
                    files = (opened[0], opened[1])
                    shards.append(0)
                starts = np.cumsum(lengths) - lengths.ravel() + shards[-1]
                files[0].write(tokens.data)
                files[1].write(starts.astype(np.uint64).data)
                shards[-1] += len(tokens)
            advance(part.size)
    return counts, shards


def _unseen(digests: np.ndarray, seen: set[int]) -> np.ndarray:
    """Marks the documents that did not come before, and remembers them."""
    keep = np.ones(len(digests), bool)
    for i, digest in enumerate(digests.tolist()):
        keep[i] = digest not in seen
        seen.add(digest)
    return keep


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    """Shows a bar on standard error if there is much text; yields what moves it."""
    if total < _BAR or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"tokenizing {title}", total=total)
        yield lambda size: bar.advance(task, size)
