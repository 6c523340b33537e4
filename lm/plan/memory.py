"""Bytes that a device holds in a train step, by what they are of, at its fullest moment.

State is exact. Of what a step makes, each moment that may be the fullest has a sum of its own: the
loss, when all that the forward kept is there and logits are; the backward, when beside that there
are gradients of all layers and one layer is computed; and the update.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lm import gathering, gradients, optim, sharding, train, trees
from lm.models.encoder_decoder import ENCODER
from lm.plan import jaxprs, layer, local, placement, report
from lm.program import STACK, Program

FP32 = 4
# Of a TPU's program: bytes of code (18 to 53 MB, measured), and the share of what a step makes that
# is lost in gaps between arrays (0.6 to 7 %, in the mean of seven programs 2 %).
CODE, GAPS = 32 * 2**20, 0.02
_each: dict[Any, float] = {}  # bytes of an optimizer's state for a byte of parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of a device's arguments."""

    parameters: int
    optimizer: int  # with averages and counters
    batch: int


def state(prog: Program, rough: bool = False) -> State:
    """Returns the bytes of the train state and of a batch on a device.

    Where it may be `rough`, the optimizer has as many for an entry as when it was looked at first.
    """
    if rough:
        key = repr(prog.experiment.optim), tuple(prog.shapes.items())
        entries = _bytes([_shape(prog, p, prog.updates[p]) for p in prog.shapes])
        if key not in _each:
            _each[key] = state(prog).optimizer / entries
        return State(
            parameters=_bytes([_shape(prog, p, prog.specs[p]) for p in prog.shapes]),
            optimizer=round(_each[key] * entries),
            batch=_bytes(train.abstract_batch(prog)),
        )
    stored = trees.nest({p: _shape(prog, p, prog.specs[p]) for p in prog.shapes})
    placed = trees.nest({p: _shape(prog, p, prog.updates[p]) for p in prog.shapes})

    def rest(params: Any) -> Any:
        averaged = prog.experiment.optim.ema is not None
        ema = optim.ema_init(params) if averaged else None
        return prog.optimizer.init(params), ema, optim.health_init(), 0

    with sharding.use(prog.layout):
        more = jax.eval_shape(rest, placed)
    return State(
        parameters=_bytes(stored),
        optimizer=_bytes(more),
        batch=_bytes(train.abstract_batch(prog)),
    )


def memory(prog: Program, parts: layer.Costs | None = None) -> report.Memory:
    """Returns what the fullest device holds at the fullest moment of a step.

    Searches give the costs of its `parts`, by which they look at it roughly.
    """
    return max(moments(prog, parts).values(), key=lambda m: m.total)


def moments(
    prog: Program, parts: layer.Costs | None = None
) -> dict[str, report.Memory]:
    """Returns what the fullest device holds at each moment that may be the fullest."""
    rough = parts is not None
    costs, there = parts or layer.costs(prog), state(prog, rough)
    grads = gradient(prog)
    kept = _kept(prog, costs)
    kept["ids"] = there.batch
    kept |= _cast(prog)
    held = placement.gathered_bytes(prog)
    head = costs.head
    block = max((g.cost for g in costs.blocks), key=lambda c: c.working_backward)
    # Of the chunk that is computed again; its gradients are counted as such.
    again = block.kept - grads.chunk if prog.staged else 0
    # Of a pipeline gradients add up from the first tick; else they come to be in the backward.
    early = grads.layers + grads.ends if prog.staged else 0

    def moment(**own: Any) -> report.Memory:
        usual = {"activations": kept, "layer": 0, "loss": 0, "collectives": 0}
        found = report.Memory(
            parameters=there.parameters,
            optimizer=there.optimizer,
            margin=0,
            **{**usual, **own},
        )
        found = dataclasses.replace(found, collectives=found.collectives + held)
        made = found.total - there.parameters - there.optimizer - there.batch
        tpu = prog.layout.platform == "tpu"
        return dataclasses.replace(
            found, margin=round(CODE + GAPS * made) if tpu else 0
        )

    found = {
        "loss": moment(
            gradients=grads.sums + early,
            loss=head.working_forward + head.kept - head.gathered_forward,
            collectives=head.gathered_forward,
        ),
        "backward": moment(
            gradients=grads.sums + grads.layers + grads.ends + grads.chunk,
            layer=again + block.working_backward - block.gathered_backward,
            collectives=block.gathered_backward + grads.waiting,
        ),
    }
    if not rough:
        found["update"] = moment(
            gradients=grads.sums or grads.layers + grads.ends,
            layer=update(prog).peak,
            activations={"ids": there.batch},
        )
    return found


