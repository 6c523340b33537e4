"""Sampling: one token for each row, from the logits of all; and how text is generated.

Shapes: B rows, V true vocabulary, k ids to choose among; small letters for one device's share.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.config import ConfigError
from lm.nn import manual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """How text is sampled."""

    tokens: int = 200  # at most so many new ones
    temperature: float = 0.8  # 0: the most likely token (greedy)
    top_k: int | None = None  # sample among so many of the likeliest
    top_p: float | None = (
        0.95  # sample among the likeliest that hold this much probability
    )
    seed: int = 0
    samples: int = 1  # texts for each prompt; of beams the best
    beams: int = 1  # texts that grow side by side for each prompt, see lm/beam.py
    length_penalty: float = 1.0  # log-probabilities are divided by tokens to this power
    # When a prompt is done: once as many texts as beams have ended ("full"), once the likeliest
    # that grows scores less than each of them at its length ("heuristic"), or at any ("never").
    early_stop: Literal["full", "heuristic", "never"] = "heuristic"
    prompts: tuple[str, ...] = ()  # continued at the end of training

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(
                f"generate.temperature={self.temperature}: expected 0 or more"
            )
        for name in ("tokens", "samples", "top_k", "beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"generate.{name}={value}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"generate.top_p={self.top_p}: expected 0 < top_p <= 1")
        if self.beams > 1:
            self._check_beams()
        elif self.length_penalty != 1 or self.early_stop != "heuristic":
            raise ConfigError(
                f"generate.length_penalty={self.length_penalty} and early_stop="
                f"{self.early_stop} are for several beams; set generate.beams=4, or leave "
                "them out"
            )

    def _check_beams(self) -> None:
        if self.temperature:
            raise ConfigError(
                f"generate.beams={self.beams} keeps the likeliest texts and draws none, but "
                f"generate.temperature={self.temperature}; set generate.temperature=0"
            )
        if self.top_k is not None:
            raise ConfigError(
                f"generate.beams={self.beams} draws no token, but generate.top_k="
                f"{self.top_k}; set generate.top_k=none"
            )
        if self.samples > self.beams:
            raise ConfigError(
                f"generate.samples={self.samples}, but generate.beams={self.beams} find no "
                f"more texts than that; set generate.beams={self.samples}"
            )
        if not -5 <= self.length_penalty <= 5:
            raise ConfigError(
                f"generate.length_penalty={self.length_penalty}: expected -5 to 5 (0: none)"
            )


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
