"""The axis table, meshes and manual regions: what does not fit is refused, nothing is gathered."""

import dataclasses
import functools
import math
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax import lax
from jax.sharding import PartitionSpec as P

from lm import sharding, train
from lm.nn import attend, manual
from lm.nn.blockwise import Mask, Tokens
from lm.sharding import MeshConfig, Rules


def layout(**sizes):
    return toy.layout(MeshConfig(**{"data": 1, **sizes}))


# The table.


def test_specs_leave_out_axes_of_one_device():
    with sharding.use(layout(data=2, fsdp=2, tensor=2)):
        assert sharding.spec("batch", "length", None) == P(("data", "fsdp"), None, None)
        assert sharding.spec("vocab", "embed") == P("tensor", "fsdp")
    with sharding.use(layout(data=8)):
        assert sharding.spec("vocab", "embed") == P(None, None)


def test_sequence_parallelism_splits_the_residual_stream_over_tensor():
    with sharding.use(layout(data=2, tensor=4, sequence_parallel=True)):
        assert sharding.spec("batch", "residual", None) == P("data", "tensor", None)
        assert sharding.spec("batch", "length", None) == P("data", None, None)


def test_a_mesh_axis_used_twice_is_refused():
    with (
        sharding.use(layout(tensor=8)),
        pytest.raises(ValueError, match="two dimensions"),
    ):
        sharding.spec("heads", "mlp")
    rules = Rules(batch=("data", "data"))
    twice = dataclasses.replace(layout(data=8), rules=rules)
    with sharding.use(twice), pytest.raises(ValueError, match="two dimensions"):
        sharding.spec("batch")


def test_an_unknown_logical_axis_suggests_the_nearest():
    with (
        sharding.use(layout()),
        pytest.raises(ValueError, match="'embedd'; did you mean 'embed'"),
    ):
        sharding.spec("batch", "embedd")


def test_the_table_names_only_mesh_axes():
    for field in dataclasses.fields(Rules):
        assert set(field.default) <= set(sharding.AXES), field.name


def test_replicas_stand_for_data_and_only_inside():
    with sharding.use(layout(data=2, fsdp=4)):
        with sharding.mapped("replica"):
            assert sharding.spec("batch") == P("fsdp")
        assert sharding.spec("batch") == P(("data", "fsdp"))


def test_a_gathered_weight_keeps_its_split_over_tensor():
    assert sharding.gathered(P("tensor", "fsdp")) == P("tensor", None)
    assert sharding.gathered(P(("fsdp", "tensor"), None)) == P("tensor", None)


# Meshes.


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, {"data": 8}),
        ({"data": -1, "tensor": 4}, {"data": 2, "tensor": 4}),
        ({"data": 1, "fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"data": 2}, {"data": 2}),  # fewer than there are: the first ones
    ],
)
def test_minus_one_is_the_rest_of_the_devices(sizes, shape):
    mesh = sharding.make_layout(MeshConfig(**sizes)).mesh
    assert {a: n for a, n in mesh.shape.items() if n > 1} == shape
    assert all(t == jax.sharding.AxisType.Explicit for t in mesh.axis_types)


def test_meshes_that_do_not_fit_are_refused():
    with toy.refused("data 4 x tensor 4", "needs 16 devices, there are 8", "smaller"):
        sharding.make_layout(MeshConfig(data=4, tensor=4))
    with toy.refused("mesh.data=-1", "8 devices do not divide by the 3"):
        sharding.make_layout(MeshConfig(tensor=3))
    with toy.refused("only one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with toy.refused("mesh.fsdp=0: expected a positive number, or -1"):
        MeshConfig(fsdp=0)
    with toy.refused("does not multiply to 6 devices"):
        sharding.abstract_layout(MeshConfig(data=4), 6)


def test_the_last_axes_are_nearest():
    ids = np.vectorize(lambda d: d.id)(layout(data=2, fsdp=2, tensor=2).mesh.devices)
    np.testing.assert_array_equal(ids.reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2))


