"""Attention over rows whose tokens are split over devices (context parallelism).

`ring`: keys and values travel round the devices, each of which adds what its queries see of them to
what they have seen (Liu et al. 2023, "Ring attention with blockwise transformers"); in the backward
they travel again and take their gradient along. `gather`: every device gathers all keys and values
(Llama 3, §3.3.2). All keep shards only for the backward: q, k, v, ids, the output and its
log-sum-exp. With learned scores of distances the keys are gathered, and the scores formed, twice.

Shapes, of one device: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lm import sharding
from lm.nn import blockwise, manual, quadratic
from lm.nn.blockwise import NEG, Mask, Tokens

Shared = tuple[Array, Array, Tokens]  # keys, values and what they belong to
Result = tuple[Array, Array]  # output [B, T, K, G, H] and log-sum-exp [B, K, G, T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How devices work together on a row; static."""

    mask: Mask
    block: int  # divides a device's queries and its keys
    axes: tuple[str, ...]  # mesh axes that split the row
    devices: int  # along them


def attention(
    how: Literal["ring", "gather"],
    mask: Mask,
    block: int,
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    bias_RKGTS: Float[Array, "R K G T S"] | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"]]:
    """Returns the attention output and the log-sum-exp of each query's scores (fp32).

    Arrays are global here. Tokens may stand in any order, the same for an array and its ids.

    Args:
        how: keys and values travel, or are gathered.
        mask: who sees whom.
        block: divides a device's share of T and of S.
        q_BTKGH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        q_tokens: positions and segments of the queries.
        kv_tokens: those of keys and values.
        bias_RKGTS: added to the scores, once for each device with rows of its own; gathered only.
    """
    layout, scored = sharding.current(), bias_RKGTS is not None
    assert how == "gather" or not scored
    plan = Plan(
        mask=dataclasses.replace(mask, ordered=False),
        block=block,
        axes=layout.axes("length"),
        devices=layout.size("length"),
    )
    q_spec = sharding.spec("batch", "length", "kv_heads", None, None)
    kv_spec = sharding.spec("batch", "length", "kv_heads", None)
    ids = (sharding.spec("batch", "length"),) * 4
    outs = (q_spec, sharding.spec("batch", "kv_heads", None, "length"))
    ins = (q_spec, kv_spec, kv_spec, *ids)
    if scored:
        ins = (*ins, sharding.spec("batch", "kv_heads", None, "length", None))
    call = _differentiable(plan, "scored" if scored else how, ins, outs)
    return call(
        q_BTKGH, k_BSKH, v_BSKH, q_tokens.positions, q_tokens.segments,
        kv_tokens.positions, kv_tokens.segments, *([bias_RKGTS] if scored else []),
    )  # fmt: skip


def _differentiable(plan: Plan, how: str, ins: Any, outs: Any) -> Callable[..., Any]:
    """Returns the region of one way to attend, with the gradient that is written for it."""
    forward, backward = {
        "ring": (_ring_forward, _ring_backward),
        "gather": (_gather_forward, _gather_backward),
        "scored": (_scored_forward, _scored_backward),
    }[how]

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return manual.region(functools.partial(forward, plan), ins, outs)(*args)

    def fwd(*args: Any) -> Any:
        out, lse = (checkpoint_name(x, "attention") for x in call(*args))
        return (out, lse), (*args, out, lse)

    def bwd(saved: Any, cotangents: Any) -> Any:
        body = functools.partial(backward, plan)
        run = manual.region(body, (*ins, *outs, *outs), (*ins[:3], *ins[7:]))
        dq, dk, dv, *d_bias = run(*saved, *cotangents)
        return (dq, dk, dv, None, None, None, None, *d_bias)

    call.defvjp(fwd, bwd)
    return call


def _ring_forward(plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg) -> Result:
    share = functools.partial(_share, plan, q, Tokens(q_pos, q_seg))
    send = _sender(plan)

    def hop(carry: Any, _: None) -> Any:
        shared, result = carry
        following, more = _together(send(shared), share(shared))
        return (following, _merge(result, more)), None

    B, T, K, G, _ = q.shape
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((B, K, G, T), NEG, jnp.float32)
    start = (k, v, Tokens(kv_pos, kv_seg)), nothing
    (shared, result), _ = lax.scan(hop, start, length=plan.devices - 1)
    out, lse = _merge(result, share(shared))
    return out.astype(q.dtype), lse


def _ring_backward(
    plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg, out, lse, g, g_lse
) -> tuple[Array, Array, Array]:
    delta = blockwise.differences(out, g, g_lse)
    send = _sender(plan)

    def gradients(shared: Shared) -> tuple[Array, tuple[Array, Array]]:
        k, v, kv_tokens = shared
        dq, dk, dv = blockwise.backward(
            plan.mask, plan.block, q, k, v, Tokens(q_pos, q_seg), kv_tokens, g, lse, delta
        )  # fmt: skip
        return dq, (dk, dv)

    def hop(carry: Any, _: None) -> Any:
        shared, dq, d_shared = carry
        sent = send((shared, d_shared))
        (following, d_shared), (more_dq, more) = _together(sent, gradients(shared))
        d_shared = jax.tree.map(jnp.add, d_shared, more)
        return (following, dq + more_dq, d_shared), None

    own = k, v, Tokens(kv_pos, kv_seg)
    start = send(own), *gradients(own)
    (shared, dq, d_shared), _ = lax.scan(hop, start, length=plan.devices - 2)
    # The last keys and values go no further, their gradient does.
    sent, (more_dq, more) = _together(send(d_shared), gradients(shared))
    dk, dv = send(jax.tree.map(jnp.add, sent, more))  # home
    dq = dq + more_dq
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _gather_forward(plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg) -> Result:
    shared = _gathered(plan, (k, v, Tokens(kv_pos, kv_seg)))
    out, lse = _share(plan, q, Tokens(q_pos, q_seg), shared)
    return out.astype(q.dtype), lse


def _gather_backward(
    plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg, out, lse, g, g_lse
) -> tuple[Array, Array, Array]:
    all_k, all_v, kv_tokens = _gathered(plan, (k, v, Tokens(kv_pos, kv_seg)))
    delta = blockwise.differences(out, g, g_lse)
    dq, dk, dv = blockwise.backward(
        plan.mask, plan.block, q, all_k, all_v, Tokens(q_pos, q_seg), kv_tokens, g, lse,
        delta,
    )  # fmt: skip
    dk, dv = (_home(plan, d, k.dtype) for d in (dk, dv))
    return dq.astype(q.dtype), dk, dv


def _scored_forward(plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg, bias) -> Result:
    all_k, all_v, kv_tokens = _gathered(plan, (k, v, Tokens(kv_pos, kv_seg)))
    given = q, all_k, all_v, Tokens(q_pos, q_seg), kv_tokens, bias
    return quadratic.attention(plan.mask, True, *given)


def _scored_backward(
    plan: Plan, q, k, v, q_pos, q_seg, kv_pos, kv_seg, bias, out, lse, g, g_lse
) -> tuple[Array, Array, Array, Array]:
    all_k, all_v, kv_tokens = _gathered(plan, (k, v, Tokens(kv_pos, kv_seg)))

    def again(q: Array, k: Array, v: Array, bias: Array) -> Result:
        given = q, k, v, Tokens(q_pos, q_seg), kv_tokens, bias
        return quadratic.attention(plan.mask, True, *given)

    _, vjp = jax.vjp(again, q, all_k, all_v, bias)
    dq, dk, dv, d_bias = vjp((g, g_lse))
    dk, dv = (_home(plan, d.astype(jnp.float32), k.dtype) for d in (dk, dv))
    return dq, dk, dv, d_bias


def _home(plan: Plan, d: Array, dtype: Any) -> Array:
    """Returns this device's share of the sum of what all have of a gradient."""
    d = lax.psum_scatter(d, plan.axes, scatter_dimension=1, tiled=True)
    return d.astype(dtype)


def _share(plan: Plan, q: Array, q_tokens: Tokens, shared: Shared) -> Result:
    """What these queries see of some keys, in fp32."""
    k, v, kv_tokens = shared
    return blockwise.forward(
        plan.mask, plan.block, jnp.float32, q, k, v, q_tokens, kv_tokens
    )


def _merge(a: Result, b: Result) -> Result:
    """The attention over the keys of both: shares weigh as much as their sums of exponentials."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)

    def weighted(out: Array, own: Array) -> Array:
        return out * jnp.moveaxis(jnp.exp(own - lse), 3, 1)[..., None]

    return weighted(out_a, lse_a) + weighted(out_b, lse_b), lse


def _sender(plan: Plan) -> Callable[[Any], Any]:
    """Gives what a device has to the next along the ring, and it gets that of the one before."""
    ring = [(i, (i + 1) % plan.devices) for i in range(plan.devices)]
    return lambda tree: jax.tree.map(lambda x: lax.ppermute(x, plan.axes, ring), tree)


def _together(sent: Any, computed: Any) -> Any:
    """Nothing follows before both are there, so that XLA sends while it computes, not after."""
    return lax.optimization_barrier((sent, computed))


def _gathered(plan: Plan, shared: Shared) -> Shared:
    def whole(x: Array) -> Array:
        return lax.all_gather(x, plan.axes, axis=1, tiled=True)

    return jax.tree.map(whole, shared)
