"""What turns a tensor as it is stored elsewhere into a parameter, and back.

A `Row` pairs names with names and lists the steps between them; conversion tables are lists of
rows, used in both directions. A step has `ours(arrays)` and its inverse `theirs(arrays)`, written
with views where numpy has them, so that of a file that is mapped only what is used is read.

Letters: D width of the model, N heads, K kv heads, H head dim, F hidden, E experts, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Arrays = tuple[Any, ...]


@runtime_checkable
class Step(Protocol):
    """A bijection between arrays as they are stored and as they are used."""

    def ours(self, arrays: Arrays) -> Arrays: ...

    def theirs(self, arrays: Arrays) -> Arrays: ...


@dataclasses.dataclass(frozen=True)
class Transpose:
    """[out, in] ↔ [in, out], the last two dimensions."""

    def ours(self, arrays: Arrays) -> Arrays:
        return tuple(a.swapaxes(-1, -2) for a in arrays)

    theirs = ours


@dataclasses.dataclass(frozen=True)
class Fold:
    """One dimension ↔ several: `axis` of theirs is `sizes` of ours."""

    axis: int  # 0 or more
    sizes: tuple[int, ...]

    def ours(self, arrays: Arrays) -> Arrays:
        i = self.axis
        return tuple(
            a.reshape(*a.shape[:i], *self.sizes, *a.shape[i + 1 :]) for a in arrays
        )

    def theirs(self, arrays: Arrays) -> Arrays:
        i, n = self.axis, len(self.sizes)
        whole = math.prod(self.sizes)
        return tuple(a.reshape(*a.shape[:i], whole, *a.shape[i + n :]) for a in arrays)


@dataclasses.dataclass(frozen=True)
class Cut:
    """One array ↔ several that lie side by side in it."""

    axis: int  # negative
    sizes: tuple[int, ...]

    def ours(self, arrays: Arrays) -> Arrays:
        (a,) = arrays
        ends = np.cumsum(self.sizes)
        if a.shape[self.axis] != ends[-1]:
            raise ValueError(f"{a.shape[self.axis]} is not {ends[-1]}")
        after = (slice(None),) * (-self.axis - 1)
        return tuple(
            a[(..., slice(e - n, e), *after)]
            for e, n in zip(ends.tolist(), self.sizes, strict=True)
        )

    def theirs(self, arrays: Arrays) -> Arrays:
        return (_numpy(arrays).concatenate(arrays, axis=self.axis),)


@dataclasses.dataclass(frozen=True)
class Deal:
    """One array ↔ `count` whose entries take turns in it."""

    axis: int  # negative
    count: int = 2

    def ours(self, arrays: Arrays) -> Arrays:
        (a,) = arrays
        after = (slice(None),) * (-self.axis - 1)
        turns = (slice(i, None, self.count) for i in range(self.count))
        return tuple(a[(..., turn, *after)] for turn in turns)

    def theirs(self, arrays: Arrays) -> Arrays:
        one = _numpy(arrays).stack(arrays, axis=self.axis)
        i = one.ndim + self.axis - 1
        return (one.reshape(*one.shape[:i], -1, *one.shape[i + 2 :]),)


@dataclasses.dataclass(frozen=True)
class Halves:
    """Rotary pairs side by side ↔ in two halves, in the last `size` entries of an axis."""

    axis: int  # negative
    size: int

    def ours(self, arrays: Arrays) -> Arrays:
        order = np.arange(self.size).reshape(-1, 2).T.ravel()
        return tuple(self._moved(a, order) for a in arrays)

    def theirs(self, arrays: Arrays) -> Arrays:
        order = np.arange(self.size).reshape(2, -1).T.ravel()
        return tuple(self._moved(a, order) for a in arrays)

    def _moved(self, a: Any, order: np.ndarray) -> Any:
        whole = a.shape[self.axis]
        order = np.concatenate(
            [np.arange(whole - self.size), whole - self.size + order]
        )
        return a[(..., order, *(slice(None),) * (-self.axis - 1))]


def _numpy(arrays: Arrays) -> Any:
    return np if isinstance(arrays[0], np.ndarray) else jnp


@dataclasses.dataclass(frozen=True)
class Row:
    """Parameters of ours, and the tensor of theirs that is the same."""

    ours: tuple[str, ...]  # paths; within a layer, or in the model
    theirs: str  # a name; with {e} one for each expert
    steps: tuple[Any, ...] = ()
    experts: int = 0  # with {e}: how many, along the first dimension of ours

    def names(self) -> list[str]:
        """Returns the names of the tensors."""
        if not self.experts:
            return [self.theirs]
        return [self.theirs.replace("{e}", str(e)) for e in range(self.experts)]

    def to_ours(self, array: Any) -> Arrays:
        """Returns the parameters (of one expert) that a tensor holds."""
        arrays: Arrays = (array,)
        for step in self.steps:
            arrays = step.ours(arrays)
        return arrays

    def to_theirs(self, arrays: Arrays) -> Any:
        """Returns the tensor (of one expert) that parameters make."""
        for step in reversed(self.steps):
            arrays = step.theirs(arrays)
        (array,) = arrays
        return array

    def shape(self, ours: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of a tensor whose parameters have these shapes."""
        if self.experts:
            ours = [shape[1:] for shape in ours]
        structs = tuple(jax.ShapeDtypeStruct(s, np.float32) for s in ours)
        return jax.eval_shape(self.to_theirs, structs).shape


def row(
    ours: str | tuple[str, ...], theirs: str, *steps: Step, experts: int = 0
) -> Row:
    """Returns a row of a table."""
    return Row((ours,) if isinstance(ours, str) else ours, theirs, steps, experts)
