"""Decoder-only Transformer: layers of attention and feed-forward."""

import dataclasses
import functools
from typing import Any

from jaxtyping import Array

from lm.config import ConfigError
from lm.models import stack
from lm.models.model import Model
from lm.nn.attention import Attention
from lm.nn.blockwise import Tokens
from lm.nn.ffn import Mlp
from lm.nn.latent import Latent
from lm.nn.layers import Learned, Side, Sinusoidal
from lm.nn.moe import Moe
from lm.nn.rope import Rope, rope_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Layers whose attention sees a window, among others that see all."""

    window: int = 1024  # tokens a query sees back, itself included
    pattern: tuple[bool, ...] = (True, False)  # which layers; repeated
    positions: Rope | None = None  # of these layers; None: those of the others

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"model.local.window={self.window}: expected 1 or more")
        if not any(self.pattern):
            raise ConfigError(
                f"model.local.pattern={self.pattern} has no local layer; set model.local=none"
            )


class Transformer(Model):
    """A causal language model of attention and feed-forward layers."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Model.Config):
        heads: int = 6  # query heads
        kv_heads: int = 6  # key and value heads; heads is a multiple of them
        attention: Attention.Config | Latent.Config = Attention.Config()
        ffn: Mlp.Config | Moe.Config = Mlp.Config()
        positions: Rope | Learned | Sinusoidal = Rope()
        local: Local | None = None  # layers that see a window only

        def __post_init__(self) -> None:
            super().__post_init__()
            self._check_size("heads")
            self._check_size("kv_heads")
            if self.heads % self.kv_heads:
                raise ConfigError(
                    f"model.heads={self.heads} is not divisible by model.kv_heads="
                    f"{self.kv_heads}; set model.kv_heads to a divisor of it"
                )
            self._check_heads(self.heads, self.attention.head_dim)
            if isinstance(self.attention, Latent.Config):
                self._check_latent()
            if isinstance(self.positions, Rope) and self.rope_dim % 2:
                raise ConfigError(
                    f"rotary positions need an even head_dim, got {self.head_dim}; set "
                    "model.attention.head_dim or model.positions=Learned"
                )
            if (
                self.local
                and self.local.positions
                and not isinstance(self.positions, Rope)
            ):
                raise ConfigError(
                    "model.local.positions: rotary positions of some layers beside added ones; "
                    "set model.positions=Rope or model.local.positions=none"
                )
            if (
                isinstance(self.attention, Attention.Config)
                and not self.attention.causal
            ):
                raise ConfigError(
                    "model.attention.causal=false: a decoder would see what it predicts; set it to "
                    "true, or model=Encoder"
                )
            self._check_experts()

        def _check_latent(self) -> None:
            if self.kv_heads != self.heads:
                raise ConfigError(
                    f"model.kv_heads={self.kv_heads} with model.attention=Latent, whose heads all "
                    f"have keys of their own; set model.kv_heads={self.heads}"
                )
            if self.local is not None or not isinstance(self.positions, Rope):
                raise ConfigError(
                    "model.attention=Latent has neither windows nor positions that are added; set "
                    "model.local=none and model.positions=Rope"
                )

        def _check_experts(self) -> None:
            if not isinstance(self.ffn, Moe.Config):
                return
            if self.layers - self.ffn.dense_first < self.ffn.every:
                raise ConfigError(
                    f"model.layers={self.layers} with model.ffn.dense_first="
                    f"{self.ffn.dense_first} and every={self.ffn.every}: no layer would have "
                    f"experts; set model.layers to {self.ffn.dense_first + self.ffn.every} or more"
                )

        @property
        def sparse(self) -> range:
            """Numbers of the layers that have experts."""
            if not isinstance(self.ffn, Moe.Config):
                return range(0)
            return range(
                self.ffn.dense_first + self.ffn.every - 1, self.layers, self.ffn.every
            )

        @functools.cached_property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config; equal ones are stacked, see `stack.build`."""
            usual = self._block_of(
                heads=self.heads,
                kv_heads=self.kv_heads,
                mixer=self.attention,
                ffn=self.ffn,
            )
            return tuple(self._block(usual, i) for i in range(self.layers))

        def _block(self, block: stack.Block.Config, i: int) -> stack.Block.Config:
            """Returns the config of layer i: `block`, or what differs from it."""
            if isinstance(self.ffn, Moe.Config) and i not in self.sparse:
                block = dataclasses.replace(block, ffn=self.ffn.dense)
            if not self.is_local(i):
                return block
            assert self.local is not None
            mixer = dataclasses.replace(self.attention, window=self.local.window)
            rope = 1 if self.local.positions else 0
            return dataclasses.replace(block, mixer=mixer, rope=rope)

        def is_local(self, layer: int) -> bool:
            """Returns whether the layer is one of `local`."""
            if self.local is None:
                return False
            return self.local.pattern[layer % len(self.local.pattern)]

        @property
        def head_dim(self) -> int:
            """Entries of one head."""
            return self.attention.head_dim or self.dim // self.heads

        @property
        def rope_dim(self) -> int:
            """Entries of a head that are rotated."""
            c = self.attention
            return c.rope_dim if isinstance(c, Latent.Config) else self.head_dim

        @property
        def learned(self) -> Learned | None:
            """The learned positions, where it has them."""
            return self.positions if isinstance(self.positions, Learned) else None

        @property
        def sinusoidal(self) -> Sinusoidal | None:
            """The sines that stand for positions, where it has them."""
            return self.positions if isinstance(self.positions, Sinusoidal) else None

    def side(
        self,
        tokens: Tokens,
        keys_BT: Array | None = None,
        packed: bool = True,
        slot: Array | None = None,
        cached: Tokens | None = None,
    ) -> Side:
        """Returns what every block gets besides the residual stream; arguments as of a call."""
        side = super().side(tokens, keys_BT, packed, slot, cached)
        c: Any = self.config
        if not isinstance(c.positions, Rope):
            return side
        ropes = [c.positions]
        if c.local is not None and c.local.positions is not None:
            ropes.append(c.local.positions)
        rope = tuple(rope_tables(r, c.rope_dim, tokens.positions) for r in ropes)
        return dataclasses.replace(side, rope=rope)
