"""A stack of equal blocks: built at once, run by a scan, rematerialized by a named policy.

The block contract: `block(x, side, layer, cache) -> (x, aux, cache)`. `side` travels with the rows;
`layer` holds what differs from layer to layer besides the weights (its index); `aux` sums losses
and counts; `cache` is what decoding keeps for the layer, or None.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard
from jaxtyping import Array, Float

from lm import sharding
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import Norm, Side, dropout, make_norm
from lm.nn.param import residual_std

Remat = Literal["none", "dots", "attention", "full", "offload"]
SITES = 4  # places with dropout of their own: two in a block, the embedding, one spare


class Block(nnx.Module):
    """Pre-norm Transformer block (Xiong et al. 2020): mix the tokens, then feed each forward."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        dim: int
        heads: int
        kv_heads: int
        layers: (
            int  # of the whole stack: sets the scale of the projections into the stream
        )
        mixer: Attention.Config
        ffn: Mlp.Config
        norm: Norm
        dropout: float
        init_std: float

    def __init__(self, config: Config, rngs: nnx.Rngs):
        std, out_std = config.init_std, residual_std(config.layers, config.init_std)
        self.rate = config.dropout
        self.norm1 = make_norm(config.norm, config.dim, "norm", rngs)
        self.mixer = Attention(
            config.mixer, config.dim, config.heads, config.kv_heads, std, out_std, rngs
        )
        self.norm2 = make_norm(config.norm, config.dim, "norm", rngs)
        self.ffn = Mlp(config.ffn, config.dim, std, out_std, rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, layer: Any, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Any]:
        site = layer["index"] * SITES
        y_BTD, cache = self.mixer(enter(self.norm1(x_BTD)), side, cache)
        x_BTD = x_BTD + dropout(y_BTD, self.rate, side.keys_BT, site)
        y_BTD = self.ffn(enter(self.norm2(x_BTD)))
        return x_BTD + dropout(y_BTD, self.rate, side.keys_BT, site + 1), {}, cache


def enter(x_BTD: Array) -> Array:
    """Gathers the residual stream's length over tensor, where sequence parallelism splits it."""
    return reshard(x_BTD, sharding.spec("batch", "length", None))


def policy(remat: Remat) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns the transformation of a block's function that keeps what `remat` says.

    none: everything · dots: products with weights · attention: attention's output and what its
    backward needs · full: nothing but the block's input · offload: that input, in host memory.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return lambda f: f
    keep = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names("attention"),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return lambda f: jax.checkpoint(f, policy=keep, prevent_cse=False)


def build(config: Block.Config, rngs: nnx.Rngs) -> Block:
    """Returns a block whose parameters carry a leading axis of `config.layers`."""
    return jax.vmap(lambda r: Block(config, r))(rngs.split(config.layers))


def run(
    blocks: Block,
    x_BTD: Array,
    side: Side,
    cache: Any = None,
    *,
    remat: Remat,
    scan: bool,
    index_L: Array | None = None,
) -> tuple[Array, dict[str, Array], Any]:
    """Returns x after all layers, the sum of their aux, and the new cache ([L, …] like the old).

    Scanned, one layer is compiled; unrolled, XLA sees them all. The maths is the same.

    Args:
        blocks: parameters with a leading axis of layers.
        x_BTD: the residual stream.
        side: what else every block gets.
        cache: of every layer, or None.
        remat: what to keep for the backward.
        scan: over the layers.
        index_L: int32 numbers of the layers, where they are not 0, 1, 2, …; a negative one is no
            layer, and its parameters do nothing.
    """
    layers = jax.tree.leaves(nnx.to_pure_dict(nnx.state(blocks)))[0].shape[0]
    index = jnp.arange(layers) if index_L is None else index_L
    layer = {"index": index.astype(jnp.uint32)}
    if index_L is not None:
        layer["there"] = index_L >= 0

    def body(x: Array, slices: Any) -> tuple[Array, Any]:
        block, layer, cache = slices
        x = checkpoint_name(x, "block")
        y, aux, cache = block(x, side, layer, cache)
        if "there" in layer:
            y = jnp.where(layer["there"], y, x)
            aux = jax.tree.map(lambda a: jnp.where(layer["there"], a, 0), aux)
        return y, (aux, cache)

    body = policy(remat)(body)
    if scan:
        x_BTD, (aux, cache) = jax.lax.scan(body, x_BTD, (blocks, layer, cache))
    else:
        slices = [
            jax.tree.map(lambda a, i=i: a[i], (layer, cache)) for i in range(layers)
        ]
        outs = []
        for block, one in zip(_unstack(blocks, layers), slices, strict=True):
            x_BTD, out = body(x_BTD, (block, *one))
            outs.append(out)
        aux, cache = jax.tree.map(lambda *a: jnp.stack(a), *outs)
    return x_BTD, jax.tree.map(lambda a: a.sum(0), aux), cache


def _unstack(blocks: Block, layers: int) -> list[Block]:
    """Splits every stacked parameter at once, so that its gradient is one concatenation."""

    def split(a: Array) -> list[Array]:
        return [jnp.squeeze(x, 0) for x in jax.lax.split(a, (1,) * layers, 0)]

    leaves, tree = jax.tree.flatten(blocks)
    columns = [split(a) for a in leaves]
    return [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]
