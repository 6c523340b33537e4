"""Beam search: of all texts that begin as the prompt does, those of the best score.

A text's score is the sum of the log-probabilities of its new tokens, its end included, over
their number to the power of `generate.length_penalty`, as in `transformers`; Wu et al. 2016,
equation 14, has ((5 + n) / 6) in place of n. K texts of each prompt grow side by side. One
that ends leaves the beam for the K best that have ended; the next best takes its place.

Shapes: B prompts, K beams, X = B K rows of the model, the beams of a prompt side by side, C
candidates of a prompt at a step, V true vocabulary, M new tokens; small letters for one
device's share. A device has all beams of its prompts, so that nothing here communicates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lm import sharding
from lm.nn import manual
from lm.sampling import Generate

# From new tokens [X, 1], their number so far and the cache, to logits [X, V] and the cache.
Advance: TypeAlias = Callable[[Array, Array, Any], tuple[Array, Any]]


class Beams(NamedTuple):
    """The texts of each prompt, best first; those that do not exist have score -inf."""

    growing: Any  # int32[B, K, M]: new tokens, filled up with the end of text
    log_probs: Any  # float32[B, K]: the sums of those
    ended: Any  # int32[B, K, M]: the best that have ended
    scores: Any  # float32[B, K]: theirs
    done: Any  # bool[B]: nothing that grows could get among them


def search(
    config: Generate,
    stops: tuple[int, ...],
    limits_B: Int[Array, "B"],
    logits_BV: Float[Array, "B V"],
    cache: Any,
    advance: Advance,
) -> tuple[Int[Array, "B K M"], Float[Array, "B K"], Bool[Array, ""]]:
    """Returns the new tokens of the best texts, best first, their scores, and `finite`.

    A text that ended before M tokens is filled up with the end of text. `finite` is False
    where a logit was not; then the search stopped.

    Args:
        config: how to search.
        stops: ids that end a text, the end of text first.
        limits_B: new tokens at most; 0 for a row that only fills the batch.
        logits_BV: of the first new token.
        cache: of the prompts, leaves [L, B, ...].
        advance: what gives the logits of the next.
    """
    K, M = config.beams, config.tokens
    row, rows = sharding.spec("batch"), sharding.spec("batch", None)
    beams = Beams(*(row,) * len(Beams._fields))
    begin = manual.region(functools.partial(_begin, K, M, stops[0]), (row,), beams)
    grow = manual.region(
        functools.partial(_grow, config, stops),
        (sharding.spec(), row, rows, *beams),
        (beams, row, row),
    )

    def more(carry: Any) -> Array:
        m, _, now, finite, _ = carry
        return (m < M) & ~now.done.all() & finite

    def step(carry: Any) -> Any:
        m, logits_XV, now, finite, cache = carry
        finite &= jnp.isfinite(logits_XV).all()
        now, ids_X, parent_X = grow(m, limits_B, logits_XV, *now)
        logits_XV, cache = advance(ids_X[:, None], m, reorder(cache, parent_X))
        return m + 1, logits_XV, now, finite, cache

    start = (jnp.int32(0), repeat(logits_BV, K, 0), begin(limits_B), jnp.bool(True))
    carry = (*start, repeat(cache, K, 1))
    _, _, now, finite, _ = lax.while_loop(more, step, carry)
    return now.ended, now.scores, finite


def repeat(tree: Any, times: int, axis: int) -> Any:
    """Returns the arrays with every row so many times, side by side, on its own device."""
    return _locally(lambda _, a: jnp.repeat(a, times, axis), tree)


def reorder(tree: Any, parent_X: Int[Array, "X"]) -> Any:
    """Returns leaves [L, X, ...] whose rows are copies of their device's rows `parent_X`."""
    return _locally(lambda parent_x, a: a[:, parent_x], tree, parent_X)


def _locally(body: Callable[..., Any], tree: Any, rows: Array | None = None) -> Any:
    """Returns `body(rows, leaf)` of every leaf, on each device's share."""
    leaves, structure = jax.tree.flatten(tree)
    specs = tuple(jax.typeof(a).sharding.spec for a in leaves)
    more = () if rows is None else (rows,)

    def shares(*args: Any) -> Any:
        given = args[0] if more else None
        return tuple(body(given, a) for a in args[len(more) :])

    ins = (*(sharding.spec("batch") for _ in more), *specs)
    return jax.tree.unflatten(
        structure, manual.region(shares, ins, specs)(*more, *leaves)
    )


