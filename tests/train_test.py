"""A step is the same however it is cut up, reduces over data once, and survives bad batches."""

import dataclasses
import functools

import hlo
import jax
import numpy as np
import pytest
import reference
import toy

from lm import experiment, optim, sharding, train, trees
from lm.plan import target

DROPOUT = "model.dropout=0.1"


@functools.cache
def ran(*sets):
    """Two steps of SGD on two batches, from random parameters."""
    prog = toy.program(*sets)
    return toy.run(prog, [toy.batch(0), toy.batch(1)], toy.start(prog, noise=0.1))


def assert_equal(got, want):
    """Losses to 1e-6; gradients and parameters to a few roundings of their norm."""
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-6)
    for path in want.params:
        for a, b in [
            (got.gradient[path], want.gradient[path]),
            (got.params[path], want.params[path]),
        ]:
            # A gradient that is 0 by the maths (of a key's bias) is some 1e-9 of noise.
            assert toy.distance(a, b) <= 16 * toy.EPS * np.linalg.norm(b) + 1e-9, path


def reductions(run, *sets):
    """(over data inside a loop, over data outside of loops) of a run's compiled step."""
    found = hlo.collectives(run.text, toy.program(*sets).layout.mesh)
    sums = [
        c
        for c in found
        if c.kind in ("all-reduce", "reduce-scatter") and "data" in c.axes
    ]
    return [c for c in sums if c.looped], [c for c in sums if not c.looped]


@pytest.mark.parametrize(
    "sets",
    [
        ["mesh.data=1", "train.accumulate=4"],
        ["mesh.data=4", "train.accumulate=4"],
        ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=2"],
    ],
    ids=["one device", "data 4", "data 2 x fsdp 2 x tensor 2"],
)
def test_microbatches_change_nothing_and_reduce_over_data_once(sets):
    """Rows hold different numbers of scored tokens, dropout is on; no loop sums over data."""
    run, plain = ran(DROPOUT, *sets), ran(DROPOUT)
    assert_equal(run, plain)
    for name in ("tokens", "bytes"):
        assert run.metrics[0][name] == plain.metrics[0][name]
    looped, once = reductions(run, *sets)
    assert not looped and bool(once) == ("mesh.data=1" not in sets)


# Optimizer state and averages.


def local_bytes(tree):
    """Bytes of a tree on the first device."""
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(tree)]
    return sum(s.nbytes for s in shards)


def test_zero1_is_plain_training_with_the_optimizer_state_split_over_data():
    sets = ["mesh.data=4", "mesh.tensor=2"]
    plain, split = ran(*sets), ran(*sets, "mesh.zero1=true")
    assert_equal(split, plain)
    assert local_bytes(split.state.params) == local_bytes(plain.state.params)
    small = local_bytes(split.state.opt_state) / local_bytes(plain.state.opt_state)
    assert small == 1 / 4  # every tensor has a dimension that 4 divides
    # Without microbatches layers reduce over data in their loop: the search above can find it.
    assert all(reductions(plain, *sets))


def test_zero1_leaves_what_it_cannot_split():
    """A scale of 5 numbers on 4 replicas stays whole; the rest is split."""
    prog = toy.program(
        "model.dim=20", "model.attention.head_dim=6", "mesh.data=8", "mesh.zero1=true"
    )
    assert prog.updates["norm/scale_d"] == prog.specs["norm/scale_d"]
    assert prog.updates["embed_vd"] != prog.specs["embed_vd"]


@pytest.fixture(scope="module")
def careful():
    """A program with all that a step may leave untouched, and its step."""
    prog = toy.program(
        "optim.ema=0.15", "optim.algorithm=AdamW", "mesh.data=2", "mesh.zero1=true",
        "train.accumulate=4",
    )  # fmt: skip
    return prog, train.make_train_step(prog)


def test_the_average_follows_the_parameters(careful):
    """Step t keeps min(decay, (1 + t) / (10 + t)) of it, from the initial parameters on."""
    prog, step = careful
    state = toy.start(prog, noise=0.1)
    ema = toy.flat(state.params)
    assert toy.flat(state.ema).keys() == ema.keys()
    for t in range(3):
        state, _ = step(state, toy.place(prog, toy.batch(t)))
        keep = min(0.15, (1 + t) / (10 + t))
        for path, p in toy.flat(state.params).items():
            ema[path] = keep * ema[path] + (1 - keep) * p
    for path, got in toy.flat(state.ema).items():
        np.testing.assert_allclose(got, ema[path], rtol=1e-5, atol=1e-7)
    assert (
        trees.flatten(state.ema)["embed_vd"].sharding.spec == prog.updates["embed_vd"]
    )


