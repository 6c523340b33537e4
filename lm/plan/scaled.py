"""What a model's parts cost, by few traces: for searches, which ask for thousands of meshes.

What a device computes, keeps and moves is a line over the rows that it has: a part for weights and
one for activations. Layers of a pipeline's stage are as many layers without one. So traces of one
row and of two (of short rows: of a few and of twice as many) do for all batches and microbatches,
for any number of shares of weights (few stand for more), and for all pipelines with the same
tensor, sequence and expert axes. Stages of two stacks, or of layers of several kinds, are traced
as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import PartitionSpec as P

from lm import gathering, sharding
from lm.models import stack
from lm.plan import layer, local
from lm.plan.layer import Cost, Costs, Group, Trace
from lm.program import STACK, Program, varied

SHARES = 8  # of weights, that stand for more
TWO_SHARES = 2, 4  # of two stacks' weights: beyond them costs are a line
ENOUGH = 1024  # tokens of rows, beyond which costs are a line; before, less passes beside products
STAGES = 2, 4  # that a vocabulary is split over; beyond them costs are a line in shares

_known: dict[Any, Any] = {}


def costs(prog: Program) -> Costs:
    """Returns about what `layer.costs` does.

    Some per cent off: of what is not split evenly a device may have more than it has of two rows,
    and another moment may be the fullest (`tests/plan_test.py`).
    """
    if len(prog.stacks) == 1:
        return _with_weights(prog, _of(prog, SHARES))
    # What a stage of two stacks holds of weights and their gradients is traced with its layers.
    shares = max(prog.layout.mesh.shape[a] for a in sharding.GATHERED)
    near, far = TWO_SHARES
    if shares <= near:
        return _of(prog, near)
    beyond = (1 / near - 1 / shares) / (1 / near - 1 / far)
    return _line(_of(prog, near), _of(prog, far), 1 + beyond)


def _of(prog: Program, shares: int) -> Costs:
    """Returns the costs on a mesh with so many shares of weights, if it has as many."""
    count, mesh = layer.rows(prog), prog.layout.mesh.shape
    few = {a: min(mesh[a], shares) for a in sharding.GATHERED}
    sizes = {**mesh, **few, **dict.fromkeys(prog.layout.rules.replica, 1)}
    first = min(4, max(1, ENOUGH // prog.experiment.data.length))
    if count <= 2 * first:
        return _traced(prog, sizes, count)
    near, far = (_traced(prog, sizes, n) for n in (first, 2 * first))
    return _line(near, far, count / first)


def least(prog: Program, remats: Sequence[stack.Remat] = ()) -> Costs:
    """Returns no more than `costs` does, by traces of a mesh without tensor and experts' shares.

    The devices that share a layer cannot do better than to share all of it. What parts hold while
    they run is left out, and half of what is done for weights: they may be gathered in fewer bytes.

    Args:
        prog: the program.
        remats: it may have any of these; none: its own.
    """
    layout, rows = prog.layout, layer.rows(prog)
    fixed, each = _floor(prog, tuple(remats) or (prog.experiment.model.remat,))
    tensor, ends = layout.size("mlp"), layout.size("vocab")
    experts = layout.size("expert")

    def share(fixed: Cost, each: Cost, tokens: int, weights: int) -> Cost:
        found = {}
        for name, a in vars(fixed).items():
            part = min(a, a / (2 * weights))
            found[name] = type(a)(part + getattr(each, name) * rows / tokens)
        return Cost(**found)

    def group(fixed: Group, each: Group) -> Group:
        cost = share(fixed.cost, each.cost, tensor, tensor * experts)
        return dataclasses.replace(fixed, cost=cost)

    return Costs(
        blocks=tuple(map(group, fixed.blocks, each.blocks)),
        embed=share(fixed.embed, each.embed, ends, ends),
        head=share(fixed.head, each.head, ends, ends),
    )


def _floor(prog: Program, remats: tuple[stack.Remat, ...]) -> tuple[Costs, Costs]:
    """The least of these remats without shares: of no rows, and for each row more."""
    layout = dataclasses.replace(prog.layout, rules=sharding.Rules())
    alone = dataclasses.replace(prog, layout=layout, working=prog.specs)
    whole = layout.rules.length  # attention over shares of a row is another
    sizes = {a: n if a in whole else 1 for a, n in layout.mesh.shape.items()}
    key = remats, _key(alone, sizes)
    if key not in _known:
        found = []
        for remat in remats:
            e = alone.experiment
            model = dataclasses.replace(e.model, remat=remat)
            changed = varied(alone, dataclasses.replace(e, model=model))
            found.append([_traced(changed, sizes, n) for n in (1, 2)])
        fixed = [_map(lambda _, a, b: 2 * a - b, *pair) for pair in found]
        each = [_map(lambda _, a, b: b - a, *pair) for pair in found]
        _known[key] = _map(_lowest, *fixed), _map(_lowest, *each)
    return _known[key]


def _lowest(name: str, *numbers: float) -> float:
    return 0 if name.startswith(("working", "gathered")) else min(numbers)


def _line(one: Any, two: Any, count: float) -> Any:
    """Returns costs of `count` by those of one and of two: a line through both."""
    return _map(lambda _, a, b: type(a)(a + (count - 1) * (b - a)), one, two)


def _map(f: Callable[..., Any], *some: Any) -> Any:
    """Returns costs whose numbers are f(name, *numbers of `some`)."""
    one = some[0]
    if isinstance(one, tuple):
        return tuple(_map(f, *each) for each in zip(*some, strict=True))
    found = {}
    for name, value in vars(one).items():
        given = [getattr(c, name) for c in some]
        if isinstance(value, int | float):
            found[name] = f(name, *given)
        else:
            found[name] = value if isinstance(value, str) else _map(f, *given)
    return type(one)(**found)


def _key(prog: Program, sizes: dict[str, int]) -> Any:
    """Returns what costs depend on, besides rows."""
    e = prog.experiment
    places: Any = prog.places.shape
    if not _uniform(prog):
        all_of = (p.layers for p in prog.stacks.values())
        places = tuple((here.shape, here.tobytes()) for here in all_of)
    what = e.model, e.objective, e.data.length, e.data.isolate
    on = prog.layout
    where = tuple(sizes.values()), on.rules, on.platform, on.chip
    return (*what, *where, prog.whole, places)


def _traced(prog: Program, sizes: dict[str, int], count: int) -> Costs:
    """Returns the costs of so many rows on a mesh of these sizes."""
    key = count, _key(prog, sizes)
    if key not in _known:
        here = _on(prog, sizes)
        trace = Trace(here, count)
        blocks = _blocks(here, trace) if _uniform(here) else tuple(trace.blocks())
        embed, head = _ends(here, sizes, count)
        _known[key] = Costs(blocks=blocks, embed=embed, head=head)
    return _known[key]


def _on(prog: Program, sizes: dict[str, int]) -> Program:
    """Returns the program on a mesh of these sizes, no array split over one device."""

    def split(spec: P) -> P:
        kept = [[a for a in sharding.names(e) if sizes[a] > 1] for e in spec]
        return P(*(tuple(axes) or None for axes in kept))

    return dataclasses.replace(
        prog,
        layout=layer.sized(prog.layout, sizes),
        specs={path: split(spec) for path, spec in prog.specs.items()},
        working={path: split(spec) for path, spec in prog.working.items()},
    )


def _uniform(prog: Program) -> bool:
    """Whether all layers are of one kind, so that a stage's are as many of them."""
    return prog.staged and len(prog.stacks) == len(prog.chunks.stacks) == 1


