"""A stack of blocks: equal ones built at once, run by a scan, rematerialized by a named policy.

The block contract: `block(x, side, layer, cache) -> (x, aux, cache)`. `side` travels with the rows;
`layer` holds what differs from layer to layer besides the weights (its index); `aux` sums losses
and counts; `cache` is what decoding keeps for the layer, or None.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard
from jaxtyping import Array, Float

from lm import sharding
from lm.nn import attention, latent, recurrent
from lm.nn.attention import Attention
from lm.nn.cross import Cross
from lm.nn.ffn import Mlp
from lm.nn.latent import Latent
from lm.nn.layers import Norm, RmsNorm, Side, dropout, make_norm
from lm.nn.moe import Moe
from lm.nn.param import residual_std
from lm.nn.recurrent import Gru, Lstm

Norms = Literal["before", "after", "both", "post"]
Remat = Literal["none", "dots", "attention", "full", "offload"]
SITES = 4  # places with dropout of their own: three in a block, and the embedding


class Block(nnx.Module):
    """Mix the tokens, look at another stack's where there is one, then feed each forward.

    Norms stand before each (pre-norm, Xiong et al. 2020), after each, in front of the sum with the
    residual stream (OLMo 2, §3.2), or in both places (Gemma 2); or on the sum (post-norm, Vaswani
    et al. 2017).
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        dim: int
        heads: int = 1  # of attention
        kv_heads: int = 1
        layers: (
            int  # of the whole stack: sets the scale of the projections into the stream
        )
        mixer: Attention.Config | Latent.Config | Lstm.Config | Gru.Config
        cross: Attention.Config | None = None  # to `side.source`; None: there is none
        ffn: Mlp.Config | Moe.Config | None  # None: the mixer is all
        norm: Norm
        norms: Norms = "before"
        rope: int = 0  # which of the model's rotary positions
        dropout: float
        init_std: float

    def __init__(self, config: Config, rngs: nnx.Rngs):
        std, out_std = config.init_std, residual_std(config.layers, config.init_std)
        self.rate = config.dropout
        before, after = (config.norms in (own, "both") for own in ("before", "after"))
        post = config.norms == "post"
        norm = functools.partial(make_norm, config.norm, config.dim, "norm", rngs)
        self.norm1 = norm() if before else None
        self.mixer = _mixer(config, std, out_std, rngs)
        self.after1 = norm() if after else None
        self.sum1 = norm() if post else None
        there = config.cross is not None
        self.norm3 = norm() if before and there else None
        self.cross = _cross(config, std, out_std, rngs)
        self.after3 = norm() if after and there else None
        self.sum3 = norm() if post and there else None
        there = config.ffn is not None
        self.norm2 = norm() if before and there else None
        self.ffn = _ffn(config, std, out_std, rngs)
        self.after2 = norm() if after and there else None
        self.sum2 = norm() if post and there else None
        self.layers = config.layers

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, layer: Any, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Any]:
        site = layer["index"] * SITES
        own, other = cache if self.cross is not None and cache else (cache, None)
        y_BTD, own = self.mixer(enter(_by(self.norm1, x_BTD)), side, own)
        y_BTD = _by(self.after1, y_BTD)
        x_BTD = x_BTD + dropout(y_BTD, self.rate, side.keys_BT, site)
        x_BTD = _by(self.sum1, x_BTD)
        cache = own
        if self.cross is not None:
            y_BTD, other = self.cross(enter(_by(self.norm3, x_BTD)), side, other)
            y_BTD = _by(self.after3, y_BTD)
            x_BTD = x_BTD + dropout(y_BTD, self.rate, side.keys_BT, site + 3)
            x_BTD = _by(self.sum3, x_BTD)
            cache = own, other
        if self.ffn is None:
            return x_BTD, {}, cache
        y_BTD, aux = self.ffn(enter(_by(self.norm2, x_BTD)), side)
        y_BTD = _by(self.after2, y_BTD)
        if "moe_load_E" in aux:  # a line of each layer's own, so that a sum keeps them
            mine_L = jnp.arange(self.layers) == layer["index"]
            aux["moe_load_LE"] = mine_L[:, None] * aux.pop("moe_load_E")[None]
        x_BTD = x_BTD + dropout(y_BTD, self.rate, side.keys_BT, site + 1)
        return _by(self.sum2, x_BTD), aux, cache


def _mixer(config: Block.Config, std: float, out_std: float, rngs: nnx.Rngs) -> Any:
    c, dim, heads = config.mixer, config.dim, config.heads
    if isinstance(c, Latent.Config):
        return Latent(c, dim, heads, std, out_std, rngs, config.rope)
    recurrent: Any = {Lstm.Config: Lstm, Gru.Config: Gru}.get(type(c))
    if recurrent is not None:
        return recurrent(c, dim, std, out_std, rngs)
    assert isinstance(c, Attention.Config)
    return _attention(Attention, c, config, std, out_std, rngs)


