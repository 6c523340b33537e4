"""Multi-head attention with grouped kv heads (Vaswani et al. 2017; Ainslie et al. 2023).

Shapes: B batch, T length, S cache length, D embed, N query heads, K kv heads, G = N / K, H head
dim. Query heads are kept in groups of their kv head, `[B, T, K, G, H]`, so that one mesh axis
splits both. With fewer kv heads than devices along it, each kv head is repeated just often enough.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn import attend
from lm.nn.blockwise import Mask
from lm.nn.layers import RmsNorm, Side, rotate
from lm.nn.param import einsum, gather, param, stored, weight


class Attention(nnx.Module):
    """Mixes each token with those of its own segment, or only the earlier ones."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        head_dim: int | None = None  # entries of a head; None: dim / heads
        bias: bool = False  # learned shifts of queries, keys and values
        out_bias: bool = False  # a learned shift of the output
        causal: bool = True  # a query sees no later key; False: all of its segment
        qk_norm: bool = False  # RMS norm of each head's queries and keys
        scale: float | None = None  # of the scores; None: head_dim ** -0.5
        sinks: bool = (
            False  # a learned score of each head that takes weight from the keys
        )
        softcap: float | None = None  # scores become cap * tanh(score / cap)
        window: int | None = (
            None  # tokens a query sees back, itself included; None: all
        )
        implementation: attend.Implementation = (
            "auto"  # how it is computed, see lm/nn/attend.py
        )
        context: attend.Context = (
            "auto"  # under mesh.seq: keys and values travel, or are gathered
        )

        def __post_init__(self) -> None:
            if self.window is not None and self.window < 1:
                raise ConfigError(
                    f"model.attention.window={self.window}: expected 1 or more"
                )
            for name in ("softcap", "scale"):
                value = getattr(self, name)
                if value is not None and value <= 0:
                    raise ConfigError(
                        f"model.attention.{name}={value}: expected above 0"
                    )

        def mask(self, head_dim: int, ordered: bool = True) -> Mask:
            """Returns what a query sees, and how scores are formed."""
            return Mask(
                scale=self.scale or head_dim**-0.5,
                causal=self.causal,
                window=self.window,
                softcap=self.softcap,
                ordered=ordered,
            )

        def case(self, row: attend.Row, head_dim: int) -> attend.Case:
            """Returns what attention over such rows needs."""
            H = self.head_dim or head_dim
            mask = self.mask(H, ordered=row.keys is None)
            return row.case(H, mask, packed=not self.causal, lse=self.sinks)

        def how(self, row: attend.Row, head_dim: int) -> str:
            """Returns in words how attention over such rows is computed."""
            return self.case(row, head_dim).how(self.implementation, self.context)

    def __init__(self, config: Config, dim: int, heads: int, kv_heads: int, std: float,
                 out_std: float, norm: RmsNorm.Config, rngs: nnx.Rngs,
                 rope: int = 0):  # fmt: skip
        self.config, self.rope = config, rope
        self.heads, self.kv_heads = heads, kv_heads
        H = config.head_dim or dim // heads
        self.head_dim = H
        self.query_dnh = param(
            rngs, (dim, heads, H), ("embed", "heads", "head_dim"), std
        )
        self.key_dkh = param(
            rngs, (dim, kv_heads, H), ("embed", "kv_heads", "head_dim"), std
        )
        self.value_dkh = param(
            rngs, (dim, kv_heads, H), ("embed", "kv_heads", "head_dim"), std
        )
        self.out_nhd = param(
            rngs, (heads, H, dim), ("heads", "head_dim", "embed"), out_std
        )
        if config.bias:
            self.query_bias_nh = param(rngs, (heads, H), ("heads", "head_dim"), 0.0)
            self.key_bias_kh = param(rngs, (kv_heads, H), ("kv_heads", "head_dim"), 0.0)
            self.value_bias_kh = param(
                rngs, (kv_heads, H), ("kv_heads", "head_dim"), 0.0
            )
        if config.out_bias:
            self.out_bias_d = param(rngs, (dim,), ("norm",), 0.0)
        if config.qk_norm:
            self.query_norm = RmsNorm(norm, H, "norm", rngs)
            self.key_norm = RmsNorm(norm, H, "norm", rngs)
        if config.sinks:
            self.sink_n = param(rngs, (heads,), ("heads",), 0.0)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the mixed tokens, and the cache (k, v) with these tokens' keys and values."""
        q, k, v = self._project(x_BTD, "query", "key", "value")
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if side.rope is not None:
            tables = side.rope[self.rope]
            q, k = rotate(q, tables), rotate(k, tables)
        kv_tokens = side.tokens
        if cache is not None:
            start = (0, side.slot, 0, 0)
            k, v = (
                lax.dynamic_update_slice(c, a.astype(c.dtype), start)
                for c, a in zip(cache, (k, v), strict=True)
            )
            assert side.cached is not None, "a cache comes with the tokens in it"
            cache, kv_tokens = (k, v), side.cached
        mask = self.config.mask(self.head_dim, ordered=cache is None)
        # Without packing a causal query never meets the padding at a row's end; others do.
        packed = side.packed or cache is not None or not self.config.causal
        y_BTKGH, lse_BKGT = attend.attend(
            q, k.astype(q.dtype), v.astype(q.dtype), side.tokens, kv_tokens, mask,
            self.config.implementation if cache is None else "auto",
            packed, self.config.context, self.config.sinks, self._bias(side),
        )  # fmt: skip
        if self.config.sinks:
            y_BTKGH = self._less_sinks(y_BTKGH, lse_BKGT)
        return self._output(y_BTKGH), cache

    def _bias(self, side: Side) -> Array | None:
        """Returns the scores that distances have, [R, K, G, T, S], where they have any."""
        if side.bias is None:
            return None
        R, _, T, S = side.bias.shape
        over = sharding.spec("batch", "kv_heads", None, "length", None)
        return side.bias.reshape(R, *self._groups(), T, S, out_sharding=over)

    def _less_sinks(self, y_BTKGH: Array, lse_BKGT: Any) -> Array:
        """Returns what attention gives when each head's sink is one more score, of no value."""
        over = sharding.spec("kv_heads", None)
        sink_KG = self.sink_n[...].reshape(*self._groups(), out_sharding=over)
        kept_BKGT = jax.nn.sigmoid(lse_BKGT - sink_KG[None, :, :, None])
        kept_BTKG = jnp.moveaxis(kept_BKGT, 3, 1)
        return (y_BTKGH * kept_BTKG[..., None]).astype(y_BTKGH.dtype)

    def _groups(self) -> tuple[int, int]:
        """Returns (kv heads in use, query heads for each): kv heads repeat to fill the devices."""
        devices = sharding.current().size("kv_heads")
        used = self.kv_heads if self.kv_heads % devices == 0 else devices
        if used % self.kv_heads or self.heads % used:
            raise ConfigError(
                f"model.heads={self.heads} and model.kv_heads={self.kv_heads} cannot be split over "
                f"{devices} tensor devices; kv_heads must divide them or be a multiple of them, "
                "and heads be a multiple of both"
            )
        return used, self.heads // used

    def _project(self, x_BTD: Array, *names: str) -> list[Array]:
        """Returns of x each of `names`: `query` [B, T, K, G, H], `key` and `value` [B, T, K, H],
        by one product, so that its backward reduces the gradient of x over tensor once."""
        dtype = x_BTD.dtype
        _, G = self._groups()
        w_dkgh = gather(jnp.concatenate([self._weight(n, dtype) for n in names], 2))
        y_BTKgH = einsum("btd,dkgh->btkgh", x_BTD, w_dkgh)
        if self.config.bias:
            shifts = [self._shift(n, dtype) for n in names]
            y_BTKgH = y_BTKgH + jnp.concatenate(shifts, axis=1)[None, None]
        parts, at = [], 0
        for name in names:
            one = name != "query"
            parts.append(y_BTKgH[:, :, :, at if one else slice(at, at + G)])
            at += 1 if one else G
        return parts

    def _weight(self, name: str, dtype: Any) -> Array:
        """Returns [D, K, G, H], with one entry of G for keys and values; to be gathered."""
        K, G = self._groups()
        whole = self.kv_heads != K  # before kv heads repeat
        read = weight if whole else stored
        if name != "query":
            w_dkh = self.key_dkh if name == "key" else self.value_dkh
            return self._repeat(read(w_dkh, dtype), K)[:, :, None]
        over = sharding.spec(None if whole else "embed", "kv_heads", None, None)
        w_dnh = read(self.query_dnh, dtype)
        return w_dnh.reshape(-1, K, G, self.head_dim, out_sharding=over)

    def _shift(self, name: str, dtype: Any) -> Array:
        """Returns the learned shift, [K, G, H], with one entry of G for keys and values."""
        K, G = self._groups()
        if name != "query":
            b_kh = self.key_bias_kh if name == "key" else self.value_bias_kh
            return self._repeat(b_kh[...].astype(dtype)[None], K)[0][:, None]
        over = sharding.spec("kv_heads", None, None)
        b_nh = self.query_bias_nh[...].astype(dtype)
        return b_nh.reshape(K, G, -1, out_sharding=over)

    def _repeat(self, w_dkh: Array, K: int) -> Array:
        if self.kv_heads == K:
            return w_dkh
        D, _, H = w_dkh.shape
        times = K // self.kv_heads
        w = jnp.broadcast_to(w_dkh[:, :, None], (D, self.kv_heads, times, H)).reshape(
            D, K, H
        )
        return reshard(w, sharding.spec(None, "kv_heads", None))

    def _output(self, y_BTKGH: Array) -> Array:
        K, G = self._groups()
        over = sharding.spec("kv_heads", None, None, "embed")
        w_kghd = stored(self.out_nhd, y_BTKGH.dtype).reshape(
            K, G, self.head_dim, -1, out_sharding=over
        )
        w_kghd = gather(w_kghd)
        out = sharding.spec("batch", "residual", None)
        y_BTD = einsum("btkgh,kghd->btd", y_BTKGH, w_kghd, out)  # reduce over tensor
        if self.config.out_bias:
            y_BTD = y_BTD + self.out_bias_d[...].astype(y_BTD.dtype)[None, None]
        return y_BTD


def init_cache(
    kv_heads: int, head_dim: int, batch: int, length: int, dtype: Any
) -> Any:
    """Returns one layer's empty (k, v): [B, S, K, H], kv heads repeated to fill the devices."""
    layout = sharding.current()
    heads = math.lcm(kv_heads, layout.size("kv_heads"))
    spec = sharding.spec("batch", None, "kv_heads", None)
    shape = (batch, length, heads, head_dim)
    return tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2))
