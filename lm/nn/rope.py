"""Rotary positions, and the ways to stretch them beyond the length they were trained on.

Shapes: B batch, T length, H head dim, P = H / 2 planes that are rotated.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """All wavelengths are `factor` times as long (Chen et al. 2023)."""

    factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1)."""

    factor: float = 8.0  # of the wavelengths above length / low
    low: float = 1.0
    high: float = 4.0  # wavelengths below length / high are kept
    length: int = 8192  # tokens, before it was stretched


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Planes that turn often are kept, those that turn seldom stretched (Peng et al. 2023)."""

    factor: float = 4.0  # of the wavelengths that are stretched
    fast: float = 32.0  # turns within `length` above which a plane is kept
    slow: float = 1.0  # turns below which it is stretched whole
    length: int = 4096  # tokens, before it was stretched
    whole: bool = True  # the planes between which it is interpolated are whole numbers
    magnitude: float = 1.0  # of queries and keys: their product gets its square


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al. 2021), halves rotated against each other (GPT-NeoX order)."""

    base: float = 10_000.0  # wavelengths run from 2 pi to 2 pi base positions
    scaling: Linear | Llama3 | Yarn | None = None  # how long contexts are reached

    def __post_init__(self) -> None:
        if self.base <= 0:
            raise ConfigError(f"model.positions.base={self.base}: expected above 0")


def mscale(factor: float, weight: float = 1.0) -> float:
    """Returns YaRN's magnitude for a factor (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_tables(
    rope: Rope, head_dim: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Returns (cos, sin) of the angle of each position in each of P = head_dim / 2 planes."""
    if head_dim % 2:
        raise ConfigError(f"rotary positions need an even head_dim, got {head_dim}")
    frequency = rope.base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling is not None:
        frequency = _stretched(rope, head_dim, frequency)
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(rope.scaling, Yarn):
        cos, sin = cos * rope.scaling.magnitude, sin * rope.scaling.magnitude
    return cos, sin


def _stretched(
    rope: Rope, head_dim: int, frequency_P: Float[Array, " P"]
) -> Float[Array, " P"]:
    """Returns the frequencies after the scaling."""
    s = rope.scaling
    slowed = frequency_P / s.factor  # type: ignore[union-attr]
    if isinstance(s, Llama3):
        turns = s.length * frequency_P / (2 * math.pi)
        kept = jnp.clip((turns - s.low) / (s.high - s.low), 0, 1)
    elif isinstance(s, Yarn):
        # The plane that turns so often within the length.
        low, high = (
            head_dim * math.log(s.length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
            for turns in (s.fast, s.slow)
        )  # fmt: skip
        if s.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        plane = jnp.arange(head_dim // 2, dtype=jnp.float32)
        kept = 1 - jnp.clip((plane - low) / ((high - low) or 0.001), 0, 1)
    else:
        return slowed
    return slowed * (1 - kept) + frequency_P * kept
