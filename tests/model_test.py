"""The model is the formula; no token sees a later one or another document; remat is free."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toy

from lm import experiment, gradients, sharding, train
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.layers import dropout, dropout_keys

KINDS = {"base": [], "classic": toy.CLASSIC, "capped": toy.CAPPED}


def model(*sets):
    """Returns the compiled hidden states and logits, with random parameters of size 0.2."""
    prog = toy.program(*sets)
    params = toy.start(prog, noise=0.2).params
    run = toy.hidden(prog)
    return lambda host: run(params, host)


@pytest.fixture(scope="module")
def base():
    return model()


def whole(seed=0):
    """A batch whose rows are one document each."""
    host = toy.batch(seed)
    segments = np.ones_like(host["segments"])
    return {**host, "segments": segments, "positions": toy.restart(segments)}


def changed(host, row, where):
    """The same batch with other tokens at some places of a row."""
    tokens = host["tokens"].copy()
    tokens[row, where] = (tokens[row, where] + 7) % toy.VOCAB
    return {**host, "tokens": tokens}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_are_those_of_the_reference(kind):
    prog = toy.program(*KINDS[kind])
    params = toy.start(prog, noise=0.2).params
    x, logits = toy.hidden(prog)(params, toy.batch())
    want = reference.logits(prog.experiment, toy.flat(params), toy.batch())
    true = logits[..., : toy.VOCAB]
    for got, expected in zip((x, true), want, strict=True):
        # A dozen products deep, each adds a few rounding errors.
        assert toy.distance(got, expected) < 30 * toy.EPS * np.linalg.norm(expected)
    assert logits.shape[-1] == 320 and (logits[..., toy.VOCAB :] < -1e29).all()


def small(name):
    """An experiment's shape at small width: all that is not a size stays."""
    chosen = experiment.load(name)
    c = chosen.model
    byte = c.vocab_size == 257
    sizes = {
        "layers": 2, "dim": 64, "heads": 4, "vocab_size": 257 if byte else 1000,
        "vocab_multiple": 64, "dtype": "float32",
    }  # fmt: skip
    if hasattr(c, "kv_heads"):
        sizes["kv_heads"] = max(1, 4 * c.kv_heads // c.heads)
    if c.ffn is not None:
        sizes["ffn"] = dataclasses.replace(c.ffn, hidden=128)
    has = {field.name for field in dataclasses.fields(c)}
    return dataclasses.replace(
        toy.BASE,
        objective=chosen.objective,
        data=toy.BASE.data
        if byte
        else dataclasses.replace(chosen.data, length=toy.LENGTH),
        model=dataclasses.replace(c, **{k: v for k, v in sizes.items() if k in has}),
    )


@pytest.mark.parametrize("name", [*experiment.names(), "capped"])
def test_the_initial_loss_is_that_of_knowing_nothing_on_any_mesh(name):
    """Within 2 % of ln V, and to 1e-5 the same on a mesh of all axes.

    Of classes within 5 %: the same spread of logits is more of the logarithm of a few.
    """
    chosen = toy.experiment(*toy.CAPPED) if name == "capped" else small(name)
    two = isinstance(chosen.model, EncoderDecoder.Config)
    host = toy.batch() if chosen.data.isolate else whole()
    host = toy.pairs() if two else host
    labels = len(getattr(chosen.objective, "labels", ()))
    if labels:
        host["targets"] = np.arange(toy.ROWS, dtype=np.int32) % labels
        host["weights"] = np.ones(toy.ROWS, np.float32)
    losses = []
    meshes = [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "seq": 4}]
    if two or isinstance(chosen.model, Recurrent.Config):  # of whole rows
        meshes[2] = {"fsdp": 2, "tensor": 4}
    for sizes in meshes:
        mesh = sharding.MeshConfig(**{"data": 1, **sizes})
        here = dataclasses.replace(chosen, mesh=mesh)
        prog = train.program(here, toy.layout(here.mesh))
        sums = train.make_eval_step(prog)(toy.start(prog).params, toy.place(prog, host))
        losses.append(float(sums["nll"] / sums["tokens"]))
    known = math.log(labels or chosen.model.vocab_size)
    assert abs(losses[0] / known - 1) < (0.05 if labels else 0.02)
    for loss in losses[1:]:
        assert abs(loss / losses[0] - 1) < 1e-5