def _cross(
    config: Block.Config, std: float, out_std: float, rngs: nnx.Rngs
) -> Cross | None:
    if config.cross is None:
        return None
    return _attention(Cross, config.cross, config, std, out_std, rngs)


def _attention(
    kind: Any,
    chosen: Attention.Config,
    config: Block.Config,
    std: float,
    out_std: float,
    rngs: nnx.Rngs,
) -> Any:
    rms = isinstance(config.norm, RmsNorm.Config)
    of_heads: Any = config.norm if rms else RmsNorm.Config()
    sizes = config.dim, config.heads, config.kv_heads
    return kind(chosen, *sizes, std, out_std, of_heads, rngs, config.rope)


def _ffn(
    config: Block.Config, std: float, out_std: float, rngs: nnx.Rngs
) -> Moe | Mlp | None:
    if config.ffn is None:
        return None
    kind: Any = Moe if isinstance(config.ffn, Moe.Config) else Mlp
    return kind(config.ffn, config.dim, std, out_std, rngs)


def empty_cache(config: Block.Config, batch: int, length: int, dtype: Any) -> Any:
    """Returns what decoding keeps for one layer of such blocks, leaves [B, ...]."""
    mixer = config.mixer
    if isinstance(mixer, Latent.Config):
        return latent.init_cache(mixer, batch, length, dtype)
    if isinstance(mixer, Attention.Config):
        head_dim = mixer.head_dim or config.dim // config.heads
        return attention.init_cache(config.kv_heads, head_dim, batch, length, dtype)
    return recurrent.empty_cache(mixer, config.dim, batch)


def _by(norm: Any, x_BTD: Array) -> Array:
    return x_BTD if norm is None else norm(x_BTD)


def enter(x_BTD: Array) -> Array:
    """Gathers the residual stream's length over tensor, where sequence parallelism splits it."""
    return reshard(x_BTD, sharding.spec("batch", "length", None))


def policy(
    remat: Remat, scanned: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns the transformation of a block's function that keeps what `remat` says.

    Outside a scan XLA would find that the backward computes what the forward did, and keep that
    after all, if it were not kept from looking.

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
    return lambda f: jax.checkpoint(f, policy=keep, prevent_cse=not scanned)


class Unit(nnx.Module):
    """Blocks of several kinds, one after another; a stack repeats it like a block."""

    def __init__(self, configs: Sequence[Block.Config], rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, rngs) for config in configs])

    def __call__(
        self, x_BTD: Array, side: Side, layer: Any, cache: Any = None
    ) -> tuple[Array, dict[str, Array], Any]:
        sums, caches = [], []
        for i, block in enumerate(self.blocks):
            here = {"index": layer["index"] + np.uint32(i)}
            mine = jax.tree.map(lambda a, i=i: a[i], cache)
            x_BTD, aux, mine = block(x_BTD, side, here, mine)
            sums.append(aux)
            caches.append(mine)
        return x_BTD, add(sums), jax.tree.map(lambda *a: jnp.stack(a), *caches)


class Groups(nnx.Module):
    """Stacks that run one after another, see `grouped`."""

    def __init__(self, stacks: Sequence[Any]):
        self.stacks = nnx.List(stacks)


