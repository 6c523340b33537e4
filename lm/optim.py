"""Optimizers: an algorithm, a schedule, decay, parameter groups, clipping; EMA; skipped steps.

`build` composes them into one optax transformation whose state holds the algorithm's moments and
nothing else, so that the schedule, decay, clipping and rates may change when a run is resumed. The
train step calls its `update` with `step=`, the number of steps done before:

    updates, opt_state = tx.update(grads, opt_state, params, step=step)
    params = optax.apply_updates(params, updates)

Parameters are nested dicts; `axes` gives for each, by its path `a/b/c`, its logical axes.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from lm import matrices, schedules, trees
from lm.config import ConfigError
from lm.matrices import Adafactor, Blocks, Muon, path_name
from lm.schedules import Constant, Cosine, InverseSqrt, Linear, Wsd

Axes = Mapping[str, tuple[str | None, ...]]  # path of a parameter: its logical axes
Health = dict[str, Array]  # scalars


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with bias correction, without weight decay (https://arxiv.org/abs/1412.6980)."""

    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the denominator

    def __post_init__(self):
        matrices.check_fields(self, unit=("b1", "b2"), positive=("eps",))

    def transform(self, blocks: Blocks, dtype) -> optax.GradientTransformation:
        del blocks
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    b2: float = 0.95  # decay of the second moment


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent, with momentum where it is not 0."""

    momentum: float = 0.9  # decay of the sum of past gradients
    nesterov: bool = False  # look one step ahead

    def __post_init__(self):
        matrices.check_fields(self, unit=("momentum",))
        if self.nesterov and not self.momentum:
            raise ConfigError("optim.algorithm (Sgd): nesterov needs momentum above 0")

    def transform(self, blocks: Blocks, dtype) -> optax.GradientTransformation:
        del blocks
        if not self.momentum:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, accumulator_dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of a momentum (https://arxiv.org/abs/2302.06675); wants a tenth of Adam's rate."""

    b1: float = 0.9  # weight of the momentum in the update
    b2: float = 0.99  # decay of the momentum

    def __post_init__(self):
        matrices.check_fields(self, unit=("b1", "b2"))

    def transform(self, blocks: Blocks, dtype) -> optax.GradientTransformation:
        del blocks
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is special about the parameters whose path matches; the first group to match counts."""

    pattern: str  # regular expression, searched for in paths such as layers/mixer/w_q
    learning_rate: float = 1.0  # multiple of the schedule's
    decay: bool = True  # False: no weight decay
    frozen: bool = False  # True: no update, no state, no part in the gradient's norm

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"optim.groups: pattern {self.pattern!r} is no regular expression: {error}"
            ) from error
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                f"optim.groups: {self.pattern!r}: learning_rate={self.learning_rate} is not a "
                "multiple of the schedule's rate, 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Which steps are skipped: parameters and optimizer state stay, the data goes on."""

    skip_nonfinite: bool = True  # a loss or gradient norm that is not finite
    deviations: float | None = 6.0  # above the mean, a loss is a spike; None: never
    margin: float = 0.5  # nats above the mean up to which a loss is never a spike
    norm_factor: float | None = 20.0  # times the mean, a norm is a spike; None: never
    decay: float = 0.99  # of the running means, per accepted step
    warmup: int = 100  # accepted steps before anything counts as a spike
    max_consecutive: int = 20  # skipped steps in a row after which the run stops

    def __post_init__(self):
        for name in ("deviations", "norm_factor"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(
                    f"optim.guard.{name}={getattr(self, name)} is not above 0; "
                    "none switches the test off"
                )
        if not 0 <= self.decay < 1:
            raise ConfigError(f"optim.guard.decay={self.decay} is not in [0, 1)")
        if not self.margin >= 0 or self.warmup < 0 or self.max_consecutive < 1:
            raise ConfigError(
                f"optim.guard: margin={self.margin}, warmup={self.warmup} and "
                f"max_consecutive={self.max_consecutive} must be at least 0, 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How parameters follow gradients."""

    # The direction of a step.
    algorithm: Adam | AdamW | Sgd | Adafactor | Lion | Muon = AdamW()
    learning_rate: float = 3e-4  # the peak, at the end of the warm-up
    # The learning rate over the steps.
    schedule: Constant | Linear | Cosine | Wsd | InverseSqrt = field(default=Cosine())
    clip_norm: float | None = 1.0  # bound on the gradient's global norm; None: none
    weight_decay: float = 0.1  # of matrices, times the learning rate (decoupled)
    groups: tuple[Group, ...] = ()  # exceptions by path
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # of first moments
    ema: float | None = None  # decay of an average of the parameters; None: none
    guard: Guard = Guard()  # which steps are skipped

    def __post_init__(self):
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                f"optim.learning_rate={self.learning_rate} is not a finite rate, 0 or more"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"optim.weight_decay={self.weight_decay} is not 0 or more"
            )
        if type(self.algorithm) is Adam and self.weight_decay:
            raise ConfigError(
                f"optim.weight_decay={self.weight_decay} with Adam, which has none; set "
                "optim.algorithm=AdamW or optim.weight_decay=0"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"optim.clip_norm={self.clip_norm} is not above 0; none switches it off"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(
                f"optim.ema={self.ema} is not in (0, 1); none switches it off"
            )
        momenta = {"Lion": "b2", "Adam": "b1", "AdamW": "b1"}
        name = momenta.get(type(self.algorithm).__name__, "momentum")
        decay = getattr(self.algorithm, name)
        # The last place of bfloat16 is 2**-8 of a number: a smaller change rounds to none.
        if self.state_dtype == "bfloat16" and decay and 1 - decay < 2**-8:
            raise ConfigError(
                f"optim.algorithm.{name}={decay}: an average that slow stands still in "
                "bfloat16; use at most 0.996 or optim.state_dtype=float32"
            )


def schedule(optim: Optim, steps: int) -> schedules.Rate:
    """Returns the function from a step, counted from 0, to the learning rate that it takes.

    Raises:
        ConfigError: the warm-up is not shorter than the run of `steps` steps.
    """
    return schedules.rate(optim.schedule, optim.learning_rate, steps)


def assign(groups: tuple[Group, ...], paths: Collection[str]) -> dict[str, Group]:
    """Returns the group of each path: the first whose pattern is found in it, or a plain one.

    Raises:
        ConfigError: a pattern found in no path, or only in paths of earlier groups.
    """
    plain = Group(pattern="")
    chosen = {
        path: next((g for g in groups if re.search(g.pattern, path)), plain)
        for path in paths
    }
    for group in groups:
        if not any(g is group for g in chosen.values()):
            if any(re.search(group.pattern, path) for path in paths):
                raise ConfigError(
                    f"optim.groups: earlier groups take every parameter that "
                    f"{group.pattern!r} matches; move it forward or drop it"
                )
            raise ConfigError(
                f"optim.groups: {group.pattern!r} matches no parameter; "
                f"they are {', '.join(sorted(paths))}"
            )
    return chosen


def frozen(optim: Optim, axes: Axes) -> frozenset[str]:
    """Returns the paths of parameters that no gradient updates."""
    groups = assign(optim.groups, axes).items()
    return frozenset(p for p, g in groups if g.frozen or "balance" in axes[p])


def balanced(optim: Optim, axes: Axes) -> list[str]:
    """Returns the paths of biases that the load of experts moves, unless a group freezes them."""
    groups = assign(optim.groups, axes).items()
    return [p for p, g in groups if not g.frozen and "balance" in axes[p]]


def build(
    optim: Optim, steps: int, axes: Axes
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a model whose parameters have the logical axes `axes`.

    `update(grads, state, params, step=)` takes and returns nested dicts like the parameters, of any
    float dtype, sharded alike on an Explicit mesh; updates are float32. A leaf of the state that
    belongs to a parameter has its path as the end of its own, its rank, and its shape and sharding
    but for axes of size 1; the others are scalar counts. `jax.eval_shape(tx.init, params)` on a
    mesh gives the shardings (None for the counts).

    Args:
        optim: the config.
        steps: length of the run, the default length of schedules.
        axes: logical axes by path; a leading "layers" or "expert" stacks independent parameters.

    Raises:
        ConfigError: a group that matches nothing, everything frozen, a warm-up as long as the run.
        ValueError: (from init) parameters that are not those of `axes`.
    """
    rate = schedule(optim, steps)
    groups = assign(optim.groups, axes)
    blocks = {path: matrices.block(path, a) for path, a in axes.items()}
    core = optim.algorithm.transform(blocks, jnp.dtype(optim.state_dtype))
    fixed = frozen(optim, axes)
    if len(fixed) == len(axes):
        raise ConfigError(
            "optim.groups: every parameter is frozen; nothing would train"
        )
    if fixed:

        def label(path, _):
            return "frozen" if path_name(path) in fixed else "trained"

        core = optax.partition(
            {"trained": core, "frozen": optax.set_to_zero()},
            functools.partial(jax.tree_util.tree_map_with_path, label),
        )

    def init(params):
        _check_axes(params, axes)
        return core.init(_float32(params))

    def update(updates, state, params=None, *, step: jax.typing.ArrayLike) -> Any:
        grads, params = _float32(updates), _float32(params)
        if optim.clip_norm is not None:
            grads = clip(grads, global_norm(grads, fixed), optim.clip_norm)
        directions, state = core.update(grads, state, params)
        lr = rate(step)

        def finish(path, u, p):
            name = path_name(path)
            if groups[name].decay and blocks[name].cols and name not in fixed:
                u = u + optim.weight_decay * p
            return -(lr * groups[name].learning_rate) * u

        return jax.tree_util.tree_map_with_path(finish, directions, params), state

    # Optax types `update` without the extra arguments that the class is for.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def global_norm(tree: Any, without: Collection[str] = ()) -> Float[Array, ""]:
    """Returns the root of the sum of squares of all leaves, in float32.

    Each leaf is summed where it lies: one scalar per leaf is all-reduced, nothing is gathered.

    Args:
        tree: arrays of any float dtype and sharding.
        without: paths of leaves to leave out (`frozen`).
    """
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32)))
        for path, x in trees.flatten(tree).items()
        if path not in without
    ]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip(tree: Any, norm: Float[Array, ""], largest: float) -> Any:
    """Returns `tree`, whose global norm is `norm`, scaled down to the norm `largest` if above."""
    scale = jnp.minimum(1.0, largest / norm)
    return jax.tree.map(lambda x: x * scale, tree)


def ema_init(params: Any) -> Any:
    """Returns the average of parameters before the first step: a float32 copy of them."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(decay: float, ema: Any, params: Any, step: jax.typing.ArrayLike) -> Any:
    """Returns the average with the parameters after step `step` (counted from 0) taken in.

    Its decay is min(decay, (1 + step) / (10 + step)), so that a short run's average is not made of
    the initial parameters (TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    t = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(
        lambda e, p: e + (1 - keep) * (p.astype(e.dtype) - e), ema, params
    )


def health_init() -> Health:
    """Returns the statistics before the first step (scalars): see `judge`."""
    counts = {
        name: jnp.zeros([], jnp.int32)
        for name in ("accepted", "skipped", "consecutive")
    }
    means = {
        name: jnp.zeros([], jnp.float32) for name in ("loss", "loss_variance", "norm")
    }
    return counts | means


def judge(
    guard: Guard, health: Health, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Health]:
    """Returns whether the step is to be taken, and the statistics with it counted.

    A pure function of replicated scalars, so that all devices decide alike and nothing waits for
    the host. Running means (plain ones at first, then exponential) only know accepted steps. The
    caller keeps the old state where the answer is no, and stops the run once
    `health["consecutive"]` reaches `guard.max_consecutive`.
    """
    loss, grad_norm = (jnp.asarray(x, jnp.float32) for x in (loss, grad_norm))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = jnp.zeros([], bool)
    rise = loss - health["loss"]
    if guard.deviations is not None:
        bound = guard.deviations * jnp.sqrt(health["loss_variance"])
        spike |= rise > jnp.maximum(bound, guard.margin)
    if guard.norm_factor is not None:
        spike |= grad_norm > guard.norm_factor * health["norm"]
    spike &= finite & (health["accepted"] >= guard.warmup)
    ok = ~spike & (finite | (not guard.skip_nonfinite))

    share = jnp.maximum(1 - guard.decay, 1 / (health["accepted"] + 1.0))
    means = {
        "loss": health["loss"] + share * rise,
        "loss_variance": (1 - share) * (health["loss_variance"] + share * rise**2),
        "norm": health["norm"] + share * (grad_norm - health["norm"]),
    }
    count = ok.astype(jnp.int32)
    return ok, {
        "accepted": health["accepted"] + (ok & finite),
        "skipped": health["skipped"] + 1 - count,
        "consecutive": (health["consecutive"] + 1) * (1 - count),
    } | {k: jnp.where(ok & finite, v, health[k]) for k, v in means.items()}


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _check_axes(params: Any, axes: Axes) -> None:
    ranks = {path: x.ndim for path, x in trees.flatten(params).items()}
    for name in sorted(ranks.keys() ^ axes.keys()):
        raise ValueError(f"{name} is in only one of the parameters and their axes")
    for name, rank in ranks.items():
        if rank != len(axes[name]):
            raise ValueError(f"{name} has {rank} axes, but its names are {axes[name]}")
