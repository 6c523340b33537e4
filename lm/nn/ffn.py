"""Feed-forward layers. Shapes: B batch, T length, D embed, F hidden."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm import sharding
from lm.nn.param import einsum, gather, param, stored, weight

Activation = Literal["swiglu", "geglu", "gelu", "gelu_erf", "relu", "silu", "clamped"]
PLAIN = {  # without a gate
    "gelu": jax.nn.gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
STEEP = 1.702  # of the sigmoid in a clamped SwiGLU


def gated(kind: Activation, limit: float, gate: Array, up: Array) -> Array:
    """Returns what a gated layer's two products become together.

    clamped: SwiGLU with a steeper sigmoid, `up` raised by 1, no number beyond the limit (gpt-oss).
    """
    if kind == "clamped":
        gate = jnp.minimum(gate, limit)
        return gate * jax.nn.sigmoid(STEEP * gate) * (jnp.clip(up, -limit, limit) + 1)
    return (jax.nn.silu if kind == "swiglu" else jax.nn.gelu)(gate) * up


class Mlp(nnx.Module):
    """Two layers (GELU, ReLU, SiLU), or a gated first one: SwiGLU, GeGLU (Shazeer 2020)."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        hidden: int | None = (
            None  # F; None: 4 D, or when gated 8/3 D up to a multiple of 128
        )
        activation: Activation = "swiglu"  # GELU by its tanh formula, but in gelu_erf
        limit: float = 7.0  # of a clamped SwiGLU
        bias: bool = False  # learned shifts after both products

        def width(self, dim: int) -> int:
            """Returns F for a model of width D."""
            if self.hidden is not None:
                return self.hidden
            return -(-8 * dim // (3 * 128)) * 128 if self.gated else 4 * dim

        @property
        def gated(self) -> bool:
            """Whether the first layer has a gate."""
            return self.activation not in PLAIN

    def __init__(
        self, config: Config, dim: int, std: float, out_std: float, rngs: nnx.Rngs
    ):
        self.config = config
        F = config.width(dim)
        if config.gated:
            self.gate_df = param(rngs, (dim, F), ("embed", "mlp"), std)
        self.up_df = param(rngs, (dim, F), ("embed", "mlp"), std)
        self.down_fd = param(rngs, (F, dim), ("mlp", "embed"), out_std)
        if config.bias:
            if config.gated:
                self.gate_bias_f = param(rngs, (F,), ("mlp",), 0.0)
            self.up_bias_f = param(rngs, (F,), ("mlp",), 0.0)
            self.down_bias_d = param(rngs, (dim,), ("norm",), 0.0)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Any = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the output and, as every feed-forward layer does, its losses and counts."""
        del side
        h_BTF = self._hidden(x_BTD)
        out = sharding.spec("batch", "residual", None)
        y_BTD = einsum(
            "btf,fd->btd", h_BTF, weight(self.down_fd, h_BTF.dtype), out
        )  # reduce over tensor
        if self.config.bias:
            y_BTD = y_BTD + self.down_bias_d[...].astype(y_BTD.dtype)[None, None]
        return y_BTD, {}

    def _hidden(self, x_BTD: Array) -> Array:
        dtype, bias = x_BTD.dtype, self.config.bias
        if not self.config.gated:
            act = PLAIN[self.config.activation]
            h = einsum("btd,df->btf", x_BTD, weight(self.up_df, dtype))
            return act(h + self.up_bias_f[...].astype(dtype)[None, None] if bias else h)
        # One product for gate and up: the gradient of x is reduced over tensor once.
        parts = [stored(w, dtype) for w in (self.gate_df, self.up_df)]
        w_dcf = gather(jnp.stack(parts, axis=1))
        h = einsum("btd,dcf->btcf", x_BTD, w_dcf)
        if bias:
            h = (
                h
                + jnp.stack([self.gate_bias_f[...], self.up_bias_f[...]]).astype(dtype)[
                    None, None
                ]
            )
        return gated(self.config.activation, self.config.limit, h[:, :, 0], h[:, :, 1])
