"""The small GPT as one hand-written JAX step: the fastest we know on a CPU.

No framework: weights are a flat dict, layers are unrolled, and the backward pass of
each part that XLA's CPU backend compiles badly is written out:

* `matmul` puts a barrier before its gradient products, else the transpose and
  elementwise work are fused into their operands and the library product is lost;
* `attention` is head-major, keeps the probabilities, and takes the queries in two
  halves, so that a quarter of the causal square is never computed;
* `layer_norm` keeps mean and inverse deviation instead of recomputing through autodiff;
* `cross_entropy` computes its gradients in the forward pass, one chunk of tokens at a
  time, so that logits exist once and only for a chunk.

What each brings is in `benchmarks/RESULTS.md`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import gpt as small

Tree = dict[str, jax.Array]
MASKED = -1e30
HALVES = 2  # blocks of queries in attention
CHUNK = 512  # tokens whose logits exist at once


@jax.custom_vjp
def matmul(x_MD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return x_MD @ w_DF


def _matmul_bwd(saved, g_MF):
    x_MD, w_DF, g_MF = lax.optimization_barrier((*saved, g_MF))
    return g_MF @ w_DF.T, x_MD.T @ g_MF


matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def layer_norm(x_MD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    return _norm_fwd(x_MD, scale_D, eps)[0]


def _norm_fwd(x_MD, scale_D, eps):
    mean_M1 = x_MD.mean(-1, keepdims=True)
    inverse_M1 = lax.rsqrt(((x_MD - mean_M1) ** 2).mean(-1, keepdims=True) + eps)
    y_MD = (x_MD - mean_M1) * inverse_M1 * scale_D
    return y_MD, (x_MD, mean_M1, inverse_M1, scale_D)


def _norm_bwd(eps, saved, g_MD):
    x_MD, mean_M1, inverse_M1, scale_D = saved
    h_MD = (x_MD - mean_M1) * inverse_M1
    s_MD = g_MD * scale_D
    along_M1 = (s_MD * h_MD).mean(-1, keepdims=True)
    dx_MD = inverse_M1 * (s_MD - s_MD.mean(-1, keepdims=True) - h_MD * along_M1)
    return dx_MD, (g_MD * h_MD).sum(0)


layer_norm.defvjp(_norm_fwd, _norm_bwd)


def _blocks(T: int) -> list[tuple[int, int]]:
    """The (first, end) query of each block; a block attends to keys [0, end)."""
    size = T // HALVES
    return [(i * size, (i + 1) * size) for i in range(HALVES)]


@jax.custom_vjp
def attention(q_ZTH: jax.Array, k_ZTH: jax.Array, v_ZTH: jax.Array) -> jax.Array:
    """Causal softmax attention, Z = B N heads; saves the probabilities."""
    return _attention_fwd(q_ZTH, k_ZTH, v_ZTH)[0]


def _attention_fwd(q_ZTH, k_ZTH, v_ZTH):
    _, T, H = q_ZTH.shape
    causal_TT = np.tril(np.ones((T, T), bool))
    out, probabilities = [], []
    q_ZTH, k_ZTH, v_ZTH = lax.optimization_barrier((q_ZTH, k_ZTH, v_ZTH))
    for first, end in _blocks(T):
        s_ZCS = jnp.einsum("zth,zsh->zts", q_ZTH[:, first:end], k_ZTH[:, :end])
        s_ZCS = jnp.where(causal_TT[first:end, :end], s_ZCS * H**-0.5, MASKED)
        e_ZCS = jnp.exp(s_ZCS - s_ZCS.max(-1, keepdims=True))
        p_ZCS = lax.optimization_barrier(e_ZCS / e_ZCS.sum(-1, keepdims=True))
        out.append(jnp.einsum("zts,zsh->zth", p_ZCS, v_ZTH[:, :end]))
        probabilities.append(p_ZCS)
    return jnp.concatenate(out, 1), (q_ZTH, k_ZTH, v_ZTH, probabilities)


def _attention_bwd(saved, g_ZTH):
    q_ZTH, k_ZTH, v_ZTH, probabilities, g_ZTH = lax.optimization_barrier(
        (*saved, g_ZTH)
    )
    _, T, H = q_ZTH.shape
    dq, dk_ZTH, dv_ZTH = [], jnp.zeros_like(k_ZTH), jnp.zeros_like(v_ZTH)
    for (first, end), p_ZCS in zip(_blocks(T), probabilities, strict=True):
        g_ZCH = g_ZTH[:, first:end]
        dp_ZCS = jnp.einsum("zth,zsh->zts", g_ZCH, v_ZTH[:, :end])
        ds_ZCS = p_ZCS * (dp_ZCS - (p_ZCS * dp_ZCS).sum(-1, keepdims=True)) * H**-0.5
        ds_ZCS = lax.optimization_barrier(ds_ZCS)
        dq.append(jnp.einsum("zts,zsh->zth", ds_ZCS, k_ZTH[:, :end]))
        dk_ZSH = jnp.einsum("zts,zth->zsh", ds_ZCS, q_ZTH[:, first:end])
        dk_ZTH = dk_ZTH.at[:, :end].add(dk_ZSH)
        dv_ZTH = dv_ZTH.at[:, :end].add(jnp.einsum("zts,zth->zsh", p_ZCS, g_ZCH))
    return jnp.concatenate(dq, 1), dk_ZTH, dv_ZTH


attention.defvjp(_attention_fwd, _attention_bwd)


@jax.custom_vjp
def cross_entropy(x_MD: jax.Array, w_VD: jax.Array, target_M: jax.Array) -> jax.Array:
    """Mean loss of the tied head; its forward pass computes both gradients."""
    return _cross_entropy_fwd(x_MD, w_VD, target_M)[0]


def _cross_entropy_fwd(x_MD, w_VD, target_M):
    M, V = x_MD.shape[0], w_VD.shape[0]
    loss, dw_VD, dx = jnp.float32(0), jnp.zeros_like(w_VD), []
    for first in range(0, M, CHUNK):
        x_CD = x_MD[first : first + CHUNK]
        target_C1 = target_M[first : first + CHUNK, None]
        logits_CV = x_CD @ w_VD.T
        top_C1 = logits_CV.max(-1, keepdims=True)
        e_CV = jnp.exp(logits_CV - top_C1)
        sum_C1 = e_CV.sum(-1, keepdims=True)
        label_C1 = jnp.take_along_axis(logits_CV, target_C1, 1)
        loss += (jnp.log(sum_C1) + top_C1 - label_C1).sum()
        g_CV = (e_CV / sum_C1 - (jnp.arange(V) == target_C1)) / M
        g_CV = lax.optimization_barrier(g_CV)
        dx.append(g_CV @ w_VD)
        dw_VD += g_CV.T @ x_CD
    return loss / M, (jnp.concatenate(dx), dw_VD)


cross_entropy.defvjp(
    _cross_entropy_fwd, lambda saved, g: (g * saved[0], g * saved[1], None)
)


def loss(gpt: small.Gpt, w: Tree, tokens_BT: jax.Array, target_BT: jax.Array):
    """Returns the mean cross-entropy of one batch, a float32 scalar."""
    B, T, D, N, H = gpt.batch, gpt.length, gpt.dim, gpt.heads, gpt.head_dim
    x_MD = (w["embed"][tokens_BT] + w["positions"]).reshape(B * T, D)
    for i in range(gpt.layers):
        y_MD = layer_norm(x_MD, w[f"{i}/norm1"], gpt.norm_eps)
        qkv = matmul(y_MD, w[f"{i}/qkv"]).reshape(B, T, 3, N, H)
        q_ZTH, k_ZTH, v_ZTH = qkv.transpose(2, 0, 3, 1, 4).reshape(3, B * N, T, H)
        o_ZTH = attention(q_ZTH, k_ZTH, v_ZTH)
        o_MD = o_ZTH.reshape(B, N, T, H).transpose(0, 2, 1, 3).reshape(B * T, D)
        x_MD = x_MD + matmul(o_MD, w[f"{i}/out"])
        y_MD = layer_norm(x_MD, w[f"{i}/norm2"], gpt.norm_eps)
        h_MF = jax.nn.gelu(matmul(y_MD, w[f"{i}/up"]), approximate=True)
        x_MD = x_MD + matmul(h_MF, w[f"{i}/down"])
    x_MD = layer_norm(x_MD, w["norm"], gpt.norm_eps)
    return cross_entropy(x_MD, w["embed"], target_BT.reshape(-1))


def adamw(gpt: small.Gpt, state: tuple, gradients: Tree) -> tuple:
    """Clips by global norm, then one AdamW step: (weights, mean, square, count)."""
    weights, mean, square, count = state
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients.values()))
    clip = jnp.minimum(1.0, gpt.clip / norm)
    count = count + 1
    correct1 = 1 - gpt.beta1 ** count.astype(jnp.float32)
    correct2 = 1 - gpt.beta2 ** count.astype(jnp.float32)
    new = {}, {}, {}
    for name, g in gradients.items():
        g = g * clip
        m = gpt.beta1 * mean[name] + (1 - gpt.beta1) * g
        v = gpt.beta2 * square[name] + (1 - gpt.beta2) * g * g
        update = (m / correct1) / (jnp.sqrt(v / correct2) + gpt.adam_eps)
        if small.decayed(name):
            update = update + gpt.weight_decay * weights[name]
        new[0][name] = weights[name] - gpt.learning_rate * update
        new[1][name], new[2][name] = m, v
    return *new, count


def loss_and_gradients(gpt: small.Gpt, weights: small.Tree) -> tuple[float, small.Tree]:
    """Returns the loss and every gradient of `small.batch`, to compare contestants."""
    tokens, targets = small.batch(gpt)
    value = jax.jit(jax.value_and_grad(functools.partial(loss, gpt)))
    total, gradients = value(jax.tree.map(jnp.asarray, weights), tokens, targets)
    return float(total), jax.tree.map(np.asarray, gradients)


def factory(gpt: small.Gpt | None = None) -> Callable[[], float]:
    """Returns `step()`, which trains one step, waits for it and returns its loss."""
    gpt = gpt or small.Gpt()
    weights = jax.tree.map(jnp.asarray, small.weights(gpt))
    zeros = [jax.tree.map(jnp.zeros_like, weights) for _ in range(2)]
    state = (weights, *zeros, jnp.zeros((), jnp.int32))
    tokens, targets = (jnp.asarray(a) for a in small.batch(gpt))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, tokens, targets):
        value = jax.value_and_grad(functools.partial(loss, gpt))
        total, gradients = value(state[0], tokens, targets)
        return adamw(gpt, state, gradients), total

    def step() -> float:
        nonlocal state
        state, total = train(state, tokens, targets)
        jax.block_until_ready(state)
        return float(total)

    return step
