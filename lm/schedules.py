"""Learning-rate schedules: which fraction of the peak a step takes, with a linear warm-up.

Steps count from 0. A warm-up of W steps takes (step + 1) / (W + 1) of the peak and so reaches it at
step W; no step is spent at a rate of 0. Then the schedule goes from 1 at step W to `end` at step
`length`, one after the last, and stays there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.config import ConfigError

Rate = Callable[[jax.typing.ArrayLike], Float[Array, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, to the end."""

    warmup: int = 0  # steps

    def __post_init__(self):
        _check(self)

    def after_warmup(
        self, step: Float[Array, "..."], length: int
    ) -> Float[Array, "..."]:
        del length
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to `end`."""

    warmup: int = 0  # steps
    end: float = 0.0  # fraction of the peak
    length: int | None = None  # steps, warm-up included; None: train.steps

    def __post_init__(self):
        _check(self)

    def after_warmup(
        self, step: Float[Array, "..."], length: int
    ) -> Float[Array, "..."]:
        return 1 - (1 - self.end) * _progress(step, self.warmup, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to `end` (https://arxiv.org/abs/1608.03983)."""

    warmup: int = 0  # steps
    end: float = 0.1  # fraction of the peak
    length: int | None = None  # steps, warm-up included; None: train.steps

    def __post_init__(self):
        _check(self)

    def after_warmup(
        self, step: Float[Array, "..."], length: int
    ) -> Float[Array, "..."]:
        wave = jnp.cos(math.pi * _progress(step, self.warmup, length))
        return self.end + (1 - self.end) * 0.5 * (1 + wave)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd:
    """Warm-up, stable, decay: the peak, then a short fall (https://arxiv.org/abs/2405.18392)."""

    warmup: int = 0  # steps
    decay: float = 0.2  # fraction of the length that the fall at its end takes
    shape: Literal["linear", "sqrt"] = "linear"  # of the fall: 1 - x, or 1 - sqrt(x)
    end: float = 0.0  # fraction of the peak
    length: int | None = None  # steps, warm-up included; None: train.steps

    def __post_init__(self):
        _check(self)
        if not 0 < self.decay <= 1:
            raise ConfigError(
                f"optim.schedule.decay={self.decay} is not in (0, 1]; it is the fraction of "
                "the schedule's length spent falling (0.2 is usual)"
            )

    def after_warmup(
        self, step: Float[Array, "..."], length: int
    ) -> Float[Array, "..."]:
        x = _progress(step, self.decay_start(length), length)
        return 1 - (1 - self.end) * (x if self.shape == "linear" else jnp.sqrt(x))

    def decay_start(self, length: int) -> int:
        """The step at which the fall begins: the last one at the peak.

        Raises:
            ConfigError: the warm-up is not over by then.
        """
        start = length - max(1, round(self.decay * length))
        if self.warmup > start:
            raise ConfigError(
                f"optim.schedule.warmup={self.warmup} reaches into the fall, which begins at "
                f"step {start} of {length} (decay={self.decay}); lower warmup or decay"
            )
        return start


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """The inverse square root of the step, no end in sight (https://arxiv.org/abs/1706.03762)."""

    warmup: int = (
        0  # steps; also the scale of the fall: half the peak at four times as many
    )
    end: float = 0.0  # fraction of the peak below which it does not fall

    def __post_init__(self):
        _check(self)

    def after_warmup(
        self, step: Float[Array, "..."], length: int
    ) -> Float[Array, "..."]:
        del length
        fall = jnp.sqrt((self.warmup + 1) / (jnp.maximum(step, self.warmup) + 1))
        return jnp.maximum(fall, self.end)


Schedule = Constant | Linear | Cosine | Wsd | InverseSqrt


def rate(schedule: Schedule, peak: float, steps: int) -> Rate:
    """Returns the function from a step (counted from 0, traced or not) to its learning rate.

    Args:
        schedule: the shape.
        peak: learning rate at the end of the warm-up.
        steps: length of the training run, which is the schedule's unless it has its own.

    Raises:
        ConfigError: the warm-up is not shorter than the schedule.
    """
    own = getattr(schedule, "length", None)
    length = steps if own is None else own
    if schedule.warmup >= length:
        raise ConfigError(
            f"optim.schedule.warmup={schedule.warmup} is not below the schedule's length of "
            f"{length} steps; lower it or raise {'train.steps' if own is None else 'length'}"
        )
    if isinstance(schedule, Wsd):
        schedule.decay_start(length)

    def at(step: jax.typing.ArrayLike) -> Float[Array, "..."]:
        step = jnp.asarray(step, jnp.float32)
        rise = (step + 1) / (schedule.warmup + 1)
        after = schedule.after_warmup(step, length)
        return peak * jnp.where(step < schedule.warmup, rise, after)

    return at


def _progress(step: Float[Array, "..."], start: int, end: int) -> Float[Array, "..."]:
    """How far `step` is from `start` (0) to `end` (1), which it does not leave."""
    return jnp.clip((step - start) / (end - start), 0, 1)


def _check(schedule: Schedule) -> None:
    name = f"optim.schedule ({type(schedule).__name__})"
    if schedule.warmup < 0:
        raise ConfigError(f"{name}: warmup={schedule.warmup} steps is negative")
    end, length = getattr(schedule, "end", 0.0), getattr(schedule, "length", None)
    if not 0 <= end <= 1:
        raise ConfigError(
            f"{name}: end={end} is not in [0, 1]; it is a fraction of the peak, not a rate"
        )
    if length is not None and schedule.warmup >= length:
        raise ConfigError(
            f"{name}: warmup={schedule.warmup} is not below length={length} steps; "
            "lower warmup or raise length"
        )
