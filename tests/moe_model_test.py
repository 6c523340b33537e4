"""Models with experts: every mesh gives what one device gives, which is what float64 gives.

Routing is a decision: the smallest gap between a chosen and the best unchosen score is measured, so
that no result here hangs on a rounding.
"""

import dataclasses
import functools
import itertools
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import runs
import toy

from lm import gradients, log, loop, matrices, optim, sharding, train
from lm.models import stack
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.moe import Moe
from lm.plan import flops

ONE, STAGES = "one device", "pipe 2 x expert 2"
LAYOUTS = {
    ONE: ["mesh.data=1"],
    "data 2 x expert 4": ["mesh.data=2", "mesh.expert=4"],
    "expert 8": ["mesh.expert=8"],
    "expert 2 x fsdp 2 x tensor 2": [
        "mesh.expert=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
    ],
    STAGES: ["mesh.pipe=2", "mesh.expert=2", "pipeline.microbatches=2"],
}
MESHES = [m for m in LAYOUTS if m not in (ONE, STAGES)]
KINDS = {
    "mixtral": ["model.ffn=Moe", "model.ffn.hidden=24"],
    "deepseek": [
        "model.ffn=Moe",
        "model.ffn.hidden=24",
        "model.ffn.gate=Sigmoid",
        "model.ffn.gate.rate=0.01",
        "model.ffn.dispatch=Dropless",
        "model.ffn.shared=1",
        "model.layers=4",
        "model.ffn.dense_first=1",
        "model.ffn.every=2",
        "model.ffn.dense.hidden=40",
    ],
}
SGD = ["model.dropout=0.1", "train.accumulate=2"]
BATCHES = [toy.batch(seed) for seed in range(3)]
TIMES, ULPS = 2.0, 2.0  # of tests/mesh_equality_test.py
RATE, MOMENTUM = 0.1, 0.9  # of the toy


@functools.cache
def trained(kind, mesh):
    prog = toy.program(*LAYOUTS[mesh], *KINDS[kind], *SGD)
    return prog, toy.run(prog, BATCHES, toy.start(prog, noise=0.1))


@functools.cache
def in_float64(kind):
    """Returns losses, the first gradient, parameters after all steps, and the smallest margin."""
    prog = toy.program(*KINDS[kind], *SGD)
    start = toy.flat(toy.start(prog, noise=0.1).params)
    params = {k: v.astype(np.float64) for k, v in start.items()}
    momentum, losses, first, margins = {}, [], None, []
    for step, host in enumerate(BATCHES):
        loss, grads = reference.gradient(prog.experiment, params, host, step)
        loads, margin = reference.routing(prog.experiment, params, host, step)
        losses.append(loss)
        margins.append(margin)
        first = first or grads
        for path, g in grads.items():
            if path.endswith("balance_e"):
                short = np.sign(loads.mean(1, keepdims=True) - loads)
                params[path] = params[path] + 0.01 * short
                continue
            momentum[path] = g + MOMENTUM * momentum.get(path, 0.0)
            params[path] = params[path] - RATE * momentum[path]
    return losses, first, params, min(margins)


def assert_as_exact(got, one, exact):
    for path, want in exact.items():
        if path.endswith("balance_e"):
            continue
        error, usual = toy.distance(got[path], want), toy.distance(one[path], want)
        floor = ULPS * toy.EPS * np.linalg.norm(want)
        assert error <= TIMES * usual + floor, (path, error / floor, usual / floor)