def _begin(K: int, M: int, eot: int, limits_b: Array) -> Beams:
    b = len(limits_b)
    # At first all beams are one: only the first has a score that anything can follow.
    log_probs_bK = jnp.full((b, K), -jnp.inf).at[:, 0].set(0.0)
    none_bK, new_bKM = jnp.full((b, K), -jnp.inf), jnp.full((b, K, M), eot, jnp.int32)
    return Beams(new_bKM, log_probs_bK, new_bKM, none_bK, limits_b <= 0)


def _grow(
    config: Generate,
    stops: tuple[int, ...],
    m: Array,
    limits_b: Array,
    logits_xV: Array,
    *state: Array,
) -> tuple[Beams, Array, Array]:
    """Returns the texts with one more token, those tokens [x], and which row each grew from."""
    old = Beams(*state)
    (b, K), V = old.log_probs.shape, logits_xV.shape[-1]
    log_probs_bKV = jax.nn.log_softmax(logits_xV.reshape(b, K, V))
    sums_bKV = old.log_probs[..., None] + log_probs_bKV
    # So many that K of them go on, even where each of the best K texts may end.
    C = min((1 + len(stops)) * K, K * V)
    sums_bC, at_bC = lax.top_k(sums_bKV.reshape(b, K * V), C)
    parent_bC, ids_bC = at_bC // V, (at_bC % V).astype(jnp.int32)
    texts_bCM = _of(old.growing, parent_bC).at[:, :, m].set(ids_bC)
    ends_bC = functools.reduce(jnp.logical_or, [ids_bC == i for i in stops])
    ends_bC |= m + 1 >= limits_b[:, None]

    log_probs_bK, go_bK = lax.top_k(jnp.where(ends_bC, -jnp.inf, sums_bC), K)
    growing_bKM = _of(texts_bCM, go_bK)
    ids_bK, parent_bK = _of(ids_bC, go_bK), _of(parent_bC, go_bK)

    weights = jnp.asarray(_lengths(config), jnp.float32)
    # An end that is not among the K likeliest is no end: what comes after may be likelier.
    counts_bC = ends_bC & (jnp.arange(C) < K)[None]
    new_bC = jnp.where(counts_bC, sums_bC / weights[m], -jnp.inf)
    scores_bK, best_bK = lax.top_k(jnp.concatenate([old.scores, new_bC], 1), K)
    ended_bKM = _of(jnp.concatenate([old.ended, texts_bCM], 1), best_bK)

    at_best = weights[m]
    if config.early_stop == "never" and config.length_penalty > 0:
        at_best = weights[jnp.maximum(limits_b, 1) - 1]
    worst_b = scores_bK[:, -1]
    done_b = (log_probs_bK[:, 0] / at_best <= worst_b) | (m + 1 >= limits_b)
    if config.early_stop == "full":
        done_b |= worst_b > -jnp.inf
    new = Beams(growing_bKM, log_probs_bK, ended_bKM, scores_bK, old.done | done_b)
    kept = Beams(*(_either(old.done, a, n) for a, n in zip(old, new, strict=True)))
    row_bK = jnp.arange(b)[:, None] * K + parent_bK
    return kept, ids_bK.reshape(-1), row_bK.reshape(-1)


def _lengths(config: Generate) -> np.ndarray:
    """What the score of a text of 1, 2, … tokens is divided by."""
    return np.arange(1, config.tokens + 1, dtype=np.float64) ** config.length_penalty


def _of(a_bC: Array, at_bK: Array) -> Array:
    """Returns the entries [b, K, ...] of a [b, C, ...]."""
    places = at_bK.reshape(*at_bK.shape, *(1,) * (a_bC.ndim - 2))
    return jnp.take_along_axis(a_bC, places, 1)


def _either(done_b: Array, old: Array, new: Array) -> Array:
    return jnp.where(done_b.reshape(-1, *(1,) * (old.ndim - 1)), old, new)
