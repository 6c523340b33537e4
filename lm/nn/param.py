"""Parameters with logical axes, and the one way to use them in a product.

A parameter is an `nnx.Param` whose metadata `axes` names its dimensions; its sharding follows from
`sharding.storage`. `weight` returns it cast and gathered for use; `einsum` is `jnp.einsum` with a
backward that XLA's CPU backend runs well.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from lm import sharding


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], std: float | None = None
) -> nnx.Param:
    """Returns a new fp32 parameter, born sharded.

    Args:
        rngs: its stream `params` gives the key.
        shape: size of each dimension.
        axes: logical axis of each dimension, see `sharding.Rules`.
        std: standard deviation of a normal distribution; 0 gives zeros, None ones.

    Raises:
        ConfigError: a dimension that its mesh axes do not divide.
    """
    sizes = ", ".join(f"{a} {n}" for a, n in zip(axes, shape, strict=True))
    partition = sharding.storage(f"parameter [{sizes}]", shape, axes)
    if std:
        init = jax.nn.initializers.normal(std)
        value = init(rngs.params(), tuple(shape), jnp.float32, out_sharding=partition)
    else:
        value = jnp.full(shape, float(std is None), jnp.float32, out_sharding=partition)
    return nnx.Param(value, axes=tuple(axes))


def weight(p: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """Returns the parameter in `dtype`, gathered over the axes it is only stored over (ZeRO-3).

    The cast comes first, so that the gather moves bytes of `dtype`; its transpose, in the backward
    pass, is the reduce-scatter of the gradient.
    """
    value = p[...].astype(dtype)
    stored = sharding.storage("weight", value.shape, p.axes)
    used = sharding.gathered(stored)
    if (
        "kv_heads" in p.axes
    ):  # too few heads to split: `storage` moved the axes to `embed`
        used = sharding.gathered(P(*_unmoved(p.axes, value.shape)))
    return reshard(value, used)  # all-gather over fsdp


def stored(p: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """Returns the parameter in `dtype` as it is stored: to be joined with others, then gathered.

    A gather of what the product takes has for transpose one reduce-scatter. Of parameters that
    are gathered first and joined then, XLA for GPUs reduces the whole gradient and slices it.
    """
    value = p[...].astype(dtype)
    # Already there, but for sampling with a pipeline: then a gather from the stages.
    return reshard(value, sharding.storage("weight", value.shape, p.axes))


def gather(w: jax.Array) -> jax.Array:
    """Returns a weight made of `stored` ones gathered over the axes it is only stored over."""
    partition = jax.typeof(w).sharding.spec
    return reshard(w, sharding.gathered(partition))  # all-gather over fsdp


def _unmoved(
    axes: Sequence[str], shape: Sequence[int]
) -> list[str | tuple[str, ...] | None]:
    layout = sharding.current()
    fits = all(
        a != "kv_heads" or n % layout.size(a) == 0
        for a, n in zip(axes, shape, strict=True)
    )
    return list(sharding.spec(*(a if a != "kv_heads" or fits else None for a in axes)))


def rows(
    p: nnx.Param, dtype: jnp.dtype, ids: jax.Array, out: P, tied: bool
) -> jax.Array:
    """Returns `weight(p, dtype)[ids]`, sharded as `out`.

    Of a `tied` weight, which the head uses too, the gradient adds up in fp32 like the head's, so
    that XLA adds the two and reduces them over devices once. Not where devices store shares: the
    head's gradient is in its shares long before this one is known.
    """
    partition = jax.typeof(p[...]).sharding.spec
    if not tied or sharding.gathered(partition) != partition:
        return weight(p, dtype).at[ids].get(out_sharding=out)

    @jax.custom_vjp
    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table.astype(dtype).at[ids].get(out_sharding=out)

    def forward(table: jax.Array, ids: jax.Array) -> Any:
        return look_up(table, ids), (table, ids)

    def backward(saved: Any, g: jax.Array) -> Any:
        table, ids = saved
        _, vjp = jax.vjp(lambda t: t.at[ids].get(out_sharding=out), table)
        return *vjp(g.astype(table.dtype)), None

    look_up.defvjp(forward, backward)
    return look_up(p[...], ids)


def einsum(
    subscripts: str, x: jax.Array, w: jax.Array, out: P | None = None
) -> jax.Array:
    """Returns `jnp.einsum(subscripts, x, w, out_sharding=out)` of activations and a weight.

    The last axes of x are contracted with the first of w. On CPU the backward stands behind an
    optimization barrier: there XLA fuses elementwise work and transposes into the operands of the
    weight gradient's product, which then misses the fast matrix routine; so do products of more
    than two axes, which one device flattens. Accelerators want that fusion and get neither.

    Of a sum that goes to shares (sequence parallelism) the gradient is gathered first: left to
    the two products that need it, each of a pipeline's stages gathers it for both of them.
    """
    layout = sharding.current()
    gathered = _gathered(out, layout.axes("mlp"))
    if layout.platform != "cpu" and gathered is None:
        return jnp.einsum(subscripts, x, w, out_sharding=out)
    if layout.platform != "cpu" or layout.mesh.size > 1:
        how = _How(subscripts, out, gathered, layout.platform == "cpu")
        return cast("jax.Array", _einsum(how, x, w))
    left, right = subscripts.split("->")[0].split(",")
    shared = sum(letter in left for letter in right)
    lead, rest = x.shape[: x.ndim - shared], w.shape[shared:]
    x_MC, w_CN = x.reshape(math.prod(lead), -1), w.reshape(-1, math.prod(rest))
    y_MN = cast("jax.Array", _einsum(_How("mc,cn->mn", None, None, True), x_MC, w_CN))
    return y_MN.reshape(*lead, *rest)


def _gathered(spec: P | None, axes: tuple[str, ...]) -> P | None:
    """Returns the spec without these mesh axes, None if it has none of them."""
    entries = [sharding.names(entry) for entry in spec or ()]
    if not any(a in axes for entry in entries for a in entry):
        return None
    kept = [tuple(a for a in entry if a not in axes) for entry in entries]
    return P(*(entry or None for entry in kept))


class _How(NamedTuple):
    subscripts: str
    out: P | None
    gathered: P | None  # how the result's gradient is sharded first; None: as it comes
    barrier: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(how: _How, x: jax.Array, w: jax.Array) -> Any:
    return jnp.einsum(how.subscripts, x, w, out_sharding=how.out)


def _einsum_fwd(how, x, w):
    return _einsum(how, x, w), (x, w)


def _einsum_bwd(how, saved, g):
    x, w = saved
    if how.barrier:
        x, w, g = lax.optimization_barrier((x, w, g))
    out = how.out
    if how.gathered is not None:
        out = how.gathered
        g = reshard(g, out)
    _, vjp = jax.vjp(
        lambda x, w: jnp.einsum(how.subscripts, x, w, out_sharding=out), x, w
    )
    return vjp(g)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def residual_std(layers: int, std: float = 0.02) -> float:
    """Returns the std of projections into the residual stream of `layers` blocks (GPT-2 §2.3)."""
    return std / math.sqrt(2 * layers)
