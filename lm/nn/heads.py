"""What an encoder ends in: a transform before the vocabulary, or a score for each class.

Shapes: B batch, T length, D embed, V vocabulary, C classes.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn.layers import LayerNorm
from lm.nn.param import einsum, param, weight


class Words(nnx.Module):
    """Hidden tokens are told from norm(gelu(W x + b)) by the embedding and a bias of each id
    (Devlin et al. 2019)."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        eps: float = 1e-12  # of the norm

    def __init__(
        self, config: Config, dim: int, vocab: int, std: float, rngs: nnx.Rngs
    ):
        self.dense_de = param(rngs, (dim, dim), ("embed", "feature"), std)
        self.dense_bias_e = param(rngs, (dim,), ("norm",), 0.0)
        self.after = LayerNorm(LayerNorm.Config(eps=config.eps), dim, "norm", rngs)
        self.bias_v = param(rngs, (vocab,), ("vocab",), 0.0)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the embedding is multiplied by."""
        dtype = x_BTD.dtype
        h_BTD = einsum("btd,de->bte", x_BTD, weight(self.dense_de, dtype))
        h_BTD = h_BTD + self.dense_bias_e[...].astype(dtype)[None, None]
        return self.after(jax.nn.gelu(h_BTD))


class Classes(nnx.Module):
    """Scores of classes from tanh(W p + b) of one vector p of a text (Devlin et al. 2019)."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        classes: int = 2  # C: as many as objective.labels
        pool: Literal["first", "mean"] = "mean"  # p: the first token, or their mean

        def __post_init__(self) -> None:
            if self.classes < 2:
                raise ConfigError(
                    f"model.head.classes={self.classes}: expected 2 or more"
                )

    def __init__(
        self, config: Config, dim: int, vocab: int, std: float, rngs: nnx.Rngs
    ):
        del vocab
        self.config = config
        self.dense_de = param(rngs, (dim, dim), ("embed", "feature"), std)
        self.dense_bias_e = param(rngs, (dim,), ("norm",), 0.0)
        shape = (dim, config.classes)
        self.class_dc = param(rngs, shape, ("embed", "feature"), std)
        self.class_bias_c = param(rngs, (config.classes,), ("feature",), 0.0)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns x: what is pooled."""
        return x_BTD

    def scores(self, x_BTD: Float[Array, "B T D"], tokens: Any) -> Float[Array, "B C"]:
        """Returns fp32 logits of the classes; `tokens` says which places hold text."""
        there_BT = tokens.segments > 0
        if self.config.pool == "first":
            there_BT &= tokens.positions == 0
        share_BT = there_BT.astype(jnp.float32)
        count_B = jnp.maximum(share_BT.sum(1), 1)
        over = sharding.spec("batch", None)
        x_BTD = jax.sharding.reshard(x_BTD, sharding.spec("batch", "length", None))
        # An all-reduce where devices split the row.
        p_BD = jnp.einsum(
            "btd,bt->bd", x_BTD.astype(jnp.float32), share_BT, out_sharding=over
        )
        p_BD = p_BD / count_B[:, None]
        h_BD = p_BD @ weight(self.dense_de, p_BD.dtype) + self.dense_bias_e[...][None]
        logits_BC = jnp.tanh(h_BD) @ weight(self.class_dc, p_BD.dtype)
        return logits_BC + self.class_bias_c[...][None]
