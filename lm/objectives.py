"""Losses over model outputs: sums over tokens, so that no batch layout can change their value.

Shapes: B batch, T length, D embed, V vocabulary (padded), C tokens of a chunk. Small letters are
one device's share.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.batches import (
    Causal,
    Classification,
    CrossEntropy,
    Masked,
    Objective,
    Prefix,
    Seq2Seq,
    SpanCorruption,
)
from lm.config import ConfigError, kind
from lm.models.transformer import Transformer
from lm.nn import manual
from lm.nn.blockwise import NEG, Tokens, cap

__all__ = ["Causal"]  # from here, as an experiment would look for it

Batch = dict[
    str, Array
]  # tokens, targets, segments, positions [B, T]; weights; bytes, index [B]


NEEDS = {  # what the decoder there is lacks
    Masked: "an encoder",
    SpanCorruption: "an encoder and a decoder",
    Seq2Seq: "an encoder and a decoder",
    Classification: "a head for classes",
}


def refuse(objective: Objective) -> None:
    """Refuses an objective that no model here can be trained by yet.

    Raises:
        ConfigError: what it lacks, and what can be used.
    """
    if need := NEEDS.get(type(objective)):
        raise ConfigError(
            f"objective={kind(type(objective))} needs {need}, and the model is a decoder of "
            "text; use objective=Causal, Prefix or Sft"
        )
    if isinstance(objective, Prefix) and objective.attention != "causal":
        raise ConfigError(
            f"objective.attention={objective.attention}: the model's attention is causal in "
            "the prefix, too; set objective.attention=causal"
        )


def causal(
    objective: Objective,
    model: Transformer,
    batch: Batch,
    keys_BT: Any,
    packed: bool,
    graded: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss summed over the batch's scored tokens, and sums of what is reported.

    Sums: `nll` (nats, of the cross-entropy alone), `tokens` (scored), `bytes` (of their text),
    `correct` (scored tokens that are the likeliest, where `graded`; then there is no gradient),
    and those of the layers. The losses of layers are a row's; they count as often as its scored
    tokens.
    """
    x_BTD, aux, _ = model(
        batch["tokens"], Tokens(batch["positions"], batch["segments"]), keys_BT, packed
    )
    loss, sums = score(objective, model, x_BTD, batch, graded)
    of_layers, more = layers(aux, batch)
    return loss + of_layers, {**sums, **more}


def layers(
    aux: dict[str, Array], batch: Batch
) -> tuple[Array | float, dict[str, Array]]:
    """Returns the loss that layers add, and their sums, from the sums of their aux."""
    aux = dict(aux)
    if "moe_loss_B" not in aux:
        return 0.0, aux
    loss = (aux.pop("moe_loss_B") * batch["weights"].sum(1)).sum()
    return loss, {**aux, "moe_loss": loss}


