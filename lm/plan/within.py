"""What the layers of a train step have to send: a formula for each mesh axis inside of them.

Letters as in `lm.plan.minimum`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from lm.models.encoder_decoder import ENCODER
from lm.models.stack import Block
from lm.nn.attend import Case
from lm.nn.blockwise import Mask
from lm.nn.moe import Dropless, Moe
from lm.nn.recurrent import Gru, Lstm
from lm.plan.count import FP32, Count, Layers, Term

BEHIND = ("after", "both", "post")  # where a norm asks for the output in front of it


def of(count: Count) -> Iterable[Term]:
    """Returns what the layers of all stacks send."""
    for layers in count.stacks.values():
        if layers.block is not None:
            yield from _tensor(count, layers, layers.block)
            yield from _looked_at(count, layers)
            yield from _states(count, layers, layers.block)
            yield from _keys(count, layers, layers.block)
            yield from _experts(count, layers)


def _tensor(count: Count, layers: Layers, block: Block.Config) -> Iterable[Term]:
    """Megatron: the sum of attention's and of the feed-forward's output, and of the gradient
    of their inputs; under sequence parallelism each sum is a reduce-scatter behind and an
    all-gather before. A recomputed layer forms attention's output again, and its last one only
    where a norm stands behind it.
    """
    over, p = count.layout.axes("mlp"), count.passes
    outs = count.repeated(layers, "attention")
    last = outs if block.norms in BEHIND else layers.before * p.backward
    split = over and over[0] in count.layout.axes("residual")
    alone = block.ffn is None  # then attention's output, or the state's, is the last
    for operand, parts, more in (
        (layers.act, layers.looks, last if alone else outs),
        (layers.act, layers.dense, last),
        (_routed(count), layers.sparse, last),
    ):
        sums = (p.forward + p.backward + more) * parts
        if not split:
            yield count.term("tensor: layers", "all-reduce", over, operand, sums)
            continue
        yield count.term("tensor: layers", "reduce-scatter", over, operand, sums)
        # Inputs are gathered again.
        gathers = (p.forward + layers.again * p.backward + p.backward) * parts
        yield count.term("tensor: layers", "all-gather", over, operand, gathers)


def _looked_at(count: Count, layers: Layers) -> Iterable[Term]:
    """What an encoder made: all layers that look at it add up its gradient, which is summed over
    devices once. Where its length is split it is gathered once for all of them, in a stage's
    backward again."""
    if not layers.crosses:
        return
    over, p = count.layout.axes("mlp"), count.passes
    act = count.stacks[ENCODER].act
    split = over and over[0] in count.layout.axes("residual")
    kind = "reduce-scatter" if split else "all-reduce"
    yield count.term("tensor: looked at", kind, over, act, p.backward)
    if split:
        times = p.forward + count.prog.staged * p.backward
        yield count.term("tensor: looked at", "all-gather", over, act, times)


def _states(count: Count, layers: Layers, block: Block.Config) -> Iterable[Term]:
    """Every token's product with the state that the token before left: it is gathered, and its
    gradient summed in fp32. All are gathered once more for the gradient of the matrix.
    """
    if not isinstance(block.mixer, Lstm.Config | Gru.Config):
        return
    over, p = count.layout.axes("mlp"), count.passes
    size = count.b * layers.t * block.mixer.width(block.dim) * count.item
    runs = (p.forward + count.repeated(layers, "keys")) * layers.mixers
    back = p.backward * layers.mixers
    once = count.term("tensor: states", "all-gather", over, size, runs)
    yield dataclasses.replace(once, waits=layers.T * runs if over else 0)
    yield count.term("tensor: states", "all-gather", over, size, back)
    grads = count.term(
        "tensor: states", "all-reduce", over, size / count.item * FP32, back
    )
    yield dataclasses.replace(grads, waits=layers.T * back if over else 0)


def _keys(count: Count, layers: Layers, block: Block.Config) -> Iterable[Term]:
    """Keys, values and their ids of the other devices come, forward and backward (and again
    where attention is), and their gradients in fp32 go home: by C - 1 hops, or gathered."""
    over, C, p = count.layout.axes("length"), count.layout.size("length"), count.passes
    if C == 1:
        return
    mixer: Any = block.mixer
    head_dim = mixer.head_dim or block.dim // block.heads
    heads = max(1, block.kv_heads // count.layout.size("kv_heads"))
    for source, parts in (
        (layers, layers.mixers),
        (count.stacks.get(ENCODER, layers), layers.crosses),
    ):
        entries = 2 * count.b * source.t * heads * head_dim
        shared = entries * count.item + 8 * count.b * source.t
        forward, back = p.forward * parts, p.backward * parts
        bias = source is layers and count.model.relative is not None
        if _context(count, layers.T, source.T, mixer, head_dim, bias) == "ring":
            again = count.repeated(layers, "keys") * parts
            kind, size = "collective-permute", (C - 1) * shared
            yield count.term("keys", kind, over, size, forward + again + back)
            grads = (C - 1) * entries * FP32
            yield count.term("keys: gradients", kind, over, grads, back)
            continue
        # What is gathered to form attention again serves its backward too.
        yield count.term("keys", "all-gather", over, C * shared, forward + back)
        grads = C * entries * FP32
        yield count.term("keys: gradients", "reduce-scatter", over, grads, back)


def _context(
    count: Count, queries: int, keys: int, mixer: Any, head_dim: int, bias: bool
) -> str:
    case = Case(
        platform=count.layout.platform,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        dtype="bfloat16",
        packed=True,
        mask=Mask(scale=1.0),
        shards=count.layout.size("length"),
        bias=bias,
    )
    return case.share(mixer.context)


def _routed(count: Count) -> float:
    """Bytes of a device's buffers for experts: E times the room of each of its rows. Where
    none is dropped, as much as there are choices: routing in balance."""
    ffn, layers = count.model.ffn, count.written
    if not isinstance(ffn, Moe.Config):
        return 0.0
    room = ffn.room(layers.T)
    slots = count.b * layers.t * ffn.top_k
    if room is not None and not isinstance(ffn.dispatch, Dropless):
        slots = count.b * ffn.experts * min(room, layers.t)
    return slots * count.model.dim * count.item


def _experts(count: Count, layers: Layers) -> Iterable[Term]:
    """Buffers go to the experts and come back, both ways; again in a recomputed layer."""
    over, p = count.layout.axes("expert"), count.passes
    runs = 2 * (p.forward + p.backward + layers.again * p.backward)
    yield count.term(
        "experts", "all-to-all", over, _routed(count), runs * layers.sparse
    )
