"""Trees of arrays: paths, sizes, selection by path, and digests that no mesh can change.

The path of a leaf joins its keys with "/": `params/layers/attention/w_q`, `opt_state/0/mu/…`.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} in the order of the leaves.

    Raises:
        ValueError: two leaves with one path, as in `{"a/b": x, "a": {"b": y}}`.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(f"two leaves of the tree have the path {path!r}")
        flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any], like: Tree) -> Tree:
    """Returns a tree built as `like` from the leaves that `flat` holds at its paths."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [flat[p] for p in flatten(like)]
    )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts: `{"a/b": x}` becomes `{"a": {"b": x}}`.

    Raises:
        ValueError: a path that goes through another leaf, as in `{"a": x, "a/b": y}`.
    """
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
            if isinstance(node, dict):
                continue
            raise ValueError(f"the path {path!r} goes through the leaf {parent!r}")
        if name in node:
            raise ValueError(f"the leaf {path!r} is a parent of other leaves")
        node[name] = leaf
    return nested


def count(tree: Tree) -> int:
    """Returns the number of elements of all arrays (abstract ones too)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Returns the bytes of all arrays (abstract ones too), each counted once."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def mask(tree: Tree, patterns: Sequence[str]) -> Tree:
    """Returns a tree of bools: does the path match a pattern (`*` matches "/" too)?"""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: any(
            fnmatch.fnmatchcase(
                jax.tree_util.keystr(keys, simple=True, separator="/"), pattern
            )
            for pattern in patterns
        ),
        tree,
    )


@jax.jit
def digest(x: Array) -> UInt32[Array, ""]:
    """Returns a checksum of the bits of `x`, equal whatever mesh holds it.

    It is the sum modulo 2³² of mix(bits ^ key(coordinates)) over the elements. A sum of
    integers has no order, so each device adds up its own shard and one all-reduce of a
    scalar ends it; no array is gathered. `mix` is a bijection, so one changed element
    always changes the sum; other changes, exchanged elements too, are missed with
    probability 2⁻³². The key hashes each coordinate apart, so arrays of more than 2³²
    elements are safe.
    """
    key = jnp.uint32(0x9E3779B9)
    for axis in range(x.ndim):
        key = key + _axis_key(_iota(x, axis), axis)
    # Words of one element must not be exchangeable either: each has its own salt.
    sums = [
        jnp.sum(_mix(word ^ (key + jnp.uint32(salt))), dtype=jnp.uint32)
        for salt, word in enumerate(_words(x))
    ]
    return sum(sums[1:], sums[0])


def digests(tree: Tree) -> dict[str, UInt32[Array, ""]]:
    """Returns {path: digest} of all leaves, still on the device.

    One program for the tree: a device takes only so many programs at once, and emulated
    devices that wait in the collectives of one would never finish it.
    """
    return _digests(flatten(tree))


@jax.jit
def _digests(leaves: dict[str, Array]) -> dict[str, Array]:
    return {path: digest(leaf) for path, leaf in leaves.items()}


def _axis_key(coordinates: Array, axis: int) -> Array:
    return _mix(coordinates + jnp.uint32((axis + 1) * 0x85EBCA6B % 2**32))


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby, public domain), a bijection of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _iota(x: Array, axis: int) -> Array:
    """Returns the coordinates along `axis`, sharded as that axis of `x` is."""
    shape = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.are_all_axes_explicit:
        return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    spec = [part if i == axis else None for i, part in enumerate(sharding.spec)]
    return jax.lax.broadcasted_iota(
        jnp.uint32,
        shape,
        axis,
        out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)),
    )


def _words(x: Array) -> list[Array]:
    """Returns the bits of `x` as uint32 arrays of its shape, low word first."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(x.real) + _words(x.imag)
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    if x.dtype.itemsize <= 4:  # bool and narrow integers widen without loss
        return [x.astype(jnp.uint32)]
    x = x.astype(jnp.uint64)
    return [x.astype(jnp.uint32), (x >> 32).astype(jnp.uint32)]
