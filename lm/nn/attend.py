"""Attention from queries, keys, values, positions and segments: chooses how, and says which.

| implementation | where                    | packed rows | window | soft cap | log-sum-exp | bias |
|----------------|--------------------------|-------------|--------|----------|-------------|------|
| einsum         | anywhere, short rows     | yes         | yes    | yes      | yes         | yes  |
| blockwise      | anywhere                 | yes         | yes    | yes      | yes         | no   |
| cudnn          | NVIDIA Ampere and newer  | no          | causal | no       | no gradient | no   |
| splash         | TPU                      | yes         | causal | yes      | no          | no   |

Where devices split the row, it is blockwise, by one of the ways of lm/nn/ring.py; with a bias it
is einsum, of all keys.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each kv head, H head dim, R
devices with rows of their own.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float

from lm import sharding
from lm.config import ConfigError
from lm.nn import blockwise, manual, quadratic, ring
from lm.nn.blockwise import Mask, Tokens

Implementation = Literal["auto", "einsum", "blockwise", "cudnn", "splash"]
Context = Literal["auto", "ring", "gather"]
SHORT = 1024 * 1024  # T x S up to which forming the scores is cheap
IN_NAME = "dot_product_attention"  # of cuDNN, in traces for GPUs that are not here
GATHERED = (
    8192  # S up to which all keys and values are small beside the rest of a layer
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What an implementation has to be able to do."""

    platform: str
    queries: int  # T
    keys: int  # S
    head_dim: int
    dtype: str
    packed: (
        bool  # segments that differ within a row, or positions that are not 0, 1, 2, …
    )
    mask: Mask
    shards: int = 1  # devices that split the row
    lse: bool = False  # the log-sum-exp is used, and its gradient
    capability: float = 0.0  # compute capability of the GPU
    bias: bool = False  # scores have a learned part of their own, `relative.scores`

    def how(self, asked: Implementation, context: Context) -> str:
        """Returns in words how it is computed."""
        chosen = self.choose(asked)
        return chosen if self.shards == 1 else f"{chosen} by {self.share(context)}"

    def obstacle(self, implementation: str) -> str | None:
        """Returns why the implementation can't do this, or None."""
        if self.bias and implementation != "einsum":
            return "it has no learned scores of distances (model.positions=Relative)"
        if implementation == "blockwise" and self.block() == 0:
            per = f", over {self.shards} devices," if self.shards > 1 else ""
            return (
                f"lengths {self.queries} and {self.keys}{per} share no block of 16 or "
                "more"
            )
        if self.shards > 1 and implementation != (
            "einsum" if self.bias else "blockwise"
        ):
            return (
                f"it needs whole rows, here mesh.seq={self.shards} devices split them"
            )
        if implementation == "cudnn":
            if self.platform != "gpu":
                return f"it needs an NVIDIA GPU, this is {self.platform}"
            if self.capability < 8:
                return (
                    "it needs an NVIDIA GPU of compute capability 8, here it is "
                    f"{self.capability:g}"
                )
            if self.dtype not in ("bfloat16", "float16"):
                return f"it computes in bfloat16 or float16, not {self.dtype}"
            if self.packed:
                return "it has no segments and rows are packed (data.isolate=false ends that)"
            if self.mask.softcap is not None:
                return f"it has no soft cap, here {self.mask.softcap:g}"
            if self.head_dim % 8 or self.head_dim > 256:
                return f"it needs head_dim a multiple of 8, at most 256, not {self.head_dim}"
        if implementation == "splash":
            if self.platform != "tpu":
                return f"it needs a TPU, this is {self.platform}"
            if self.queries % 128 or self.keys % 128:
                return f"it needs lengths in multiples of 128, not {self.queries}, {self.keys}"
            if self.head_dim % 64:
                return f"it needs head_dim a multiple of 64, not {self.head_dim}"
        if implementation in ("cudnn", "splash"):
            if not self.mask.ordered or self.queries != self.keys:
                return "it needs queries and keys to be the same tokens (no cache)"
            if self.mask.window is not None and not self.mask.causal:
                return "its window is causal only"
            if self.lse:
                return "its log-sum-exp, which attention sinks need, has no gradient"
        return None

    def block(self) -> int:
        """Returns the largest block length up to 512 that divides T and S, or 0 below 16.

        Of split rows it divides the chunks that `sharding.order` moves, so that a block has tokens
        of one place; shares of less than two blocks are one block.
        """
        common = math.gcd(self.queries, self.keys)
        if self.shards > 1:
            share = common // self.shards
            if min(self.queries, self.keys) <= 32 * self.shards:
                return share
            common = share // 2
        return max((b for b in range(16, 513) if common % b == 0), default=0)

    def choose(self, asked: Implementation) -> str:
        """Returns the implementation to run.

        Raises:
            ConfigError: the one asked for can't honour the case.
        """
        if asked != "auto":
            if reason := self.obstacle(asked):
                raise ConfigError(
                    f"model.attention.implementation={asked}: {reason}; use auto (which takes "
                    f"{self.choose('auto')} here)"
                )
            return asked
        if self.shards > 1:
            if self.bias:
                return "einsum"
            if reason := self.obstacle("blockwise"):
                raise ConfigError(
                    f"data.length={max(self.queries, self.keys)}: {reason}; use a length that is "
                    f"a multiple of {32 * self.shards}"
                )
            return "blockwise"
        if (
            self.queries * self.keys <= SHORT and self.platform == "cpu"
        ) or self.queries == 1:
            return "einsum"
        order = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(self.platform, [])
        fits = (i for i in [*order, "blockwise", "einsum"] if self.obstacle(i) is None)
        return next(fits)

    def share(self, asked: Context) -> Literal["ring", "gather"]:
        """Returns how devices that split a row get each other's keys and values.

        auto: gathered up to a row of `GATHERED` tokens, where all keys and values are small and
        what a device computes on one share is too short to hide its journey; else by the ring,
        which holds two shares of them whatever the length. Always gathered where distances have
        scores, which are formed of all keys.

        Raises:
            ConfigError: a ring is asked for, and distances have scores.
        """
        if self.bias and asked == "ring":
            raise ConfigError(
                "model.attention.context=ring: model.positions=Relative has scores of distances, "
                "which are formed of all keys; set it to gather or auto"
            )
        if self.bias:
            return "gather"
        if asked != "auto":
            return asked
        return "gather" if self.keys <= GATHERED else "ring"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Rows of a train step, which attend to themselves or to others."""

    layout: sharding.Layout
    length: int  # tokens
    dtype: str
    packed: bool
    bias: bool = False  # see `Case`
    keys: int | None = None  # tokens of the other rows; None: to themselves

    @property
    def shards(self) -> int:
        """Devices that split the row."""
        return self.layout.size("length")

    def case(
        self, head_dim: int, mask: Mask, packed: bool = False, lse: bool = False
    ) -> Case:
        """Returns what attention over the rows needs; `packed` where it does whatever they are."""
        return Case(
            platform=self.layout.platform,
            capability=_capability(self.layout),
            queries=self.length,
            keys=self.length if self.keys is None else self.keys,
            head_dim=head_dim,
            dtype=self.dtype,
            packed=self.packed or packed,
            mask=mask,
            shards=self.shards,
            lse=lse,
            bias=self.bias,
        )


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    mask: Mask,
    implementation: Implementation = "auto",
    packed: bool = True,
    context: Context = "auto",
    lse: bool = False,
    bias_RKGTS: Float[Array, "R K G T S"] | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"] | None]:
    """Returns the attention output, and each query's log-sum-exp (fp32) where it is known.

    With `lse` it is known, and has its gradient. `bias` is added to the scores, see
    `relative.scores`.

    Each device works on its own rows and heads, in a manual region. `packed=False` promises that
    every row is one segment at positions 0, 1, 2, …; devices that split rows, and have moved
    their tokens (`sharding.order`), do not rely on it.
    """
    layout = sharding.current()
    case = Case(
        platform=layout.platform,
        capability=_capability(layout),
        queries=q_BTKGH.shape[1],
        keys=k_BSKH.shape[1],
        head_dim=q_BTKGH.shape[4],
        dtype=str(q_BTKGH.dtype),
        packed=packed,
        mask=mask,
        shards=layout.size("length"),
        lse=lse,
        bias=bias_RKGTS is not None,
    )
    chosen = case.choose(implementation)
    if case.shards > 1:
        return ring.attention(
            case.share(context), mask, case.block(), q_BTKGH, k_BSKH, v_BSKH, q_tokens,
            kv_tokens, bias_RKGTS,
        )  # fmt: skip
    body = functools.partial(_local, chosen, case)
    q_spec = sharding.spec("batch", "length", "kv_heads", None, None)
    kv_spec = sharding.spec("batch", "length", "kv_heads", None)
    tokens = sharding.spec("batch", "length")
    outs = [q_spec]
    if chosen != "splash":
        outs.append(sharding.spec("batch", "kv_heads", None, "length"))
    ins = [q_spec, kv_spec, kv_spec, tokens, tokens, tokens, tokens]
    given = [q_BTKGH, k_BSKH, v_BSKH]
    for of in (q_tokens, kv_tokens):
        given += [of.positions, of.segments]
    if bias_RKGTS is not None:
        ins.append(sharding.spec("batch", "kv_heads", None, "length", None))
        given.append(bias_RKGTS)
    out = manual.manual(body, tuple(ins), tuple(outs), "attention")(*given)
    return out[0], out[1] if len(out) > 1 else None


def _local(implementation, case, q, k, v, q_pos, q_seg, kv_pos, kv_seg, bias=None):
    """Attention on one device; returns the output, and the log-sum-exp if there is one."""
    mask, q_tokens, kv_tokens = case.mask, Tokens(q_pos, q_seg), Tokens(kv_pos, kv_seg)
    if implementation == "einsum":
        given = (q, k, v, q_tokens, kv_tokens, bias)
        return quadratic.attention(mask, case.packed, *given)
    if implementation == "blockwise":
        return blockwise.attention(mask, case.block(), q, k, v, q_tokens, kv_tokens)
    B, T, K, G, H = q.shape
    q = q.reshape(B, T, K * G, H)
    if implementation == "cudnn":
        out, lse = _cudnn(mask, q, k, v)
        return out.reshape(B, T, K, G, H), lse.reshape(B, K, G, T)
    return (_splash(mask, q, k, v, q_seg, kv_seg).reshape(B, T, K, G, H),)


def _capability(layout: sharding.Layout) -> float:
    """Compute capability of a mesh's GPUs; those that exist in name only can all."""
    if layout.platform != "gpu":
        return 0.0
    if isinstance(layout.mesh, AbstractMesh):
        return math.inf
    return float(getattr(layout.mesh.devices.flat[0], "compute_capability", 0))


