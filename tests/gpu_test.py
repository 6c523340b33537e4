"""What only a GPU can show: its attention kernel, bf16 steps, its memory. `pytest -m gpu`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lm import sharding
from lm.nn import attend
from lm.nn.blockwise import Mask, Tokens

pytestmark = pytest.mark.gpu

B, T, K, G, H = 2, 256, 2, 2, 64
EPS = 2**-8  # of bf16: 8 bits of mantissa


def value_and_gradients(implementation, mask, dtype):
    """Returns attention's output, log-sum-exp and gradients in fp32, on an Explicit mesh."""
    rng = np.random.default_rng(0)
    shapes = (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)
    layout = sharding.make_layout(sharding.MeshConfig(data=1), jax.devices()[:1])
    with sharding.use(layout):
        q, k, v, g = (
            jnp.asarray(rng.standard_normal(s), jnp.bfloat16).astype(dtype)
            for s in shapes
        )
        positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
        tokens = Tokens(positions, jnp.ones((B, T), jnp.int32))

        @jax.jit
        def run(q, k, v, g):
            def f(q, k, v):
                return attend.attend(
                    q, k, v, tokens, tokens, mask, implementation, packed=False
                )

            (out, lse), vjp = jax.vjp(f, q, k, v)
            return out, lse, *vjp((g, jnp.zeros_like(lse)))

        return [np.asarray(x, np.float64) for x in run(q, k, v, g)]


@pytest.mark.parametrize("window", [None, 100])
def test_the_gpus_attention_equals_the_blockwise_one(window):
    mask = Mask(scale=H**-0.5, window=window)
    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients("blockwise", mask, jnp.float32)
    found = value_and_gradients("cudnn", mask, jnp.bfloat16)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        # Inputs are equal; probabilities and results are rounded to bf16 on the way.
        assert toy.distance(a, b) <= 4 * EPS * np.linalg.norm(b), name


def test_auto_takes_the_gpus_attention_where_it_can():
    case = attend.Case(
        platform="gpu", queries=1024, keys=1024, head_dim=64, dtype="bfloat16",
        packed=False, mask=Mask(scale=1.0),
    )  # fmt: skip
    assert case.choose("auto") == "cudnn"
    assert dataclasses.replace(case, packed=True).choose("auto") == "blockwise"


def test_steps_in_bf16_lower_the_loss():
    prog = toy.program("model.dtype=bfloat16", "data.isolate=false")
    batch = toy.batch()
    losses = toy.run(prog, [batch] * 8).losses
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_the_gpu_tells_how_much_memory_is_in_use():
    kept = jnp.ones((1024, 1024), jnp.float32).block_until_ready()
    stats = jax.local_devices()[0].memory_stats()
    assert stats is not None
    assert kept.nbytes <= stats["bytes_in_use"] <= stats["peak_bytes_in_use"]
