"""Sampling: one token for each row, from the logits of all.

Shapes: B rows, V true vocabulary, k ids to choose among; small letters for one device's share.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.experiment import Generate
from lm.nn import manual


def choose(
    config: Generate, logits_BV: Float[Array, "B V"], keys_B: Array
) -> Int[Array, " B"]:
    """Returns an id for each row, drawn with the row's own key.

    Temperature first, then top-k (of equal logits the lower id counts as likelier),
    then top-p of what is left: the fewest likeliest ids that hold so much of its
    probability (Holtzman et al. 2020). At temperature 0, the likeliest; nothing drawn.
    """
    if config.temperature < 1e-30:  # fp32 could not divide by it
        return logits_BV.argmax(-1).astype(jnp.int32)
    # Each device draws for its own rows; there is nothing to communicate.
    specs = sharding.spec("batch", None), sharding.spec("batch")
    draw = manual.region(functools.partial(_draw, config), specs, specs[1])
    return draw(logits_BV, keys_B)


def _draw(config: Generate, logits_bV: Array, keys_b: Array) -> Array:
    V = logits_bV.shape[1]
    # The Gumbel-max trick. The noise goes by id, not by rank: where two logits change
    # order by rounding, the sample stays the same.
    noise_bV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_b)
    top_b1 = logits_bV.max(-1, keepdims=True)
    x_bV = (logits_bV - top_b1) / config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    if config.top_k is None and top_p == 1:
        return (x_bV + noise_bV).argmax(-1).astype(jnp.int32)
    x_bk, ids_bk = lax.top_k(x_bV, min(config.top_k or V, V))
    if top_p < 1:
        p_bk = jax.nn.softmax(x_bk)
        likelier_bk = jnp.cumsum(p_bk, -1) - p_bk  # probability of those before
        x_bk = jnp.where(likelier_bk < top_p, x_bk, -jnp.inf)
    x_bk = x_bk + jnp.take_along_axis(noise_bV, ids_bk, 1)
    best_b1 = x_bk.argmax(-1, keepdims=True)
    return jnp.take_along_axis(ids_bk, best_b1, 1)[:, 0].astype(jnp.int32)
