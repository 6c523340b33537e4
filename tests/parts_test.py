"""Parts that only some families have, on meshes: what one device computes, they compute.

That one device is right is for tests/parity_test.py to show.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lm import generate, gradients, stacked
from lm.experiment import Generate
from lm.nn import attend

ROUNDINGS = 128  # of a gradient: sums in another order, through up to four layers
ATTENTION = [
    *("model.layers=4", "model.norms=both", "model.norm.offset=1", "model.embed_scale=3"),
    *("model.attention.sinks=true", "model.attention.scale=0.3", "model.local=Local"),
    *("model.local.window=5", "model.local.positions=Rope", "model.local.positions.base=50"),
    *("model.positions.scaling=Yarn", "model.positions.scaling.length=8"),
    "model.positions.scaling.magnitude=1.2",
]  # fmt: skip
LATENT = [
    *("model.attention=Latent", "model.kv_heads=4", "model.attention.rank=12"),
    *("model.attention.query_rank=8", "model.attention.plain_dim=6"),
    *("model.attention.rope_dim=4", "model.attention.value_dim=8"),
    *("model.attention.bias=true", "model.norms=after", "model.positions.scaling=Llama3"),
    "model.positions.scaling.length=16",
]  # fmt: skip
EXPERTS = [
    *("model.ffn=Moe", "model.ffn.hidden=24", "model.ffn.activation=clamped"),
    *("model.ffn.bias=true", "model.ffn.router_bias=true", "model.ffn.shared=1"),
    *("model.ffn.shared_gate=true", "model.ffn.limited=Limited"),
    *("model.ffn.limited.groups=4", "model.ffn.limited.keep=2", "model.ffn.limit=0.5"),
]
KINDS = {"attention": ATTENTION, "latent": LATENT, "experts": EXPERTS}
FSDP = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
SEQ = ["mesh.data=2", "mesh.seq=2", "mesh.tensor=2"]
RING = ["mesh.seq=4", "mesh.fsdp=2", "mesh.data=1", "model.attention.context=ring"]
PIPE = ["mesh.pipe=2", "mesh.data=2", "mesh.tensor=2", "pipeline.microbatches=2"]
EXPERT = ["mesh.data=2", "mesh.expert=2", "mesh.tensor=2"]


@functools.cache
def gradient(*sets):
    prog = toy.program(*sets)
    params = toy.start(prog, noise=0.1).params

    def of(params, batch):
        count = batch["weights"].sum()
        sums, grads = gradients.of(prog, params, batch, jnp.int32(0), count)
        return sums["loss"], stacked.plain(prog, grads)

    host = toy.batch()
    loss, grads = prog.compiled(of)(params, toy.place(prog, host))
    return float(loss), toy.flat(grads)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("attention", FSDP),
        ("attention", RING),
        ("attention", PIPE),
        ("latent", FSDP),
        ("latent", SEQ),
        ("experts", EXPERT),
        ("experts", PIPE),
    ],
)
def test_a_mesh_changes_neither_loss_nor_gradient(kind, mesh):
    loss, grads = gradient(*KINDS[kind], *mesh)
    want, exact = gradient(*KINDS[kind], "mesh.data=1")
    assert loss == pytest.approx(want, rel=1e-5)
    for path, value in exact.items():
        limit = ROUNDINGS * toy.EPS * np.linalg.norm(value) + 1e-8
        assert toy.distance(grads[path], value) < limit, path
        assert np.any(value) or "key_bias" in path or "balance" in path, path


@pytest.mark.parametrize("kind", ["attention", "latent"])
def test_a_mesh_writes_the_same_text(kind):
    """Greedily, by the cache: of latents, with everything absorbed."""
    found = []
    for mesh in (["mesh.data=1"], ["mesh.data=2", "mesh.tensor=2"]):
        prog = toy.program(*KINDS[kind], *mesh)
        params = toy.start(prog, noise=0.1).params
        sample = generate.make_sample(prog, Generate(tokens=10, temperature=0.0), -1)
        prompts = [(np.arange(3, 3 + n, dtype=np.int32), 0) for n in (4, 2)]
        rows = generate.make_rows(prompts, 10, 16, 2)
        new, finite = sample(params, rows, jax.random.key(0))
        assert finite
        found.append(np.asarray(new))
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 3


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_sinks_want_a_log_sum_exp_that_has_a_gradient(name):
    platform = {"cudnn": "gpu", "splash": "tpu"}[name]
    case = attend.Case(
        platform=platform, queries=2048, keys=2048, head_dim=64, dtype="bfloat16",
        packed=False, mask=attend.Mask(scale=1.0), capability=9.0,
    )  # fmt: skip
    assert case.choose("auto") == name
    with_sinks = attend.dataclasses.replace(case, lse=True)
    assert with_sinks.choose("auto") == "blockwise"
    with toy.refused("implementation", "sinks"):
        with_sinks.choose(name)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["model.attention=Latent"], ["kv_heads=2", "Latent", "kv_heads=4"]),
        ([*LATENT, "model.local=Local"], ["Latent", "windows"]),
        (["model.local=Local", "model.local.window=0"], ["window=0"]),
        (["model.norm.offset=0.5"], ["offset=0.5"]),
        ([*EXPERTS, "model.ffn.limited.groups=3"], ["groups=3", "experts=8"]),
        ([*EXPERTS, "model.ffn.top_k=5"], ["top_k=5"]),
        ([*EXPERTS, "model.ffn.shared=0"], ["shared_gate", "shared"]),
    ],
)
def test_what_cannot_be_is_refused(sets, words):
    with toy.refused(*words):
        toy.program(*sets)