def score(
    objective: Objective,
    model: Transformer,
    x_BTD: Float[Array, "B T D"],
    batch: Batch,
    graded: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Returns what `causal` does, from the hidden states after the last norm."""
    assert isinstance(objective, CrossEntropy)  # what `refuse` lets through
    head = Head(
        vocab=model.config.vocab_size,
        softcap=model.config.head_softcap,
        chunk=objective.chunk,
        z_loss=objective.z_loss,
        smoothing=objective.label_smoothing,
    )
    states = (x_BTD, model.head()[...], batch["targets"], batch["weights"])
    if graded:
        loss, nll, correct = (x.sum() for x in _region(head, False)(*states))
    else:
        (loss, nll), correct = cross_entropy(head, *states), None
    sums = {"nll": nll, "tokens": batch["weights"].sum(), "bytes": batch["bytes"].sum()}
    return loss, sums if correct is None else {**sums, "correct": correct}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """How logits and their loss are formed; static."""

    vocab: int  # real ids; the rows above are padding
    softcap: float | None
    chunk: int
    z_loss: float
    smoothing: float


def cross_entropy(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted loss and the weighted negative log-likelihood, fp32 sums over tokens.

    Logits exist for one chunk of tokens at a time. When a gradient is asked for, it is computed in
    the same pass (the loss is a scalar, so its gradient is known up to a factor): no logits are
    kept or formed again. The vocabulary may be split over devices: then each token's maximum, sum
    and target logit are reduced over them, and the weight is gathered over fsdp, in the dtype of x,
    and its gradient reduced back. Only the loss is differentiable, not the second result.
    """
    return _cross_entropy(head, x_BTD, w_VD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(head, x, w, targets, weights):
    loss, nll, _ = _region(head, False)(x, w, targets, weights)
    return loss.sum(), nll.sum()


def _fwd(head, x, w, targets, weights):
    loss, nll, dx, dw = _region(head, True)(x, w, targets, weights)
    return (loss.sum(), nll.sum()), (dx, dw, weights)


def _bwd(head, saved, cotangents):
    dx, dw, weights = saved
    g = cotangents[0]
    # An all-reduce; XLA adds a tied embedding's other gradient first, and reduces once.
    dw = (dw * g).sum(0)
    return (dx * g).astype(dx.dtype), dw, None, jnp.zeros_like(weights)


_cross_entropy.defvjp(_fwd, _bwd)


def _region(head: Head, gradient: bool):
    """The chunked loss on every device's own tokens and rows of the vocabulary."""
    axes = Axes.of(sharding.current())
    tokens = sharding.spec("batch", "length")
    x_spec, w_spec = (
        sharding.spec("batch", "residual", None),
        sharding.spec("vocab", "embed"),
    )
    row = sharding.spec("batch")  # one partial sum for each device's rows
    lead = axes.rest[0] if len(axes.rest) == 1 else axes.rest or None
    parts = P(lead, *w_spec)
    outs = (row, row, x_spec, parts) if gradient else (row, row, row)
    body = functools.partial(_chunks, head, axes, gradient)
    return manual.region(body, (x_spec, w_spec, tokens, tokens), outs)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes by what the loss does over them."""

    vocab: tuple[str, ...]  # split the vocabulary
    embed: tuple[str, ...]  # split the stored weight's width
    tokens: tuple[str, ...]  # split the tokens
    length: tuple[str, ...]  # of these, those that split a row
    stream: tuple[str, ...]  # split the row of the residual stream besides

    @property
    def rest(self) -> tuple[str, ...]:
        """Mesh axes whose devices each have a part of the weight's gradient."""
        return tuple(a for a in self.tokens if a not in self.embed)

    @classmethod
    def of(cls, layout: sharding.Layout) -> "Axes":
        batch, length = layout.axes("batch"), layout.axes("length")
        stream = tuple(a for a in layout.axes("residual") if a not in length)
        vocab, embed = layout.axes("vocab"), layout.axes("embed")
        return cls(vocab, embed, batch + length, length, stream)


def _chunks(head: Head, axes: Axes, gradient: bool, x, w, targets, weights):
    """Loss of one device's tokens: x [b, t, D] or a share of t, w [v, d], targets and weights
    [b, t]."""
    D = x.shape[-1]
    if axes.stream:
        x = lax.all_gather(x, axes.stream, axis=1, tiled=True)
    w = w.astype(x.dtype)
    if axes.embed:
        w = lax.all_gather(w, axes.embed, axis=1, tiled=True)
    v = w.shape[0]
    first = lax.axis_index(axes.vocab) * v if axes.vocab else 0
    ids = first + jnp.arange(v)  # of this device's rows
    c = _chunk(head.chunk, targets.size)
    parts = (x.reshape(-1, c, D), targets.reshape(-1, c), weights.reshape(-1, c))

    def step(dw, part):
        x_CD, target_C, weight_C = part
        out = _one_chunk(head, axes, x_CD, w, ids, target_C, weight_C, gradient)
        if not gradient:
            return dw, out
        loss, nll, dz_CV = out
        dw = dw + jnp.einsum(
            "cv,cd->vd", dz_CV, x_CD, preferred_element_type=jnp.float32
        )
        return dw, (loss, nll, jnp.einsum("cv,vd->cd", dz_CV, w))

    zero = jnp.zeros(w.shape, jnp.float32) if gradient else None
    dw, (loss, nll, last) = lax.scan(step, zero, parts)
    loss, nll = loss.sum()[None], nll.sum()[None]
    if not gradient:
        sums = (loss, nll, last.sum()[None])
        return lax.psum(sums, axes.length) if axes.length else sums
    if axes.length:
        loss, nll = lax.psum((loss, nll), axes.length)
    assert dw is not None
    dx = last.reshape(x.shape)
    if axes.stream:
        dx = lax.psum_scatter(dx, axes.stream, scatter_dimension=1, tiled=True)
    if whole := tuple(a for a in axes.vocab if a not in axes.stream):
        dx = lax.psum(dx, whole)
    if axes.embed:
        dw = lax.psum_scatter(dw, axes.embed, scatter_dimension=1, tiled=True)
    assert dw is not None
    return loss, nll, dx, dw[None]


def _one_chunk(
    head: Head, axes: Axes, x_CD, w, ids, target_C, weight_C, gradient: bool
):
    """Returns the chunk's loss, its negative log-likelihood and the gradient of its logits.

    Without a gradient the last is the weight of the tokens whose target is the likeliest; of
    several equally likely the first counts.
    """
    z_CV = jnp.einsum("cd,vd->cv", x_CD, w, preferred_element_type=jnp.float32)
    z_CV, slope = cap(head.softcap, z_CV)
    real = ids < head.vocab
    z_CV = jnp.where(real[None], z_CV, NEG)
    top_C = z_CV.max(-1)
    if axes.vocab:
        top_C = lax.pmax(top_C, axes.vocab)
    e_CV = jnp.exp(z_CV - top_C[:, None])
    hit_CV = ids[None] == target_C[:, None]
    sums = [e_CV.sum(-1), jnp.where(hit_CV, z_CV, 0).sum(-1)]
    if head.smoothing:
        sums.append(jnp.where(real[None], z_CV, 0).sum(-1))
    if axes.vocab:
        sums = lax.psum(sums, axes.vocab)
    norm_C, label_C, *all_C = sums
    lse_C = top_C + jnp.log(norm_C)
    nll_C = lse_C - label_C
    loss_C = nll_C
    if head.smoothing:
        mean_C = lse_C - all_C[0] / head.vocab
        loss_C = (1 - head.smoothing) * nll_C + head.smoothing * mean_C
    loss_C = loss_C + head.z_loss * lse_C * lse_C
    loss, nll = (loss_C * weight_C).sum(), (nll_C * weight_C).sum()
    if not gradient:
        likeliest_C = jnp.where(z_CV == top_C[:, None], ids[None], head.vocab).min(-1)
        if axes.vocab:
            likeliest_C = lax.pmin(likeliest_C, axes.vocab)
        return loss, nll, ((likeliest_C == target_C) * weight_C).sum()
    p_CV = e_CV * ((1 + 2 * head.z_loss * lse_C) / norm_C)[:, None]
    dz_CV = p_CV - (1 - head.smoothing) * hit_CV
    if head.smoothing:
        dz_CV = dz_CV - (head.smoothing / head.vocab) * real[None]
    dz_CV = (dz_CV * weight_C[:, None] * slope).astype(x_CD.dtype)
    if sharding.current().platform == "cpu":
        dz_CV = lax.optimization_barrier(dz_CV)  # see lm/nn/param.py
    return loss, nll, dz_CV


def _chunk(wanted: int, tokens: int) -> int:
    """The largest number of tokens up to `wanted` that divides `tokens`."""
    return next(c for c in range(min(wanted, tokens), 0, -1) if tokens % c == 0)


def bits_per_byte(nll: float, count: float) -> float:
    """Returns nats over `count` bytes as bits per byte."""
    return nll / math.log(2) / count