def test_a_batch_of_nan_is_skipped_and_counted(careful):
    """Parameters, optimizer state and average stay bitwise; the next good batch trains."""
    prog, step = careful
    good = toy.place(prog, toy.batch())
    state, _ = step(toy.start(prog, noise=0.1), good)
    kept = toy.flat((state.params, state.opt_state, state.ema))
    poison = toy.batch(1)
    poison["weights"][3, 5] = np.nan  # in one row of one microbatch
    for n in (1, 2):
        state, metrics = step(state, toy.place(prog, poison))
        assert np.isnan(metrics["loss"])
        assert (int(metrics["skipped"]), int(metrics["consecutive"])) == (n, n)
    for path, x in toy.flat((state.params, state.opt_state, state.ema)).items():
        np.testing.assert_array_equal(x, kept[path])
    assert int(state.step) == 3  # the data goes on
    state, metrics = step(state, good)
    assert (int(metrics["skipped"]), int(metrics["consecutive"])) == (2, 0)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(toy.flat(state.params)["embed_vd"], kept["0/embed_vd"])


def test_a_batch_without_a_scored_token_changes_nothing(careful):
    """Its loss is 0, not 0 / 0, and the gradient too."""
    prog, step = careful
    host = toy.batch()
    host["weights"][:] = 0
    state = toy.start(prog, noise=0.1)
    before = toy.flat(state.params)
    state, metrics = step(state, toy.place(prog, host))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    for path, x in toy.flat(state.params).items():
        np.testing.assert_array_equal(x, before[path])


def test_the_old_state_is_given_up(careful):
    """The step's state is donated: no second copy of the model exists."""
    prog, step = careful
    state = toy.start(prog, noise=0.1)
    step(state, toy.place(prog, toy.batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


def test_steps_of_a_growing_batch_run_one_after_the_other(careful):
    prog, step = careful
    state = toy.start(prog, noise=0.1)
    for rows in (8, 16):
        state, metrics = step(state, toy.place(prog, toy.batch(rows=rows)))
        assert int(metrics["tokens"]) == toy.batch(rows=rows)["weights"].sum()
    assert int(state.step) == 2


def test_frozen_parameters_stay_and_do_not_count():
    """Neither the update nor the gradient's norm knows the embedding."""
    chosen = toy.experiment(DROPOUT)
    groups = (optim.Group(pattern="embed", frozen=True),)
    chosen = dataclasses.replace(
        chosen, optim=dataclasses.replace(chosen.optim, groups=groups)
    )
    prog = train.program(chosen, toy.layout(chosen.mesh))
    state = toy.start(prog, noise=0.1)
    before = toy.flat(state.params)
    state, metrics = train.make_train_step(prog)(state, toy.place(prog, toy.batch()))
    for path, x in toy.flat(state.params).items():
        assert np.array_equal(x, before[path]) == (path == "embed_vd"), path
    trained = dict(ran(DROPOUT).gradient)
    del trained["embed_vd"]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in trained.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)


def test_metrics_are_sums_over_the_whole_batch():
    run, host = ran(DROPOUT), toy.batch()
    first = run.metrics[0]
    assert (
        first["tokens"] == host["weights"].sum()
        and first["bytes"] == host["bytes"].sum()
    )
    assert first["loss"] == pytest.approx(first["nll"] / first["tokens"], rel=1e-6)
    norm = np.sqrt(
        sum((g.astype(np.float64) ** 2).sum() for g in run.gradient.values())
    )
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert first["learning_rate"] == np.float32(0.1)


def test_evaluation_scores_the_likelihood_alone():
    """No dropout, smoothing or z-loss: the sum over tokens of the reference's."""
    sets = [DROPOUT, "objective.z_loss=0.1", "objective.label_smoothing=0.2"]
    prog = toy.program(*sets, "mesh.data=4", "mesh.tensor=2")
    params = toy.start(prog, noise=0.1).params
    sums = train.make_eval_step(prog)(params, toy.place(prog, toy.batch()))
    plain = toy.experiment()
    loss, _ = reference.gradient(plain, toy.flat(params), toy.batch())
    assert float(sums["nll"] / sums["tokens"]) == pytest.approx(loss, rel=1e-6)
    assert "loss" not in sums


def test_smoothing_and_z_loss_are_trained_on():
    sets = ["objective.z_loss=0.1", "objective.label_smoothing=0.2"]
    prog = toy.program(*sets)
    state = toy.start(prog, noise=0.1)
    params = toy.flat(state.params)
    run = toy.run(prog, [toy.batch()], state)
    loss, grads = reference.gradient(prog.experiment, params, toy.batch())
    assert run.losses[0] == pytest.approx(loss, rel=1e-6)
    for path, want in grads.items():
        assert toy.distance(run.gradient[path], want) <= 16 * toy.EPS * np.linalg.norm(
            want
        )


def test_the_batch_grows_by_the_ramp():
    chosen = toy.experiment("train.batch_ramp=((2, 4), (5, 8))")
    sizes = [chosen.train.batch_at(step) for step in range(7)]
    assert sizes == [4, 4, 8, 8, 8, 16, 16]
    assert chosen.train.batch_sizes() == [4, 8, 16]
    with toy.refused("train.batch_size=4 is not divisible by", "use a multiple of 8"):
        train.program(
            dataclasses.replace(chosen, mesh=sharding.MeshConfig(data=8)),
            sharding.abstract_layout(sharding.MeshConfig(data=8), 8),
        )
    for bad in ("((5, 4), (2, 8))", "((2, 0),)"):
        with toy.refused("train.batch_ramp", "rising steps"):
            toy.experiment(f"train.batch_ramp={bad}")


# Where everything is.


@pytest.fixture(scope="module")
def initial():
    return toy.flat(toy.start(toy.program("optim.ema=0.9", "optim.algorithm=AdamW")))


@pytest.mark.parametrize("mesh", toy.MESHES)
def test_initialisation_is_bitwise_the_same_on_every_mesh(mesh, initial):
    """And no device ever holds more than its share of any array that the program splits."""
    prog = toy.program("optim.ema=0.9", "optim.algorithm=AdamW", *toy.MESHES[mesh])
    state = train.make_init(prog)(jax.random.key(1))
    want = train.abstract_state(prog)
    for (path, x), a in zip(
        trees.flatten(state).items(), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), initial[path])
        assert (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding), path