@pytest.mark.parametrize(
    "kind", ["mixtral", pytest.param("deepseek", marks=pytest.mark.slow)]
)
def test_one_device_trains_as_float64_does(kind):
    losses, gradient, params, margin = in_float64(kind)
    assert gradient is not None
    _, run = trained(kind, ONE)
    prog, _ = trained(kind, ONE)
    roundings = 8 * prog.experiment.model.layers  # a few a layer
    assert margin > 20 * toy.EPS  # and scores err by a few roundings
    np.testing.assert_allclose(run.losses, losses, rtol=1e-6)
    for found, exact in ((run.gradient, gradient), (run.params, params)):
        for path, want in exact.items():
            if path.endswith("balance_e"):
                continue
            limit = roundings * toy.EPS * np.linalg.norm(want)
            assert toy.distance(found[path], want) < limit, path
    for path, want in params.items():
        if path.endswith("balance_e"):
            np.testing.assert_allclose(run.params[path], want, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *itertools.product(["mixtral"], MESHES),
        *(
            pytest.param("deepseek", mesh, marks=pytest.mark.slow)
            for mesh in (*MESHES, STAGES)
        ),
    ],
)
def test_losses_gradients_and_three_steps_are_those_of_one_device(kind, mesh):
    """With two microbatches; the balancing biases move by the same steps exactly."""
    (_, run), (_, one) = trained(kind, mesh), trained(kind, ONE)
    np.testing.assert_allclose(run.losses, one.losses, rtol=1e-5)
    _, gradient, params, _ = in_float64(kind)
    assert_as_exact(run.gradient, one.gradient, gradient)
    assert_as_exact(run.params, one.params, params)
    for mine, theirs in zip(run.metrics, one.metrics, strict=True):
        assert mine["moe_dropped"] == theirs["moe_dropped"]
    for path, value in one.params.items():
        if path.endswith("balance_e"):
            np.testing.assert_array_equal(run.params[path], value)


@pytest.mark.parametrize("algorithm", ["Muon", "Adafactor"])
def test_optimizers_see_one_matrix_of_one_expert(algorithm):
    """And on a mesh the same as on one device."""
    steps = []
    for mesh in (ONE, "expert 2 x fsdp 2 x tensor 2"):
        sets = [f"optim.algorithm={algorithm}", "optim.learning_rate=0.01"]
        prog = toy.program(*LAYOUTS[mesh], *KINDS["mixtral"], *sets)
        axes = matrices.block("up", prog.axes["layers/ffn/up_edf"])
        assert (axes.stack, axes.rows, axes.cols) == (2, (2,), (3,))
        assert not any("balance" in a for a in prog.axes.values())
        start = toy.start(prog, noise=0.1)
        before = toy.flat(start.params)
        after = toy.run(prog, BATCHES[:1], start).params
        steps.append({k: after[k] - before[k] for k in after})
    one, split = steps
    for path in ("layers/ffn/up_edf", "layers/ffn/down_efd", "layers/ffn/router_de"):
        size = np.linalg.norm(one[path])
        assert size > 0 and toy.distance(split[path], one[path]) < 1e-3 * size, path
    if (
        algorithm == "Muon"
    ):  # each expert's largest singular value is that of all others
        values = np.linalg.svd(one["layers/ffn/up_edf"], compute_uv=False).max(-1)
        assert values.max() / values.min() < 1.2 / 0.7  # what Newton-Schulz leaves


@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_move_by_all_to_alls_and_nothing_else_does(mesh):
    """There and back, forward and backward; nothing of the tokens' width is gathered."""
    prog, run = trained("mixtral", mesh)
    devices: Any = prog.layout.mesh
    found = hlo.collectives(run.text, devices)
    moved = [c for c in found if c.kind == "all-to-all"]
    assert len(moved) == 4 and all(c.axes == {"expert"} and c.looped for c in moved)
    assert all(c.axes == {"fsdp"} for c in found if c.kind == "all-gather")
    assert all(c.kind != "collective-permute" for c in found)
    assert not any(c.looped and "data" in c.axes for c in found)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_biases_and_reports_its_experts(tmp_path):
    """Bitwise: the biases are in the checkpoint like any weight."""
    experts = {
        "model.ffn": "Moe",
        "model.ffn.hidden": 32,
        "model.ffn.gate": "Sigmoid",
        "train.steps": 6,
    }
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert runs.small(whole, experts).code == loop.DONE
    with runs.signalled(3):
        assert runs.small(half, experts).code == loop.PREEMPTED
    result = runs.small(half, experts)
    assert result.code == loop.DONE, result.err
    assert runs.digests(half, 6) == runs.digests(whole, 6)
    record = runs.records(whole)[-1]
    assert 1 < record["moe_load_max"] < 8
    assert max(record["moe_load"]) == pytest.approx(record["moe_load_max"], abs=1e-3)
    assert len(record["moe_load"]) == 8 and record["moe_load_layer"] in (0, 1)
    assert 0 <= record["moe_dropped"] < 0.5 and record["moe_loss"] > 0


