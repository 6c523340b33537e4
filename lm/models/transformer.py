"""Decoder-only Transformer: embed, stack, norm, head. Knows logical axes, not the mesh.

Shapes: B batch, T length, D embed, V vocabulary padded to `vocab_multiple`.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.config import ConfigError
from lm.models import chunk, stack
from lm.nn import latent
from lm.nn.attention import Attention, init_cache
from lm.nn.blockwise import NEG, Tokens, cap
from lm.nn.ffn import Mlp
from lm.nn.latent import Latent
from lm.nn.layers import (
    Learned,
    Norm,
    RmsNorm,
    Side,
    dropout,
    make_norm,
)
from lm.nn.moe import Moe
from lm.nn.param import param, rows, weight
from lm.nn.rope import Rope, rope_tables

DEEPEST = 100_000  # layers; more is a slip of the hand


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


class Transformer(nnx.Module):
    """A causal language model; returns the final hidden states, the loss applies the head."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        layers: int = 6  # blocks
        dim: int = 384  # D, width of the residual stream
        heads: int = 6  # query heads
        kv_heads: int = 6  # key and value heads; heads is a multiple of them
        vocab_size: int = 257  # tokens of the tokenizer
        vocab_multiple: int = 256  # the embedding has this many rows, or a multiple
        attention: Attention.Config | Latent.Config = Attention.Config()
        ffn: Mlp.Config | Moe.Config = Mlp.Config()
        norm: Norm = RmsNorm.Config()
        norms: stack.Norms = "before"  # of attention and feed-forward, after, or both
        positions: Rope | Learned = Rope()
        local: Local | None = None  # layers that see a window only
        tied: bool = True  # the head is the embedding
        embed_scale: float = 1.0  # of the embedding, where it enters the first layer
        head_softcap: float | None = None  # logits become cap * tanh(logit / cap)
        dropout: float = (
            0.0  # of the embedding and of what each layer adds to the stream
        )
        init_std: float = (
            0.02  # of weights; over sqrt(2 layers) where they write to the stream
        )
        dtype: Literal["auto", "float32", "bfloat16"] = (
            "auto"  # of compute; auto: bf16 but on CPU
        )
        # What the backward computes again; on stages of a pipeline, of that which it does anyway.
        remat: stack.Remat = "none"
        scan: bool = True  # compile one layer and loop, or unroll them all

        def __post_init__(self) -> None:
            for name in (
                "layers",
                "dim",
                "heads",
                "kv_heads",
                "vocab_size",
                "vocab_multiple",
            ):
                most = DEEPEST if name == "layers" else 2**31 - 1
                if not 1 <= getattr(self, name) <= most:
                    raise ConfigError(
                        f"model.{name}={getattr(self, name)}: expected 1 to {most}"
                    )
            if self.heads % self.kv_heads:
                raise ConfigError(
                    f"model.heads={self.heads} is not divisible by model.kv_heads="
                    f"{self.kv_heads}; set model.kv_heads to a divisor of it"
                )
            if self.attention.head_dim is None and self.dim % self.heads:
                raise ConfigError(
                    f"model.dim={self.dim} is not divisible by model.heads={self.heads}; set "
                    "model.attention.head_dim, or another dim"
                )
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
                    "model.local.positions: rotary positions of some layers beside learned ones; "
                    "set model.positions=Rope or model.local.positions=none"
                )
            if not 0 <= self.dropout < 1:
                raise ConfigError(
                    f"model.dropout={self.dropout}: expected 0 <= dropout < 1"
                )
            self._check_experts()
            if self.dtype not in ("auto", "float32", "bfloat16"):
                raise ConfigError(
                    f"model.dtype={self.dtype}: expected auto, float32 or bfloat16"
                )

        def _check_latent(self) -> None:
            if self.kv_heads != self.heads:
                raise ConfigError(
                    f"model.kv_heads={self.kv_heads} with model.attention=Latent, whose heads all "
                    f"have keys of their own; set model.kv_heads={self.heads}"
                )
            if self.local is not None or not isinstance(self.positions, Rope):
                raise ConfigError(
                    "model.attention=Latent has neither windows nor learned positions; set "
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

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config; equal ones are stacked, see `stack.build`."""
            usual = stack.Block.Config(
                dim=self.dim,
                heads=self.heads,
                kv_heads=self.kv_heads,
                layers=self.layers,
                mixer=self.attention,
                ffn=self.ffn,
                norm=self.norm,
                norms=self.norms,
                dropout=self.dropout,
                init_std=self.init_std,
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

        def compute(self, platform: str) -> jnp.dtype:
            """Returns the dtype of compute on a platform."""
            auto = "float32" if platform == "cpu" else "bfloat16"
            return jnp.dtype(auto if self.dtype == "auto" else self.dtype)

        @property
        def rope_dim(self) -> int:
            """Entries of a head that are rotated."""
            c = self.attention
            return c.rope_dim if isinstance(c, Latent.Config) else self.head_dim

        @property
        def vocab_rows(self) -> int:
            """Rows of the embedding and the head: the vocabulary, padded."""
            return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

        @property
        def head_std(self) -> float:
            """Std of the head: small enough that initial logits barely leave the uniform."""
            return min(self.init_std, 0.4 * self.dim**-0.5)

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_rows, config.dim
        std = config.head_std if config.tied else config.init_std
        self.embed_vd = param(rngs, (V, D), ("vocab", "embed"), std)
        if isinstance(config.positions, Learned):
            shape = (config.positions.length, D)
            self.position_pd = param(
                rngs, shape, ("position", "embed"), config.init_std
            )
        self.layers = stack.build(config.blocks, rngs)
        self.norm = make_norm(config.norm, D, "norm", rngs)
        if not config.tied:
            self.head_vd = param(rngs, (V, D), ("vocab", "embed"), config.head_std)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of compute."""
        return self.config.compute(sharding.current().platform)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        tokens: Tokens,
        keys_BT: Array | None = None,
        packed: bool = True,
        cache: Any = None,
        slot: Array | None = None,
        cached: Tokens | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Any]:
        """Returns the hidden states after the last norm, sums of the layers' aux, and the cache.

        Args:
            tokens_BT: ids.
            tokens: their positions and segments.
            keys_BT: of dropout, or None for none.
            packed: False promises that each row is one segment at positions 0, 1, 2, ….
            cache: from `empty_cache`, or None.
            slot: with a cache, where these tokens go in it.
            cached: with a cache, positions and segments of all its slots, these tokens included.
        """
        x_BTD = self.embed(tokens_BT, tokens.positions, keys_BT)
        side = self.side(tokens, keys_BT, packed, slot, cached)
        how = {"remat": self.config.remat, "scan": self.config.scan}
        x_BTD, aux, cache = stack.run(self.layers, x_BTD, side, cache, **how)
        return self.norm(x_BTD), aux, cache

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        keys_BT: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what enters the first block."""
        x_BTD = self._embed(tokens_BT, positions_BT)
        return dropout(x_BTD, self.config.dropout, keys_BT, jnp.uint32(2))

    def side(
        self,
        tokens: Tokens,
        keys_BT: Array | None = None,
        packed: bool = True,
        slot: Array | None = None,
        cached: Tokens | None = None,
    ) -> Side:
        """Returns what every block gets besides the residual stream; arguments as of a call."""
        rope, c = None, self.config
        if isinstance(c.positions, Rope):
            ropes = [c.positions]
            if c.local is not None and c.local.positions is not None:
                ropes.append(c.local.positions)
            rope = tuple(rope_tables(r, c.rope_dim, tokens.positions) for r in ropes)
        return Side(tokens, rope, keys_BT, slot, cached, packed)

    def stage(
        self,
        x_BTD: Float[Array, "B T D"],
        side: Side,
        places: chunk.Places,
        index_l: Int[Array, "l"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns x after the chunk of layers that `self.layers` holds, see `chunk.run`."""
        how = {"remat": self.config.remat, "scan": self.config.scan}
        return chunk.run(self.layers, places, index_l, x_BTD, side, **how)

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> Array:
        out = sharding.spec("batch", "length", None)
        x_BTD = rows(
            self.embed_vd, self.dtype, tokens_BT, out, self.config.tied
        )  # reduce over the vocabulary's shards
        if self.config.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
        if isinstance(self.config.positions, Learned):
            table_pd = weight(self.position_pd, self.dtype)
            x_BTD = x_BTD + table_pd.at[positions_BT].get(out_sharding=out)
        return reshard(x_BTD, sharding.spec("batch", "residual", None))

    def head(self) -> nnx.Param:
        """Returns the parameter [V, D] that turns hidden states into logits."""
        return self.embed_vd if self.config.tied else self.head_vd

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns fp32 logits; ids that are padding of the vocabulary get -1e30."""
        w_vd = weight(self.head(), x_BTD.dtype)
        x_BTD = stack.enter(x_BTD)
        logits = jnp.einsum(
            "btd,vd->btv", x_BTD, w_vd, preferred_element_type=jnp.float32
        )
        logits, _ = cap(self.config.head_softcap, logits)
        real = jnp.arange(self.config.vocab_rows) < self.config.vocab_size
        return jnp.where(real[None, None], logits, NEG)

    def empty_cache(self, batch: int, length: int) -> Any:
        """Returns the cache of `length` slots for `batch` rows, every array [L, B, S, …]."""
        c = self.config
        if isinstance(c.attention, Latent.Config):
            one = latent.init_cache(c.attention, batch, length, self.dtype)
        else:
            one = init_cache(c.kv_heads, c.head_dim, batch, length, self.dtype)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (c.layers, *a.shape)), one)
