"""A pipeline computes what one device does, by the timetable's ticks, and nothing leaks into it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lm import generate, gradients, train, trees
from lm.experiment import Generate
from lm.models import timetable

# The norm of a gradient's difference from one device's: a few roundings of sums in another order.
ROUNDINGS = 64
FIVE = ["model.layers=5"]
EIGHT = ["model.layers=8"]
ROUNDS = ["pipeline.schedule=interleaved", "pipeline.rounds=2"]
EXPERTS = ["model.ffn=Moe", "model.ffn.hidden=24"]
FIRST = ["model.ffn.dense_first=1", "model.ffn.dense.hidden=40"]
TWO = [
    *("objective=Seq2Seq", "objective.target_length=12", "data.packing=documents"),
    *(
        "model=EncoderDecoder",
        "model.encoder_layers=2",
        "model.attention.qk_norm=false",
    ),
    "pipeline.schedule=gpipe",
]
T5 = [
    *(*TWO, "model.positions.buckets=8", "model.positions.distance=9", "model.start=0"),
    *("model.encoder_layers=3", "model.dropout=0.1"),
]
VASWANI = [
    *TWO,
    "model.positions=Sinusoidal",
    "model.norms=post",
    "model.norm=LayerNorm",
]
CASES = {
    "1f1b, uneven": [*FIVE, "mesh.pipe=4", "mesh.data=2", "pipeline.microbatches=4"],
    "1f1b, fewer microbatches than stages": [
        *EIGHT, "mesh.pipe=8", "pipeline.microbatches=2", "model.dropout=0.1",
    ],
    "gpipe, untied, dropout": [
        *EIGHT, "mesh.pipe=4", "mesh.tensor=2", "pipeline.schedule=gpipe",
        "model.tied=false", "model.dropout=0.1", "pipeline.microbatches=8",
    ],
    "interleaved, fsdp": [
        *EIGHT, *ROUNDS, "mesh.pipe=2", "mesh.fsdp=2", "mesh.tensor=2", "pipeline.microbatches=4",
        "model.remat=full",
    ],
    "interleaved, uneven, sequence": [
        *FIVE, *ROUNDS, "mesh.pipe=2", "mesh.data=2", "mesh.tensor=2", "pipeline.microbatches=2",
        "mesh.sequence_parallel=true", "train.accumulate=2", "model.scan=true",
    ],
    "1f1b, ring": [
        "mesh.pipe=2", "mesh.seq=2", "mesh.data=2", "model.attention.context=ring",
        "pipeline.microbatches=2", "model.dropout=0.1",
    ],
    "1f1b, experts": [
        *EXPERTS, "mesh.pipe=2", "mesh.expert=2", "mesh.tensor=2", "pipeline.microbatches=2",
    ],
    "interleaved, dropless experts, fsdp": [
        *EXPERTS, *ROUNDS, "mesh.pipe=2", "mesh.expert=2", "mesh.fsdp=2", "model.layers=4",
        "pipeline.microbatches=2", "model.ffn.dispatch=Dropless", "model.ffn.gate=Sigmoid",
    ],
    "1f1b, experts after dense layers": [
        *EXPERTS, *FIRST, "model.layers=3", "mesh.pipe=2", "mesh.fsdp=2",
        "pipeline.microbatches=2",
    ],
    "gpipe, dense and experts in turn": [
        *EXPERTS, "model.ffn.every=2", "model.layers=4", "mesh.pipe=2", "mesh.tensor=2",
        "pipeline.schedule=gpipe", "pipeline.microbatches=2", "model.remat=full",
    ],
    "interleaved, dense and experts, no two stages alike": [
        *EXPERTS, *ROUNDS, *FIRST, "model.ffn.every=3", "model.layers=10", "mesh.pipe=2",
        "mesh.data=2", "mesh.expert=2", "pipeline.microbatches=2", "model.ffn.gate=Sigmoid",
        "model.dropout=0.1",
    ],
    "1f1b, gathered once": [
        *FIVE, "mesh.pipe=2", "mesh.data=2", "mesh.fsdp=2", "pipeline.gather=step",
        "pipeline.microbatches=2",
    ],
    "interleaved, experts, gathered once, accumulated": [
        *EXPERTS, *ROUNDS, "mesh.pipe=2", "mesh.fsdp=2", "mesh.expert=2", "model.layers=4",
        "model.ffn.every=2", "pipeline.microbatches=2", "pipeline.gather=step",
        "train.accumulate=2", "model.tied=false",
    ],
    "two stacks, uneven, gathered once": [
        *T5, "mesh.pipe=2", "mesh.data=2", "mesh.fsdp=2", "pipeline.gather=step",
        "pipeline.microbatches=2",
    ],
    "two stacks, post-norm, ring": [
        *VASWANI, "mesh.pipe=4", "mesh.seq=2", "model.attention.context=ring",
        "pipeline.microbatches=4", "model.layers=4", "model.encoder_layers=5",
    ],
    "two stacks, accumulated": [
        *T5, "mesh.pipe=2", "mesh.fsdp=2", "mesh.tensor=2", "pipeline.microbatches=2",
        "mesh.sequence_parallel=true", "train.accumulate=2", "model.remat=full",
    ],
    "1f1b, learned positions": [
        *toy.CLASSIC, "model.attention.bias=false", "mesh.pipe=2", "mesh.tensor=4",
        "pipeline.microbatches=16",
    ],
}  # fmt: skip


@functools.cache
def gradient(*sets, poison=False):
    """Returns the sums, the gradient in plain order, and the compiled program."""
    prog = toy.program(*sets)
    params = toy.start(prog, noise=0.1).params
    step = jnp.int32(3)

    def of(params, batch):
        count = batch["weights"].sum()
        return gradients.of(prog, params, batch, step, count, poison=poison)

    batch = toy.place(prog, host(sets))
    compiled = prog.compiled(of).lower(params, batch).compile()
    sums, grads = compiled(params, batch)
    for path, g in toy.flat(grads).items():  # of rows that hold no layer
        if prog.staged and prog.stacked(path):
            assert not g[prog.rows(path).ravel() < 0].any(), path
    grads = toy.flat(train.saved(prog, grads))
    return jax.device_get(sums), grads, compiled


def host(sets):
    """Returns the rows of a case."""
    return toy.pairs() if TWO[0] in sets else toy.batch()


def plain(sets):
    return [
        s
        for s in sets
        if not s.startswith(("mesh", "pipeline", "train.accumulate", "model.remat"))
    ]


SLOW = (
    "two stacks, accumulated",
    "interleaved, fsdp",
    "interleaved, experts, gathered once, accumulated",
    "1f1b, experts after dense layers",
    "interleaved, dropless experts, fsdp",
    "1f1b, fewer microbatches than stages",
    "interleaved, dense and experts, no two stages alike",
)
QUICK = [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]


@pytest.mark.parametrize("case", QUICK)
def test_loss_sums_and_gradients_are_those_of_one_device(case):
    """With NaN in the bubbles, which no result shows."""
    sums, grads, _ = gradient(*CASES[case], poison=True)
    want_sums, want, _ = gradient(*plain(CASES[case]))
    assert sums.keys() == want_sums.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], want_sums[name], rtol=1e-5)
    assert grads.keys() == want.keys()
    for path, g in want.items():
        bound = ROUNDINGS * toy.EPS * np.linalg.norm(g)
        assert toy.distance(grads[path], g) <= bound, path


@pytest.mark.parametrize(
    "case", ["1f1b, uneven", "gpipe, untied, dropout", "interleaved, fsdp"]
)
def test_the_program_runs_the_ticks_of_the_table(case):
    """Trip counts of its loops are those of the table, read from StableHLO."""
    prog = toy.program(*CASES[case], "model.scan=false")
    params = toy.start(prog, noise=0.1).params
    batch = toy.place(prog, toy.batch())

    def of(params, batch):
        return gradients.of(prog, params, batch, jnp.int32(0), jnp.float32(1))

    text = prog.compiled(of).lower(params, batch).as_text()
    P, v, _ = prog.places.shape
    chosen = prog.experiment.pipeline
    table = timetable.make(chosen.schedule, P, prog.microbatches, v)
    want = [p.ticks for loop in table.loops for p in loop.phases if p.ticks > 1]
    want += [loop.times for loop in table.loops if loop.times > 1]
    trips = [
        int(n)
        for n in re.findall(r"stablehlo.constant dense<(\d+)> : tensor<i32>", text)
    ]
    loops = len(re.findall("stablehlo.while", text))
    assert loops >= len(want)
    for n in want:
        assert n in trips, (n, trips)


def memory(schedule, microbatches, *more):
    """Bytes of temporaries of a device, with microbatches of one row."""
    sets = [
        "mesh.pipe=2",
        f"pipeline.schedule={schedule}",
        "model.dim=64",
        *more,
    ]
    sets += [
        f"pipeline.microbatches={microbatches}",
        f"train.batch_size={microbatches}",
    ]
    prog = toy.program(*sets, f"eval.batch_size={microbatches}", "data.length=64")
    params = train.abstract_state(prog).params
    host = toy.batch(0, microbatches, 64)
    batch = toy.place(prog, host)

    def of(params, batch):
        return gradients.of(prog, params, batch, jnp.int32(0), jnp.float32(1))

    return (
        prog.compiled(of)
        .lower(params, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_under_1f1b_only_ids_grow_with_the_microbatches():
    activation = 64 * 64 * 4  # one row, fp32
    ids = (
        64 * 4 * 8
    )  # tokens, targets, segments, positions, weights, and copies of them
    one = (memory("1f1b", 32) - memory("1f1b", 8)) / 24
    gpipe = (memory("gpipe", 32) - memory("gpipe", 8)) / 24
    assert one <= ids
    assert gpipe >= activation


@pytest.mark.slow
def test_remat_is_honoured_inside_a_stage():
    """A chunk of four layers keeps their inputs, or all that their backward needs."""
    none = memory("1f1b", 2, *EIGHT, "model.remat=none")
    assert none > 1.5 * memory("1f1b", 2, *EIGHT, "model.remat=full")


def test_settings_that_do_nothing_are_told():
    def told(*sets):
        return "; ".join(toy.program(*sets).unused)

    assert not told("mesh.data=8") and not told("mesh.pipe=2")
    both = ["pipeline.schedule=gpipe", "pipeline.microbatches=2"]
    for sets in (both, ["mesh.fsdp=2", "pipeline.gather=step"]):
        names = [s for s in sets if s.startswith("pipeline")]
        assert told(*sets) == f"mesh.pipe=1: {', '.join(names)} not used"
    one = told("mesh.pipe=2", "pipeline.gather=step", "pipeline.microbatches=2")
    assert one.startswith("mesh.fsdp=1: pipeline.gather=step not used")


@pytest.mark.parametrize(
    "case", ["interleaved, uneven, sequence", "two stacks, uneven, gathered once"]
)
def test_evaluation_and_samples_are_those_of_one_device(case):
    sets, found = CASES[case], []
    for some in (sets, plain(sets)):
        prog = toy.program(*some)
        params = toy.start(prog, noise=0.1).params
        score = train.make_eval_step(prog)(params, toy.place(prog, host(sets)))
        rows = generate.make_rows(
            [(np.arange(1, 6), 0), (np.arange(3), 1)] * 2, 4, 16, 4
        )
        sample = generate.make_sample(prog, Generate(temperature=0), 256)
        new, finite = sample(params, rows, jax.random.key(0))
        assert finite
        found.append((jax.device_get(score), np.asarray(new)))
    (scores, new), (want, same) = found
    for name in want:
        np.testing.assert_allclose(scores[name], want[name], rtol=1e-5)
    np.testing.assert_array_equal(new, same)


@pytest.mark.parametrize(
    "model",
    [
        [*FIVE, *ROUNDS],
        [*EXPERTS, *FIRST, "model.layers=3"],
        T5,
    ],
)
def test_what_is_saved_is_in_plain_order_and_comes_back(model):
    prog = toy.program(*model, "mesh.pipe=2", "pipeline.microbatches=2")
    state = toy.start(prog)
    one = toy.program(*plain(model))
    want = toy.flat(toy.start(one).params)
    assert train.abstract_state(one).params.keys() == state.params.keys()
    saved = train.saved(prog, state)
    got = toy.flat(saved.params)
    for path, x in want.items():
        np.testing.assert_array_equal(got[path], x)
    shapes = trees.flatten(train.saved(prog, train.abstract_state(prog)))
    for path, x in trees.flatten(saved).items():
        assert (x.shape, x.dtype, x.sharding) == (
            shapes[path].shape, shapes[path].dtype, shapes[path].sharding,
        )  # fmt: skip
    before = toy.flat(state)
    for path, x in toy.flat(train.loaded(prog, saved)).items():
        np.testing.assert_array_equal(x, before[path])
    stacked = (trees.flatten(saved.params[name]).values() for name in prog.stacks)
    assert all(x.is_deleted() for some in stacked for x in some)  # no second copy stays


@pytest.mark.parametrize(
    ("sets", "ffns", "rows"),
    [
        (["model.ffn.every=2"], 2, {"blocks/0": 1, "blocks/1": 1}),
        (["model.ffn.dense_first=1"], 3, {"stacks/0": 1, "stacks/1": 2}),
        (["model.ffn.dense_first=3"], 4, {"stacks/0": 2, "stacks/1": 2}),
    ],
)
def test_kinds_that_differ_between_stages_are_both_computed(sets, ffns, rows):
    """By the table of docs/parallelism.md."""
    prog = toy.program(*EXPERTS, *EIGHT, *sets, "mesh.pipe=4", "mesh.tensor=2")
    assert len(prog.computed("mixer")) == 2 and len(prog.computed("ffn")) == ffns
    for stack, n in rows.items():
        path = next(p for p in prog.shapes if f"{stack}/mixer/query_dnh" in p)
        assert prog.rows(path).shape == (4, 1, n)


@pytest.mark.slow
def test_initialisation_is_that_of_one_device():
    mixed = [*EXPERTS, *FIRST, *FIVE]
    for model, sets in (
        (FIVE, ["mesh.pipe=4"]),
        (FIVE, [*ROUNDS, "mesh.pipe=2"]),
        (mixed, ["mesh.pipe=2"]),
    ):
        sets = [*model, *sets, "train.batch_size=64", "eval.batch_size=64"]
        prog = toy.program(*sets)
        state = train.make_init(prog)(jax.random.key(1))
        one = toy.program(*model)
        want = toy.flat(train.make_init(one)(jax.random.key(1)).params)
        for path, x in toy.flat(train.saved(prog, state).params).items():
            np.testing.assert_array_equal(x, want[path])


def test_what_does_not_fit_is_refused():
    with toy.refused("train.batch_size=16", "pipeline.microbatches=5", "multiple of 5"):
        toy.program("mesh.pipe=2", "pipeline.microbatches=5")
    with toy.refused("model.layers=2", "mesh.pipe=4"):
        toy.program("mesh.pipe=4", "pipeline.microbatches=2")
    with toy.refused("pipeline.microbatches=3", "mesh.pipe=2", "2 or 4"):
        toy.program("mesh.pipe=2", *ROUNDS, "model.layers=4", "pipeline.microbatches=3")
    with toy.refused("vocab_multiple"):
        toy.program("mesh.pipe=2", "pipeline.microbatches=2", "model.vocab_multiple=1")
