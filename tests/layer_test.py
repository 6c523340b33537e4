"""What a layer costs by its trace is what XLA counts, and what is written down for attention."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import toy

from lm import batches, config, gradients, objectives, sharding, train
from lm.experiment import load, names
from lm.models import stack
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.blockwise import Tokens
from lm.plan import flops, jaxprs, layer, target
from lm.program import STACK, program

# So wide that what is not a product, which XLA counts too, is below 1 %.
WIDE = [
    *("model.layers=2", "model.dim=512", "model.heads=4", "model.kv_heads=2"),
    *("model.attention.qk_norm=false", "model.ffn.hidden=2048"),
    *(
        "data.length=256",
        "train.batch_size=2",
        "eval.batch_size=2",
        "data.isolate=false",
    ),
]
KINDS = {
    "dense": [],
    "dense, recomputed": ["model.remat=full"],
    "attention kept": ["model.remat=attention"],
    "products kept": ["model.remat=dots"],
    "experts": ["model.ffn=Moe", "model.ffn.hidden=1024"],
    "latents": ["model.attention=Latent", "model.kv_heads=4"],
}


def xla(prog):
    """Returns XLA's count of an unrolled layer: forward, and forward with backward."""
    params = train.abstract_state(prog).params
    some = train.abstract_batch(prog)

    def run(layers, x, some):
        model = prog.model({**params, STACK: layers})
        tokens = Tokens(some["positions"], some["segments"])
        side = model.side(
            tokens, gradients.row_keys(prog, some, jnp.int32(0)), prog.packed
        )
        how = {"remat": prog.experiment.model.remat, "scan": True}
        x, aux, _ = stack.run(model.layers, x, side, **how)
        return (x, jnp.float32(objectives.layers(aux, some)[0])), aux

    def both(layers, x, some, g):
        out, vjp, aux = jax.vjp(lambda *a: run(*a, some), layers, x, has_aux=True)
        return out, aux, vjp((g, jnp.float32(1)))

    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params[STACK])
    x = jax.ShapeDtypeStruct(
        (*some["tokens"].shape, prog.experiment.model.dim), jnp.float32
    )
    counts = []
    with sharding.use(prog.layout):
        for f, more in ((run, ()), (both, (x,))):
            lowered = jax.jit(f).lower(one, x, some, *more)
            counts.append(lowered.cost_analysis()["flops"])
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_xla_counts(kind):
    prog = toy.program(*WIDE, *KINDS[kind])
    cost = layer.costs(prog).blocks[0].cost
    there, both = xla(prog)
    assert cost.flops_forward == pytest.approx(there, rel=0.02)
    assert cost.flops_forward + cost.flops_backward == pytest.approx(both, rel=0.02)


# Rows of four blocks of 512; of a causal mask ten pairs of blocks are needed, of the window seven.
LONG = [
    *("model.dim=512", "model.heads=8", "model.kv_heads=8", "data.length=2048"),
    *("train.batch_size=16", "eval.batch_size=16", "mesh.data=1"),
]


def cost(chip, *sets):
    """Returns what a layer costs a device of eight chips."""
    chosen = toy.experiment(*LONG, *sets)
    layout = target.read(f"{chip}").layout(chosen.mesh)
    return layer.costs(program(chosen, layout)).blocks[0].cost


@pytest.mark.parametrize(("chip", "products"), [("h100:8", 5), ("v5e:2x4", 7)])
def test_attention_costs_the_blocks_that_are_needed(chip, products):
    """Blockwise goes back by five products a pair of blocks, the kernel for TPUs by seven."""
    whole = cost(chip, "mesh.data=8")
    window = cost(chip, "mesh.data=8", "model.attention.window=512")
    pair = 2 * 512 * 512 * 64 * 8 * 2  # a product of all heads of two rows
    assert whole.flops_forward - window.flops_forward == 3 * 2 * pair
    assert whole.flops_backward - window.flops_backward == 3 * products * pair


