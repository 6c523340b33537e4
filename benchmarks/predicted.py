"""A step's time as a plan predicts it for this CPU, beside the step itself.

python -m benchmarks.predicted shakespeare t5_tiny
"""

import sys
import time
from typing import Any

from lm import heap

heap.keep()  # as lm.main does, before jax is imported

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lm import experiment, sharding, train  # noqa: E402
from lm.plan import cpu, make, target  # noqa: E402
from lm.program import Program  # noqa: E402

ROUNDS = 4  # a plan, which measures the CPU's rates, and steps, in turn
STEPS = 3  # of a round


def batch(prog: Program) -> dict[str, np.ndarray]:
    """Returns full rows of random tokens."""
    random, found = np.random.default_rng(0), {}
    for name, x in train.abstract_batch(prog).items():
        if np.issubdtype(x.dtype, np.floating):
            value = np.ones(x.shape)
        elif "positions" in name:
            value = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        elif "segments" in name:
            value = np.ones(x.shape)
        elif name == "index":
            value = np.arange(x.shape[0])
        else:
            value = random.integers(1, 2 if x.ndim < 2 else 200, x.shape)
        found[name] = np.ascontiguousarray(value).astype(x.dtype)
    return found


def compared(name: str) -> tuple[list[float], list[float]]:
    """Returns seconds of a step of a shipped experiment, predicted and measured, of each round."""
    chosen = experiment.load(name)
    prog = train.program(chosen, sharding.make_layout(chosen.mesh, jax.devices()[:1]))
    state = train.make_init(prog)(jax.random.key(0))
    step: Any = train.make_train_step(prog)
    where = {k: x.sharding for k, x in train.abstract_batch(prog).items()}
    here = jax.device_put(batch(prog), where)
    predicted, measured = [], []
    for _ in range(ROUNDS):
        cpu.rates.cache_clear()
        plan = make.plan(chosen, target.read("cpu:1"))
        assert plan.time is not None
        predicted.append(plan.time.step)
        state, sums = step(state, here)
        jax.block_until_ready(sums)
        began = time.perf_counter()
        for _ in range(STEPS):
            state, sums = step(state, here)
        jax.block_until_ready(sums)
        measured.append((time.perf_counter() - began) / STEPS)
    return predicted, measured


def main() -> None:
    """Prints a line for each experiment named."""
    for name in sys.argv[1:]:
        predicted, measured = (min(times) for times in compared(name))
        print(
            f"{name}: predicted {1e3 * predicted:.0f} ms, measured {1e3 * measured:.0f} ms "
            f"({predicted / measured - 1:+.0%}), the least of {ROUNDS} rounds",
            flush=True,
        )


if __name__ == "__main__":
    main()
