"""Mixture of experts: each token goes through the few feed-forward layers that a router chooses.

Shapes: B rows, T length, D embed, F hidden width of an expert, E experts, K choices of a token,
R rows of all buffers of an expert.
"""

import dataclasses
import functools
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
from lm.nn import dispatch, ragged
from lm.nn.ffn import PLAIN, Activation, Mlp, gated
from lm.nn.layers import Side
from lm.nn.param import gather, param, stored, weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax:
    """Gates are a softmax over the experts (Shazeer 2017); the highest are chosen."""

    renormalize: bool = True  # the gates of the chosen experts sum to 1 (Mixtral)
    scale: float = 1.0  # of the gates after that

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"model.ffn.gate.scale={self.scale}: expected above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Each expert's gate is a sigmoid of its own (DeepSeek-V3, arXiv 2412.19437, §2.1.2).

    A bias for each expert is added for the choice alone. It is not trained: after each step it
    rises where the expert had fewer tokens than the mean and falls where it had more.
    """

    renormalize: bool = True  # the gates of the chosen experts sum to 1
    scale: float = 1.0  # of the gates after that
    rate: float = 0.001  # how far a bias moves in a step; 0: they stay 0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.rate >= 0):
            raise ConfigError(
                f"model.ffn.gate: scale={self.scale} must be above 0 and rate={self.rate} "
                "0 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """An expert takes so many tokens of a row; the rest of its choices are dropped, and counted."""

    factor: float = 1.25  # times an even share of the row, T K / E, rounded up

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ConfigError(
                f"model.ffn.dispatch.factor={self.factor}: expected a number above 0; "
                "model.ffn.dispatch=Dropless drops nothing"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropless:
    """Every choice is honoured, whatever the load."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limited:
    """Experts stand in groups, and a token uses those of few (DeepSeek-V2, §2.2.2).

    A group is as good as its best expert, or under sigmoid gates as its two best together.
    """

    groups: int = 8
    keep: int = 4  # groups that a token may use


