"""The CPU that a plan is made on, as a chip: measured on the spot.

On a CPU what is not a product does not wait for memory alone: exponentials are computed there, and
starting an operation takes as long as a small one. So a small training step is timed, and what its
products leave of its time, over the bytes that plans count for it, is the rate for other steps.
"""

import time
from typing import Any

import jax
import numpy as np

from lm import sharding, train
from lm.data.loader import Data
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.optim import Optim
from lm.plan import chips
from lm.plan.chips import Chip
from lm.plan.work import work

ROUNDS = 3  # of which the best counts
SLENDER = (2048, 192, 512)  # a product as small models have them
SAMPLE = Experiment(
    name="sample",
    model=Transformer.Config(layers=4, dim=192, heads=3, kv_heads=3, vocab_size=512),
    data=Data(source=("tfds:lm_text/slice",), length=128),  # never read
    optim=Optim(),
    train=Train(steps=1, batch_size=8),
)


def chip(devices: int) -> Chip:
    """Returns this CPU (seconds, the first time on a machine for a compilation).

    Emulated devices share its arithmetic, its memory and the way to it.
    """
    prog = train.program(SAMPLE, sharding.make_layout(SAMPLE.mesh, _cpus()[:1]))
    step = Step(prog)
    rate = copies = slender = 0.0
    least = float("inf")
    for _ in range(ROUNDS):  # in turn: the speed of a machine that is shared varies
        rate = max(rate, chips.product_rate())
        slender = max(slender, chips.product_rate(SLENDER))
        copies = max(copies, chips.copy_rate())
        least = min(least, step.seconds())
    reach, wanted = min(1.0, slender / rate), work(prog)
    left = least - wanted.hardware_flops / (rate * reach)
    other = copies if left <= 0 else min(copies, wanted.waited_bytes / left)
    memory = chips.ram()
    return Chip(
        name="cpu",
        kinds=("cpu",),
        platform="cpu",
        bf16=rate / devices,
        reach=reach,
        fp8=rate / devices,
        int8=rate / devices,
        hbm=memory // devices,
        bandwidth=other / devices,
        torus=0,
        links=copies / devices / 2,  # what one device writes another reads
        network=copies / devices / 2,
        watts=None,
        host_chips=devices,
        host_ram=memory,
        largest=devices,
        sources={
            "bf16 reach fp8 int8 links network": "measured, fp32",
            "bandwidth": "measured on a small step's elementwise work",
        },
    )


class Step:
    """A training step on this CPU, ready to be run again and again."""

    def __init__(self, prog: train.Program):
        make: Any = train.make_train_step(prog)
        shapes = train.abstract_state(prog), train.abstract_batch(prog)
        self._state, self._batch = jax.tree.map(_ones, shapes)
        self._run = make.ready(self._state, self._batch)

    def seconds(self) -> float:
        """Runs the step once."""
        began = time.perf_counter()
        self._state, sums = self._run(self._state, self._batch)
        jax.block_until_ready(sums)
        return time.perf_counter() - began


def _ones(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)


def _cpus() -> list[Any]:
    return jax.local_devices(backend="cpu")
