"""Stacking layers and sharding them never change what an optimizer does."""

import math
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optim_cases import (
    ADAFACTOR,
    AXES,
    CLIP,
    MATRIX,
    MUON,
    RATE,
    SIZES,
    STACK,
    D,
    H,
    N,
    config,
    each_algorithm,
    inputs,
    make,
    one_device,
    reference,
    run,
    split,
    stack,
    train,
)

from lm import matrices, optim, trees


@each_algorithm
def test_stacked_parameters_equal_optax_on_each_layers_matrix(algorithm):
    tx = optax.chain(optax.clip_by_global_norm(CLIP), reference(algorithm))
    tx = optax.with_extra_args_support(tx)
    params, gradients = inputs(algorithm)
    want, _ = run(tx, split(params), stack(map(split, gradients)))
    got = one_device(algorithm)
    for name, value in split(got).items():
        # Measured: at most 5e-5 of a step, an ulp of weights up to 8.
        tolerance = 2e-4 * RATE
        np.testing.assert_allclose(
            value, want[name], rtol=0, atol=tolerance, err_msg=name
        )


MESHES = {  # mesh axes, and mesh axes of logical ones
    "data2_fsdp2_tensor2": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
    ),
    "pipe2_expert3": (  # 6 of 8 devices, and 3 do not divide the stack
        {"pipe": 2, "expert": 3},
        {"layers": "pipe", "mlp": "expert", "head_dim": "expert"},
    ),
    "data2_fsdp2_tensor2_zero1": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"embed": ("fsdp", "data"), "heads": "tensor", "mlp": "tensor"},
    ),
}
ON_MESHES = [(optim.AdamW(), "data2_fsdp2_tensor2"), (ADAFACTOR, "data2_fsdp2_tensor2")]
ON_MESHES += [(optim.Muon(), name) for name in MESHES]


@pytest.mark.parametrize(
    "algorithm, mesh_name",
    ON_MESHES,
    ids=[f"{type(a).__name__}-{m}" for a, m in ON_MESHES],
)
def test_sharded_equals_one_device_and_state_is_sharded_alike(algorithm, mesh_name):
    sizes, table = MESHES[mesh_name]
    count = math.prod(sizes.values())
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Explicit,) * len(sizes),
        devices=jax.devices()[:count],
    )
    params, gradients = inputs(algorithm)
    names = trees.flatten(params)
    spec = {n: P(*(table.get(a) for a in AXES[n])) for n in names}

    def place(tree, *lead):
        return trees.nest(
            {
                n: jax.device_put(x, jax.NamedSharding(mesh, P(*lead, *spec[n])))
                for n, x in trees.flatten(tree).items()
            }
        )

    with jax.set_mesh(mesh):
        got, state = train(
            config(algorithm), place(params), place(stack(gradients), None)
        )
    got, want = trees.flatten(got), trees.flatten(one_device(algorithm))
    for name, x in got.items():
        assert x.sharding.spec == spec[name], name
        # The norm and factored means sum in another order: an ulp of weights up to 8.
        tolerance = 2e-4 * RATE
        np.testing.assert_allclose(x, want[name], rtol=0, atol=tolerance, err_msg=name)
    for path, x in trees.flatten(state).items():
        owner = next((n for n in names if path.endswith("/" + n)), None)
        if owner is None:
            assert x.shape == (), path  # a count
            continue
        assert x.ndim == len(AXES[owner]), path
        for i, (size, full) in enumerate(zip(x.shape, got[owner].shape, strict=True)):
            assert size in (1, full), path
            assert x.sharding.spec[i] == (spec[owner][i] if size == full else None), (
                path
            )


def test_muon_trades_shards_for_whole_layers_and_gathers_nothing():
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Explicit,) * 3)
    x_spec = P(None, "fsdp", "tensor", None)
    x = make(0, ["layers/w_q"], SIZES | {"layers": 11})["layers"]["w_q"]
    seen = []

    def whole(x):
        seen.append(x.shape)
        return 2 * x

    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: matrices.whole_blocks(whole, 1, x))
        x = jax.device_put(x, x_spec)
        np.testing.assert_array_equal(run(x), 2 * x)
        text = run.lower(x).compile().as_text()
    # 11 layers on 8 devices: at most two each, and each whole.
    assert seen[0] == (2, D, N, H)
    ops = re.findall(r" (all-gather|all-reduce|all-to-all)(?:-start)?\(", text)
    assert sorted(ops) == ["all-reduce"] + ["all-to-all"] * 4


def test_a_block_is_what_one_layer_multiplies_by():
    for name, axes in AXES.items():
        block = matrices.block(name, axes)
        shape = [SIZES[a] for a in axes]
        inner = math.prod(shape[i] for i in block.inner)
        assert block.stack == STACK.get(name, int(axes[0] == "layers"))
        assert inner == math.prod(shape[block.stack :])
        sides = tuple(math.prod(shape[i] for i in s) for s in (block.rows, block.cols))
        if name in MATRIX:
            assert sides == MATRIX[name], name
            assert block.table == (name not in MUON)
        else:
            assert not block.cols, name
    assert matrices.block("x", ("embed", "gate", "mlp")).cols == (1, 2)
    assert matrices.block("x", ("layers", "expert")).rows == (1,)
    with pytest.raises(ValueError, match="which of the axes"):
        matrices.block("x", ("layers", "mlp", "gate", "heads"))