def update(prog: Program) -> jaxprs.Total:
    """Returns what the optimizer costs a device; `peak` is beside gradients and state."""
    placed = trees.nest({p: _shape(prog, p, prog.updates[p]) for p in prog.shapes})

    def run(grads: Any, state: Any, params: Any, step: Any) -> Any:
        changes, state = prog.optimizer.update(grads, state, params, step=step)
        return optax.apply_updates(params, changes), state

    with sharding.use(prog.layout):
        state = jax.tree.map(prog.abstract, jax.eval_shape(prog.optimizer.init, placed))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        traced = jax.make_jaxpr(run)(placed, state, placed, step)
    found = jaxprs.total(traced)
    # The new state is written over the old one.
    return dataclasses.replace(
        found, peak=max(0, found.peak - _bytes(placed) - _bytes(state))
    )


def _kept(prog: Program, costs: layer.Costs) -> dict[str, int]:
    """Returns the bytes that the forward keeps for the backward, by what they are of."""
    if not prog.staged:
        kept = {"embedding": costs.embed.kept}
        for g in costs.blocks:
            kept[g.what] = kept.get(g.what, 0) + g.count * g.cost.kept + g.cost.shared
        return kept
    table = gradients.table(prog)
    stream = layer.stream(prog)
    kept = {
        "inputs of chunks": table.slots * stream,
        "between stages": (2 + table.head_slots) * stream,
    }
    if ENCODER in prog.stacks:
        read = layer.stream(prog, ENCODER)
        kept["inputs of chunks"] += table.slots * read
        kept["what is looked at"] = 2 * prog.microbatches * read  # and its gradient
    return kept


def _cast(prog: Program) -> dict[str, int]:
    """Returns the bytes of weights in the dtype of compute that live as long as both passes.

    XLA for TPUs casts the stored shares of all layers at once, before its loop over them, and keeps
    them for the backward where that computes layers again.
    """
    model = prog.experiment.model
    item = model.compute(prog.layout.platform).itemsize
    if prog.layout.platform != "tpu" or model.remat == "none" or item == FP32:
        return {}
    stacked = (p for p in prog.shapes if p.split("/")[0] == STACK)
    entries = sum(
        math.prod(local.local(_shape(prog, p, prog.specs[p]))) for p in stacked
    )
    return {"weights cast": entries * item}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """Bytes of gradients on a device."""

    layers: int
    ends: int  # of the embedding, the head and the last norm
    sums: int  # of earlier microbatches
    chunk: int  # of the layers of one tick, before they are added
    waiting: (
        int  # what a device has of the head's beside its share, until all are reduced
    )


def gradient(prog: Program) -> Gradient:
    """Returns what gradients take: fp32, as large as the weights that a step computes with."""
    sizes = {
        path: math.prod(local.local(_shape(prog, path, prog.working[path]))) * FP32
        for path in prog.shapes
    }
    layers = sum(n for p, n in sizes.items() if p.split("/")[0] == STACK)
    ends = sum(sizes.values()) - layers
    head = "head_vd" if "head_vd" in prog.shapes else "embed_vd"
    whole = local.local(_shape(prog, head, sharding.gathered(prog.working[head])))
    # Of microbatches, layers' are added when all are there, those of the ends as they come to be.
    many = prog.experiment.train.accumulate > 1
    return Gradient(
        layers=layers,
        ends=0 if many and not prog.staged else ends,
        sums=(layers + ends) * many,
        chunk=_chunk(prog, sizes),
        waiting=_waiting(prog, math.prod(whole) * FP32, sizes[head]),
    )


def _chunk(prog: Program, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of the gradients that one tick makes of a chunk: in its weights' dtype."""
    if not prog.staged:
        return 0
    total = 0
    for path, size in sizes.items():
        if path.split("/")[0] == STACK:
            held = gathering.dtypes(prog, path)[1].itemsize if prog.whole else FP32
            total += size // FP32 * held
    return total // prog.places.shape[1]


def _waiting(prog: Program, whole: int, share: int) -> int:
    """Returns what the backward of layers has of the head's gradient beside the step's share.

    XLA for accelerators reduces it to shares after the layers' backward. A tick of a pipeline adds
    it to those of earlier ones; for TPUs it is mostly reduced before the chunk's backward.
    """
    if not prog.staged:
        return whole - share
    return share if prog.layout.platform == "tpu" else whole


def _shape(prog: Program, path: str, spec: Any) -> jax.ShapeDtypeStruct:
    x = prog.shapes[path]
    return _placed(x.shape, x.dtype, prog.layout.mesh, spec)


@functools.lru_cache(maxsize=2**14)
def _placed(shape: Any, dtype: Any, mesh: Any, spec: Any) -> jax.ShapeDtypeStruct:
    place = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _bytes(tree: Any) -> int:
    return sum(local.size(x) for x in jax.tree.leaves(tree))
