"""What the trace of attention does not say: how many pairs of blocks a device computes.

Its loops run over the blocks that a mask leaves, which are found when positions are there.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lm import sharding, train
from lm.models import stack
from lm.nn import attend, blockwise
from lm.nn.attention import Attention
from lm.nn.blockwise import Tokens
from lm.nn.latent import Latent
from lm.nn.moe import Moe
from lm.plan import jaxprs
from lm.program import Program

# Bytes that a chip's memory gives in the time of one operation of a large product, for want of a
# chip: between those of the platform's chips in lm/plan/chips.py. A CPU's cores do one or the
# other.
BESIDE = {"tpu": 0.005, "gpu": 0.0045, "cpu": 0.0}


def unsaid(prog: Program, blocks: Sequence[stack.Block.Config]) -> jaxprs.Unsaid:
    """What traces of these layers do not say: of attention, the mean of the layers."""
    found = [p for p in (_pairs(prog, block) for block in blocks) if p]
    rows = _used(prog, blocks)
    # XLA for GPUs puts off what nothing waits for.
    late = prog.layout.platform == "gpu"
    beside = BESIDE[prog.layout.platform]
    tpu = prog.layout.platform == "tpu"
    how = jaxprs.Unsaid(rows=rows, late=late, beside=beside, through=tpu, copied=tpu)
    if not found:
        return how
    pairs = sum(count for count, _ in found) / len(found)
    return dataclasses.replace(how, pairs=pairs, hops=found[0][1])


def _pairs(prog: Program, block: stack.Block.Config) -> tuple[float, int] | None:
    """Pairs of blocks that attention computes on a device, and in how many loops."""
    mixer, layout = block.mixer, prog.layout
    if not isinstance(mixer, Attention.Config | Latent.Config):
        return None
    row = attend.Row(
        layout=layout,
        length=train.abstract_batch(prog)["tokens"].shape[1],
        dtype=str(prog.experiment.model.compute(layout.platform)),
        packed=prog.packed,
    )
    case = mixer.case(row, block.dim // block.heads)
    how = case.choose(mixer.implementation)
    if how not in ("blockwise", "splash"):
        return None
    n = row.shards
    size = case.block() if how == "blockwise" else attend.tile(row.length, row.length)
    # Of rows that are one document each: packed ones need no more.
    place = sharding.order(row.length, n).astype(np.int32)[None]
    tokens = Tokens(place, np.ones_like(place))
    mask = dataclasses.replace(case.mask, ordered=n == 1)
    needed = blockwise.needed(mask, size, tokens, tokens)
    ring = n > 1 and case.share(mixer.context) == "ring"
    return float(needed.sum()) / n, n if ring else 1


def _used(prog: Program, blocks: Sequence[stack.Block.Config]) -> float:
    """Returns how much of the room for tokens of its experts a device uses, in balance.

    It has room for all choices that the tokens of all who share the experts can make among its own.
    """
    n = prog.layout.size("expert")
    sparse = [b.ffn for b in blocks if isinstance(b.ffn, Moe.Config)]
    if not sparse:
        return 1.0
    k, own = sparse[0].top_k, sparse[0].experts // n
    return k / (n * min(k, own))


def words(blocks: Sequence[stack.Block.Config]) -> str:
    """The kinds of layers there are, in words."""
    kinds = []
    for block in blocks:
        parts = [
            type(c).__qualname__.split(".")[0] for c in (block.mixer, block.ffn) if c
        ]
        window = getattr(block.mixer, "window", None)
        parts[0] += f" {window}" if window else ""
        kinds.append(" + ".join(parts))
    return ", ".join(dict.fromkeys(kinds))
