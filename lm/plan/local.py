"""A device's own part of arrays and of products, from the types of a traced program."""

import math
from typing import Any

import jax

from lm import sharding


def local(aval: Any) -> tuple[int, ...]:
    """Returns the shape of a device's part of an array."""
    shape = getattr(aval, "shape", ())
    where = getattr(aval, "sharding", None)
    if where is None:
        return tuple(shape)
    mesh = where.mesh.shape
    over = [*where.spec, *[None] * (len(shape) - len(where.spec))]
    return tuple(
        -(-n // math.prod(mesh[a] for a in sharding.names(entry)))
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


def product(eqn: Any) -> tuple[float, int]:
    """Returns the operations of a product on a device, and the entries of its own result."""
    if eqn.primitive.name == "conv_general_dilated":
        out, kernel = local(eqn.outvars[0].aval), local(eqn.invars[1].aval)
        spec = eqn.params["dimension_numbers"].rhs_spec
        taps = math.prod(kernel) // kernel[spec[0]]
        return 2.0 * math.prod(out) * taps, math.prod(out)
    x, w = (local(v.aval) for v in eqn.invars[:2])
    if eqn.primitive.name == "ragged_dot":
        return 2.0 * math.prod(x) * w[-1], math.prod(x[:-1]) * w[-1]
    (x_sum, w_sum), (x_batch, w_batch) = eqn.params["dimension_numbers"]
    # Of a dimension that only one side has in shares, each device takes its own of both.
    summed = math.prod(min(x[i], w[j]) for i, j in zip(x_sum, w_sum, strict=True))
    batch = math.prod(min(x[i], w[j]) for i, j in zip(x_batch, w_batch, strict=True))
    rows = math.prod(n for i, n in enumerate(x) if i not in (*x_sum, *x_batch))
    columns = math.prod(n for i, n in enumerate(w) if i not in (*w_sum, *w_batch))
    return 2.0 * batch * rows * columns * summed, batch * rows * columns


def attention(eqn: Any, kernel: str) -> float:
    """Operations of cuDNN's attention: two products forward, five backward; half if causal."""
    q, k = (local(v.aval) for v in eqn.invars[:2])  # [B, T, N, H], [B, S, K, H]
    products = 5 if "bwd" in kernel else 2
    mask = str(eqn.params.get("mask_type", kernel))
    seen = 0.5 if "CAUSAL" in mask.upper() else 1.0
    return 2.0 * products * math.prod(q) * k[-3] * seen
