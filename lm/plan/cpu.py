"""The CPU that a plan is made on, as a chip: measured on the spot.

On a CPU what is not a product does not wait for memory alone: exponentials are computed there, and
starting a kernel takes as long as a small one. So small training steps of more rows and of fewer
are timed. What their products leave of their times is a line over the bytes that plans count for
them: its slope is the rate for other steps, and what is left at no bytes starts kernels.
"""

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import sharding, train
from lm.data.loader import Data
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.optim import Optim
from lm.plan import chips
from lm.plan.chips import Chip
from lm.plan.report import Work
from lm.plan.work import work

ROUNDS = 3  # of which the best counts
SPAN = 0.3  # seconds for a step in each of them
SLENDER = (2048, 192, 512)  # a product as small models have them
ROWS = 1, 8  # of the steps
SAMPLE = Experiment(
    name="sample",
    model=Transformer.Config(layers=4, dim=192, heads=3, kv_heads=3, vocab_size=512),
    data=Data(source=("tfds:lm_text/slice",), length=128),  # never read
    optim=Optim(),
    train=Train(steps=1, batch_size=ROWS[-1]),
)


class Rates(NamedTuple):
    """Of all cores together."""

    products: float  # operations a second of large ones
    reach: float  # share of it that products of small models take
    copies: float  # bytes a second read and written
    other: float  # the same, of what is not a product
    start: float  # seconds that a kernel takes however small


@functools.cache
def rates() -> Rates:
    """Measures this CPU (seconds, and some more for compilations the first time on a machine)."""
    steps = _steps()
    products = copies = slender = 0.0
    least = dict.fromkeys(steps, math.inf)
    for _ in range(ROUNDS):  # in turn: the speed of a machine that is shared varies
        products = max(products, chips.product_rate())
        slender = max(slender, chips.product_rate(SLENDER))
        copies = max(copies, chips.copy_rate())
        least = {rows: min(least[rows], step.seconds()) for rows, step in steps.items()}
    reach = min(1.0, slender / products)
    few, many = (
        (step.work, least[rows] - step.work.hardware_flops / (products * reach))
        for rows, step in steps.items()
    )
    return Rates(products, reach, copies, *_line(few, many, copies))


def chip(devices: int) -> Chip:
    """Returns this CPU; emulated devices share its arithmetic, its memory and the way to it."""
    here, memory = rates(), chips.ram()
    return Chip(
        name="cpu",
        kinds=("cpu",),
        platform="cpu",
        bf16=here.products / devices,
        reach=here.reach,
        fp8=here.products / devices,
        int8=here.products / devices,
        hbm=memory // devices,
        bandwidth=here.other / devices,
        start=here.start * devices,
        torus=0,
        links=here.copies / devices / 2,  # what one device writes another reads
        network=here.copies / devices / 2,
        watts=None,
        host_chips=devices,
        host_ram=memory,
        largest=devices,
        sources={
            "bf16 reach fp8 int8 links network": "measured, fp32",
            "bandwidth start": "measured on small steps' elementwise work",
        },
    )


def _line(
    few: tuple[Work, float], many: tuple[Work, float], copies: float
) -> tuple[float, float]:
    """Returns bytes a second, no more than those of copies, and the seconds that a kernel takes
    to start, by the seconds of two steps beside their products."""
    (less, short), (more, long) = few, many
    slope = (long - short) / (more.waited_bytes - less.waited_bytes)
    slope = max(min(slope, long / more.waited_bytes), 1 / copies)
    return 1 / slope, max(0.0, long - slope * more.waited_bytes) / more.starts


@functools.cache
def _steps() -> dict[int, "Step"]:
    """Returns the steps to time, by their rows."""
    found = {}
    for rows in ROWS:
        sized = dataclasses.replace(SAMPLE.train, batch_size=rows)
        chosen = dataclasses.replace(SAMPLE, train=sized)
        layout = sharding.make_layout(chosen.mesh, _cpus()[:1])
        found[rows] = Step(train.program(chosen, layout))
    return found


class Step:
    """A training step on this CPU, ready to be run again and again."""

    def __init__(self, prog: train.Program):
        self.work = work(prog)
        make: Any = train.make_train_step(prog)
        shapes = train.abstract_state(prog), train.abstract_batch(prog)
        self._state, self._batch = jax.tree.map(_ones, shapes)
        self._run = make.ready(self._state, self._batch)

    def seconds(self) -> float:
        """Runs the step again and again, and returns what the best took."""
        least, end = math.inf, time.perf_counter() + SPAN
        while (began := time.perf_counter()) < end:
            self._state, sums = self._run(self._state, self._batch)
            jax.block_until_ready(sums)
            least = min(least, time.perf_counter() - began)
        return least


def _ones(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)


def _cpus() -> list[Any]:
    return jax.local_devices(backend="cpu")
