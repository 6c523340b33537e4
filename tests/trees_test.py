"""Paths and digests of trees: what a mesh may not change, and what a digest must find."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm import trees

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "bool", "complex64"]
SPECS = [P(), P("data"), P("data", "tensor"), P(None, ("data", "tensor"))]


def random_array(dtype, shape=(8, 16, 4), seed=0):
    """Random bits, so that infinities, NaNs and negative zeros occur."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    size = jnp.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(np.prod(shape) * size), jnp.dtype(dtype)).reshape(
        shape
    )


def some_tree():
    params = {"embed": jnp.ones((4, 2)), "layers": {"w": jnp.zeros((3, 2, 2))}}
    return {"params": params, "opt": optax.adam(0.1).init(params), "ema": None}


def test_flatten_names_every_leaf_and_unflatten_rebuilds_the_tree():
    tree = some_tree()
    flat = trees.flatten(tree)
    assert "opt/0/mu/layers/w" in flat
    assert "opt/0/count" in flat
    assert len(flat) == len(jax.tree.leaves(tree))
    rebuilt = trees.unflatten(flat, tree)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(tree)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(rebuilt), flat.values(), strict=True)
    )


def test_nest_is_the_inverse_of_flatten_on_dicts():
    flat = trees.flatten(some_tree())
    assert trees.flatten(trees.nest(flat)) == flat


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_a_path_through_a_leaf_is_refused(flat):
    with pytest.raises(ValueError, match="'a"):
        trees.nest(flat)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="'a/b'"):
        trees.flatten({"a/b": 1, "a": {"b": 2}})


def test_sizes_count_abstract_arrays():
    tree = jax.eval_shape(some_tree)
    assert trees.count(tree["params"]) == 4 * 2 + 3 * 2 * 2
    assert trees.nbytes(tree["params"]) == 4 * (4 * 2 + 3 * 2 * 2)


def test_mask_selects_by_path():
    mask = trees.mask(some_tree()["params"], ["layers/*"])
    assert mask == {"embed": False, "layers": {"w": True}}


def digests_on(x, mesh, specs):
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
    return {int(trees.digest(y)) for y in placed}


@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_digest_is_the_same_on_every_mesh(axes):
    x = random_array("float32")
    digests = {int(trees.digest(jax.device_put(x, jax.devices()[0])))}
    for shape in ((4, 2), (1, 8)):
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(axes, axes))
        digests |= digests_on(x, mesh, SPECS)
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_of_any_type_is_the_same_sharded_and_whole(dtype):
    x = random_array(dtype)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    assert digests_on(x, mesh, [SPECS[-2]]) == {int(trees.digest(x))}


def test_digest_moves_no_array_between_devices():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    x = jax.device_put(
        random_array("float32"), NamedSharding(mesh, P("data", "tensor"))
    )
    text = trees.digest.lower(x).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert "u32[] all-reduce" in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_finds_every_flipped_bit(dtype):
    """Not with high probability but always: the hash of one element is a bijection."""
    x = random_array(dtype, (2, 3))
    before = int(trees.digest(x))
    bits = 1 if dtype == "bool" else 8
    for i in range(x.nbytes):
        for bit in range(bits):
            raw = bytearray(x.tobytes())
            raw[i] ^= 1 << bit
            flipped = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
            assert int(trees.digest(flipped)) != before


def test_digest_finds_what_a_plain_sum_would_not():
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    changed = {
        "columns exchanged": x[:, [1, 0, 2]],
        "rows exchanged": x[[1, 0]],
        "transposed": x.T,
        "reshaped": x.reshape(3, 2),
        "moved along": np.roll(x, 1),
        "two changes that cancel": x + np.array([[1, -1, 0], [0, 0, 0]], np.float32),
    }
    digests = {name: int(trees.digest(y)) for name, y in changed.items()}
    assert int(trees.digest(x)) not in digests.values()
    assert int(trees.digest(np.float32(0.0))) != int(trees.digest(np.float32(-0.0)))


def test_positions_beyond_32_bits_have_their_own_keys():
    """In a (2**20, 2**16) array a linear position modulo 2**32 would repeat 16 times."""
    rows = jnp.arange(16, dtype=jnp.uint32) * jnp.uint32(2**16)
    keys = trees._axis_key(rows, 0) + trees._axis_key(jnp.zeros_like(rows), 1)
    assert len(set(np.asarray(keys).tolist())) == 16
    huge = jax.ShapeDtypeStruct((2**20, 2**16), jnp.bfloat16)
    assert jax.eval_shape(trees.digest, huge).shape == ()


def test_digests_name_the_leaves_and_take_scalars_and_empty_arrays():
    tree = {"a": jnp.int32(3), "b": {"c": jnp.zeros((0, 4)), "d": jnp.ones(3)}}
    digests = trees.digests(tree)
    assert list(digests) == ["a", "b/c", "b/d"]
    assert int(digests["a"]) != int(trees.digests({"a": jnp.int32(4)})["a"])
    assert int(digests["b/c"]) == 0