def grouped(kinds: Sequence[Any]) -> list[tuple[int, tuple[Any, ...]]]:
    """Returns (repeats, unit) of the stacks that layers of these kinds make, in their order.

    Equal layers are one stack. Else a run of equal ones at the start, the shortest unit that the
    others repeat (twice at least), and what remains of a last unit; without such a unit, runs.
    """
    if not kinds:
        return []
    kinds = tuple(kinds)
    count, lead = len(kinds), _runs(kinds)[0][0]
    for period in range(1, count // 2 + 1):
        for first in range(lead + 1):
            units, rest = divmod(count - first, period)
            if units > 1 and kinds[first:-period] == kinds[first + period :]:
                unit = units, kinds[first : first + period]
                return [*_runs(kinds[:first]), unit, *_runs(kinds[count - rest :])]
    return _runs(kinds)


def _runs(kinds: Sequence[Any]) -> list[tuple[int, tuple[Any, ...]]]:
    return [(len([*some]), (kind,)) for kind, some in itertools.groupby(kinds)]


def entries(kinds: Sequence[Any]) -> dict[str, list[int]]:
    """Returns the numbers of the layers that each block of `build` stacks, by its path in it."""
    found: dict[str, list[int]] = {}
    stacks, first = grouped(kinds), 0
    for i, (repeats, unit) in enumerate(stacks):
        for j in range(len(unit)):
            path = [] if len(stacks) == len(unit) == 1 else [f"stacks/{i}"]
            path += [f"blocks/{j}"] if len(unit) > 1 else []
            after = first + repeats * len(unit)
            found["/".join(path)] = [*range(first + j, after, len(unit))]
        first += repeats * len(unit)
    return found


def build(configs: Sequence[Block.Config], rngs: nnx.Rngs) -> Block | Groups:
    """Returns a block for each config, in stacks whose parameters carry a leading axis.

    Equal layers are one stacked `Block`; layers of several kinds are `Groups`, see `grouped`.
    """

    def repeat(count: int, unit: Sequence[Block.Config]) -> Any:
        def one(r: nnx.Rngs) -> Block | Unit:
            return Block(unit[0], r) if len(unit) == 1 else Unit(unit, r)

        return jax.vmap(one)(rngs.split(count))

    stacks = [repeat(count, unit) for count, unit in grouped(configs)]
    if len(stacks) == 1 and isinstance(stacks[0], Block):
        return stacks[0]
    return Groups(stacks)


def run(
    blocks: Any,
    x_BTD: Array,
    side: Side,
    cache: Any = None,
    *,
    remat: Remat,
    scan: bool,
    first: int = 0,
) -> tuple[Array, dict[str, Array], Any]:
    """Returns x after all layers, the sum of their aux, and the new cache ([L, …] like the old).

    Args:
        blocks: from `build`, or a part of it.
        x_BTD: the residual stream.
        side: what else every block gets.
        cache: of every layer, or None.
        remat: what to keep for the backward.
        scan: over the layers.
        first: number of the first layer, by which layers draw what they drop.
    """
    stacks = blocks.stacks if isinstance(blocks, Groups) else [blocks]
    at, sums, caches = 0, [], []
    for one in stacks:
        after = at + _repeats(one) * _unit(one)
        mine = jax.tree.map(lambda a, i=at, j=after: a[i:j], cache)
        how = {"remat": remat, "scan": scan}
        x_BTD, aux, mine = _run(one, first + at, x_BTD, side, mine, **how)
        sums.append(aux)
        caches.append(mine)
        at = after
    cache = jax.tree.map(lambda *a: jnp.concatenate(a), *caches) if caches else cache
    return x_BTD, add(sums), cache


def add(sums: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Returns the sums of aux by name; not every kind of block has every name."""
    names = dict.fromkeys(name for aux in sums for name in aux)
    return {n: sum(a[n] for a in sums if n in a) for n in names}  # type: ignore[misc]


def _repeats(stack: Any) -> int:
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(stack)))[0].shape[0]


def _unit(stack: Any) -> int:
    return len(stack.blocks) if isinstance(stack, Unit) else 1


def _run(
    blocks: Any, first: int, x_BTD: Array, side: Side, cache: Any, **how: Any
) -> tuple[Array, dict[str, Array], Any]:
    """One stack, whose first layer is number `first`."""
    repeats, unit = _repeats(blocks), _unit(blocks)
    index = first + np.arange(repeats, dtype=np.uint32) * unit
    layer = {"index": jnp.asarray(index, jnp.uint32)}
    if unit > 1:
        cache = jax.tree.map(lambda a: a.reshape(repeats, unit, *a.shape[1:]), cache)
    x_BTD, aux, cache = _layers(blocks, layer, x_BTD, side, cache, **how)
    if unit > 1:
        cache = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), cache)
    return x_BTD, aux, cache


def _layers(
    blocks: Any,
    layer: dict[str, Array],
    x_BTD: Array,
    side: Side,
    cache: Any,
    *,
    remat: Remat,
    scan: bool,
) -> tuple[Array, dict[str, Array], Any]:
    """Equal layers: scanned, one is compiled; unrolled, all are. The maths is the same."""

    def body(x: Array, slices: Any) -> tuple[Array, Any]:
        block, layer, cache = slices
        x = checkpoint_name(x, "block")
        y, aux, cache = block(x, side, layer, cache)
        return y, (aux, cache)

    body = policy(remat, scan)(body)
    if scan:
        x_BTD, (aux, cache) = jax.lax.scan(body, x_BTD, (blocks, layer, cache))
    else:
        repeats = _repeats(blocks)
        slices = [
            jax.tree.map(lambda a, i=i: a[i], (layer, cache)) for i in range(repeats)
        ]
        outs = []
        for block, one in zip(unstack(blocks, repeats), slices, strict=True):
            x_BTD, out = body(x_BTD, (block, *one))
            outs.append(out)
        aux, cache = jax.tree.map(lambda *a: jnp.stack(a), *outs)
    return x_BTD, jax.tree.map(lambda a: a.sum(0), aux), cache


def unstack(blocks: Any, layers: int) -> list[Any]:
    """Splits every stacked array at once, so that its gradient is one concatenation."""

    def split(a: Array) -> list[Array]:
        return [jnp.squeeze(x, 0) for x in jax.lax.split(a, (1,) * layers, 0)]

    leaves, tree = jax.tree.flatten(blocks)
    columns = [split(a) for a in leaves]
    return [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]
