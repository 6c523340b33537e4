"""Recurrent mixers: LSTM (Hochreiter & Schmidhuber 1997) and GRU (Cho et al. 2014).

All that does not depend on the state is one product over the row before the scan, and the
gradient of the recurrent matrix one after it. The hidden state is split over tensor; every
step gathers it for its product. The state is emptied wherever a new segment begins.

Shapes: B batch, T length, D embed, H hidden, G gates that read the state, P >= G parts of
the pre-activation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn.layers import Side
from lm.nn.param import einsum, gather, param, stored, weight

State: TypeAlias = tuple[Array, ...]  # fp32 [B, H] each; the first is what is put out
Cell: TypeAlias = Callable[[Array, State], State]  # from the pre-activation [B, P, H]

UNROLL = 4  # steps of the scan in one turn of its loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    hidden: int | None = None  # H, numbers of the state; None: D
    # W, tokens that a gradient goes back at most: at every W-th token of a row the state goes on
    # and its gradient does not (Williams & Peng 1990). None: back to the row's beginning.
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"model.mixer.{name}={value}: expected 1 or more, or none"
                )

    def width(self, dim: int) -> int:
        """Returns H for a model of width D."""
        return self.hidden or dim


class _Mixer(nnx.Module):
    """Mixes each token with a state that the earlier ones of its segment left."""

    gates: int  # G
    parts: int  # P
    states: int  # arrays that the state is made of

    def __init__(
        self, config: Any, dim: int, std: float, out_std: float, rngs: nnx.Rngs
    ):
        self.config = config
        H = config.width(dim)
        axes = ("gate", "embed", "mlp")
        self.input_gdh = param(rngs, (self.gates, dim, H), axes, std)
        # So large that a state neither grows nor dies out at once.
        self.recurrent_ghk = param(rngs, (self.gates, H, H), axes, H**-0.5)
        self.bias_ph = param(rngs, (self.parts, H), ("gate", "mlp"), 0.0)
        self.out_hd = param(rngs, (H, dim), ("mlp", "embed"), out_std)

    @staticmethod
    def cell(config: Any, p_BPH: Array, state: State) -> State:
        """Returns the state after a token."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the mixed tokens, and the cache: the state after the last of them."""
        dtype = x_BTD.dtype
        w_dgh = gather(jnp.moveaxis(stored(self.input_gdh, dtype), 0, 1))
        p_BTPH = self._parts(einsum("btd,dgh->btgh", x_BTD, w_dgh))
        p_BTPH = p_BTPH + self.bias_ph[...].astype(dtype)[None, None]
        w_ghk = weight(self.recurrent_ghk, dtype)
        state = cache
        if cache is None:
            state = empty_cache(self.config, x_BTD.shape[2], len(x_BTD))
        cell = functools.partial(self.cell, self.config)
        window = self.config.window
        found: Any = recur(cell, window, p_BTPH, w_ghk, _kept(side), state)
        ys_BTH, state = found
        out = sharding.spec("batch", "residual", None)
        w_hd = weight(self.out_hd, dtype)
        y_BTD = einsum("bth,hd->btd", ys_BTH, w_hd, out)  # reduce over tensor
        return y_BTD, None if cache is None else state

    def _parts(self, x_BTGH: Array) -> Array:
        return x_BTGH


class Lstm(_Mixer):
    """h = o tanh(c), c = f c + i tanh(g); gates i, f, g, o as in PyTorch."""

    gates, parts, states = 4, 4, 2

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(_Config):
        forget: float = 1.0  # added to the forget gate's bias (Jozefowicz et al. 2015)

    @staticmethod
    def cell(config: Config, p_BPH: Array, state: State) -> State:
        i, f, g, o = (p_BPH[:, n] for n in range(4))
        c = jax.nn.sigmoid(f + config.forget) * state[1]
        c = c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


class Gru(_Mixer):
    """h = (1 - z) n + z h, n = tanh(x + r (W h + b)); gates r, z, n as in PyTorch.

    The reset gate acts on the product with the state, as in cuDNN, which has a bias of its
    own: the last of the four in `bias_ph` is that of the input's part of n.
    """

    gates, parts, states = 3, 4, 1

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(_Config):
        pass

    @staticmethod
    def cell(config: Config, p_BPH: Array, state: State) -> State:
        del config
        r, z, u, x = (p_BPH[:, n] for n in range(4))
        new = jnp.tanh(x + jax.nn.sigmoid(r) * u)
        keep = jax.nn.sigmoid(z)
        return ((1 - keep) * new + keep * state[0],)

    def _parts(self, x_BTGH: Array) -> Array:
        reset, update, new = (x_BTGH[:, :, n : n + 1] for n in range(3))
        return jnp.concatenate([reset, update, jnp.zeros_like(new), new], 2)