def device(number, slice_index):
    """What a mesh asks of a device, enough to stand for another machine's."""
    kind = {"platform": "cpu", "device_kind": "cpu", "process_index": slice_index}
    return mock.Mock(jax.Device, id=number, slice_index=slice_index, **kind)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_only_the_chosen_axis_crosses_slices(axis):
    """Two slices of eight devices, listed in any order."""
    devices = [device(i, i // 8) for i in np.random.default_rng(0).permutation(16)]
    config = MeshConfig(data=4, fsdp=2, tensor=2, slices=2, slice_axis=axis)
    shape = tuple(config.sizes().values())
    grid = sharding._grid(config, shape, devices)
    assert grid.shape == shape
    assert {d.id for d in grid.flat} == set(range(16))
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    for i, name in enumerate(sharding.AXES):
        assert np.ptp(slices, axis=i).any() == (name == axis), name
    halves = np.split(np.moveaxis(slices, sharding.AXES.index(axis), 0), 2)
    assert [set(h.flat) for h in halves] == [{0}, {1}]  # each slice is one half of it


def test_slices_that_are_not_there_are_refused():
    with toy.refused("mesh.slices=2"):
        sharding.make_layout(MeshConfig(data=8, slices=2))
    with toy.refused("mesh.data=3 is not divisible by mesh.slices=2"):
        MeshConfig(data=3, slices=2)


# How parameters are stored.


def test_an_indivisible_dimension_names_sizes_and_a_fix():
    words = "w: mlp=6 is not divisible by 4 (mesh.tensor=4)", "divide 6"
    with sharding.use(layout(tensor=4)), toy.refused(*words):
        sharding.storage("w", (32, 6), ("embed", "mlp"))
    words = "layers/ffn/up_df", "embed=20", "mesh.fsdp=8"
    with sharding.use(layout(fsdp=8)), toy.refused(*words):
        sharding.storage(words[0], (2, 20, 64), ("layers", "embed", "mlp"))


@pytest.mark.parametrize(
    ("kv_heads", "sizes", "spec"),
    [
        (4, {"fsdp": 2, "tensor": 4}, P("fsdp", "tensor", None)),
        (2, {"fsdp": 2, "tensor": 4}, P(("fsdp", "tensor"), None, None)),
        (1, {"tensor": 8}, P("tensor", None, None)),
        (8, {"fsdp": 4, "tensor": 16}, P(("fsdp", "tensor"), None, None)),
    ],
)
def test_too_few_kv_heads_leave_their_devices_to_the_width(kv_heads, sizes, spec):
    """So that the weight is still stored in as many parts as there are devices."""
    count = math.prod(sizes.values())
    abstract = sharding.abstract_layout(MeshConfig(**{"data": 1, **sizes}), count)
    with sharding.use(abstract):
        axes = ("embed", "kv_heads", "head_dim")
        assert sharding.storage("w", (256, kv_heads, 16), axes) == spec


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor"), [(8, 2, 4), (32, 8, 16), (4, 4, 2)]
)
def test_each_device_attends_with_its_share_of_the_query_heads(
    monkeypatch, heads, kv_heads, tensor
):
    """On an abstract mesh: every device gets heads / tensor of the query heads, no more."""
    seen = {}

    def local(implementation, case, q, k, v, *ids):
        seen.update(q=q.shape, k=k.shape, v=v.shape)
        return q, jnp.zeros((q.shape[0], *q.shape[2:4], q.shape[1]))

    monkeypatch.setattr(attend, "_local", local)
    chosen = toy.experiment(
        f"model.heads={heads}", f"model.kv_heads={kv_heads}", "model.dim=256",
        f"mesh.tensor={tensor}", "mesh.data=1", "model.dtype=float32",
    )  # fmt: skip
    prog = train.program(chosen, sharding.abstract_layout(chosen.mesh, tensor))
    host = jax.tree.map(jnp.asarray, toy.batch())
    jax.eval_shape(train.make_eval_step(prog), train.abstract_state(prog).params, host)
    rows, H = toy.ROWS, 256 // heads
    used = max(kv_heads, tensor) // tensor  # kv heads of a device
    assert seen["q"] == (rows, toy.LENGTH, used, heads // tensor // used, H)
    assert seen["k"] == seen["v"] == (rows, toy.LENGTH, used, H)


def test_heads_that_no_layout_splits_are_refused():
    sets = ["model.kv_heads=6", "model.heads=12", "model.dim=48", "mesh.tensor=4"]
    with toy.refused("model.heads=12 and model.kv_heads=6", "4 tensor devices"):
        prog = toy.program(*sets)
        train.make_eval_step(prog).lower(toy.start(prog).params, toy.batch())


# Manual regions.


def attention_inputs(lead=()):
    """Returns q, k, v and the tokens of 8 rows, which may be [R, b, ...] for R replicas."""
    rng = np.random.default_rng(0)
    shapes = [(8, 16, 2, 2, 8), (8, 16, 2, 8), (8, 16, 2, 8)]
    rows = 8 // math.prod(lead)
    arrays = [
        jnp.asarray(rng.standard_normal(s).reshape(*lead, rows, *s[1:]), jnp.float32)
        for s in shapes
    ]
    segments = np.sort(rng.integers(1, 4, (8, 16)), 1)
    ids = [toy.restart(segments), segments.astype(np.int32)]
    return arrays, [jnp.asarray(x.reshape(*lead, rows, 16), jnp.int32) for x in ids]


def attention_with_gradients(implementation, q, k, v, positions, segments):
    tokens = Tokens(positions, segments)

    def f(q, k, v):
        mask = Mask(scale=0.3)
        out, lse = attend.attend(q, k, v, tokens, tokens, mask, implementation)
        return (out**2).sum() + (lse**2).sum(), (out, lse)

    (_, outs), grads = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
    return *outs, *grads


@pytest.mark.parametrize("implementation", ["einsum", "blockwise"])
@pytest.mark.parametrize(
    "vmapped", [False, True], ids=["plain", "vmapped over replicas"]
)
def test_attention_on_a_mesh_is_the_same_and_moves_nothing(vmapped, implementation):
    """Forward and backward compile to no collective at all but that of the scalar loss."""
    f = functools.partial(attention_with_gradients, implementation)
    with sharding.use(layout()):
        arrays, ids = attention_inputs()
        want = jax.jit(f)(*arrays, *ids)
    on_mesh = layout(data=4, tensor=2)
    arrays, ids = attention_inputs((4,) if vmapped else ())
    lead = ("data", None) if vmapped else ("data",)
    tails = [
        (None, "tensor", None, None),
        (None, "tensor", None),
        (None, "tensor", None),
    ]
    specs = [P(*lead, *tail) for tail in tails] + [P(*lead, None)] * 2
    put = [
        jax.device_put(x, sharding.shard(on_mesh, s))
        for x, s in zip([*arrays, *ids], specs, strict=True)
    ]

    def on_replicas(*args):
        with sharding.mapped("replica"):
            return jax.vmap(f)(*args)

    with sharding.use(on_mesh):
        compiled = jax.jit(on_replicas if vmapped else f).lower(*put).compile()
    assert not hlo.collectives(compiled.as_text(), on_mesh.mesh)
    for a, b in zip(want, compiled(*put), strict=True):
        np.testing.assert_allclose(
            np.asarray(b).reshape(a.shape), a, atol=2e-5, rtol=1e-5
        )


def body(x, w, n):
    """Every float has a gradient, an integer none; the results are of different shapes."""
    y = jnp.sin(x * w[None, :]) * n[:, None].astype(x.dtype)
    return y, (y * y).sum(1)


def region_of(x_spec, w_spec, n_spec):
    return manual.manual(body, (x_spec, w_spec, n_spec), (x_spec, n_spec), "region")


def loss(f, x, w, n):
    y, z = f(x, w, n)
    return (y * jnp.arange(1.0, 7)[None]).sum() + (z**2).sum()


@pytest.mark.parametrize("remat", [False, True])
def test_a_manual_region_equals_its_body_with_gradients(remat):
    """Also where the backward is recomputed; the sharded argument's gradient stays sharded."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 6), np.float32), rng.standard_normal(6, np.float32)
    n = np.arange(8, dtype=np.int32)
    plain = jax.jit(jax.value_and_grad(functools.partial(loss, body), (0, 1)))
    want = plain(x, w, n)
    on_mesh = layout(data=8)
    with sharding.use(on_mesh):
        # Each device has a row of its own, of x and of w alike: no argument is shared by devices.
        f = region_of(P("data", None), P(None), P("data"))
        rows = jax.device_put(x, sharding.shard(on_mesh, P("data", None)))
        scalars = jax.device_put(n, sharding.shard(on_mesh, P("data")))
        each = functools.partial(loss, jax.checkpoint(f) if remat else f)
        got = jax.jit(jax.value_and_grad(each))(rows, w, scalars)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert toy.distance(got[1], want[1][0]) < 1e-6 * np.linalg.norm(want[1][0])
    assert jax.typeof(got[1]).sharding.spec == P("data", None)


def test_arguments_are_shared_or_mapped_under_vmap():
    """Vmapped over four replicas of two rows: the rows are mapped, the weight is one for all."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 6), np.float32), rng.standard_normal(6, np.float32)
    n = np.arange(8, dtype=np.int32)
    want = jax.jit(jax.value_and_grad(functools.partial(loss, body), (0, 1)))(x, w, n)
    on_mesh = layout(data=4, tensor=2)
    with sharding.use(on_mesh):
        split = lambda a: a.reshape(4, 2, *a.shape[1:])  # noqa: E731
        put = lambda a, *s: jax.device_put(a, sharding.shard(on_mesh, P(*s)))  # noqa: E731
        rows, scalars = (
            put(split(x), "data", "tensor", None),
            put(split(n), "data", "tensor"),
        )

        def run(rows, w, scalars):
            with sharding.mapped("replica"):
                f = region_of(P("tensor", None), P(None), P("tensor"))
                grad = jax.value_and_grad(functools.partial(loss, f))
                return jax.vmap(grad, (0, None, 0))(rows, w, scalars)

        compiled = jax.jit(run).lower(rows, w, scalars).compile()
        value, grad = compiled(rows, w, scalars)
    np.testing.assert_allclose(value.sum(), want[0], rtol=1e-5)
    error = toy.distance(grad.reshape(8, 6), want[1][0])
    assert error < 1e-6 * np.linalg.norm(want[1][0])
    assert jax.typeof(grad).sharding.spec == P("data", "tensor", None)
    assert not any(
        "data" in c.axes for c in hlo.collectives(compiled.as_text(), on_mesh.mesh)
    )


def test_a_region_may_hold_collectives_of_its_own():
    """A sum over tensor inside a region under vmap over replicas stays within each replica."""
    on_mesh = layout(data=4, tensor=2)
    x = np.arange(32.0, dtype=np.float32).reshape(4, 8)

    def run(x):
        with sharding.mapped("replica"):
            total = lambda s: (lax.psum(s.sum(), "tensor")[None],)  # noqa: E731
            f = manual.region(total, (P("tensor"),), (P(None),))
            return jax.vmap(f)(x)[0]

    with sharding.use(on_mesh):
        put = jax.device_put(x, sharding.shard(on_mesh, P("data", "tensor")))
        compiled = jax.jit(run).lower(put).compile()
    np.testing.assert_array_equal(np.asarray(compiled(put))[:, 0], x.sum(1))
    found = hlo.collectives(compiled.as_text(), on_mesh.mesh)
    assert [(c.kind, c.axes) for c in found] == [("all-reduce", {"tensor"})]
