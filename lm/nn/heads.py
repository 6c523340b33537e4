"""What a model ends in besides a vocabulary's embedding: a transform before it, or classes.

Shapes: B batch, T length, D embed, V vocabulary, F hidden, C classes.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn.ffn import PLAIN
from lm.nn.layers import LayerNorm
from lm.nn.param import einsum, param, weight

END = "end"  # what a model calls its head: the parameters under it are the head's


class Words(nnx.Module):
    """Hidden tokens are told from norm(gelu(W x + b)) by the embedding and a bias of each id
    (Devlin et al. 2019)."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        eps: float = 1e-12  # of the norm
        activation: Literal["gelu", "gelu_erf"] = "gelu"

    def __init__(
        self, config: Config, dim: int, vocab: int, std: float, rngs: nnx.Rngs
    ):
        self.config = config
        self.dense_de = param(rngs, (dim, dim), ("embed", "feature"), std)
        self.dense_bias_e = param(rngs, (dim,), ("norm",), 0.0)
        self.after = LayerNorm(LayerNorm.Config(eps=config.eps), dim, "norm", rngs)
        self.bias_v = param(rngs, (vocab,), ("vocab",), 0.0)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the embedding is multiplied by."""
        dtype = x_BTD.dtype
        h_BTD = einsum("btd,de->bte", x_BTD, weight(self.dense_de, dtype))
        h_BTD = h_BTD + self.dense_bias_e[...].astype(dtype)[None, None]
        return self.after(PLAIN[self.config.activation](h_BTD))


class Pooler(nnx.Module):
    """A dense layer with no head on it, as bare encoders are stored: trained by no objective.

    `Classes` of the same width begins with it where weights are taken over.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        hidden: int | None = None  # F, width of the layer; None: D

        def __post_init__(self) -> None:
            if self.hidden is not None and self.hidden < 1:
                raise ConfigError(
                    f"model.head.hidden={self.hidden}: expected 1 or more, or none"
                )

    def __init__(
        self, config: Config, dim: int, vocab: int, std: float, rngs: nnx.Rngs
    ):
        del vocab
        F = config.hidden or dim
        self.pool_df = param(rngs, (dim, F), ("embed", "feature"), std)
        self.pool_bias_f = param(rngs, (F,), ("norm",), 0.0)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x: what is pooled."""
        return x_BTD


class Classes(Pooler):
    """Scores of classes from tanh(W p + b) of one vector p of a text (Devlin et al. 2019)."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Pooler.Config):
        classes: int = 2  # C: as many as objective.labels
        pool: Literal["first", "last", "mean"] = "mean"  # p: a token, or their mean

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.classes < 2:
                raise ConfigError(
                    f"model.head.classes={self.classes}: expected 2 or more"
                )

    def __init__(
        self, config: Config, dim: int, vocab: int, std: float, rngs: nnx.Rngs
    ):
        super().__init__(config, dim, vocab, std, rngs)
        self.config = config
        shape = (config.hidden or dim, config.classes)
        self.class_dc = param(rngs, shape, ("embed", "feature"), std)
        self.class_bias_c = param(rngs, (config.classes,), ("feature",), 0.0)

    def scores(self, x_BTD: Float[Array, "B T D"], tokens: Any) -> Float[Array, "B C"]:
        """Returns fp32 logits of the classes; `tokens` says which places hold text."""
        share_BT = self._share(tokens)
        over = sharding.spec("batch", None)
        x_BTD = jax.sharding.reshard(x_BTD, sharding.spec("batch", "length", None))
        # An all-reduce where devices split the row.
        p_BD = jnp.einsum(
            "btd,bt->bd", x_BTD.astype(jnp.float32), share_BT, out_sharding=over
        )
        h_BF = p_BD @ weight(self.pool_df, p_BD.dtype) + self.pool_bias_f[...][None]
        logits_BC = jnp.tanh(h_BF) @ weight(self.class_dc, p_BD.dtype)
        return logits_BC + self.class_bias_c[...][None]

    def _share(self, tokens: Any) -> Float[Array, "B T"]:
        """Returns how much of each token is in the text's vector."""
        there_BT = tokens.segments > 0
        if self.config.pool != "mean":
            last_B1 = there_BT.sum(1, keepdims=True) - 1
            place = 0 if self.config.pool == "first" else last_B1
            there_BT &= tokens.positions == place
        return there_BT / jnp.maximum(there_BT.sum(1, keepdims=True), 1)