def empty_cache(config: _Config, dim: int, batch: int) -> State:
    """Returns the state of one layer before the first token."""
    over, shape = sharding.spec("batch", "mlp"), (batch, config.width(dim))
    zero = jnp.zeros(shape, jnp.float32, out_sharding=over)
    return (zero,) * (Lstm.states if isinstance(config, Lstm.Config) else Gru.states)


def _kept(side: Side) -> Array:
    """Returns fp32 [B, T]: 0 where a token begins a segment, 1 where the state goes on."""
    segments_BT = side.tokens.segments
    before_B1 = segments_BT[:, :1]  # the state before the first token is empty anyway
    if side.cached is not None:
        slot = jnp.maximum(side.slot - 1, 0)
        before_B1 = lax.dynamic_slice_in_dim(side.cached.segments, slot, 1, axis=1)
    before_BT = jnp.concatenate([before_B1, segments_BT[:, :-1]], 1)
    return (segments_BT == before_BT).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recur(
    cell: Cell,
    window: int | None,
    p_BTPH: Float[Array, "B T P H"],
    w_GHK: Float[Array, "G H H"],
    kept_BT: Float[Array, "B T"],
    state: State,
) -> tuple[Float[Array, "B T H"], State]:
    """Returns the first part of every state, in the dtype of p, and the state at the end.

    Args:
        cell: from a pre-activation and the state before it to the state after it.
        window: tokens from one border that gradients do not pass to the next; None: no border.
        p_BTPH: pre-activations without what the state adds to the first G of them.
        w_GHK: that adds it: the first part of the state times this.
        kept_BT: what the state is multiplied by before a token.
        state: before the first token.
    """
    return _scan(cell, window, w_GHK, kept_BT, p_BTPH, state)


def _scan(
    cell: Cell,
    window: int | None,
    w_GHK: Array,
    kept_BT: Array,
    p_BTPH: Array,
    state: State,
) -> Any:
    G, dtype = len(w_GHK), p_BTPH.dtype
    w_HGK = jnp.moveaxis(w_GHK, 0, 1)

    def step(state: State, now: Any) -> tuple[State, Array]:
        p_BPH, kept_B, border = now
        state = tuple(s * kept_B[:, None] for s in state)
        if window is not None:
            state = tuple(jnp.where(border, lax.stop_gradient(s), s) for s in state)
        h_BH = _whole(state[0].astype(dtype))
        u_BGH = jnp.einsum(
            "bh,hgk->bgk", h_BH, w_HGK, preferred_element_type=jnp.float32
        )
        p_BPH = p_BPH.astype(jnp.float32)
        p_BPH = jnp.concatenate([p_BPH[:, :G] + u_BGH, p_BPH[:, G:]], 1)
        state = cell(p_BPH, state)
        return state, state[0].astype(dtype)

    borders_T = jnp.arange(p_BTPH.shape[1]) % (window or 1) == 0
    along = jnp.moveaxis(p_BTPH, 1, 0), kept_BT.T, borders_T
    state, ys_TBH = lax.scan(step, state, along, unroll=UNROLL)
    return jnp.moveaxis(ys_TBH, 0, 1), state


def _whole(h: Array) -> Array:
    rest = [None] * (h.ndim - 1)
    return reshard(h, sharding.spec("batch", *rest))  # all-gather over tensor


def _forward(
    cell: Cell, window: int | None, p: Array, w: Array, kept: Array, state: State
) -> Any:
    run = functools.partial(_scan, cell, window, w, kept)
    out, vjp = jax.vjp(run, p, state)
    first = state[0].astype(p.dtype)[:, None]
    before = jnp.concatenate([first, out[0][:, :-1]], 1) * kept[..., None]
    return out, (vjp, before.astype(p.dtype), w, kept)


def _backward(cell: Cell, window: int | None, saved: Any, cotangents: Any) -> Any:
    del cell, window
    vjp, before_BTH, w_GHK, kept_BT = saved
    dp_BTPH, d_state = vjp(cotangents)
    # One product over the row, where the scan's own gradient would add up a matrix a step.
    G, h_BTH = len(w_GHK), _whole(before_BTH)
    _, of_w = jax.vjp(
        lambda w: einsum("bth,hgk->btgk", h_BTH, w), jnp.moveaxis(w_GHK, 0, 1)
    )
    (dw_HGK,) = of_w(dp_BTPH[:, :, :G])
    return dp_BTPH, jnp.moveaxis(dw_HGK, 1, 0), jnp.zeros_like(kept_BT), d_state


recur.defvjp(_forward, _backward)