@pytest.mark.parametrize("t", [0, 9, 15])
def test_no_token_sees_a_later_one(base, t):
    before, after = base(whole())[0], base(changed(whole(), 2, t))[0]
    same = (before == after).all(-1)
    assert same[2, :t].all() and not same[2, t:].any()
    assert np.delete(same, 2, 0).all()


def test_documents_of_a_row_do_not_see_each_other(base):
    """Changing all of one document changes no bit of the others, earlier or later."""
    host = toy.batch()
    before = base(host)[0]
    for segment in (0, 1, 2):
        row = next(r for r in range(4, toy.ROWS) if len({*host["segments"][r]}) == 3)
        inside = host["segments"][row] == segment
        same = (before == base(changed(host, row, inside))[0]).all(-1)
        assert not same[row, inside].any() and same[row, ~inside].all()


def test_without_isolation_a_row_is_one_document():
    run = model("data.isolate=false")
    before, after = (run(h)[0] for h in (whole(), changed(whole(), 0, 3)))
    assert (before == after).all(-1)[0].tolist() == [True] * 3 + [False] * 13


@pytest.mark.parametrize("kind", ["base", "classic"])
def test_packed_documents_equal_each_alone(kind, base):
    """Whatever stands before a document in its row: rotary and learned positions restart."""
    run = base if kind == "base" else model(*KINDS[kind])
    alone = whole()
    cut = 9  # documents of 9 and 7 tokens
    rows = np.arange(0, toy.ROWS, 2)
    packed = {k: v.copy() for k, v in alone.items()}
    packed["tokens"][rows, cut:] = alone["tokens"][rows + 1, : toy.LENGTH - cut]
    packed["segments"][rows, cut:] = 2
    packed["positions"] = toy.restart(packed["segments"])
    x, y = run(alone)[0], run(packed)[0]
    np.testing.assert_array_equal(y[rows, :cut], x[rows, :cut])
    np.testing.assert_allclose(
        y[rows, cut:], x[rows + 1, : toy.LENGTH - cut], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_a_window_reaches_so_far_and_no_farther(layers):
    """Each layer sees the last 4 tokens, its own included: 3 back a layer."""
    run = model(f"model.layers={layers}", "model.attention.window=4")
    same = (run(whole())[0] == run(changed(whole(), 1, 2))[0]).all(-1)[1]
    reach = 2 + 3 * layers
    assert same[:2].all() and not same[2 : reach + 1].any() and same[reach + 1 :].all()


# Dropout.


@functools.partial(jax.jit, static_argnums=(1,))
def _masks(index, seed, step, site):
    keys = dropout_keys(seed, step, index, 8)
    return dropout(jnp.ones((index.size, 8, 64)), 0.25, keys, site)


def masks(index, seed=0, step=0, site=0):
    """Returns what 8 tokens of width 64 of each example are multiplied by, at rate 1/4."""
    with sharding.use(toy.layout(toy.BASE.mesh)):
        index = jnp.asarray(index, jnp.uint32)
        return np.asarray(_masks(index, seed, jnp.int32(step), jnp.uint32(site)))


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    drawn = masks(range(64))
    assert set(np.unique(drawn)) == {0.0, np.float32(1 / 0.75)}
    n = drawn.size
    assert abs((drawn == 0).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)  # 4 sigma


def test_dropout_belongs_to_the_example_not_to_its_place():
    """Any order or part of a batch drops the same; examples, positions, sites, steps differ."""
    all_of_them = masks([3, 5, 2**32 - 1, 8])
    np.testing.assert_array_equal(masks([8, 3]), all_of_them[[3, 0]])
    others = [masks([3], step=1), masks([3], seed=1), masks([3], site=1), masks([4])]
    for other in others:
        assert (
            0.2 < (other != all_of_them[0]).mean() < 0.55
        )  # 2 rate (1 - rate) = 0.375
    flat = all_of_them.reshape(-1, 64)
    assert len(np.unique(flat, axis=0)) == len(flat)


def test_dropout_on_a_mesh_drops_the_same():
    """Also where a row is split over tensor."""
    layout = toy.layout(sharding.MeshConfig(data=2, tensor=4, sequence_parallel=True))
    with sharding.use(layout):
        index, ones = jax.device_put(
            (np.arange(4, dtype=np.uint32), np.ones((4, 8, 64), np.float32)),
            (
                sharding.shard(layout, sharding.spec("batch")),
                sharding.shard(layout, sharding.spec("batch", "residual", None)),
            ),
        )

        @jax.jit
        def run(ones, index):
            return dropout(ones, 0.25, dropout_keys(0, jnp.int32(0), index, 8), 0)

        out = run(ones, index)
    np.testing.assert_array_equal(out, masks(range(4)))
    assert jax.typeof(out).sharding.spec == ones.sharding.spec


# What is kept for the backward, and how the stack is run.


def gradient(*sets):
    """Returns loss, gradient by path, and bytes of temporaries of four layers."""
    prog = toy.program("model.layers=4", "model.dropout=0.1", *sets)
    params, batch = toy.start(prog, noise=0.1).params, toy.place(prog, toy.batch())

    def f(params, batch):
        return gradients.of(prog, params, batch, jnp.int32(0), batch["weights"].sum())

    with sharding.use(prog.layout):
        compiled = jax.jit(f).lower(params, batch).compile()
    sums, grads = compiled(params, batch)
    return (
        float(sums["loss"]),
        toy.flat(grads),
        compiled.memory_analysis().temp_size_in_bytes,
    )


@pytest.fixture(scope="module")
def plain():
    return gradient()


@pytest.mark.parametrize(
    "way",
    [
        "model.remat=dots",
        "model.remat=attention",
        "model.remat=full",
        "model.scan=false",
    ],
)
def test_remat_and_unrolling_change_no_gradient(plain, way):
    """What is recomputed is computed from the same numbers, so rounding is all that may differ."""
    loss, grads, memory = gradient(way)
    assert abs(loss / plain[0] - 1) < 1e-6
    for path, want in plain[1].items():
        assert toy.distance(grads[path], want) <= 4 * toy.EPS * np.linalg.norm(want), (
            path
        )
    if "remat" in way:
        assert memory < plain[2]
    if way == "model.remat=full":
        assert memory < 0.6 * plain[2]


def test_unrolled_layers_are_computed_again_too():
    """XLA would find the same work in the forward, and keep what that has."""
    _, grads, whole = gradient("model.scan=false")
    _, again, memory = gradient("model.scan=false", "model.remat=full")
    assert memory < whole
    for path, want in grads.items():
        assert toy.distance(again[path], want) <= 4 * toy.EPS * np.linalg.norm(want), (
            path
        )


def test_offload_is_for_accelerators():
    chosen = toy.experiment("model.remat=offload")
    with toy.refused("model.remat=offload", "needs an accelerator", "model.remat=full"):
        train.program(chosen, toy.layout(chosen.mesh))
    gpu = sharding.abstract_layout(chosen.mesh, 1, "gpu")
    prog = train.program(chosen, gpu)  # and there the step traces
    state, batch = train.abstract_state(prog), jax.tree.map(jnp.asarray, toy.batch())
    train.make_train_step(prog).shapes(state, batch)


def test_bfloat16_compute_keeps_parameters_in_fp32_and_stays_close():
    x, _ = model()(toy.batch())
    y, logits = model("model.dtype=bfloat16")(toy.batch())
    assert y.dtype == jnp.bfloat16 and logits.dtype == np.float32
    error = toy.distance(y.astype(np.float32), x) / np.linalg.norm(x)
    assert 1e-4 < error < 0.03  # bf16 has 8 bits: 0.4 % a rounding


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 4}, ["model.heads=6 is not divisible by model.kv_heads=4"]),
        ({"dim": 100}, ["model.dim=100", "model.heads=6", "model.attention.head_dim"]),
        ({"dim": 30}, ["even head_dim, got 5"]),
        ({"dropout": 1.0}, ["model.dropout=1.0: expected 0 <= dropout < 1"]),
        ({"layers": 0}, ["model.layers=0: expected 1 to 100000"]),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, words):
    with toy.refused(*words):
        dataclasses.replace(Transformer.Config(), **change)


def test_positions_beyond_the_learned_ones_are_refused():
    with toy.refused(
        "model.positions.length=8 is less than data.length=16", "raise it"
    ):
        toy.experiment("model.positions=Learned", "model.positions.length=8")
