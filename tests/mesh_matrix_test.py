"""Every way to place eight devices on the six axes gives the maths of one device.

`make mesh-matrix` runs all of it and writes docs/mesh-matrix.md; it takes a quarter of an hour on
two idle cores, so `make test` leaves it out (tests/mesh_equality_test.py holds a part of it).
Placements are crossed with schedules, accumulation, dropout, remat and experts by turns, not all
with all. The measure is that of tests/mesh_equality_test.py: errors against float64, next to one
device's.
"""

import functools
import itertools
import pathlib

import numpy as np
import pytest
import reference
import toy

from lm import sharding, train, trees

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]
ROWS, LENGTH, STEPS = 32, 16, 3
TIMES, RATE, MOMENTUM = 4.0, 0.1, 0.9
ULPS = 8.0  # a rounding a layer
TABLE = pathlib.Path(__file__).parent.parent / "docs" / "mesh-matrix.md"
SHAPE = [
    "model.layers=8",
    "model.heads=8",
    f"train.batch_size={ROWS}",
    f"eval.batch_size={ROWS}",
]
# What else a case does, that the one-device run does too.
MODELS = {
    "dense, dropout": [*SHAPE, "model.dropout=0.1"],
    "experts": [*SHAPE, "model.ffn=Moe", "model.ffn.hidden=24", "model.ffn.experts=8"],
    "experts, dropless": [
        *SHAPE,
        "model.ffn=Moe",
        "model.ffn.hidden=24",
        "model.ffn.experts=8",
        "model.ffn.dispatch=Dropless",
    ],
}
WAYS = ["train.accumulate=2", "model.remat=full", "mesh.sequence_parallel=true"]
SCHEDULES = {
    "1f1b": ["pipeline.schedule=1f1b"],
    "gpipe": ["pipeline.schedule=gpipe"],
    "interleaved": ["pipeline.schedule=interleaved", "pipeline.rounds=2"],
}
BATCHES = [toy.batch(seed, ROWS, LENGTH) for seed in range(STEPS)]


def cases():
    """Returns (name, mesh, model, ways) of every placement; options take turns."""
    powers = itertools.product(range(4), repeat=len(sharding.AXES))
    found = []
    for i, p in enumerate(p for p in powers if sum(p) == 3):
        sizes = {a: 2**n for a, n in zip(sharding.AXES, p, strict=True)}
        names = list(MODELS)
        model = names[1 + i % 2 if sizes["expert"] > 1 else i % len(names)]
        ways = [WAYS[i % len(WAYS)]]
        if sizes["pipe"] > 1:
            fits = [s for s in SCHEDULES if s != "interleaved" or sizes["pipe"] <= 4]
            schedule = fits[i % len(fits)]
            rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
            parts = 2 if "train.accumulate=2" in ways else 1
            micro = min(ROWS // rows // parts, 2 * sizes["pipe"])
            ways += [*SCHEDULES[schedule], f"pipeline.microbatches={micro}"]
        mesh = " x ".join(f"{a} {n}" for a, n in sizes.items() if n > 1)
        places = [f"mesh.{a}={n}" for a, n in sizes.items()]
        found.append((mesh, places, model, ways))
    return found


CASES = cases()
RESULTS: dict[str, str] = {}


@functools.cache
def exact(model):
    """Losses, the first gradient and the last parameters in float64, under SGD."""
    prog = toy.program(*MODELS[model])
    params = {
        k: v.astype(np.float64)
        for k, v in toy.flat(toy.start(prog, noise=0.1).params).items()
    }
    momentum, losses, first = {}, [], None
    for step, host in enumerate(BATCHES):
        loss, grads = reference.gradient(prog.experiment, params, host, step)
        losses.append(loss)
        first = first or grads
        momentum = {k: g + MOMENTUM * momentum.get(k, 0.0) for k, g in grads.items()}
        params = {
            k: p - RATE * momentum[k] if k in momentum else p for k, p in params.items()
        }
    return losses, first, params


def trained(*sets):
    prog = toy.program(*sets)
    state = toy.start(prog, noise=0.1)
    before = trees.digests(train.saved(prog, state.params))
    return {k: int(v) for k, v in before.items()}, toy.run(prog, BATCHES, state)


@functools.cache
def alone(model):
    return trained(*MODELS[model], "mesh.data=1")


def worst(got, one, want):
    """The largest error, as a share of what is allowed."""
    found = 0.0
    for path, x in want.items():
        floor = ULPS * toy.EPS * np.linalg.norm(x)
        allowed = TIMES * toy.distance(one[path], x) + floor
        found = max(found, toy.distance(got[path], x) / allowed)
    return found


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: c[0].replace(" x ", "_").replace(" ", "")
)
def test_a_placement_trains_as_one_device(case):
    mesh, places, model, ways = case
    saved, run = trained(*MODELS[model], *places, *ways)
    same, one = alone(model)
    assert saved == same  # what a checkpoint holds knows no mesh
    np.testing.assert_allclose(run.losses, one.losses, rtol=1e-5)
    losses, gradient, params = exact(model)
    np.testing.assert_allclose(run.losses, losses, rtol=1e-5)
    shares = (
        worst(run.gradient, one.gradient, gradient),
        worst(run.params, one.params, params),
    )
    off = max(abs(a / b - 1) for a, b in zip(run.losses, one.losses, strict=True))
    options = ", ".join(w.split(".", 1)[1] for w in ways)
    cells = mesh, model, options, f"{off:.1e}", *(f"{s:.2f}" for s in shares)
    RESULTS[mesh] = f"| {' | '.join(cells)} |"
    assert max(shares) <= 1, shares


@pytest.fixture(scope="module", autouse=True)
def table():
    """Writes the results into the table; placements that did not run keep their line."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    before = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    yield
    head = (
        "# Every placement of eight devices\n\n"
        "Written by `make mesh-matrix`. Three steps of SGD on eight emulated CPU devices, fp32,\n"
        "packed rows. Loss: largest relative difference from one device. Gradients, parameters:\n"
        "largest error of a tensor against float64, as a share of what is allowed (four times one\n"
        "device's error and a rounding a layer).\n\n"
        "| mesh | model | options | loss | gradients | parameters |\n|---|---|---|---|---|---|\n"
    )
    rows = {**before, **RESULTS}
    text = head + "".join(f"{rows[c[0]]}\n" for c in CASES if c[0] in rows)
    TABLE.write_text(text, encoding="utf-8")
