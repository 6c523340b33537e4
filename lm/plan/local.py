"""A device's own part of arrays and of products, from the types of a traced program."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from lm import sharding

LANES = (
    128  # entries of the tiles that a TPU stores arrays in, along their last dimension
)


def local(aval: Any) -> tuple[int, ...]:
    """Returns the shape of a device's part of an array."""
    shape = tuple(getattr(aval, "shape", ()))
    where = getattr(aval, "sharding", None)
    return shape if where is None else _part(shape, where.spec, where.mesh)


@functools.lru_cache(maxsize=2**16)
def _part(shape: tuple[int, ...], spec: Any, mesh: Any) -> tuple[int, ...]:
    sizes = mesh.shape
    over = [*spec, *[None] * (len(shape) - len(spec))]
    return tuple(
        -(-n // math.prod(sizes[a] for a in sharding.names(entry)))
        for n, entry in zip(shape, over, strict=True)
    )


def size(aval: Any) -> int:
    """Returns the bytes of a device's part of an array; 0 in a host's memory."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or dtype == jax.dtypes.float0:
        return 0
    if getattr(aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    return math.prod(local(aval)) * dtype.itemsize


def tiled(aval: Any) -> int:
    """Returns the bytes of an array for a TPU's kernel: its last dimension fills whole lanes."""
    last = (local(aval) or (1,))[-1]
    return size(aval) // last * -(-last // LANES) * LANES if last else 0


@dataclasses.dataclass(frozen=True)
class Product:
    """A product on a device."""

    flops: float  # a multiply-add is two
    entries: int  # of its result, before it is reduced to shares
    gathered: int  # bytes of operands that are gathered for it


def product(eqn: Any) -> Product:
    """Returns what a device does of a product.

    Each mesh axis splits the work once. Where it would split both operands, but not along one
    dimension that they share, XLA gathers one: that whose dimension the result does not have, or
    does not have split.
    """
    x, w, out = (v.aval for v in (*eqn.invars[:2], *eqn.outvars))
    if eqn.primitive.name == "conv_general_dilated":
        taps = (
            math.prod(local(w)) // local(w)[eqn.params["dimension_numbers"].rhs_spec[0]]
        )
        return Product(2.0 * math.prod(local(out)) * taps, math.prod(local(out)), 0)
    if eqn.primitive.name.startswith("ragged_dot"):
        return _ragged(eqn)
    (x_sum, w_sum), (x_batch, w_batch) = eqn.params["dimension_numbers"]
    x_axes, w_axes, out_axes = (_axes(a) for a in (x, w, out))
    devices = _mesh(x)
    summed = math.prod(x.shape[i] for i in x_sum)
    flops = 2.0 * math.prod(out.shape) * summed
    shared = {*zip(x_sum, w_sum, strict=True), *zip(x_batch, w_batch, strict=True)}
    twice = {
        a for a in x_axes.keys() & w_axes.keys() if (x_axes[a], w_axes[a]) not in shared
    }
    lost = (
        [a for a in twice if x_axes[a] in x_sum],
        [a for a in twice if w_axes[a] in w_sum],
    )
    for a in twice.difference(*lost):  # the result has one of both
        first = [i for i in range(len(x.shape)) if i not in (*x_sum, *x_batch)]
        of_x = a in out_axes and out_axes[a] == len(x_batch) + first.index(x_axes[a])
        lost[of_x].append(a)
    gathered = sum(
        size(operand) * math.prod(devices[a] for a in axes)
        for operand, axes in zip((x, w), lost, strict=True)
        if axes
    )
    used = x_axes.keys() | w_axes.keys()
    kept = {a for a, i in x_axes.items() if i not in x_sum}
    kept |= {a for a, i in w_axes.items() if i not in w_sum}
    return Product(
        flops / math.prod(devices[a] for a in used),
        math.prod(out.shape) // math.prod(devices[a] for a in kept),
        gathered,
    )


def _ragged(eqn: Any) -> Product:
    """Rows in groups, each with a matrix: [m, k] x [g, k, n] -> [m, n], or from the two others."""
    x, out = local(eqn.invars[0].aval), local(eqn.outvars[0].aval)
    return Product(2.0 * math.prod(x) * out[-1], math.prod(out), 0)


def _mesh(aval: Any) -> Mapping[str, int]:
    where = getattr(aval, "sharding", None)
    return {} if where is None else where.mesh.shape


def _axes(aval: Any) -> dict[str, int]:
    """Which dimension each mesh axis splits."""
    where = getattr(aval, "sharding", None)
    spec = () if where is None else where.spec
    return {a: i for i, entry in enumerate(spec) for a in sharding.names(entry)}


def attention(eqn: Any, kernel: str) -> float:
    """Operations of cuDNN's attention: two products forward, five backward; half if causal."""
    q, k = (local(v.aval) for v in eqn.invars[:2])  # [B, T, N, H], [B, S, K, H]
    products = 5 if "bwd" in kernel else 2
    mask = str(eqn.params.get("mask_type", kernel))
    seen = 0.5 if "CAUSAL" in mask.upper() else 1.0
    return 2.0 * products * math.prod(q) * k[-3] * seen
