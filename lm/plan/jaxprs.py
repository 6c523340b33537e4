"""What a traced program costs one device: operations, memory traffic, and what it holds at once.

Read from the jaxpr, whose types say how each array is sharded. Compilers fuse elementwise work into
what reads it, so an array counts as stored only where something else than elementwise work makes
or takes it: products, reductions, lookups, collectives, loops, kernels.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import AxisType

from lm.nn import attend
from lm.plan import kernels, local
from lm.plan.kernels import Buffer, Kernel, Total

# Another view of the same bytes.
VIEWS = {
    *("reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "name"),
    *("optimization_barrier", "stop_gradient", "pvary", "mesh_cast", "rev"),
    *("random_wrap", "random_unwrap", "bitcast_convert_type", "broadcast_in_dim"),
}
# What is read is no more than what comes out.
PARTS = {"slice", "dynamic_slice", "gather", "split"}
UPDATES = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}
MOVES = {
    *(
        "all_gather",
        "psum",
        "psum2",
        "psum_invariant",
        "pmax",
        "pmin",
        "reduce_scatter",
    ),
    *("all_to_all", "ppermute", "ragged_all_to_all", "all_gather_invariant"),
}
STORED = {  # written to memory by a kernel of their own
    *("sort", "top_k", "approx_top_k", "cumsum", "cumlogsumexp", "cummax", "cumprod"),
    *("rng_bit_generator", "argmax", "argmin"),
}
PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
LOOPS = {
    "scan": "scan",
    "while": "while_",
    "cond": "cond",
    "pallas_call": "pallas_call",
}


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """What a jaxpr does not say, as it depends on numbers that are not there yet."""

    pairs: float = (
        0.0  # of blocks of queries and keys that attention computes in a pass
    )
    hops: int = (
        1  # loops over blocks that a pass is made of: shares of keys that come by
    )
    rows: float = 1.0  # share of the room for rows of experts that is in use
    late: bool = False  # gradients of weights are formed when a layer's own is done
    # Bytes that the chip's memory gives in the time of one operation of a large product.
    beside: float = 0.0
    through: bool = False  # products do the elementwise work beside them
    copied: bool = (
        False  # what a kernel reads of a loop's arrays is cut out of them first
    )


class _Value:
    """An array that may not be in memory: then what is read to make it."""

    __slots__ = ("buffer", "reads", "size")

    def __init__(
        self,
        size: int,
        buffer: Buffer | None = None,
        reads: Mapping[Buffer, int] | None = None,
    ):
        self.size, self.buffer = size, buffer
        self.reads = reads if reads is not None else {}

    def read(self) -> Mapping[Buffer, int]:
        """Bytes that are read of each array for it."""
        return {self.buffer: self.buffer.size} if self.buffer else self.reads


def total(closed: Any, unsaid: Unsaid = Unsaid()) -> Total:
    """Returns what a closed jaxpr costs; arguments are not counted, results stay."""
    walk = _Walk(unsaid)
    args = [_argument(v.aval) for v in closed.jaxpr.invars]
    outs = walk.run(
        closed.jaxpr, [_argument(v.aval) for v in closed.jaxpr.constvars], args
    )
    return walk.total([walk.store(v) for v in outs])


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Of a program that goes forward and then back."""

    forward: Total
    backward: Total
    kept: tuple[tuple[tuple[int, ...], int], ...]  # what backward reads: (shape, bytes)


def gradient(closed: Any, mark: str, unsaid: Unsaid = Unsaid()) -> Gradient:
    """Returns what a closed jaxpr costs before and behind a mark; arguments are not counted.

    Args:
        closed: from `jax.make_jaxpr`, of a function that goes forward, calls
            `checkpoint_name(x, mark)` with its first results x, and then goes back.
        mark: the name.
        unsaid: what the jaxpr does not say.
    """
    jaxpr, walk = closed.jaxpr, _Walk(unsaid)
    named = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.params.get("name") == mark]
    first, after = named[0], named[-1] + 1
    env = dict(
        zip(jaxpr.invars, map(_argument, (v.aval for v in jaxpr.invars)), strict=True)
    )
    env |= {v: _argument(v.aval) for v in jaxpr.constvars}
    walk.equations(jaxpr.eqns[:first], env)
    outs = [walk.store(_value(env, eqn.invars[0])) for eqn in jaxpr.eqns[first:after]]
    walk.equations(jaxpr.eqns[first:after], env)
    back = _Walk(unsaid)
    behind = jaxpr.eqns[after:]
    read = {a for eqn in behind for a in eqn.invars if not isinstance(a, core.Literal)}
    kept: dict[Buffer, tuple[int, ...]] = {}
    inner = {}
    for var in read & env.keys():
        buffer = walk.store(env[var])
        inner[var] = _argument(var.aval)
        if not buffer.held and buffer not in outs:
            kept.setdefault(buffer, var.aval.shape)
    back.equations(behind, inner)
    grads = [_value(inner, v) for v in jaxpr.outvars]
    return Gradient(
        walk.total([*outs, *kept]),
        back.total([back.store(v) for v in grads]),
        tuple((shape, b.size) for b, shape in kept.items()),
    )


