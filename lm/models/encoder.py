"""Encoder: every token sees those on both sides of it (BERT, Devlin et al. 2019)."""

import dataclasses
from typing import Any

from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.models import stack
from lm.models.model import Model
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.heads import Classes, Pooler, Words
from lm.nn.layers import LayerNorm, Learned, Norm
from lm.nn.param import param

_HEADS: dict[Any, Any] = {head.Config: head for head in (Words, Classes, Pooler)}


class Encoder(Model):
    """A model of whole texts; its head names the words that are hidden, or the text's class."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Model.Config):
        norm: Norm = LayerNorm.Config(eps=1e-12)
        norms: stack.Norms = "post"
        heads: int = 6  # query heads
        attention: Attention.Config = Attention.Config(
            causal=False, bias=True, out_bias=True
        )
        ffn: Mlp.Config = Mlp.Config(activation="gelu", bias=True)
        positions: Learned = Learned(length=512)
        types: int = 2  # kinds of texts in a row; a text alone is of the first kind
        head: Words.Config | Classes.Config | Pooler.Config = Words.Config()

        def __post_init__(self) -> None:
            super().__post_init__()
            self._check_size("heads")
            self._check_size("types")
            self._check_heads(self.heads, self.attention.head_dim)
            if self.attention.causal:
                raise ConfigError(
                    "model.attention.causal=true: an encoder sees both sides; set it to false, or "
                    "model=Transformer"
                )
            if not self.tied:
                raise ConfigError(
                    "model.tied=false: an encoder's head is its embedding; set model.tied=true"
                )

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config."""
            block = self._block_of(
                heads=self.heads,
                kv_heads=self.heads,
                mixer=self.attention,
                ffn=self.ffn,
            )
            return (block,) * self.layers

        @property
        def learned(self) -> Learned | None:
            """The learned positions."""
            return self.positions

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        D, std = config.dim, config.init_std
        self.type_cd = param(rngs, (config.types, D), ("position", "embed"), std)
        kind: Any = _HEADS[type(config.head)]
        self.end = kind(config.head, D, config.vocab_rows, std, rngs)

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> Array:
        x_BTD = super()._embed(tokens_BT, positions_BT)
        first_D = reshard(self.type_cd[0], sharding.spec(None))
        x_BTD = x_BTD + first_D.astype(x_BTD.dtype)[None, None]
        return self.norm(x_BTD) if self._ends_in_norms else x_BTD

    @property
    def _ends_in_norms(self) -> bool:
        """Whether the layers' last norm is the model's, which then has its own at the beginning."""
        return self.config.norms == "post"

    def final(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the head takes."""
        return self.end(x_BTD if self._ends_in_norms else self.norm(x_BTD))

    @property
    def head_bias(self) -> nnx.Param | None:
        """The shift [V] of each id's logit."""
        return self.end.bias_v if isinstance(self.end, Words) else None