SPLIT = {  # logical axes over which a mesh axis has to split a parameter that has one of them
    "fsdp": {"embed"},
    "tensor": {"vocab", "heads", "kv_heads", "mlp"},
}


@pytest.mark.parametrize("kind", ["base", "classic", "capped"])
def test_no_parameter_is_whole_that_could_be_split(kind):
    """Only the scales and shifts of the model's width, and of one head's, are on every device."""
    sets = {"base": [], "classic": toy.CLASSIC, "capped": toy.CAPPED}[kind]
    prog = toy.program(*sets, "mesh.fsdp=2", "mesh.tensor=4", "mesh.data=1")
    whole = set()
    for path, spec in prog.specs.items():
        over = {
            a
            for entry in spec
            for a in ([entry] if isinstance(entry, str) else entry or [])
        }
        for axis, logical in SPLIT.items():
            if logical & {*prog.axes[path]} and axis not in over:
                whole.add((path, axis))
        if not over:
            assert {*prog.axes[path]} <= {"layers", "norm", "kv_heads", "head_dim"}, (
                path
            )
    # Of fewer heads than devices, the bias alone has no width to be split over.
    biases = {f"layers/mixer/{x}_bias_kh" for x in ("key", "value")} & prog.specs.keys()
    few = prog.experiment.model.kv_heads < 4
    assert whole == ({(path, "tensor") for path in biases} if few else set())


@pytest.mark.parametrize("name", experiment.names())
def test_every_experiment_fits_its_production_mesh(name, given_cpu):
    """Shapes, shardings and the whole step are checked on as many devices, none of them real."""
    chosen = experiment.load(name)
    count = target.read(target.names(chosen.target)[0]).devices
    for platform in ("tpu", "gpu"):
        prog = train.program(
            chosen, sharding.abstract_layout(chosen.mesh, count, platform)
        )
        state = train.abstract_state(prog)
        batch = train.abstract_batch(prog)
        new, metrics = train.make_train_step(prog).shapes(state, batch)
        for (path, a), b in zip(
            trees.flatten(state).items(), jax.tree.leaves(new), strict=True
        ):
            assert (a.shape, a.dtype, a.sharding.spec) == (
                b.shape,
                b.dtype,
                b.sharding.spec,
            ), path
        assert metrics["loss"].shape == ()