def _blocks(prog: Program, trace: Trace) -> tuple[Group, ...]:
    """The layers that a stage runs at a time, of which each costs what it costs without stages.

    Beside what a layer needs there is what enters and leaves all of them; see `_with_weights`.
    """
    group = trace.groups()[0]
    _, rounds, count = prog.places.shape
    stream, cost = local.size(trace.stream(trace.inner)), layer.again(group.cost)
    added = ("flops", "bytes", "waited", "starts", "kept")
    many = {n: v * count for n, v in vars(cost).items() if n.startswith(added)}
    held = cost.working_backward + 2 * stream
    ahead = cost.working_forward + stream
    cost = dataclasses.replace(
        cost, **many, working_forward=ahead, working_backward=held
    )
    return (dataclasses.replace(group, count=rounds, layers=count, cost=cost),)


def _with_weights(prog: Program, found: Costs) -> Costs:
    """Adds to a stage's backward the gradients of all weights of its chunk, as held in a step."""
    if not _uniform(prog):
        return found
    size = 0
    for path, x in prog.shapes.items():
        if path.split("/")[0] == STACK:
            spec = (prog.working if prog.whole else prog.specs)[path]
            dtype = gathering.dtypes(prog, path)[1] if prog.whole else x.dtype
            own = prog.sharding(spec).shard_shape(x.shape)
            size += math.prod(own) * dtype.itemsize
    (group,) = found.blocks
    held = group.cost.working_backward + size // group.count
    cost = dataclasses.replace(group.cost, working_backward=held)
    return dataclasses.replace(found, blocks=(dataclasses.replace(group, cost=cost),))


def _ends(prog: Program, sizes: dict[str, int], count: int) -> tuple[Cost, Cost]:
    """The embedding and the head, whose costs are a line in a device's share of the vocabulary."""

    def both(stages: int) -> tuple[Cost, Cost]:
        # Experts have rows of their own, as fsdp's devices have.
        few = {**sizes, **dict.fromkeys(prog.layout.rules.expert, 1)}
        few |= dict.fromkeys(prog.layout.rules.layers, stages)
        trace = Trace(_on(prog, few), count)
        return trace.embed(), trace.head()

    stages, (near, far) = prog.layout.size("layers"), STAGES
    rows, tensor = prog.experiment.model.vocab_rows, prog.layout.size("mlp")
    if stages <= near or rows % (far * tensor):
        return both(stages)
    beyond = (1 / near - 1 / stages) / (1 / near - 1 / far)
    return _line(both(near), both(far), 1 + beyond)
