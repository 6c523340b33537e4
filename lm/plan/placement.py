"""What each device holds of a run's state, and what it holds that another device holds too."""

import math
from collections import defaultdict

import jax

from lm import batches, gathering, sharding
from lm.nn import attend
from lm.program import Program
from lm.terminal import size
from lm.train import TrainState

LARGE = 2**20  # bytes on a device above which a copy is named


def lines(prog: Program, state: TrainState) -> list[str]:
    """Returns lines for the user: bytes a device by what and by logical axis, and large copies."""
    whole = {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state) + held(state.ema),
        "gradients": sum(working(prog, path) for path in prog.shapes) * 4,  # fp32
    }
    if gathered := gathered_bytes(prog):
        whole["weights gathered for a step"] = gathered
    parts = ", ".join(f"{name} {size(n)}" for name, n in whole.items())
    return [f"a device holds: {parts}", *_by_axis(prog), *copies(prog)]


def attention(prog: Program, packed: bool | None = None) -> str:
    """Returns how attention is computed in each kind of layer that has it, "" where none has;
    `packed` instead of what rows are."""
    model, layout = prog.experiment.model, prog.layout
    row = attend.Row(
        layout=layout,
        length=prog.experiment.data.length,
        dtype=str(model.compute(layout.platform)),
        packed=prog.packed if packed is None else packed,
    )
    written = batches.written(prog.experiment.objective, prog.experiment.data)
    return " and ".join(dict.fromkeys(model.attends(row, written)))


def gathered_bytes(prog: Program) -> int:
    """Returns the bytes of the weights that a device holds gathered (`pipeline.gather=step`)."""
    return sum(
        working(prog, path) * gathering.dtypes(prog, path)[1].itemsize
        for path, spec in prog.working.items()
        if spec != prog.specs[path]
    )


def copies(prog: Program) -> list[str]:
    """Returns a line for each mesh axis along which large parameters are whole, but needn't be.

    Data is left out: its devices are replicas.
    """
    mesh = prog.layout.mesh.shape
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for path, spec in prog.specs.items():
        used = {a for entry in spec for a in sharding.names(entry)}
        for axis, n in mesh.items():
            if n == 1 or axis in used or axis in prog.layout.rules.replica:
                continue
            if (held := _bytes(prog, path)) > LARGE and _could_split(prog, path, n):
                found[axis].append((held, path))
    return [
        f"copied along {axis} {mesh[axis]}: {size(sum(n for n, _ in some))} a device, "
        + ", ".join(f"{path} {size(n)}" for n, path in sorted(some, reverse=True))
        + "; mesh.fsdp splits them"
        for axis, some in found.items()
    ]


def _by_axis(prog: Program) -> list[str]:
    """Returns one line: bytes of the parameters by the logical axes that split them."""
    groups: dict[str, int] = defaultdict(int)
    for path, spec in prog.specs.items():
        axes = prog.axes[path]
        split = [a for a, entry in zip(axes, spec, strict=True) if entry is not None]
        groups[" x ".join(split) or "whole"] += _bytes(prog, path)
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    if list(groups) == ["whole"]:
        return []
    return ["  split over " + ", ".join(f"{k}: {size(n)}" for k, n in ordered)]


def _could_split(prog: Program, path: str, n: int) -> bool:
    shape = _local(prog, path)
    return any(size % n == 0 for size in shape)


def _local(prog: Program, path: str) -> tuple[int, ...]:
    place = prog.sharding(prog.specs[path])
    return place.shard_shape(prog.shapes[path].shape)


def working(prog: Program, path: str) -> int:
    """Entries of a parameter that a device computes with."""
    place = prog.sharding(prog.working[path])
    return math.prod(place.shard_shape(prog.shapes[path].shape))


def _bytes(prog: Program, path: str) -> int:
    return math.prod(_local(prog, path)) * 4


def held(tree: object) -> int:
    """Bytes of a device's shards of a tree, real or abstract."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
