"""What a layer costs by its trace is what XLA counts, and what is written down for attention."""

import jax
import jax.numpy as jnp
import pytest
import toy

from lm import gradients, objectives, sharding, train
from lm.models import stack
from lm.nn.blockwise import Tokens
from lm.plan import layer
from lm.program import STACK

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
