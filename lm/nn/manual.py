"""Manual regions: code that runs on each device's shard and writes its own collectives.

`manual` differentiates its body; `region` leaves that to a `jax.custom_vjp` around it.
"""

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from lm import sharding

_vmaps: contextvars.ContextVar[int] = contextvars.ContextVar("vmaps", default=0)


def manual(
    body: Callable[..., Any],
    in_specs: tuple[P, ...],
    out_specs: tuple[P, ...],
    name: str,
) -> Callable[..., Any]:
    """Returns a function that runs `body` on each device's shard, all mesh axes manual.

    A partly manual `shard_map` gathers every other axis at its boundary, so all are manual here.
    Under `jax.vmap` the mapped dimension of each mapped argument keeps its mesh axis and is split
    too; arguments that are not mapped are shared. The gradient is that of `body` on each shard;
    what it needs stays on its device and carries the `checkpoint_name` `name`.

    Args:
        body: from shards to a tuple of shards. It must not reduce over devices: the gradient of
            such a region is written by hand around `region`.
        in_specs: one for each argument.
        out_specs: one for each result.
        name: what a remat policy calls the results and what the backward needs.
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return region(body, in_specs, out_specs)(*args)

    # The backward's structure, known once the forward is traced; by the vmaps around it.
    cell: dict[int, tuple[Any, list[int | None]]] = {}
    forward = functools.partial(_forward, cell, body, in_specs, out_specs, name)
    call.defvjp(forward, functools.partial(_backward, cell, in_specs, out_specs))
    return call


def _forward(cell, body, in_specs, out_specs, name, *args):
    floats = _floats(args)

    def run(*shards: Any) -> Any:
        def of_floats(*values: Any) -> Any:
            given = dict(zip(floats, values, strict=True))
            return body(*(given.get(i, a) for i, a in enumerate(shards)))

        out, vjp = jax.vjp(of_floats, *(shards[i] for i in floats))
        leaves, tree = jax.tree.flatten(vjp)
        places = {id(a): i for i, a in enumerate((*shards, *out))}  # saved once
        known = [places.get(id(leaf)) for leaf in leaves]
        cell[_vmaps.get()] = tree, known
        return out, [x[None] for x, i in zip(leaves, known, strict=True) if i is None]

    out, rest = region(run, in_specs, (out_specs, sharding.everywhere()))(*args)
    out, rest = jax.tree.map(lambda x: checkpoint_name(x, name), (out, rest))
    return out, (*args, *out, *rest)


def _backward(cell, in_specs, out_specs, saved, cotangents):
    count = len(in_specs) + len(out_specs)

    def run(*shards: Any) -> Any:
        tree, known = cell[_vmaps.get()]
        rest = iter(shards[count : len(saved)])
        leaves = [next(rest)[0] if i is None else shards[i] for i in known]
        return jax.tree.unflatten(tree, leaves)(shards[len(saved) :])

    floats = _floats(saved[: len(in_specs)])
    rows = (sharding.everywhere(),) * (len(saved) - count)
    ins = (*in_specs, *out_specs, *rows, *out_specs)
    grads = region(run, ins, tuple(in_specs[i] for i in floats))(*saved, *cotangents)
    given = dict(zip(floats, grads, strict=True))
    return tuple(given.get(i) for i in range(len(in_specs)))


def _floats(args: Sequence[Any]) -> list[int]:
    return [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]


def region(
    body: Callable[..., Any], in_specs: tuple[P, ...], out_specs: Any, vmaps: int = 0
) -> Callable[..., Any]:
    """Returns `manual` without a gradient: wrap it in a `jax.custom_vjp` of your own.

    Args:
        body: from shards to a tree of shards.
        in_specs: one for each argument.
        out_specs: a tree, or a prefix of one, for the result.
        vmaps: how many vmaps are around `body` already.
    """

    @custom_vmap
    def call(*args: Any) -> Any:
        def counted(*shards: Any) -> Any:
            token = _vmaps.set(vmaps)
            try:
                return body(*shards)
            finally:
                _vmaps.reset(token)

        split = jax.shard_map(
            counted, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return split(*args)

    @call.def_vmap
    def mapped(size: int, batched: Sequence[bool], *args: Any) -> tuple[Any, Any]:
        del size
        lead = next(
            jax.typeof(a).sharding.spec[0]
            for a, m in zip(args, batched, strict=True)
            if m
        )
        ins = tuple(
            P(lead, *s) if m else s for s, m in zip(in_specs, batched, strict=True)
        )
        outs = jax.tree.map(
            lambda s: P(lead, *s), out_specs, is_leaf=lambda s: isinstance(s, P)
        )
        inner = jax.vmap(body, in_axes=tuple(0 if m else None for m in batched))
        result = region(inner, ins, outs, vmaps + 1)(*args)
        return result, jax.tree.map(lambda _: True, result)

    return call
