"""Losses over model outputs: sums over tokens, so that no batch layout can change their value.

Shapes: B batch, T length, D embed, V vocabulary (padded), C tokens of a chunk. Small letters are
one device's share.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
    Seq2Seq,
    SpanCorruption,
)
from lm.config import ConfigError, kind
from lm.models import kinds
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.model import Model
from lm.nn import manual
from lm.nn.blockwise import NEG, Tokens, cap
from lm.nn.heads import Classes, Pooler, Words
from lm.scores import classes

__all__ = ["Causal"]  # from here, as an experiment would look for it

Batch = dict[
    str, Array
]  # tokens, targets, segments, positions [B, T]; weights; bytes, index [B]


NEEDS = {
    Masked: "model=Encoder",
    Classification: "a model with model.head=Classes, as model=Encoder",
    Seq2Seq: "an encoder and a decoder, model=EncoderDecoder",
    SpanCorruption: "an encoder and a decoder, model=EncoderDecoder",
}


FITS: dict[Any, tuple[str, ...]] = {  # by what a model ends in
    Words.Config: ("Masked",),
    Classes.Config: ("Classification",),
    Pooler.Config: ("Masked",),  # by name only, see `kinds.untrained`
}


def refuse(objective: Objective, model: kinds.Config) -> None:
    """Refuses an objective that the model cannot be trained by.

    Raises:
        ConfigError: what it lacks, and what can be used.
    """
    name, has = kind(type(objective)), kind(type(model))
    fits, head = ("Causal", "Prefix", "Sft"), kinds.head(model)
    if isinstance(model, EncoderDecoder.Config):
        fits = ("Seq2Seq", "SpanCorruption")
    if head is not None:
        fits = FITS[type(head)]
        has = f"{has} with model.head={kind(type(head))}"
    if name not in fits:
        needs = NEEDS.get(type(objective), "model=Transformer or model=Recurrent")
        raise ConfigError(
            f"objective={name} does not go with model={has}, which is trained by "
            f"{' or '.join(fits)}; {name} needs {needs}"
        )
    labels = len(getattr(objective, "labels", ()))
    if isinstance(head, Classes.Config) and head.classes != labels:
        raise ConfigError(
            f"model.head.classes={head.classes}, but objective.labels has {labels}; set "
            f"model.head.classes={labels}"
        )


def causal(
    objective: Objective,
    model: Model,
    batch: Batch,
    keys: Callable[[int], Array] | None,
    packed: bool,
    graded: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss summed over the batch's scored tokens, and sums of what is reported.

    Sums: `nll` (nats, of the cross-entropy alone), `tokens` (scored), `bytes` (of their text),
    `correct` (scored tokens that are the likeliest, where `graded`; then there is no gradient),
    and those of the layers. The losses of layers are a row's; they count as often as its scored
    tokens.
    """
    x_BTD, aux = model.read(batch, keys, packed)
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
    model: Model,
    x_BTD: Float[Array, "B T D"],
    batch: Batch,
    graded: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Returns what `causal` does, from the hidden states after the last norm."""
    if isinstance(objective, Classification):
        return _classified(model, x_BTD, batch, graded)
    assert isinstance(objective, CrossEntropy)  # what `refuse` lets through
    head = Head(
        vocab=model.config.vocab_size,
        softcap=model.config.head_softcap,
        chunk=objective.chunk,
        z_loss=objective.z_loss,
        smoothing=objective.label_smoothing,
        bias=model.head_bias is not None,
    )
    states = (x_BTD, model.head()[...], batch["targets"], batch["weights"])
    if model.head_bias is not None:
        states = (*states, model.head_bias[...])
    if graded:
        loss, nll, correct = (x.sum() for x in _region(head, False)(*states))
    else:
        (loss, nll), correct = cross_entropy(head, *states), None
    sums = {"nll": nll, "tokens": batch["weights"].sum(), "bytes": batch["bytes"].sum()}
    return loss, sums if correct is None else {**sums, "correct": correct}


def _classified(
    model: Model, x_BTD: Array, batch: Batch, graded: bool
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of a text's class; `tokens` counts texts, `read` their tokens.

    Where `graded`, the sums have a matrix of counts, too.
    """
    tokens = Tokens(batch["positions"], batch["segments"])
    logits_BC = model.classes(x_BTD, tokens)
    hit_BC = jax.nn.one_hot(batch["targets"], logits_BC.shape[1])
    nll_B = -(jax.nn.log_softmax(logits_BC) * hit_BC).sum(1)
    loss, count = (nll_B * batch["weights"]).sum(), batch["weights"].sum()
    read = (tokens.segments > 0).sum()
    sums = {
        "nll": loss,
        "tokens": count,
        "bytes": jnp.zeros((), jnp.int32),
        "read": read,
    }
    if graded:
        found_B = logits_BC.argmax(1)
        sums["confusion"] = classes.confusion(
            found_B, batch["targets"], batch["weights"], logits_BC.shape[1]
        )
    return loss, sums


