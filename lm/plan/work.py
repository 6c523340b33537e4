"""What a device computes in a step, and what it reads and writes for that."""

import math

from lm import batches
from lm.plan import flops, layer
from lm.plan.count import passes
from lm.plan.report import Work
from lm.program import Program


def work(prog: Program, parts: layer.Costs | None = None) -> Work:
    """Returns what a device computes in a step; `parts`: what a search takes their costs for."""
    e = prog.experiment
    length, devices = e.data.length, prog.layout.mesh.size
    written = batches.written(e.objective, e.data)
    tokens = e.train.batch_size * written / devices
    one, full = (
        flops.forward(e.model, length, causal=c, written=written) for c in (True, False)
    )
    done = _passes(prog, parts or layer.costs(prog))
    update = _update_bytes(prog)
    return Work(
        forward_flops=one,
        forward_flops_full=full,
        model_flops=3 * one * tokens,
        model_flops_full=3 * full * tokens,
        hardware_flops=done["flops"],
        hbm_bytes=done["bytes"] + update,
        waited_bytes=done["waited"] + update,
        starts=done["starts"] + len(prog.updates),
    )


def _passes(prog: Program, parts: layer.Costs) -> dict[str, float]:
    """Returns the operations, the bytes read and written, those that are waited for, and the
    kernels of all passes of a step. A stage runs one chunk in each tick, idle or not; without
    stages a pass runs all layers."""
    runs = passes(prog)
    groups = [
        (1 if prog.staged else group.count, runs.forward, runs.backward, group.cost)
        for group in parts.blocks
    ]
    groups.append((1, runs.forward, runs.backward, parts.embed))
    groups.append((1, runs.head, runs.head, parts.head))
    found: dict[str, float] = dict.fromkeys(("flops", "bytes", "waited", "starts"), 0.0)
    for count, forward, backward, cost in groups:
        for name in found:
            ahead, behind = (
                getattr(cost, f"{name}_{way}") for way in ("forward", "backward")
            )
            found[name] += count * (forward * ahead + backward * behind)
    return found


def _update_bytes(prog: Program) -> float:
    """Bytes of the optimizer's pass: parameters, gradients and two moments are read, all but the
    gradients written, in fp32."""
    entries = 0.0
    for path, spec in prog.updates.items():
        place = prog.sharding(spec)
        entries += math.prod(place.shard_shape(prog.shapes[path].shape))
    return 7 * 4 * entries