class Moe(nnx.Module):
    """Experts, a router (in fp32), and experts that every token goes through.

    What is counted is counted for each row on its own: load, losses and capacity are those of the
    row's real tokens (segment 0 is padding and goes to no expert), so that neither microbatches
    nor the mesh change them. With a cache nothing is dropped: a text may not depend on how many
    of its tokens are read at a time.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        experts: int = 8  # E
        top_k: int = 2  # K, experts of a token
        hidden: int | None = None  # F; None: as wide as the dense layer would be
        activation: Activation = "swiglu"
        limit: float = 7.0  # of a clamped SwiGLU
        bias: bool = False  # learned shifts after an expert's products
        router_bias: bool = False  # a learned shift of each expert's logit
        shared: int = 0  # experts that every token goes through, as one layer
        shared_gate: bool = False  # a sigmoid of the token weighs what they give
        gate: Softmax | Sigmoid = Softmax()
        limited: Limited | None = None  # to few groups of experts
        dispatch: Capacity | Dropless = Capacity()
        balance: float = 0.01  # weight of the loss that evens the load (Switch, eq. 4)
        z_loss: float = 0.001  # weight of the router's log(Z)^2 (ST-MoE, eq. 5)
        dense_first: int = 0  # layers at the start that have `dense` instead
        every: int = 1  # of the others, each so many-th has experts
        dense: Mlp.Config = Mlp.Config()  # of the layers without experts

        def __post_init__(self) -> None:
            for name, least in (("experts", 1), ("top_k", 1), ("shared", 0)):
                self._at_least(name, least)
            for name, least in (("dense_first", 0), ("every", 1)):
                self._at_least(name, least)
            for name in ("balance", "z_loss"):
                self._at_least(name, 0)
            if self.hidden is not None:
                self._at_least("hidden", 1)
            if self.top_k > self.experts:
                raise ConfigError(
                    f"model.ffn.top_k={self.top_k} of model.ffn.experts={self.experts}: "
                    f"expected at most {self.experts}"
                )
            if self.shared_gate and not self.shared:
                raise ConfigError(
                    "model.ffn.shared_gate=true: there are no shared experts to weigh; set "
                    "model.ffn.shared, or model.ffn.shared_gate=false"
                )
            self._check_groups()
            if self.top_k == 1 < self.experts and self.gate.renormalize:
                raise ConfigError(
                    "model.ffn.top_k=1 with model.ffn.gate.renormalize=true: every gate would "
                    "be 1 and teach the router nothing; set model.ffn.gate.renormalize=false"
                )

        def _check_groups(self) -> None:
            if self.limited is None:
                return
            groups, keep = self.limited.groups, self.limited.keep
            if not 1 <= keep <= groups or self.experts % groups:
                raise ConfigError(
                    f"model.ffn.limited: keep={keep} of groups={groups} of model.ffn.experts="
                    f"{self.experts}: expected 1 <= keep <= groups, and groups to divide experts"
                )
            each = self.experts // groups
            if self.top_k > keep * each or each < self.best:
                raise ConfigError(
                    f"model.ffn.limited: {keep} of {groups} groups have {keep * each} experts for "
                    f"model.ffn.top_k={self.top_k}, {each} in a group; use fewer groups"
                )

        @property
        def best(self) -> int:
            """Experts by which a group is judged."""
            return 2 if isinstance(self.gate, Sigmoid) else 1

        def _at_least(self, name: str, least: int) -> None:
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"model.ffn.{name}={getattr(self, name)}: expected {least} or more"
                )

        def expert(self, dim: int, count: int = 1) -> Mlp.Config:
            """Returns the dense layer that `count` experts side by side are."""
            one = Mlp.Config(
                hidden=self.hidden, activation=self.activation, limit=self.limit
            )
            return dataclasses.replace(one, hidden=one.width(dim) * count)

        def room(self, length: int) -> int | None:
            """Returns how many choices of a row of `length` tokens an expert takes; None: all."""
            if isinstance(self.dispatch, Dropless):
                return None
            even = length * self.top_k / self.experts
            return min(length, max(1, math.ceil(even * self.dispatch.factor)))

    def __init__(
        self, config: Config, dim: int, std: float, out_std: float, rngs: nnx.Rngs
    ):
        self.config = config
        E, F = config.experts, config.expert(dim).width(dim)
        self.router_de = param(rngs, (dim, E), ("embed", "choice"), std)
        if isinstance(config.gate, Sigmoid):
            self.balance_e = param(rngs, (E,), ("balance",), 0.0)
        if config.activation not in PLAIN:
            self.gate_edf = param(rngs, (E, dim, F), ("expert", "embed", "mlp"), std)
        self.up_edf = param(rngs, (E, dim, F), ("expert", "embed", "mlp"), std)
        self.down_efd = param(rngs, (E, F, dim), ("expert", "mlp", "embed"), out_std)
        if config.bias:
            if config.activation not in PLAIN:
                self.gate_bias_ef = param(rngs, (E, F), ("expert", "mlp"), 0.0)
            self.up_bias_ef = param(rngs, (E, F), ("expert", "mlp"), 0.0)
            self.down_bias_ed = param(rngs, (E, dim), ("expert", "norm"), 0.0)
        if config.router_bias:
            self.router_bias_e = param(rngs, (E,), ("choice",), 0.0)
        if config.shared:
            shared = config.expert(dim, config.shared)
            self.shared = Mlp(shared, dim, std, out_std, rngs)
        if config.shared_gate:
            self.shared_gate_d = param(rngs, (dim,), ("norm",), std)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the output, and of this layer: `moe_loss_B` (each row's losses, weighted),
        `moe_load_E` (choices of each expert) and `moe_dropped` (choices without a slot)."""
        c, real_BT = self.config, side.tokens.segments != 0
        logit_BTE, score_BTE = self._scores(x_BTD)
        ranked_BTE = score_BTE
        if isinstance(c.gate, Sigmoid):
            ranked_BTE = ranked_BTE + self.balance_e[...][None, None]
        few = c.limited
        groups = few and dispatch.Groups(few.groups, few.keep, c.best)
        choice_BTK = dispatch.choose(lax.stop_gradient(ranked_BTE), c.top_k, groups)
        gate_BTK = dispatch.chosen(score_BTE, choice_BTK)
        if c.gate.renormalize:
            # Sigmoids may all be as good as 0.
            gate_BTK = gate_BTK / (gate_BTK.sum(-1, keepdims=True) + 1e-20)
        if isinstance(c.gate, Sigmoid) or c.gate.scale != 1:
            gate_BTK = gate_BTK * c.gate.scale

        room = None if side.cached is not None else c.room(x_BTD.shape[1])
        choice_BTK = jnp.where(real_BT[..., None], choice_BTK, c.experts)
        where = dispatch.plan(choice_BTK, side.tokens, c.experts, room)
        if room is None and ragged.fits():
            y_BTD = self._ragged(x_BTD, choice_BTK, gate_BTK)
        else:
            x_ERD = dispatch.send(x_BTD, where, c.experts)
            y_BTD = dispatch.receive(self._experts(x_ERD), where, gate_BTK)
        if c.bias:
            y_BTD = y_BTD + self._shifts(choice_BTK, gate_BTK, where, y_BTD.dtype)
        y_BTD = reshard(y_BTD, sharding.spec("batch", "residual", None))
        if c.shared:
            y_BTD = y_BTD + self._shared(x_BTD)

        return y_BTD, {
            "moe_loss_B": self._losses(logit_BTE, score_BTE, where.count_BE, real_BT),
            "moe_load_E": where.count_BE.sum(0),
            "moe_dropped": where.lost_B.sum().astype(jnp.float32),
        }

    def _scores(self, x_BTD: Array) -> tuple[Array, Array]:
        """Returns the router's logits and every expert's score, in fp32."""
        logit_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            weight(self.router_de, jnp.dtype(jnp.float32)),
            precision=lax.Precision.HIGHEST,
        )
        if self.config.router_bias:
            logit_BTE = logit_BTE + self.router_bias_e[...][None, None]
        if isinstance(self.config.gate, Softmax):
            return logit_BTE, jax.nn.softmax(logit_BTE)
        return logit_BTE, jax.nn.sigmoid(logit_BTE)

    def _shared(self, x_BTD: Array) -> Array:
        y_BTD = self.shared(x_BTD)[0]
        if not self.config.shared_gate:
            return y_BTD
        gate_d = self.shared_gate_d[...].astype(x_BTD.dtype)
        weight_BT = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x_BTD, gate_d))
        weight_BT = reshard(weight_BT, sharding.spec("batch", "residual"))
        return y_BTD * weight_BT[..., None]

    def _shifts(
        self, choice_BTK: Array, gate_BTK: Array, where: Any, dtype: Any
    ) -> Array:
        """Returns what the shifts after the experts' last products add to each token."""
        E = self.config.experts
        slots = where.index_BN.shape[1] // sharding.current().size("length")
        gate_BTK = jnp.where(
            where.slot_BTK < slots, gate_BTK, 0
        )  # not of choices that were lost
        each_BTKE = choice_BTK[..., None] == jnp.arange(E)[None, None, None]
        gate_BTE = (each_BTKE * gate_BTK[..., None]).sum(2)
        shift_ed = reshard(
            self.down_bias_ed[...], sharding.spec(None, None)
        )  # small: gathered
        return jnp.einsum("bte,ed->btd", gate_BTE.astype(dtype), shift_ed.astype(dtype))

    def _experts(self, x_ERD: Array) -> Array:
        """Every expert on its buffer, without the shift at the end; nobody reads empty slots."""
        c, dtype = self.config, x_ERD.dtype
        if c.activation in PLAIN:
            up_edf = weight(self.up_edf, dtype)
            h_ERF = jnp.einsum("erd,edf->erf", x_ERD, up_edf)
            if c.bias:
                h_ERF = h_ERF + self.up_bias_ef[...].astype(dtype)[:, None]
            h_ERF = PLAIN[c.activation](h_ERF)
        else:
            # One product for gate and up: the gradient of x is reduced over tensor once.
            parts = [stored(w, dtype) for w in (self.gate_edf, self.up_edf)]
            w_edcf = gather(jnp.stack(parts, axis=2))
            h = jnp.einsum("erd,edcf->ercf", x_ERD, w_edcf)
            if c.bias:
                shifts = [self.gate_bias_ef[...], self.up_bias_ef[...]]
                h = h + jnp.stack(shifts, axis=1).astype(dtype)[:, None]
            h_ERF = gated(c.activation, c.limit, h[:, :, 0], h[:, :, 1])
        out = sharding.spec("expert", "dispatched", None)
        return jnp.einsum(
            "erf,efd->erd", h_ERF, weight(self.down_efd, dtype), out_sharding=out
        )  # reduce over tensor

    def _ragged(self, x_BTD: Array, choice_BTK: Array, gate_BTK: Array) -> Array:
        """The same without slots, by sorted rows."""
        c, E, dtype = self.config, self.config.experts, x_BTD.dtype
        plain = c.activation in PLAIN
        first = [] if plain else [self.gate_edf]
        weights = [weight(w, dtype) for w in (*first, self.up_edf, self.down_efd)]
        biases = []
        if c.bias:
            shifts = [] if plain else [self.gate_bias_ef]
            biases = [b[...].astype(dtype) for b in (*shifts, self.up_bias_ef)]
        act: Any = functools.partial(gated, c.activation, c.limit)
        act = PLAIN.get(c.activation, act)
        where = ragged.plan(choice_BTK, E)
        x = ragged.send(x_BTD, where, E // sharding.current().size("expert"))
        return ragged.receive(
            ragged.experts(x, where, weights, act, biases), where, gate_BTK
        )

    def _losses(self, logit_BTE, score_BTE, count_BE, real_BT) -> Array:
        """Returns each row's losses: means over its real tokens, times their weights."""
        c, real_BT = self.config, real_BT.astype(jnp.float32)
        tokens_B = jnp.maximum(real_BT.sum(1), 1)
        share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
        share_BE = (share_BTE * real_BT[..., None]).sum(1) / tokens_B[:, None]
        load_BE = count_BE / (c.top_k * tokens_B[:, None])
        even_B = c.experts * (load_BE * share_BE).sum(-1)  # 1 where all is even
        log_z_BT = jax.nn.logsumexp(logit_BTE, -1)
        z_B = (log_z_BT**2 * real_BT).sum(1) / tokens_B
        return c.balance * even_B + c.z_loss * z_B
