"""The GPU contest's step by hand: unrolled, cuDNN attention, fp32 weights, bf16 products.

Shapes as in `benchmarks/gpu_steps.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpt as small
from benchmarks.bare import Tree, adamw

CHUNK = 8192  # tokens whose logits exist at once
_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Normalizes in fp32."""
    x = x_BTD.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    return (x * inverse * scale_D).astype(x_BTD.dtype)


@jax.custom_vjp
def cross_entropy(x_MD: jax.Array, w_VD: jax.Array, target_M: jax.Array) -> jax.Array:
    """Mean loss of the tied head; its forward pass computes both gradients."""
    return _forward(x_MD, w_VD, target_M)[0]


def _forward(x_MD, w_VD, target_M):
    M, V = x_MD.shape[0], w_VD.shape[0]

    def chunk(carry, part):
        loss, dw_VD = carry
        x_CD, target_C = part
        logits_CV = _wide("cd,vd->cv", x_CD, w_VD)
        lse_C = jax.nn.logsumexp(logits_CV, -1)
        label_C = jnp.take_along_axis(logits_CV, target_C[:, None], 1)[:, 0]
        hit_CV = jnp.arange(V) == target_C[:, None]
        g_CV = ((jnp.exp(logits_CV - lse_C[:, None]) - hit_CV) / M).astype(x_CD.dtype)
        dw_VD += _wide("cv,cd->vd", g_CV, x_CD)
        return (loss + (lse_C - label_C).sum(), dw_VD), g_CV @ w_VD

    count = max(1, M // CHUNK)
    parts = x_MD.reshape(count, M // count, -1), target_M.reshape(count, -1)
    zero = jnp.float32(0), jnp.zeros(w_VD.shape, jnp.float32)
    (loss, dw_VD), dx = jax.lax.scan(chunk, zero, parts)
    return loss / M, (dx.reshape(x_MD.shape), dw_VD.astype(w_VD.dtype))


def _backward(saved, g):
    dx_MD, dw_VD = saved
    return (g * dx_MD).astype(dx_MD.dtype), (g * dw_VD).astype(dw_VD.dtype), None


cross_entropy.defvjp(_forward, _backward)


def loss(
    gpt: small.Gpt, weights: Tree, tokens_BT: jax.Array, target_BT: jax.Array
) -> jax.Array:
    """Returns the mean cross-entropy of one batch, a float32 scalar."""
    B, T, D, N, H = gpt.batch, gpt.length, gpt.dim, gpt.heads, gpt.head_dim
    how: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"
    w = {name: a.astype(jnp.bfloat16) for name, a in weights.items()}
    x_BTD = w["embed"][tokens_BT] + w["positions"]
    for i in range(gpt.layers):
        y_BTD = layer_norm(x_BTD, w[f"{i}/norm1"], gpt.norm_eps)
        qkv = (y_BTD @ w[f"{i}/qkv"]).reshape(B, T, 3, N, H)
        q, k, v = (qkv[:, :, j] for j in range(3))
        o_BTNH = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=how
        )
        x_BTD = x_BTD + o_BTNH.reshape(B, T, D) @ w[f"{i}/out"]
        y_BTD = layer_norm(x_BTD, w[f"{i}/norm2"], gpt.norm_eps)
        x_BTD = x_BTD + jax.nn.gelu(y_BTD @ w[f"{i}/up"]) @ w[f"{i}/down"]
    x_MD = layer_norm(x_BTD, w["norm"], gpt.norm_eps).reshape(B * T, D)
    return cross_entropy(x_MD, w["embed"], target_BT.reshape(-1))


def factory(gpt: small.Gpt, sets: list[str]) -> Callable[[], jax.Array]:
    """Returns `step()`, which dispatches a step and returns its loss unawaited."""
    assert not sets, "overrides are of lm's experiment"
    weights = jax.tree.map(jnp.asarray, small.weights(gpt))
    moments = [jax.tree.map(jnp.zeros_like, weights) for _ in range(2)]
    state = (weights, *moments, jnp.int32(0))
    batch = tuple(jnp.asarray(a) for a in small.batch(gpt))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, tokens, targets):
        value = jax.value_and_grad(functools.partial(loss, gpt))
        total, gradients = value(state[0], tokens, targets)
        return adamw(gpt, state, gradients), total

    def step() -> jax.Array:
        nonlocal state
        state, total = train(state, *batch)
        return total

    return step