SPARSE = ["model.ffn=Moe", "model.ffn.hidden=24", "model.layers=1", "mesh.expert=2"]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_the_ragged_all_to_all(platform):
    sets = [*SPARSE, "model.ffn.dispatch=Dropless", "train.accumulate=2"]
    prog = toy.program(*sets, "mesh.data=2", "model.attention.implementation=blockwise")
    where = {"cuda": "gpu"}.get(platform, platform)
    there = dataclasses.replace(prog.layout, platform=where)
    prog = dataclasses.replace(prog, layout=there)

    def step(params, batch):
        return gradients.of(prog, params, batch, jnp.int32(0), jnp.float32(1))

    with sharding.use(there):
        state, batch = train.abstract_state(prog), toy.place(prog, toy.batch())
        traced = jax.jit(step).trace(state.params, batch)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    # There and back, forward and backward.
    assert text.count('"ragged_all_to_all"') + text.count("@ragged_all_to_all") >= 4


def test_losses_and_counts_do_not_depend_on_microbatches():
    batch = toy.batch()
    found = []
    for accumulate in (1, 4):
        prog = toy.program(*SPARSE[:3], f"train.accumulate={accumulate}")
        step = train.make_train_step(prog)
        found.append(step(toy.start(prog, 0.1), toy.place(prog, batch))[1])
    one, four = found
    np.testing.assert_array_equal(one["moe_load_LE"], four["moe_load_LE"])
    assert one["moe_dropped"] == four["moe_dropped"] > 0
    np.testing.assert_allclose(one["moe_loss"], four["moe_loss"], rtol=1e-6)
    np.testing.assert_allclose(one["loss"], four["loss"], rtol=1e-6)
    assert one["loss"] > one["nll"] / one["tokens"]


def test_biases_move_load_towards_the_mean_and_nothing_else_moves_them():
    sets = ["model.ffn.gate=Sigmoid", "model.ffn.gate.rate=0.01"]
    prog = toy.program(*SPARSE, *sets, "optim.learning_rate=0", "optim.clip_norm=1")
    state = toy.start(prog, 0.1)
    path = "layers/ffn/balance_e"
    before, batch = toy.flat(state.params), toy.place(prog, toy.batch())
    step, ratios = train.make_train_step(prog), []
    for i in range(40):
        state, sums = step(state, batch)
        load = np.asarray(sums["moe_load_LE"], np.float64)
        ratios.append(load.max() / load.mean())
        if i == 0:
            moved = toy.flat(state.params)[path] - before[path]
            want = 0.01 * np.sign(load.mean(1, keepdims=True) - load)
            np.testing.assert_allclose(moved, want, atol=1e-7)
    assert ratios[0] > 1.5 and max(ratios[-5:]) < 1.15, ratios
    after = toy.flat(state.params)
    assert [p for p in after if (after[p] != before[p]).any()] == [path]
    assert not any(leaf.endswith(path) for leaf in toy.flat(state.opt_state))


def test_a_group_that_freezes_the_router_holds_its_biases_too():
    config = toy.experiment(*SPARSE, "model.ffn.gate=Sigmoid")
    axes = train.program(config, toy.layout(config.mesh)).axes
    path = "layers/ffn/balance_e"
    assert optim.balanced(config.optim, axes) == [path]
    held = dataclasses.replace(
        config.optim, groups=(optim.Group(pattern="balance|router", frozen=True),)
    )
    assert optim.balanced(held, axes) == []
    assert path in optim.frozen(held, axes)


def test_load_is_reported_of_the_least_even_layer():
    load = np.array([[0, 0], [6, 2], [0, 0], [3, 5]])
    assert log.experts(load, [1, 3], 4) == {
        "moe_dropped": 0.25,
        "moe_load_max": 1.5,
        "moe_load_layer": 1,
        "moe_load": [1.5, 0.5],
    }


