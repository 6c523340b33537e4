"""Weights from files onto a mesh and back, by a family's table, one parameter at a time.

Each device's shard is read by itself, from the rows of the mapped files that it needs; going back,
one parameter at a time is gathered on the host. Neither way is the model held twice.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import trees
from lm.config import ConfigError, nearest
from lm.convert.family import Family, Model, Table
from lm.convert.files import Source
from lm.convert.steps import Row
from lm.models import stack
from lm.models.encoder_decoder import ENCODER, EncoderDecoder
from lm.program import STACK, Params, Program

VOCAB = (
    "embed_vd",
    "head_vd",
    "end/bias_v",
    "shift_v",
)  # padded to rows of the vocabulary


@dataclasses.dataclass(frozen=True)
class Place:
    """A row of a table, and where its parameters are: in paths, at an entry or as a whole."""

    row: Row
    paths: tuple[str, ...]
    entry: int | None  # of a stacked parameter; None: it is not stacked


def places(model: Model, table: Table) -> list[Place]:
    """Returns every row of the table with its place in plain parameters (of layers, in order)."""
    found = [Place(r, r.ours, None) for r in table.whole]
    stacks = [(STACK, model.blocks, table.layers)]
    if isinstance(model, EncoderDecoder.Config):
        stacks.append((ENCODER, model.encoder_blocks, table.encoder))
    for name, blocks, rows in stacks:
        for block, layers in stack.entries(blocks).items():
            at = f"{name}/{block}/" if block else f"{name}/"
            for entry, layer in enumerate(layers):
                found += [
                    Place(r, tuple(at + p for p in r.ours), entry) for r in rows[layer]
                ]
    return found


def check(
    family: Family,
    table: Table,
    source: Source,
    shapes: Mapping[str, Sequence[int]],
    every: Sequence[Place],
    vocab: int,
) -> list[str]:
    """Checks names and shapes of all tensors; returns the names of those that are left out.

    Raises:
        ConfigError: a tensor that is missing, unknown, or of another shape.
    """
    wanted = {name: place for place in every for name in place.row.names()}
    names = source.shapes.keys()
    missing = [name for name in wanted if name not in names]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ConfigError(
            f"there is no tensor {missing[0]}{more}{nearest(missing[0], names - wanted.keys())}"
        )
    left = [n for n in names if n not in wanted]
    unknown = [
        n for n in left if not any(fnmatch.fnmatch(n, b) for b in family.buffers)
    ]
    unknown = [n for n in unknown if n not in table.copies]
    if unknown:
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise ConfigError(
            f"unknown tensor {unknown[0]}{more}: a {family.model_type} as config.json describes "
            "it has none of this name"
        )
    for name, place in wanted.items():
        ours = [_plain(shapes[p], p, place, vocab) for p in place.paths]
        expected = place.row.shape(ours)
        if source.shapes[name] != expected:
            raise ConfigError(
                f"{name} has the shape {list(source.shapes[name])}, expected {list(expected)}"
            )
    return left


def _plain(
    shape: Sequence[int], path: str, place: Place, vocab: int
) -> tuple[int, ...]:
    """Returns a parameter's shape without the layers and without padding of the vocabulary."""
    if place.entry is not None:
        return tuple(shape[1:])
    return (vocab, *shape[1:]) if path in VOCAB else tuple(shape)


def read(prog: Program, source: Source, every: Sequence[Place]) -> Params:
    """Returns the parameters, each device's shards read for it alone."""
    by_path: dict[str, dict[int | None, tuple[Row, int]]] = {}
    for place in every:
        for k, path in enumerate(place.paths):
            by_path.setdefault(path, {})[place.entry] = place.row, k
    flat = {}
    for path, shape in prog.shapes.items():
        there = prog.staged and prog.stacked(path)
        order = prog.rows(path).ravel() if there else None
        leaf = _Leaf(source, by_path[path], shape.shape, order)
        where = prog.sharding(prog.specs[path])
        flat[path] = jax.make_array_from_callback(shape.shape, where, leaf.part)
    return trees.nest(flat)


class _Leaf:
    """One parameter in files: any part of it can be asked for."""

    def __init__(
        self,
        source: Source,
        rows: Mapping[int | None, tuple[Row, int]],
        shape: tuple[int, ...],
        order: np.ndarray | None,  # the entry in each row in memory, if another
    ):
        self._source, self._rows, self._shape, self._order = source, rows, shape, order
        self._parts: dict[str, np.ndarray] = {}

    def part(self, index: Any) -> np.ndarray:
        """Returns this part; equal ones, for several devices, are made once."""
        key = str(index)
        if key not in self._parts:
            self._parts[key] = self._make(index)
        return self._parts[key]

    def _make(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*i.indices(n)) for i, n in zip(index, self._shape, strict=True)]
        out = np.zeros([len(r) for r in ranges], np.float32)
        if None in self._rows:
            self._fill(out, *self._rows[None], ranges)
            return out
        for i, at in enumerate(ranges[0]):
            entry = at if self._order is None else int(self._order[at])
            if entry >= 0:
                self._fill(out[i], *self._rows[entry], ranges[1:])
        return out

    def _fill(self, out: np.ndarray, row: Row, k: int, ranges: Sequence[range]) -> None:
        """Writes the part of one row's parameter; what the file lacks (padding) stays 0."""
        names = row.names()
        if not row.experts:
            array = row.to_ours(self._source.tensor(names[0]))[k]
            there = array[tuple(slice(r.start, r.stop) for r in ranges)]
            out[tuple(slice(n) for n in there.shape)] = there
            return
        for i, e in enumerate(ranges[0]):
            array = row.to_ours(self._source.tensor(names[e]))[k]
            out[i] = array[tuple(slice(r.start, r.stop) for r in ranges[1:])]


def sizes(
    prog: Program, every: Sequence[Place], dtypes: Mapping[str, str], usual: str
) -> dict[str, int]:
    """Returns the bytes of each tensor, in the order of `write`."""
    vocab, found = prog.experiment.model.vocab_size, {}
    for place in _in_order(every):
        ours = [_plain(prog.shapes[p].shape, p, place, vocab) for p in place.paths]
        size = math.prod(place.row.shape(ours))
        for name in place.row.names():
            found[name] = size * jnp.dtype(dtypes.get(name, usual)).itemsize
    return found


def write(
    params: Params,
    every: Sequence[Place],
    vocab: int,
    dtypes: Mapping[str, str],
    usual: str,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and value of each tensor.

    Args:
        params: plain ones (layers in their order), on a mesh.
        every: from `places`.
        vocab: true size of the vocabulary.
        dtypes: of tensors, by name.
        usual: the dtype of the others.
    """
    flat = trees.flatten(params)
    held: dict[str, np.ndarray] = {}
    for place in _in_order(every):
        if held.keys() != set(place.paths):
            held = {path: np.asarray(flat[path]) for path in place.paths}
        ours = [
            held[p] if place.entry is None else held[p][place.entry]
            for p in place.paths
        ]
        ours = [a[:vocab] if p in VOCAB else a
                for p, a in zip(place.paths, ours, strict=True)]  # fmt: skip
        names = place.row.names()
        for e, name in enumerate(names):
            mine = [a[e] for a in ours] if place.row.experts else ours
            array = place.row.to_theirs(tuple(mine))
            yield name, array.astype(jnp.dtype(dtypes.get(name, usual)))


def _in_order(every: Sequence[Place]) -> list[Place]:
    """Returns places with those of the same parameters together."""
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place in every:
        groups.setdefault(place.paths, []).append(place)
    return [place for group in groups.values() for place in group]
