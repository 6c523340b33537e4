"""Rates, groups, clipping, EMA, skipped steps and refusals are exact."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_cases import AXES, DECAY, MATRIX, RATE, STEPS, config, make, stack, train

from lm import optim, schedules, trees
from lm.config import ConfigError


def sgd(**kwargs) -> optim.Optim:
    kwargs = {"weight_decay": 0.0, "clip_norm": None, **kwargs}
    return config(optim.Sgd(momentum=0.0), **kwargs)


def one_step(cfg):
    params, grads = make(0), make(1)
    got, state = train(cfg, params, stack([grads]))
    return *(trees.flatten(t) for t in (params, grads, got)), state


def test_decay_takes_matrices_only():
    p, g, got, _ = one_step(sgd(weight_decay=DECAY))
    for name in AXES:
        decay = DECAY if name in MATRIX else 0.0
        np.testing.assert_allclose(
            got[name],
            p[name] - RATE * (g[name] + decay * p[name]),
            rtol=1e-6,
            atol=1e-8,
        )


def test_groups_scale_the_rate_stop_decay_and_freeze_and_the_first_match_wins():
    groups = (
        optim.Group(pattern=r"layers/w_q$", learning_rate=0.5),
        optim.Group(pattern=r"layers/w_", frozen=True),
        optim.Group(pattern=r"^embed/", decay=False),
    )
    clip = 0.25
    cfg = sgd(weight_decay=DECAY, groups=groups, clip_norm=clip)
    p, g, got, state = one_step(cfg)
    fixed = {"layers/w_o"}
    assert optim.frozen(cfg, AXES) == fixed
    assert not jax.tree.leaves(state)
    norm = math.sqrt(
        sum((np.asarray(g[n], np.float64) ** 2).sum() for n in AXES if n not in fixed)
    )
    np.testing.assert_allclose(optim.global_norm(make(1), fixed), norm, rtol=1e-6)
    for name in AXES:
        rate = 0.0 if name in fixed else RATE * (0.5 if name == "layers/w_q" else 1.0)
        decay = DECAY if name in set(MATRIX) - {"embed/table"} else 0.0
        want = p[name] - rate * (g[name] * clip / norm + decay * p[name])
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-8, err_msg=name)


def test_frozen_parameters_have_no_moments():
    cfg = config(
        optim.AdamW(), groups=(optim.Group(pattern="embed|head", frozen=True),)
    )
    state = jax.eval_shape(optim.build(cfg, STEPS, AXES).init, make(0))
    moments = [n for n in trees.flatten(state) if not n.endswith("count")]
    assert len(moments) == 2 * (len(AXES) - 2)
    assert not any(n.endswith(("embed/table", "head")) for n in moments)


@pytest.mark.parametrize("scale, want", [(0.5, 0.5), (2.0, 1.0)])
def test_clipping_bounds_the_norm_and_leaves_smaller_gradients_alone(scale, want):
    grads = {
        "a": jnp.array([3.0, 0.0]) * scale / 5,
        "b": jnp.array([[4.0]]) * scale / 5,
    }
    norm = optim.global_norm(grads)
    np.testing.assert_allclose(norm, scale, rtol=1e-6)
    clipped = optim.clip(grads, norm, 1.0)
    np.testing.assert_allclose(optim.global_norm(clipped), want, rtol=1e-6)
    if want == scale:
        jax.tree.map(np.testing.assert_array_equal, clipped, grads)


def test_bfloat16_state_halves_first_moments_and_keeps_second_ones():
    cfg = config(optim.AdamW(), state_dtype="bfloat16")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), make(0))
    tx = optim.build(cfg, STEPS, AXES)
    state = jax.eval_shape(tx.init, params)
    update = functools.partial(tx.update, step=0)
    updates, after = jax.eval_shape(update, params, state, params)

    def dtypes(tree):
        return {x.dtype.name for x in jax.tree.leaves(tree)}

    assert dtypes(state.mu) == dtypes(after.mu) == {"bfloat16"}
    assert dtypes(state.nu) == dtypes(after.nu) == dtypes(updates) == {"float32"}
    with pytest.raises(ConfigError, match="stands still"):
        config(optim.Lion(b2=0.999), state_dtype="bfloat16")


def test_ema_follows_its_recurrence_and_does_not_alias_the_parameters():
    params = {"a": jnp.full([2], 8.0)}
    ema = optim.ema_init(params)
    assert ema["a"].unsafe_buffer_pointer() != params["a"].unsafe_buffer_pointer()
    want = 8.0
    for step in range(30):
        value = float(step)
        ema = optim.ema_update(0.7, ema, {"a": jnp.full([2], value)}, step)
        keep = min(0.7, (1 + step) / (10 + step))
        want = keep * want + (1 - keep) * value
    np.testing.assert_allclose(ema["a"], want, rtol=1e-6)


WARMUP, TOTAL = 4, 20
AT = {  # step: fraction of the peak
    schedules.Constant(warmup=WARMUP): {5: 1, 100: 1},
    schedules.Linear(warmup=WARMUP, end=0.2): {12: 0.6, 20: 0.2, 30: 0.2},
    schedules.Linear(warmup=WARMUP, length=12): {8: 0.5, 12: 0, 19: 0},
    schedules.Cosine(warmup=WARMUP, end=0.1): {
        8: 0.1 + 0.9 * (0.5 + 0.125**0.5),
        12: 0.55,
        20: 0.1,
    },
    schedules.Wsd(warmup=WARMUP, decay=0.5): {9: 1, 10: 1, 15: 0.5, 20: 0, 21: 0},
    schedules.Wsd(warmup=WARMUP, decay=0.2, shape="sqrt", end=0.1): {16: 1, 17: 0.55, 20: 0.1},
    schedules.InverseSqrt(warmup=WARMUP): {19: 0.5, 44: 1 / 3},
    schedules.InverseSqrt(warmup=WARMUP, end=0.4): {19: 0.5, 100: 0.4},
}  # fmt: skip


@pytest.mark.parametrize("schedule", AT, ids=lambda s: type(s).__name__)
def test_schedule_at_key_steps(schedule):
    peak = 3.0
    rate = jax.jit(optim.schedule(sgd(schedule=schedule, learning_rate=peak), TOTAL))
    warm = {s: (s + 1) / (WARMUP + 1) for s in range(WARMUP + 1)}
    for step, want in (warm | AT[schedule]).items():
        np.testing.assert_allclose(
            rate(step), peak * want, rtol=1e-6, atol=1e-6, err_msg=str(step)
        )
    assert rate(0).dtype == jnp.float32


def test_the_optimizer_takes_the_rate_of_the_step_it_is_told():
    cfg = sgd(schedule=schedules.Linear(), learning_rate=1.0)
    tx = optim.build(cfg, 10, AXES)
    params, grads = make(0), make(1)
    updates, _ = tx.update(grads, tx.init(params), params, step=5)
    np.testing.assert_allclose(updates["head"], -0.5 * grads["head"], rtol=1e-6)


GUARD = optim.Guard(warmup=3, deviations=3.0, margin=0.5, norm_factor=4.0, decay=0.9)


def judged(guard, steps):
    health, answers = optim.health_init(), []
    judge = jax.jit(optim.judge, static_argnums=0)
    for loss, norm in steps:
        ok, health = judge(guard, health, jnp.float32(loss), jnp.float32(norm))
        answers.append(bool(ok))
    return answers, {k: v.item() for k, v in health.items()}


STEADY = [(4.0, 1.0), (3.0, 2.0), (2.0, 3.0)]


@pytest.mark.parametrize(
    "step",
    [
        (math.nan, 1),
        (3, math.nan),
        (math.inf, 1),
        (3, math.inf),
        (9, 2),
        (3, 8.1),
        (-math.inf, 1),
    ],
)
def test_a_bad_step_is_skipped_counted_and_forgotten(step):
    _, before = judged(GUARD, STEADY)
    answers, after = judged(GUARD, [*STEADY, step, step])
    assert answers == [True] * 3 + [False] * 2
    assert (after.pop("skipped"), after.pop("consecutive")) == (2, 2)
    assert after == {k: v for k, v in before.items() if k in after}
    answers, last = judged(GUARD, [*STEADY, step, step, (2.5, 2)])
    assert answers[-1]
    assert (last["skipped"], last["consecutive"], last["accepted"]) == (2, 0, 4)


def test_guard_statistics_are_means_and_bounds_are_where_they_are_said_to_be():
    _, health = judged(GUARD, STEADY)
    assert health["loss"] == pytest.approx(3) and health["norm"] == pytest.approx(2)
    assert health["loss_variance"] == pytest.approx(2 / 3)
    bound = 3 + 3 * math.sqrt(2 / 3)
    for loss, want in [(bound - 0.01, True), (bound + 0.01, False)]:
        assert judged(GUARD, [*STEADY, (loss, 2)])[0][-1] is want
    flat = [(3.0, 2.0)] * 3  # no variance: the margin
    assert judged(GUARD, [*flat, (3.4, 2)])[0][-1]
    assert not judged(GUARD, [*flat, (3.6, 2)])[0][-1]
    assert judged(GUARD, [*STEADY[:2], (99.0, 99.0)])[0][-1], "warm-up"
    tests_off = dataclasses.replace(GUARD, deviations=None, norm_factor=None)
    assert judged(tests_off, [*STEADY, (99, 99)])[0][-1]
    nothing = dataclasses.replace(tests_off, skip_nonfinite=False)
    answers, health = judged(nothing, [*STEADY, (math.nan, 1)])
    assert answers[-1] and health["loss"] == pytest.approx(3)


REFUSED = {
    "not a finite rate": lambda: sgd(learning_rate=-1.0),
    "with Adam, which has none": lambda: config(optim.Adam(), weight_decay=0.1),
    "weight_decay=-1": lambda: sgd(weight_decay=-1.0),
    "clip_norm=0": lambda: sgd(clip_norm=0.0),
    "ema=1.0": lambda: sgd(ema=1.0),
    "b2=1.0 is not in": lambda: optim.AdamW(b2=1.0),
    "eps=0.0 is not above 0": lambda: optim.Adam(eps=0.0),
    "nesterov needs momentum": lambda: optim.Sgd(momentum=0.0, nesterov=True),
    "momentum=1.5": lambda: optim.Muon(momentum=1.5),
    "clip_rms=-1": lambda: optim.Adafactor(clip_rms=-1.0),
    "no regular expression": lambda: optim.Group(pattern="("),
    "learning_rate=-1.0 is not a multiple": lambda: optim.Group(pattern="", learning_rate=-1.0),
    "max_consecutive=0": lambda: optim.Guard(max_consecutive=0),
    "norm_factor=0": lambda: optim.Guard(norm_factor=0.0),
    "warmup=-1": lambda: schedules.Constant(warmup=-1),
    "warmup=9 is not below length=9": lambda: schedules.Cosine(warmup=9, length=9),
    "end=2": lambda: schedules.Linear(end=2.0),
    "decay=0.0 is not in": lambda: schedules.Wsd(decay=0.0),
    "raise train.steps": lambda: optim.schedule(sgd(schedule=schedules.Constant(warmup=9)), 9),
    "reaches into the fall": lambda: optim.schedule(
        sgd(schedule=schedules.Wsd(warmup=9, decay=0.5)), 10
    ),
    "'nope' matches no parameter": lambda: build_groups("nope"),
    "earlier groups take": lambda: build_groups("layers", "layers/w_q"),
    "every parameter is frozen": lambda: build_groups(".", frozen=True),
}  # fmt: skip


def build_groups(*patterns, **kwargs):
    groups = tuple(optim.Group(pattern=p, **kwargs) for p in patterns)
    optim.build(sgd(groups=groups), STEPS, AXES)


@pytest.mark.parametrize("message", REFUSED)
def test_nonsense_is_refused_in_one_line(message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        REFUSED[message]()
    assert "\n" not in str(error.value)


def test_parameters_and_axes_must_agree():
    tx = optim.build(sgd(), STEPS, AXES)
    params = make(0)
    with pytest.raises(ValueError, match="head is in only one"):
        tx.init({k: v for k, v in params.items() if k != "head"})
    with pytest.raises(ValueError, match="head has 1 axes"):
        tx.init(params | {"head": jnp.ones([3])})
