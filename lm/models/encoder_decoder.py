"""Encoder-decoder: one stack reads a text whole, another writes one and looks at what it read.

The 2017 Transformer (Vaswani et al.), T5 (Raffel et al. 2020) and their like. The decoder is what
every model here is: embedding, `layers`, norm, head. The encoder stands beside it and shares the
embedding. Segment n of what is written belongs to segment n of what is read.

Shapes: B batch, T length of what is read, U of what is written, D embed, N heads, n buckets.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm.config import ConfigError
from lm.models import chunk, stack
from lm.models.model import DEEPEST, STACK, Model, how
from lm.nn import attend
from lm.nn.attention import Attention
from lm.nn.blockwise import Tokens
from lm.nn.ffn import Mlp
from lm.nn.layers import Side, Sinusoidal, Source, dropout, make_norm
from lm.nn.param import param, weight
from lm.nn.relative import Relative, scores

ENCODER = "encoder"  # the parameters that are stacked over the encoder's layers


class EncoderDecoder(Model):
    """A model of one text given another."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Model.Config):
        encoder_layers: int = 6  # blocks that read; `layers` are those that write
        heads: int = 6  # of every attention
        attention: Attention.Config = Attention.Config()  # of both stacks, and between
        ffn: Mlp.Config = Mlp.Config()
        positions: Relative | Sinusoidal = Relative()
        head_scale: float = 1.0  # of the hidden states, where the head takes them
        head_shift: bool = False  # a learned shift of each id's logit
        # The id that every text begins with where it is written; None: as the rows have it.
        start: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self._check_size("encoder_layers", DEEPEST)
            self._check_size("heads")
            self._check_heads(self.heads, self.attention.head_dim)
            if self.start is not None and not 0 <= self.start < self.vocab_size:
                raise ConfigError(
                    f"model.start={self.start}: expected an id below model.vocab_size="
                    f"{self.vocab_size}, or none"
                )
            self._check_attention()

        def _check_attention(self) -> None:
            """Refuses what one of the three attentions does not have."""
            wrong = {"causal": "true", "window": "none", "sinks": "false"}
            if isinstance(self.positions, Relative):
                wrong |= {"softcap": "none"}
            for name, usual in wrong.items():
                value = getattr(self.attention, name)
                if value != getattr(Attention.Config(), name):
                    value = str(value).lower()
                    raise ConfigError(
                        f"model.attention.{name}={value}: model=EncoderDecoder has none (its "
                        "decoder is causal, its encoder sees all); set "
                        f"model.attention.{name}={usual}"
                    )

        def _stack(self, layers: int, **parts: Any) -> tuple[stack.Block.Config, ...]:
            block = self._block_of(
                heads=self.heads, kv_heads=self.heads, ffn=self.ffn, **parts
            )
            return (dataclasses.replace(block, layers=layers),) * layers

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config of the decoder."""
            whole = dataclasses.replace(self.attention, causal=False)
            return self._stack(self.layers, mixer=self.attention, cross=whole)

        @property
        def encoder_blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config of the encoder."""
            whole = dataclasses.replace(self.attention, causal=False)
            return self._stack(self.encoder_layers, mixer=whole)

        @property
        def stacks(self) -> dict[str, tuple[stack.Block.Config, ...]]:
            """Every layer's config of each stack, by the name of its parameters."""
            return {ENCODER: self.encoder_blocks, STACK: self.blocks}

        def attends(self, row: attend.Row, written: int) -> list[str]:
            """Returns in words how each layer that has attention computes it."""
            bias = self.relative is not None
            own = dataclasses.replace(row, length=written, bias=bias)
            other = dataclasses.replace(row, length=written, keys=row.length)
            whole = dataclasses.replace(self.attention, causal=False)
            return [
                *how(self.encoder_blocks, dataclasses.replace(row, bias=bias)),
                *how(self.blocks, own),
                whole.how(other, self.dim // self.heads),
            ]

        @property
        def sinusoidal(self) -> Sinusoidal | None:
            """The sines that stand for positions, where it has them."""
            return self.positions if isinstance(self.positions, Sinusoidal) else None

        @property
        def relative(self) -> Relative | None:
            """The learned scores of distances, where it has them."""
            return self.positions if isinstance(self.positions, Relative) else None

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.encoder = stack.build(config.encoder_blocks, rngs)
        # After a last norm on the sum there is no other.
        post = config.norms == "post"
        norm = functools.partial(make_norm, config.norm, config.dim, "norm", rngs)
        self.norm = None if post else self.norm
        self.encoder_norm = None if post else norm()
        V = config.vocab_rows
        self.shift_v = param(rngs, (V,), ("vocab",), 0.0) if config.head_shift else None
        if config.relative is not None:
            shape, axes = (config.heads, config.relative.buckets), ("heads", "position")
            self.distance_nb = param(rngs, shape, axes, config.init_std)
            self.encoder_distance_nb = param(rngs, shape, axes, config.init_std)

    @property
    def _own(self) -> Config:
        assert isinstance(self.config, EncoderDecoder.Config)
        return self.config

    def read(
        self,
        batch: Mapping[str, Array],
        keys: Callable[[int], Array] | None,
        packed: bool,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the hidden states of what is written, and no aux; see `Model.read`."""
        read = Tokens(batch["input_positions"], batch["input_segments"])
        tokens = Tokens(batch["positions"], batch["segments"])
        T, U = batch["inputs"].shape[1], batch["tokens"].shape[1]
        source = self.encode(batch["inputs"], read, keys and keys(T), packed)
        keys_BU = keys and keys(U)
        x_BUD, aux, _ = self(batch["tokens"], tokens, keys_BU, packed, source=source)
        return x_BUD, aux

    def encode(
        self,
        tokens_BT: Int[Array, "B T"],
        tokens: Tokens,
        keys_BT: Array | None = None,
        packed: bool = True,
    ) -> Source:
        """Returns what the decoder looks at; arguments as of a call."""
        reader, c = Reader(self), self._own
        x_BTD = reader.embed(tokens_BT, tokens.positions, keys_BT)
        side = reader.side(tokens, keys_BT, packed)
        run = functools.partial(stack.run, remat=c.remat, scan=c.scan, first=c.layers)
        x_BTD, _, _ = run(self.encoder, x_BTD, side)
        return Source(stack.enter(reader.final(x_BTD)), tokens)

    def part(self, name: str) -> Any:
        """Returns what is around a stack of layers: the embedding before, the norm behind."""
        return Reader(self) if name == ENCODER else self

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        keys_BT: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what enters the first block of the decoder."""
        start = self._own.start
        if start is not None:
            tokens_BT = jnp.where(positions_BT == 0, start, tokens_BT)
        return super().embed(tokens_BT, positions_BT, keys_BT)

    def side(
        self,
        tokens: Tokens,
        keys_BT: Array | None = None,
        packed: bool = True,
        slot: Array | None = None,
        cached: Tokens | None = None,
    ) -> Side:
        """Returns what every block of the decoder gets besides the residual stream."""
        side = super().side(tokens, keys_BT, packed, slot, cached)
        bias = self.scores("distance_nb", tokens, cached, slot, causal=True)
        return dataclasses.replace(side, bias=bias)

    @property
    def shared(self) -> tuple[str, ...]:
        """Parameters that all layers have in common."""
        return () if self.config.relative is None else ("distance_nb",)

    def scores(
        self,
        table: str,
        tokens: Tokens,
        cached: Tokens | None = None,
        slot: Array | None = None,
        *,
        causal: bool,
    ) -> Array | None:
        """Returns what a table gives the distances in a row; None where there are no tables."""
        if self.config.relative is None:
            return None
        keys = tokens if cached is None else cached
        sizes = tokens.positions.shape[1], keys.positions.shape[1]
        table_nb = weight(getattr(self, table), jnp.dtype(jnp.float32))
        first = 0 if slot is None else slot
        return scores(self.config.relative, table_nb, *sizes, first, causal=causal)

    def final(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the head takes, from what the last layer returned."""
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        scale = self._own.head_scale
        return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    @property
    def head_bias(self) -> nnx.Param | None:
        """The shift [V] of each id's logit, where there is one."""
        return self.shift_v

    def empty_cache(self, batch: int, length: int, source: Source | None = None) -> Any:
        """Returns what decoding keeps of `batch` rows of `length` tokens, leaves [L, B, ...].

        Of each layer its own keys and values, which are empty, and those of the source, computed
        here and never again.
        """
        assert source is not None, "what the decoder looks at: `encode`"

        def keys(_: None, block: Any) -> Any:
            return None, block.cross.keys(source.x_BSD)

        _, others = jax.lax.scan(keys, None, self.layers)
        return super().empty_cache(batch, length), others


def rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is read of a batch, by the names that what is written has in it."""
    names = {"inputs": "tokens", "input_positions": "positions"}
    names |= {"input_segments": "segments", "index": "index"}
    return {name: batch[own] for own, name in names.items()}


def looking(side: Side, batch: Mapping[str, Any], x_BTD: Array) -> Side:
    """Returns `side` with what its blocks look at: what a `Reader` made of rows of the batch."""
    there = Tokens(batch["input_positions"], batch["input_segments"])
    return dataclasses.replace(side, source=Source(stack.enter(x_BTD), there))


@dataclasses.dataclass(frozen=True)
class Reader:
    """The stack that reads, in the parts that a model has: what leaves it is looked at."""

    model: EncoderDecoder

    @property
    def shared(self) -> tuple[str, ...]:
        """Parameters that all layers have in common."""
        return tuple(f"{ENCODER}_{name}" for name in self.model.shared)

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        keys_BT: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns what enters the first block."""
        c = self.model.config
        x_BTD = self.model._embed(tokens_BT, positions_BT)
        site = jnp.uint32(c.layers * stack.SITES + 2)
        return dropout(x_BTD, c.dropout, keys_BT, site)

    def side(
        self, tokens: Tokens, keys_BT: Array | None = None, packed: bool = True
    ) -> Side:
        """Returns what every block gets besides the residual stream."""
        bias = self.model.scores("encoder_distance_nb", tokens, causal=False)
        return Side(tokens, bias=bias, keys_BT=keys_BT, packed=packed)

    def stage(
        self,
        x_BTD: Float[Array, "B T D"],
        side: Side,
        places: chunk.Places,
        index_l: Int[Array, "l"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns x after a chunk of layers, see `Model.stage`."""
        c, m = self.model.config, self.model
        how: Any = {"remat": c.remat, "scan": c.scan, "first": c.layers}
        return chunk.run(m.encoder, places, index_l, x_BTD, side, **how)

    def final(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what is looked at, from what the last layer returned."""
        norm = self.model.encoder_norm
        return x_BTD if norm is None else norm(x_BTD)