def _cudnn(mask: Mask, q: Any, k: Any, v: Any) -> Any:
    if isinstance(sharding.current().mesh, AbstractMesh):
        return _in_name(mask.causal, q, k, v)
    window = None if mask.window is None else (mask.window - 1, 0)
    out, lse = jax.nn.dot_product_attention(
        q, k, v, scale=mask.scale, is_causal=mask.causal, local_window_size=window,
        implementation="cudnn", return_residual=True,
    )  # fmt: skip
    return out, lse.transpose(0, 2, 1)


def _name(which: str, causal: bool) -> str:
    return f"{IN_NAME}_{which}{'_causal' if causal else ''}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_name(causal: bool, q: Any, k: Any, v: Any) -> Any:
    """Types of what cuDNN's attention returns, where no GPU is: to trace, not to run."""
    B, T, N, _ = q.shape
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    name = _name("fwd", causal)
    call: Any = jax.ffi.ffi_call(name, (q, lse), vmap_method="broadcast_all")
    return call(q, k, v)


def _in_name_forward(causal: bool, q: Any, k: Any, v: Any) -> Any:
    made: Any = _in_name(causal, q, k, v)
    return made, (q, k, v, *made)


def _in_name_backward(causal: bool, kept: Any, grads: Any) -> Any:
    q, k, v, *_ = kept
    call: Any = jax.ffi.ffi_call(
        _name("bwd", causal), (q, k, v), vmap_method="broadcast_all"
    )
    return call(*kept, grads[0])


_in_name.defvjp(_in_name_forward, _in_name_backward)


def tile(queries: int, keys: int) -> int:
    """Returns the length of the blocks of the kernel for TPUs."""
    return max(b for b in (128, 256, 512) if queries % b == 0 and keys % b == 0)


def _splash(mask, q, k, v, q_seg, kv_seg):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T, S = q.shape[1], k.shape[1]
    if mask.window is not None:
        one = masks.LocalMask((T, S), (mask.window - 1, 0), 0)
    else:
        one = masks.CausalMask((T, S)) if mask.causal else masks.FullMask((T, S))
    heads = masks.MultiHeadMask([one] * q.shape[2])
    block = tile(T, S)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    run = kernel.make_splash_mha(
        heads,
        block_sizes=sizes,
        attn_logits_soft_cap=mask.softcap,
        head_shards=1,
        q_seq_shards=1,
    )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * mask.scale, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = jax.vmap(run)(q, k, v, kernel.SegmentIds(q_seg, kv_seg))
    return cast("Array", out).transpose(0, 2, 1, 3)
