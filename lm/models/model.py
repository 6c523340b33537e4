"""What all models of one stack have: embedding, layers, norm, head. Knows no mesh.

A model is a combination of parts that its config names. The class of a model says which
combinations there are, what is wrong with some of them, and what goes beside the stack.

Shapes: B batch, T length, D embed, V vocabulary padded to `vocab_multiple`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.config import ConfigError
from lm.models import chunk, stack
from lm.nn import attend
from lm.nn.attention import Attention
from lm.nn.blockwise import NEG, Tokens, cap
from lm.nn.heads import END
from lm.nn.latent import Latent
from lm.nn.layers import (
    Learned,
    Norm,
    RmsNorm,
    Side,
    Sinusoidal,
    Source,
    dropout,
    make_norm,
    sinusoids,
)
from lm.nn.param import param, rows, weight
from lm.nn.relative import Relative

DEEPEST = 100_000  # layers; more is a slip of the hand
STACK = "layers"  # the parameters that are stacked over the layers


def how(blocks: Sequence[stack.Block.Config], row: attend.Row) -> list[str]:
    """Returns in words how the attention of blocks is computed over rows."""
    mixers: Any = [(block.mixer, block.dim // block.heads) for block in blocks]
    some = Attention.Config | Latent.Config
    return [c.how(row, H) for c, H in mixers if isinstance(c, some)]


class Model(nnx.Module):
    """A language model; returns the final hidden states, the loss applies the head."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        layers: int = 6  # blocks
        dim: int = 384  # D, width of the residual stream
        vocab_size: int = 257  # tokens of the tokenizer
        vocab_multiple: int = 256  # the embedding has this many rows, or a multiple
        norm: Norm = RmsNorm.Config()
        norms: stack.Norms = "before"  # of mixer and feed-forward, after, or both
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
            self._check_layers()
            for name in ("dim", "vocab_size", "vocab_multiple"):
                self._check_size(name)
            if not 0 <= self.dropout < 1:
                raise ConfigError(
                    f"model.dropout={self.dropout}: expected 0 <= dropout < 1"
                )
            if self.dtype not in ("auto", "float32", "bfloat16"):
                raise ConfigError(
                    f"model.dtype={self.dtype}: expected auto, float32 or bfloat16"
                )

        def _check_layers(self) -> None:
            self._check_size("layers", DEEPEST)

        def _check_size(self, name: str, most: int = 2**31 - 1) -> None:
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)}: expected 1 to {most}"
                )

        def _check_heads(self, heads: int, head_dim: int | None) -> None:
            if head_dim is None and self.dim % heads:
                raise ConfigError(
                    f"model.dim={self.dim} is not divisible by model.heads={heads}; set "
                    "model.attention.head_dim, or another dim"
                )

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config; equal ones are stacked, see `stack.build`."""
            raise NotImplementedError

        @property
        def stacks(self) -> dict[str, tuple[stack.Block.Config, ...]]:
            """Every layer's config of each stack, by the name of its parameters."""
            return {STACK: self.blocks}

        def _block_of(self, **parts: Any) -> stack.Block.Config:
            """Returns a layer's config: its parts, and what all models give every layer."""
            return stack.Block.Config(
                dim=self.dim,
                layers=self.layers,
                norm=self.norm,
                norms=self.norms,
                dropout=self.dropout,
                init_std=self.init_std,
                **parts,
            )

        @property
        def learned(self) -> Learned | None:
            """The learned positions, where it has them."""
            return None

        @property
        def sinusoidal(self) -> Sinusoidal | None:
            """The sines that stand for positions, where it has them."""
            return None

        @property
        def relative(self) -> Relative | None:
            """The learned scores of distances, where it has them."""
            return None

        def attends(self, row: attend.Row, written: int) -> list[str]:
            """Returns in words how each layer that has attention computes it.

            Args:
                row: what a step reads.
                written: tokens of a row in which something is predicted.
            """
            del written
            return how(self.blocks, row)

        @property
        def sparse(self) -> range:
            """Numbers of the layers that have experts."""
            return range(0)

        def compute(self, platform: str) -> jnp.dtype:
            """Returns the dtype of compute on a platform."""
            auto = "float32" if platform == "cpu" else "bfloat16"
            return jnp.dtype(auto if self.dtype == "auto" else self.dtype)

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
        if config.learned is not None:
            shape = (config.learned.length, D)
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
        source: Source | None = None,
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
            source: what an encoder made of the rows that these look at.
        """
        x_BTD = self.embed(tokens_BT, tokens.positions, keys_BT)
        side = self.side(tokens, keys_BT, packed, slot, cached)
        side = dataclasses.replace(side, source=source)
        how = {"remat": self.config.remat, "scan": self.config.scan}
        x_BTD, aux, cache = stack.run(self.layers, x_BTD, side, cache, **how)
        return self.final(x_BTD), aux, cache

    def read(
        self,
        batch: Mapping[str, Array],
        keys: Callable[[int], Array] | None,
        packed: bool,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns what a call does, without a cache, of the rows of a batch (see `lm.batches`).

        Args:
            batch: the rows.
            keys: of dropout, by the length of a row; None for none.
            packed: as of a call.
        """
        tokens = Tokens(batch["positions"], batch["segments"])
        keys_BT = keys and keys(batch["tokens"].shape[1])
        x_BTD, aux, _ = self(batch["tokens"], tokens, keys_BT, packed)
        return x_BTD, aux

    def final(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the head takes, from what the last layer returned."""
        return self.norm(x_BTD)

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
        return Side(tokens, keys_BT=keys_BT, slot=slot, cached=cached, packed=packed)

    def part(self, name: str) -> Any:
        """Returns what is around a stack of layers: the embedding before, the norm behind."""
        assert name == STACK, name
        return self

    @property
    def shared(self) -> tuple[str, ...]:
        """Parameters outside of the layers that all of them have in common."""
        return ()

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
        if self.config.learned is not None:
            table_pd = weight(self.position_pd, self.dtype)
            x_BTD = x_BTD + table_pd.at[positions_BT].get(out_sharding=out)
        if self.config.sinusoidal is not None:
            waves_BTD = sinusoids(self.config.sinusoidal, self.config.dim, positions_BT)
            x_BTD = x_BTD + waves_BTD.astype(x_BTD.dtype)
        return reshard(x_BTD, sharding.spec("batch", "residual", None))

    def head(self) -> nnx.Param:
        """Returns the parameter [V, D] that turns hidden states into logits."""
        return self.embed_vd if self.config.tied else self.head_vd

    @property
    def head_bias(self) -> nnx.Param | None:
        """The shift [V] of each id's logit, where there is one."""
        return None

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns fp32 logits; ids that are padding of the vocabulary get -1e30."""
        w_vd = weight(self.head(), x_BTD.dtype)
        x_BTD = stack.enter(x_BTD)
        logits = jnp.einsum(
            "btd,vd->btv", x_BTD, w_vd, preferred_element_type=jnp.float32
        )
        if self.head_bias is not None:
            logits = logits + self.head_bias[...][None, None]
        logits, _ = cap(self.config.head_softcap, logits)
        real = jnp.arange(self.config.vocab_rows) < self.config.vocab_size
        return jnp.where(real[None, None], logits, NEG)

    def classes(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> Float[Array, "B C"]:
        """Returns fp32 logits of a text's classes, from what `final` returned."""
        end: Any = getattr(self, END)
        return end.scores(x_BTD, tokens)

    def empty_cache(self, batch: int, length: int, source: Source | None = None) -> Any:
        """Returns what decoding keeps of `batch` rows of `length` tokens, leaves [L, B, ...]."""
        assert source is None, "there is nothing that looks at it"
        blocks = self.config.blocks
        one = stack.empty_cache(blocks[0], batch, length, self.dtype)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (len(blocks), *a.shape)), one)