def test_kernels_of_a_loop_start_in_every_turn():
    def turn(x_ab, _):  # a product, and what it gives to the next turn
        return jnp.tanh(x_ab @ x_ab), None

    traced = jax.make_jaxpr(lambda x_ab: jax.lax.scan(turn, x_ab, length=5)[0])
    assert jaxprs.total(traced(jnp.ones((4, 4)))).starts == 5 * 2


def test_devices_share_the_work_of_a_layer():
    alone = cost("h100:8", "mesh.fsdp=8").flops_forward
    over = ["mesh.fsdp=4", "mesh.tensor=2"]
    tensor = cost("h100:8", *over)
    assert tensor.flops_forward == alone
    more = cost("h100:8", *over, "mesh.sequence_parallel=true")
    assert more.flops_forward == alone
    assert more.flops_backward == tensor.flops_backward
    assert more.kept < tensor.kept
    for context in ("ring", "gather"):
        way = f"model.attention.context={context}"
        found = cost("h100:8", "mesh.fsdp=4", "mesh.seq=2", way)
        assert found.flops_forward == alone


def test_what_is_kept_follows_the_policy():
    policies = ("full", "attention", "dots", "none")
    found = [cost("h100:8", "mesh.data=8", f"model.remat={p}") for p in policies]
    kept = [c.kept for c in found]
    assert kept == sorted(kept)
    stream = 2 * 2048 * 512 * 2  # bytes of a layer's input
    assert kept[0] == stream
    assert kept[1] == 2 * stream + 2 * 8 * 2048 * 4  # and attention's output and sums
    again = [c.flops_backward for c in found]
    assert again[0] == max(again) and again[3] == min(again)


def _two_stacks(prog, found):
    model, length = prog.experiment.model, prog.experiment.data.length
    U = batches.written(prog.experiment.objective, prog.experiment.data)
    one = flops.forward(model, length, causal=True, written=U)
    one -= 2 * model.vocab_rows * model.dim  # the head
    (both,) = found.blocks
    done = both.cost.flops_forward / (layer.rows(prog) * U)
    assert 0.99 < done / one < 1.3


def test_stages_do_what_two_stacks_do_with_all_their_layers():
    sets = ["mesh.pipe=2", "pipeline.schedule=gpipe", "pipeline.microbatches=2"]
    one, two = (
        program(chosen, sharding.abstract_layout(chosen.mesh, chosen.mesh.pipe))
        for chosen in (
            config.override(load("t5_tiny"), ["mesh.data=1", *more])
            for more in ([], sets)
        )
    )
    (both,), chunks = layer.costs(one).blocks, layer.costs(two).blocks
    assert [g.layers for g in chunks] == [1, 1]
    a_row = both.cost.flops_forward / layer.rows(one)
    on_stages = 2 * sum(g.cost.flops_forward for g in chunks) / layer.rows(two)
    assert on_stages == pytest.approx(a_row, rel=1e-3)


@pytest.mark.parametrize("name", names())
def test_every_shipped_model_has_costs(name):
    """By the formula, which leaves out routers and the room of experts that is not full."""
    chosen = load(name)
    count = max(8, math.prod(abs(n) for n in chosen.mesh.sizes().values()))
    prog = program(chosen, target.read(f"h100:{count // 8}x8").layout(chosen.mesh))
    found = layer.costs(prog)
    layers = sum(g.count * g.layers for g in found.blocks)
    length = prog.experiment.data.length
    if isinstance(chosen.model, EncoderDecoder.Config):
        _two_stacks(prog, found)
        return
    assert layers == prog.places[0].size
    one, two = (
        flops.forward(dataclasses.replace(chosen.model, layers=n), length, causal=True)
        for n in (1, 2)
    )
    shares = math.prod(prog.layout.size(axis) for axis in ("mlp", "length"))
    expected = layers * (two - one) * layer.rows(prog) * length / shares
    done = sum(g.count * g.cost.flops_forward for g in found.blocks)
    assert 0.99 < done / expected < 1.3
