"""The mesh never changes the maths: losses, gradients and training on every mesh are those of one
device, with packing, dropout and accumulation.

The measure is a float64 model written apart (tests/reference.py): a mesh may compute what is as far
from it as what one device computes in fp32, times a small constant, for it sums in another order.
"""

import functools

import numpy as np
import pytest
import reference
import toy

STEPS = 5
TIMES = 2.0  # the error of one device
ULPS = 2.0  # and so many roundings of the norm, where one device happens to be exact
ONE = "one device"
LAYOUTS = {ONE: ["mesh.data=1"], **toy.MESHES}
SGD = ["model.dropout=0.1", "train.accumulate=2"]
ADAM = ["optim.algorithm=Adam", "optim.learning_rate=0.01"]
RATE = 0.01
UNDER_ADAM = [m for m in LAYOUTS if m not in ("data 4 x tensor 2", "data 2 x tensor 4")]
BATCHES = [toy.batch(seed) for seed in range(STEPS)]


@functools.cache
def trained(mesh, *sets):
    prog = toy.program(*LAYOUTS[mesh], *sets)
    return toy.run(prog, BATCHES, toy.start(prog, noise=0.1))


def initial(prog):
    params = toy.flat(toy.start(prog, noise=0.1).params)
    return {k: v.astype(np.float64) for k, v in params.items()}


@functools.cache
def sgd_in_float64():
    """Returns losses, the first gradient, and the parameters after all steps."""
    prog = toy.program(*SGD)
    params, momentum, losses, first = initial(prog), {}, [], None
    for step, host in enumerate(BATCHES):
        loss, grads = reference.gradient(prog.experiment, params, host, step)
        losses.append(loss)
        first = first or grads
        momentum = {k: g + 0.9 * momentum.get(k, 0.0) for k, g in grads.items()}
        params = {k: p - 0.1 * momentum[k] for k, p in params.items()}
    return losses, first, params


@functools.cache
def adam_in_float64():
    """Returns losses, and the parameters after all steps of Adam as published (algorithm 1)."""
    prog = toy.program(*ADAM)
    params, losses, m, v = initial(prog), [], {}, {}
    for step, host in enumerate(BATCHES):
        loss, grads = reference.gradient(prog.experiment, params, host, step)
        losses.append(loss)
        m = {k: 0.9 * m.get(k, 0.0) + 0.1 * g for k, g in grads.items()}
        v = {k: 0.999 * v.get(k, 0.0) + 0.001 * g**2 for k, g in grads.items()}
        for k in params:
            m_hat, v_hat = (
                m[k] / (1 - 0.9 ** (step + 1)),
                v[k] / (1 - 0.999 ** (step + 1)),
            )
            params[k] = params[k] - RATE * m_hat / (np.sqrt(v_hat) + 1e-8)
    return losses, params


def assert_as_exact(got, one, exact):
    """Each tensor's error is at most some times that of one device, plus a few roundings."""
    for path, want in exact.items():
        error, usual = toy.distance(got[path], want), toy.distance(one[path], want)
        floor = ULPS * toy.EPS * np.linalg.norm(want)
        assert error <= TIMES * usual + floor, (path, error / floor, usual / floor)


def test_one_device_trains_as_float64_does():
    """The yardstick itself is good to a few roundings of every tensor's norm."""
    losses, gradient, params = sgd_in_float64()
    run = trained(ONE, *SGD)
    np.testing.assert_allclose(run.losses, losses, rtol=1e-6)
    assert losses[0] != losses[1]
    for path, want in gradient.items():
        assert toy.distance(run.gradient[path], want) < 16 * toy.EPS * np.linalg.norm(
            want
        ), path
    for path, want in params.items():
        assert toy.distance(run.params[path], want) < 16 * toy.EPS * np.linalg.norm(
            want
        ), path


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(m, marks=pytest.mark.slow) if "gpipe" in m else m
        for m in toy.MESHES
    ],
)
def test_losses_gradients_and_five_steps_are_those_of_one_device(mesh):
    """Under SGD, whose steps are as smooth as the gradient."""
    run, one = trained(mesh, *SGD), trained(ONE, *SGD)
    np.testing.assert_allclose(run.losses, one.losses, rtol=1e-5)
    _, gradient, params = sgd_in_float64()
    assert_as_exact(run.gradient, one.gradient, gradient)
    assert_as_exact(run.params, one.params, params)


@pytest.mark.parametrize("mesh", UNDER_ADAM)
def test_five_steps_of_adam_are_those_of_float64(mesh):
    """In units of the learning rate: where a gradient is about 0, its sign is a whole step."""
    run, (losses, exact) = trained(mesh, *ADAM), adam_in_float64()
    np.testing.assert_allclose(run.losses, losses, rtol=1e-5)
    for path, want in exact.items():
        steps = (run.params[path] - want) / RATE
        assert np.sqrt((steps**2).mean()) < 3e-4, path


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        (toy.CLASSIC, "data 2 x fsdp 2 x tensor 2"),
        (toy.CLASSIC, "seq 8"),
        (toy.CAPPED, "data 2 x seq 2 x tensor 2"),
        (
            toy.CAPPED,
            "data 2 x tensor 4, sequence",
        ),  # one kv head with a bias, on four devices
    ],
    ids=["classic", "classic by ring", "capped and gathered", "capped"],
)
def test_every_part_of_the_model_has_its_gradient_on_a_mesh(kind, mesh):
    """Biases, learned positions, soft caps, a window, a head of its own, every activation."""
    prog = toy.program(*LAYOUTS[mesh], *kind)
    run = toy.run(prog, BATCHES[:1], toy.start(prog, noise=0.1))
    loss, gradient = reference.gradient(prog.experiment, initial(prog), BATCHES[0])
    assert abs(run.losses[0] / loss - 1) < 1e-6
    for path, want in gradient.items():
        # A key's bias moves all scores of a query alike: without a cap its gradient is 0.
        floor = 16 * toy.EPS * np.linalg.norm(want) + 1e-8
        assert toy.distance(run.gradient[path], want) < floor, path