def plain(objective: Objective) -> Objective:
    """Returns the objective as evaluations score it: without z-loss or smoothing."""
    if not isinstance(objective, CrossEntropy):
        return objective
    return dataclasses.replace(objective, z_loss=0.0, label_smoothing=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """How logits and their loss are formed; static."""

    vocab: int  # real ids; the rows above are padding
    softcap: float | None
    chunk: int
    z_loss: float
    smoothing: float
    bias: bool = False  # every id has a shift of its own


def cross_entropy(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    bias_V: Float[Array, "V"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted loss and the weighted negative log-likelihood, fp32 sums over tokens.

    Logits exist for one chunk of tokens at a time. When a gradient is asked for, it is computed in
    the same pass (the loss is a scalar, so its gradient is known up to a factor): no logits are
    kept or formed again. The vocabulary may be split over devices: then each token's maximum, sum
    and target logit are reduced over them, and the weight is gathered over fsdp, in the dtype of x,
    and its gradient reduced back. Only the loss is differentiable, not the second result.
    """
    return _cross_entropy(head, x_BTD, w_VD, targets_BT, weights_BT, bias_V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(head, *states):
    loss, nll, _ = _region(head, False)(*_there(states))
    return loss.sum(), nll.sum()


def _there(states):
    return [a for a in states if a is not None]


def _fwd(head, *states):
    loss, nll, dx, dw, *db = _region(head, True)(*_there(states))
    return (loss.sum(), nll.sum()), (dx, dw, db, states[3])


def _bwd(head, saved, cotangents):
    dx, dw, db, weights = saved
    g = cotangents[0]
    db = (db[0] * g).sum(0) if db else None
    # An all-reduce; XLA adds a tied embedding's other gradient first, and reduces once.
    dw = (dw * g).sum(0)
    return (dx * g).astype(dx.dtype), dw, None, jnp.zeros_like(weights), db


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
    ins = (x_spec, w_spec, tokens, tokens)
    outs = (row, row, x_spec, parts) if gradient else (row, row, row)
    if head.bias:
        ins = (*ins, P(w_spec[0]))
        outs = (*outs, P(lead, w_spec[0])) if gradient else outs
    body = functools.partial(_chunks, head, axes, gradient)
    return manual.region(body, ins, outs)


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


def _chunks(head: Head, axes: Axes, gradient: bool, x, w, targets, weights, bias=None):
    """Loss of one device's tokens: x [b, t, D] or a share of t, w [v, d], targets and weights
    [b, t], bias [v]."""
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

    def step(carry, part):
        x_CD, target_C, weight_C = part
        out = _one_chunk(head, axes, x_CD, w, bias, ids, target_C, weight_C, gradient)
        if not gradient:
            return carry, out
        (dw, db), (loss, nll, dz_CV) = carry, out
        dw = dw + jnp.einsum(
            "cv,cd->vd", dz_CV, x_CD, preferred_element_type=jnp.float32
        )
        if db is not None:
            db = db + dz_CV.astype(jnp.float32).sum(0)
        return (dw, db), (loss, nll, jnp.einsum("cv,vd->cd", dz_CV, w))

    zero = jnp.zeros(w.shape, jnp.float32) if gradient else None
    zero_v = jnp.zeros(v, jnp.float32) if gradient and bias is not None else None
    (dw, db), (loss, nll, last) = lax.scan(step, (zero, zero_v), parts)
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
        db = lax.psum(db, axes.embed) if db is not None else None
    assert dw is not None
    rest = () if db is None else (db[None],)
    return loss, nll, dx, dw[None], *rest


def _one_chunk(
    head: Head, axes: Axes, x_CD, w, bias, ids, target_C, weight_C, gradient: bool
):
    """Returns the chunk's loss, its negative log-likelihood and the gradient of its logits.

    Without a gradient the last is the weight of the tokens whose target is the likeliest; of
    several equally likely the first counts.
    """
    z_CV = jnp.einsum("cd,vd->cv", x_CD, w, preferred_element_type=jnp.float32)
    if bias is not None:
        z_CV = z_CV + bias[None]
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
