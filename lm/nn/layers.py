"""Norms, positions, dropout. Shapes: B batch, T length, D embed, N heads, H head dim."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from lm import sharding
from lm.config import ConfigError
from lm.nn.blockwise import Tokens
from lm.nn.param import param


class RmsNorm(nnx.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), in fp32."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        eps: float = 1e-6  # added to the mean square
        offset: float = (
            0.0  # added to the learned scale (Gemma: 1, its scales are around 0)
        )

        def __post_init__(self) -> None:
            if self.offset not in (0.0, 1.0):
                raise ConfigError(f"model.norm.offset={self.offset}: expected 0 or 1")

    def __init__(self, config: Config, dim: int, axis: str, rngs: nnx.Rngs):
        self.eps, self.offset = config.eps, config.offset
        std = 0.0 if config.offset else None
        self.scale_d = param(rngs, (dim,), (axis,), std)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale_d = self.scale_d[...]
        return normalize(
            False, self.eps, x, scale_d + self.offset if self.offset else scale_d
        )


class LayerNorm(nnx.Module):
    """Layer norm over the last dimension (Ba et al. 2016), in fp32."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        eps: float = 1e-5  # added to the variance
        bias: bool = True  # a learned shift besides the learned scale

    def __init__(self, config: Config, dim: int, axis: str, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale_d = param(rngs, (dim,), (axis,))
        self.bias_d = param(rngs, (dim,), (axis,), std=0.0) if config.bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = normalize(True, self.eps, x, self.scale_d[...])
        return (
            y if self.bias_d is None else y + _like(self.bias_d[...].astype(y.dtype), y)
        )


def normalize(center: bool, eps: float, x: Array, scale_D: Array) -> Array:
    """Returns x over the root of its mean square, times the scale; centered first or not.

    Its backward keeps one number a row (two if centered) instead of what autodiff would.
    """
    return cast("Array", _normalize(center, eps, x, _like(scale_D, x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(center, eps, x, scale):
    return _normalize_fwd(center, eps, x, scale)[0]


def _normalize_fwd(center, eps, x, scale):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True) if center else None
    d = x32 - mean if center else x32
    inverse = jax.lax.rsqrt(jnp.mean(d * d, -1, keepdims=True) + eps)
    return (d * inverse * scale).astype(x.dtype), (x, mean, inverse, scale)


def _normalize_bwd(center, eps, saved, g):
    x, mean, inverse, scale = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    h = (x32 - mean if center else x32) * inverse
    s = g32 * scale
    dx = s - h * jnp.mean(s * h, -1, keepdims=True)
    if center:
        dx = dx - s.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return (dx * inverse).astype(x.dtype), jnp.sum(g32 * h, rows, keepdims=True)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)

Norm = RmsNorm.Config | LayerNorm.Config


def make_norm(config: Norm, dim: int, axis: str, rngs: nnx.Rngs) -> RmsNorm | LayerNorm:
    """Returns the norm that `config` describes over vectors of `dim` entries."""
    if isinstance(config, RmsNorm.Config):
        return RmsNorm(config, dim, axis, rngs)
    return LayerNorm(config, dim, axis, rngs)


def _like(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale.reshape((1,) * (x.ndim - 1) + scale.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned vector for each position, added to the embedding."""

    length: int = 1024  # positions there are vectors for, tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal:
    """Sines and cosines of each position, added to the embedding (Vaswani et al. 2017, 3.5)."""

    base: float = 10_000.0  # wavelengths run from 2 pi to 2 pi base positions
    halves: bool = False  # all sines before all cosines; False: they take turns


def sinusoids(
    config: Sinusoidal, dim: int, positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Returns the vectors of positions in fp32: sines at even places, cosines at odd ones.

    With `halves` the even places come first, and the odd ones after them.
    """
    place = np.arange(dim)
    if config.halves:
        place = np.concatenate([place[::2], place[1::2]])
    plane = jnp.asarray(place // 2 * 2, jnp.float32)
    frequency = config.base ** (-plane / dim)
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency[None, None]
    even = (place % 2 == 0)[None, None]
    return jnp.where(even, jnp.sin(angle), jnp.cos(angle))


def rotate(
    x: Float[Array, "B T *N H"], tables: tuple[Array, Array]
) -> Float[Array, "B T *N H"]:
    """Returns x with each pair (h, h + H/2) rotated by its position's angle, computed in fp32."""
    shape = (*x.shape[:2], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = (t.reshape(shape) for t in tables)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Source:
    """The rows of another stack that the blocks of this one look at, segment by segment."""

    x_BSD: Any  # what that stack returned; None where a cache has its keys and values
    tokens: Tokens  # their positions and segments


jax.tree_util.register_dataclass(Source, ["x_BSD", "tokens"], [])


@dataclasses.dataclass(frozen=True)
class Side:
    """What every block of a stack gets besides the residual stream; travels with its rows."""

    tokens: Tokens  # positions and segments of the rows
    rope: Any = None  # (cos, sin) of `rope_tables`, for each kind of position
    bias: Any = None  # of the scores of a row, from `relative.scores`
    source: Source | None = None  # what cross-attention looks at
    keys_BT: Any = None  # from `dropout_keys`; None turns dropout off
    slot: Any = None  # int32[]: where in the cache these tokens go
    cached: Tokens | None = (
        None  # positions and segments of the cache, these tokens included
    )
    packed: bool = (
        True  # rows may hold several segments, or positions that are not 0, 1, 2, …
    )


jax.tree_util.register_dataclass(
    Side,
    ["tokens", "rope", "bias", "source", "keys_BT", "slot", "cached"],
    ["packed"],
)


def dropout_keys(seed: int, step: Int[Array, ""], index_B: Array, length: int) -> Array:
    """Returns a key for each example and position, [B, T].

    Folded from (seed, step, global example index, place in the row), so that what is dropped
    depends on no microbatch, mesh or order of layers' execution. Keys stand in the order that
    tokens have on this mesh.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    example_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
    over_t = jax.vmap(jax.random.fold_in, (None, 0))
    order_T = sharding.order(length, sharding.current().size("length"))
    place_T = jax.sharding.reshard(
        jnp.asarray(order_T, jnp.uint32), sharding.spec("length")
    )
    return jax.vmap(over_t, (0, None))(example_B, place_T)


def dropout(
    x_BTD: Float[Array, "B T D"],
    rate: float,
    keys_BT: Any,
    site: Integer[Array, ""] | int,
) -> Float[Array, "B T D"]:
    """Returns x with entries zeroed with probability `rate`, the others scaled by 1/(1-rate).

    Args:
        x_BTD: activations.
        rate: 0 turns it off.
        keys_BT: from `dropout_keys`, or None (evaluation): x itself.
        site: a number of its own for each place in the model.
    """
    if keys_BT is None or not rate:
        return x_BTD

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(
            jax.random.fold_in(key, site), 1 - rate, x_BTD.shape[-1:]
        )

    keys_BT = jax.sharding.reshard(keys_BT, sharding.spec("batch", "residual"))
    return jnp.where(jax.vmap(jax.vmap(keep))(keys_BT), x_BTD / (1 - rate), 0)