def _argument(aval: Any) -> _Value:
    n = local.size(aval)
    return _Value(n, Buffer(n, held=True))


def _value(env: Mapping[Any, _Value], atom: Any) -> _Value:
    return _Value(0) if isinstance(atom, core.Literal) else env[atom]


class _Walk:
    """Kernels of a program, in its order."""

    def __init__(self, unsaid: Unsaid, length: int = 1):
        self.unsaid = unsaid
        self.length = length  # of the scan that this is the body of
        self.kernels: list[Kernel] = []
        self.loops: list[Total] = []

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value]
    ) -> list[_Value]:
        """Returns the results; calls are entered."""
        env: dict[Any, _Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = const if isinstance(const, _Value) else _argument(var.aval)
        env.update(zip(jaxpr.invars, args, strict=True))

        self.equations(jaxpr.eqns, env)
        return [_value(env, a) for a in jaxpr.outvars]

    def equations(self, eqns: Sequence[Any], env: dict[Any, _Value]) -> None:
        """Goes through equations; `env` has the values of variables."""
        for eqn in eqns:
            outs = self.equation(eqn, [_value(env, a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))

    def equation(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in LOOPS:
            made = getattr(self, LOOPS[name])(eqn, ins)
            for value, var in zip(made, eqn.outvars, strict=True):
                value.size = local.size(var.aval)  # whatever room its tiles take
            return made
        sizes = [local.size(v.aval) for v in eqn.outvars]
        if called := _called(eqn):
            # Where XLA shards, types do not say how: of lookups, all that is there.
            return (
                self.kernel(ins, sizes) if _auto(called[0]) else self.run(*called, ins)
            )
        if name in PRODUCTS:
            return [self.product(eqn, ins, sizes[0])]
        if name == "reshard" and sizes[0] > local.size(eqn.invars[0].aval):
            return self.kernel(ins, sizes, moved=True)
        if name in MOVES:
            return self.kernel(ins, sizes, moved=True)
        if name in VIEWS and len(ins) == len(sizes):
            return [
                v if v.size == n else self.fused([v], n)
                for v, n in zip(ins, sizes, strict=True)
            ]
        if name in UPDATES:
            return [self.update(ins, sizes[0])]
        if name in STORED or name.startswith("reduce"):
            return self.kernel(ins, sizes)
        if attend.IN_NAME in (kernel := eqn.params.get("target_name", name)):
            return self.kernel(ins, sizes, flops=local.attention(eqn, kernel))
        outs = [self.fused(ins, n, part=name in PARTS) for n in sizes]
        whole = ins[0].buffer if name in PARTS and ins else None
        if whole and not whole.held and 2 * sum(sizes) < whole.size:
            for v in outs:  # cut out now, so that the rest can go
                self.store(v)
        return outs

    def fused(self, ins: Sequence[_Value], n: int, part: bool = False) -> _Value:
        """Elementwise work: done where it is read."""
        reads: dict[Buffer, int] = {}
        for v in ins:
            for buffer, count in v.read().items():
                count = min(count, n) if part else count
                reads[buffer] = max(reads.get(buffer, 0), count)
        return _Value(n, reads=reads)

    def store(self, value: _Value) -> Buffer:
        """Returns the array in memory, written now if it is not there."""
        if value.buffer is None:
            value.buffer = Buffer(value.size)
            self.kernels.append(Kernel(value.reads, (value.buffer,), fused=True))
        return value.buffer

    def kernel(
        self,
        ins: Sequence[_Value],
        sizes: Sequence[int],
        moved: bool = False,
        stored: bool = False,
        **more: Any,
    ) -> list[_Value]:
        """What elementwise work cannot go on behind; nor before it, if it reads `stored` arrays."""
        for v in ins if stored or moved else ():
            self.store(v)
        reads = self.fused(ins, 0).reads
        outs = [Buffer(n, moved=moved) for n in sizes]
        self.kernels.append(Kernel(reads, tuple(outs), **more))
        return [_Value(b.size, b) for b in outs]

    def product(self, eqn: Any, ins: list[_Value], n: int) -> _Value:
        found = local.product(eqn)
        # Reduced and scattered: the device's own sum is there first, whole.
        whole = max(0, found.entries * eqn.outvars[0].aval.dtype.itemsize - n)
        inner = whole + found.gathered
        share = self.unsaid.rows if "ragged" in eqn.primitive.name else 1.0
        more = {"flops": found.flops * share, "inner": inner, "gathered": inner}
        more["product"] = True
        return self.kernel(ins, [n], stored=True, **more)[0]

    def update(self, ins: list[_Value], n: int) -> _Value:
        """Written where the old array lies, if that is nobody else's."""
        buffer = self.store(ins[0])
        if buffer.held:
            return self.kernel(ins, [n])[0]
        reads = dict(self.fused(ins[1:], 0).reads)
        new = sum(reads.values())
        reads[buffer] = 0
        self.kernels.append(Kernel(reads, (), traffic=2.0 * new, into=buffer))
        return _Value(n, buffer)

    def scan(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        # What is stacked has one dimension more outside; carried results come first.
        pairs = zip(eqn.outvars, body.jaxpr.outvars, strict=True)
        carried = sum(len(out.aval.shape) == len(v.aval.shape) for out, v in pairs)
        one, sizes = self._inside(body, length, carried)
        self.loops.append(one)
        stacked = [n * length for n in sizes[carried:]]
        return self._looped([*sizes[:carried], *stacked], ins, one, length)

    def while_(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        one, sizes = self._inside(eqn.params["body_jaxpr"], self.length)
        times = 1.0
        if (
            one.flops and self.unsaid.pairs
        ):  # attention's, over the blocks that are needed
            times = self.unsaid.pairs / self.unsaid.hops / self.length
        return self._looped(sizes, ins, one, times)

    def cond(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        some = [self._inside(b, self.length) for b in eqn.params["branches"]]
        one, sizes = max(some, key=lambda t: (t[0].flops, t[0].traffic))
        return self._looped(sizes, ins, one, 1)

    def _inside(
        self, body: Any, length: int, carried: int | None = None
    ) -> tuple[Total, list[int]]:
        """Returns what a loop's body costs, of whose results the first so many stay to its end,
        and the bytes of all of them."""
        inside = _Walk(self.unsaid, length)
        args = [_argument(v.aval) for v in body.jaxpr.invars]
        outs = inside.run(body.jaxpr, body.consts, args)
        stored = [inside.store(v) for v in outs]
        return inside.total(stored, carried), [b.size for b in stored]

    def _looped(
        self, sizes: Sequence[int], ins: Sequence[_Value], one: Total, times: float
    ) -> list[_Value]:
        return self.kernel(
            ins,
            sizes,
            stored=True,
            flops=one.flops * times,
            traffic=one.traffic * times,
            waited=one.waited * times,
            starts=one.starts * times,
            inner=one.peak,
            gathered=one.gathered,
        )

    def pallas_call(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        """Attention's kernels: for each row and head, pairs of blocks of queries and of keys."""
        largest = max(
            (v.aval for v in eqn.outvars), key=local.size
        )  # [rows, heads, T, H]
        one = _products(eqn.params["jaxpr"])
        flops = one * math.prod(largest.shape[:-2]) * self.unsaid.pairs
        for value, var in zip(ins, eqn.invars, strict=True):
            buffer, room = self.store(value), local.tiled(var.aval)
            if buffer.held and self.unsaid.copied and self.length > 1:
                value.buffer = Buffer(room)
                copy = Kernel({buffer: buffer.size}, (value.buffer,))
                self.kernels.insert(0, copy)
            buffer.size = max(buffer.size, room)
        sizes = [local.tiled(v.aval) for v in eqn.outvars]
        return self.kernel(ins, sizes, stored=True, flops=flops)

    def total(self, outs: Sequence[Buffer], carried: int | None = None) -> Total:
        """Returns what all kernels cost, see `kernels.total`."""
        said = self.unsaid
        more = self.loops, said.beside, said.through
        return kernels.total(self.kernels, outs, carried, said.late, *more)


def _products(jaxpr: Any) -> float:
    """Returns the operations of all products in a kernel, whose results are effects."""
    count = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            count += local.product(eqn).flops
        count += sum(map(_products, core.jaxprs_in_params(eqn.params)))
    return count


def _called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """Returns the jaxpr and the constants of what an equation calls, if it does just that."""
    for key in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is None:
            continue
        jaxpr = getattr(inner, "jaxpr", inner)
        if len(jaxpr.invars) == len(eqn.invars):
            return jaxpr, getattr(inner, "consts", ())
    return None


def _auto(jaxpr: Any) -> bool:
    """Whether a jaxpr's arrays are sharded as XLA sees fit."""
    types = (getattr(v.aval, "sharding", None) for v in jaxpr.outvars)
    meshes = (t.mesh for t in types if t is not None and t.mesh.size > 1)
    return any(AxisType.Auto in mesh.axis_types for mesh in meshes)