def test_layers_with_and_without_experts_make_groups():
    sets = ["model.ffn=Moe", "model.ffn.hidden=24", "model.layers=6"]
    sets += [
        "model.ffn.dense_first=1",
        "model.ffn.every=2",
        "model.ffn.dense.hidden=40",
    ]
    prog = toy.program(*sets)
    config = prog.experiment.model
    assert list(config.sparse) == [2, 4]
    shapes = {path: s.shape for path, s in prog.shapes.items()}
    assert shapes["layers/stacks/0/ffn/up_df"] == (1, 32, 40)
    assert shapes["layers/stacks/1/blocks/0/ffn/up_df"] == (2, 32, 40)
    assert shapes["layers/stacks/1/blocks/1/ffn/up_edf"] == (2, 8, 32, 24)
    assert shapes["layers/stacks/2/ffn/up_df"] == (1, 32, 40)
    unrolled = toy.program(*sets, "model.scan=false")
    state, host = toy.start(prog, 0.1), toy.batch()
    for a, b in zip(
        toy.hidden(prog)(state.params, host),
        toy.hidden(unrolled)(state.params, host),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "stacks"),
    [
        ("S", "1S"),
        ("SSSS", "4S"),
        ("DDSSS", "2D 3S"),
        ("DDSDSD", "1D 2DS 1D"),
        ("LLLGLLLGLL", "2LLLG 2L"),
        ("DSDSDS", "3DS"),
        ("DDDSD", "3D 1S 1D"),
        ("ABCABCAB", "2ABC 1A 1B"),
    ],
)
def test_layers_of_any_kinds_are_stacked_by_the_shortest_unit(layers, stacks):
    found = stack.grouped(layers)
    assert " ".join(f"{n}{''.join(unit)}" for n, unit in found) == stacks
    places = stack.entries(layers)
    assert sorted(i for some in places.values() for i in some) == [*range(len(layers))]
    for some in places.values():
        assert len({layers[i] for i in some}) == 1


def test_only_active_experts_count():
    dense = Transformer.Config(
        layers=4, dim=32, heads=4, kv_heads=4, ffn=Mlp.Config(hidden=64)
    )
    moe = Moe.Config(hidden=16, experts=32, top_k=3, shared=1)
    sparse = dataclasses.replace(dense, ffn=moe)
    extra = flops.forward(sparse, 64, causal=True) - flops.forward(
        dense, 64, causal=True
    )
    assert extra == 2 * 4 * 32 * 32  # the router
    mixed = dataclasses.replace(moe, dense_first=2, dense=Mlp.Config(hidden=64))
    mixed = dataclasses.replace(dense, ffn=mixed)
    assert (flops.forward(mixed, 64, causal=True) - extra / 2) == flops.forward(
        dense, 64, causal=True
    )


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["model.ffn.experts=0"], ["model.ffn.experts=0: expected 1 or more"]),
        (["model.ffn.top_k=9"], ["model.ffn.top_k=9", "at most 8"]),
        (["model.ffn.top_k=1"], ["top_k=1", "set model.ffn.gate.renormalize=false"]),
        (["model.ffn.dispatch.factor=0"], ["factor=0", "model.ffn.dispatch=Dropless"]),
        (["model.ffn.balance=-1"], ["model.ffn.balance=-1", "0 or more"]),
        (["model.ffn.gate=Sigmoid", "model.ffn.gate.scale=0"], ["scale=0", "above 0"]),
        (["model.ffn.dense_first=2"], ["model.layers=2", "set model.layers to 3"]),
    ],
)
def test_bad_experts_are_refused(sets, words):
    with toy.refused(*words):
        toy.experiment("model.ffn=Moe", *sets)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            ["model.ffn=Moe", "model.ffn.experts=6", "mesh.expert=4"],
            [
                "model.ffn.experts=6 is not divisible by mesh.expert=4; set mesh.expert to "
                "3 or 6, or model.ffn.experts to 4 or 8"
            ],
        ),
        (["mesh.expert=2"], ["mesh.expert=2", "no experts", "set mesh.expert=1"]),
        (
            ["model.ffn=Moe", "mesh.expert=8", "train.batch_size=12"],
            ["train.batch_size=12 is not divisible by 8 (expert 8"],
        ),
    ],
)
def test_experts_that_do_not_fit_the_mesh_are_refused(sets, words):
    with toy.refused(*words):
        toy.program(*sets)
