"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): keys and values of all heads
are made from one short vector of each token, and that vector is all that decoding keeps.

With a cache no key or value is made: what makes them is absorbed into queries and output, and the
latents themselves are attended to, by all heads (§2.1.2). Heads are split over devices, latents are
whole on each.

Shapes: B batch, T length, S cache length, D embed, N heads, P entries of a head without a position,
R rotated entries, H = P + R, V entries of a value, C latent of keys and values, Q of queries.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn import attend
from lm.nn.blockwise import Mask
from lm.nn.layers import RmsNorm, Side, rotate
from lm.nn.param import einsum, param, weight


class Latent(nnx.Module):
    """Mixes each token with the earlier ones of its own segment, through latents."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        rank: int = 512  # C: entries of a token's keys and values together
        query_rank: int | None = 1536  # Q; None: queries are made from the token itself
        plain_dim: int = 128  # P
        rope_dim: int = 64  # R; one rotated key for all heads
        value_dim: int = 128  # V
        bias: bool = False  # learned shifts of latents and output
        scale: float | None = None  # of the scores; None: (P + R) ** -0.5
        norm_eps: float = 1e-6  # of the latents' norms
        implementation: attend.Implementation = "auto"  # see lm/nn/attend.py
        context: attend.Context = "auto"  # under mesh.seq

        def __post_init__(self) -> None:
            for name in ("rank", "query_rank", "plain_dim", "rope_dim", "value_dim"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ConfigError(
                        f"model.attention.{name}={value}: expected 1 or more"
                    )
            if self.rope_dim % 2:
                raise ConfigError(
                    f"model.attention.rope_dim={self.rope_dim}: expected an even number"
                )

        @property
        def head_dim(self) -> int:
            """Entries of a head's queries and keys."""
            return self.plain_dim + self.rope_dim

        def mask(self, ordered: bool = True) -> Mask:
            """Returns what a query sees, and how scores are formed."""
            return Mask(scale=self.scale or self.head_dim**-0.5, ordered=ordered)

        def case(self, row: attend.Row, head_dim: int) -> attend.Case:
            """Returns what attention over such rows needs."""
            del head_dim
            return row.case(max(self.head_dim, self.value_dim), self.mask())

        def how(self, row: attend.Row, head_dim: int) -> str:
            """Returns in words how attention over such rows is computed."""
            return self.case(row, head_dim).how(self.implementation, self.context)

    def __init__(
        self,
        config: Config,
        dim: int,
        heads: int,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        rope: int = 0,
    ):
        self.config, self.heads, self.rope = config, heads, rope
        c, N, H = config, heads, config.head_dim
        norm = RmsNorm.Config(eps=c.norm_eps)
        of_heads = ("embed", "heads", "head_dim")
        if c.query_rank is None:
            self.query_dnh = param(rngs, (dim, N, H), of_heads, std)
        else:
            shape = (dim, c.query_rank)
            self.query_down_dq = param(rngs, shape, ("embed", "latent"), std)
            self.query_norm = RmsNorm(norm, c.query_rank, "norm", rngs)
            self.query_qnh = param(rngs, (c.query_rank, N, H), of_heads, std)
        # The latent and, behind it, the rotated key.
        self.down_dc = param(rngs, (dim, c.rank + c.rope_dim), ("embed", "latent"), std)
        self.norm = RmsNorm(norm, c.rank, "norm", rngs)
        self.key_cnp = param(rngs, (c.rank, N, c.plain_dim), of_heads, std)
        self.value_cnv = param(rngs, (c.rank, N, c.value_dim), of_heads, std)
        shape = (N, c.value_dim, dim)
        self.out_nvd = param(rngs, shape, ("heads", "head_dim", "embed"), out_std)
        if c.bias:
            if c.query_rank is not None:
                self.query_bias_q = param(rngs, (c.query_rank,), ("norm",), 0.0)
            self.down_bias_c = param(rngs, (c.rank + c.rope_dim,), ("norm",), 0.0)
            self.out_bias_d = param(rngs, (dim,), ("norm",), 0.0)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the mixed tokens, and the cache (latents) with these tokens in it."""
        c, dtype = self.config, x_BTD.dtype
        q_BTNH = self._queries(x_BTD, side)
        latent_BTC = self._latents(x_BTD, side)
        if cache is None:
            y_BTNV = self._whole(q_BTNH, latent_BTC, side)
        else:
            start = (0, side.slot, 0)
            (old,) = cache
            new = lax.dynamic_update_slice(old, latent_BTC.astype(old.dtype), start)
            cache = (new,)
            y_BTNV = self._absorbed(q_BTNH, new.astype(dtype), side)
        out = sharding.spec("batch", "residual", None)
        w_nvd = weight(self.out_nvd, dtype)
        y_BTD = einsum("btnv,nvd->btd", y_BTNV, w_nvd, out)  # reduce over tensor
        if c.bias:
            y_BTD = y_BTD + self.out_bias_d[...].astype(dtype)[None, None]
        return y_BTD, cache

    def _queries(self, x_BTD: Array, side: Side) -> Array:
        """Returns queries, their last R entries rotated."""
        c, dtype = self.config, x_BTD.dtype
        if c.query_rank is None:
            w_dnh = weight(self.query_dnh, dtype)
            q_BTNH = einsum("btd,dnh->btnh", x_BTD, w_dnh)
        else:
            q = einsum("btd,dq->btq", x_BTD, weight(self.query_down_dq, dtype))
            if c.bias:
                q = q + self.query_bias_q[...].astype(dtype)[None, None]
            w_qnh = weight(self.query_qnh, dtype)
            q_BTNH = einsum("btq,qnh->btnh", self.query_norm(q), w_qnh)
        return self._turned(q_BTNH, c.plain_dim, side)

    def _latents(self, x_BTD: Array, side: Side) -> Array:
        """Returns [B, T, C + R]: the normed latent and the rotated key."""
        c, dtype = self.config, x_BTD.dtype
        both = einsum("btd,dc->btc", x_BTD, weight(self.down_dc, dtype))
        if c.bias:
            both = both + self.down_bias_c[...].astype(dtype)[None, None]
        normed = self.norm(both[..., : c.rank])
        both = jnp.concatenate([normed, both[..., c.rank :]], -1)
        return self._turned(both, c.rank, side)

    def _turned(self, x: Array, first: int, side: Side) -> Array:
        if side.rope is None:
            return x
        turned = rotate(x[..., first:], side.rope[self.rope])
        return jnp.concatenate([x[..., :first], turned], -1)

    def _whole(self, q_BTNH: Array, latent_BTC: Array, side: Side) -> Array:
        """Attention with every head's own keys and values, made from the latents."""
        c, dtype = self.config, q_BTNH.dtype
        plain = latent_BTC[..., : c.rank]
        k = einsum("btc,cnp->btnp", plain, weight(self.key_cnp, dtype))
        v = einsum("btc,cnv->btnv", plain, weight(self.value_cnv, dtype))
        over = sharding.spec("batch", "length", "kv_heads", None)
        shape = (*k.shape[:3], c.rope_dim)
        turned = latent_BTC[:, :, None, c.rank :]
        turned = jnp.broadcast_to(turned, shape, out_sharding=over)
        k = jnp.concatenate([k, turned], -1)
        # Kernels want keys and values of one width: zeros fill the narrower.
        width = max(c.head_dim, c.value_dim)
        q, k, v = (_filled(a, width) for a in (q_BTNH[:, :, :, None], k, v))
        y = self._attend(q, k, v, side, side.tokens, c.implementation, side.packed)
        return y[:, :, :, 0, : c.value_dim]

    def _absorbed(self, q_BTNH: Array, cache_BSC: Array, side: Side) -> Array:
        """Attention of all heads to the latents themselves, one shared key each."""
        c, dtype = self.config, q_BTNH.dtype
        w_cnp = weight(self.key_cnp, dtype)
        q = jnp.einsum("btnp,cnp->btnc", q_BTNH[..., : c.plain_dim], w_cnp)
        q = jnp.concatenate([q, q_BTNH[..., c.plain_dim :]], -1)
        # A copy of the key for each device that has heads: what lies there already.
        K = sharding.current().size("kv_heads")
        groups = (*q.shape[:2], K, self.heads // K, q.shape[-1])
        over = sharding.spec("batch", "length", "kv_heads", None, None)
        q = q.reshape(groups, out_sharding=over)
        B, S, _ = cache_BSC.shape
        over = sharding.spec("batch", None, "kv_heads", None)
        k = cache_BSC[:, :, None]
        k = jnp.broadcast_to(k, (B, S, K, k.shape[-1]), out_sharding=over)
        assert side.cached is not None, "a cache comes with the tokens in it"
        y = self._attend(q, k, k, side, side.cached, "auto", True)[..., : c.rank]
        over = sharding.spec("batch", "length", "heads", None)
        y = y.reshape(*y.shape[:2], self.heads, c.rank, out_sharding=over)
        return jnp.einsum("btnc,cnv->btnv", y, weight(self.value_cnv, dtype))

    def _attend(self, q, k, v, side: Side, kv_tokens, implementation, packed) -> Array:
        mask = self.config.mask(ordered=kv_tokens is side.tokens)
        y, _ = attend.attend(
            q, k, v, side.tokens, kv_tokens, mask, implementation, packed, self.config.context
        )  # fmt: skip
        return y


def _filled(x: Array, width: int) -> Array:
    lacks = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lacks)]) if lacks else x


def init_cache(config: Latent.Config, batch: int, length: int, dtype: Any) -> Any:
    """Returns one layer's empty cache: (latents,), [B, S, C + R]."""
    shape = (batch, length, config.rank + config.rope_dim)
    return (jnp.zeros(shape, dtype, out_sharding=sharding.spec("batch", None, None)),)
