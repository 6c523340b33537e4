"""How long a train step takes to compile as it grows deeper: `python -m benchmarks.compile`.

With the layers scanned, depth must cost next to nothing. CPU seconds of this process,
tracing and XLA apart; depths interleaved, the least of several rounds; nothing comes
from a cache.
"""

import argparse
import dataclasses
import os
import time

import flax
import jax
import numpy as np

from lm import sharding, train
from lm.data.loader import Data
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Seconds:
    """CPU time of one compilation."""

    trace: float  # to StableHLO
    compile: float  # from there to code

    @property
    def total(self) -> float:
        return self.trace + self.compile


def once(layers: int, dim: int, scan: bool = True) -> Seconds:
    """Compiles the step of a model of so many layers from nothing."""
    jax.clear_caches()
    model = Transformer.Config(
        layers=layers,
        dim=dim,
        heads=dim // 32,
        kv_heads=dim // 32,
        vocab_size=2048,
        scan=scan,
    )
    experiment = Experiment(
        name="compile",
        model=model,
        data=Data(source=("none",), length=64, isolate=False),
        train=Train(batch_size=4),
        mesh=sharding.MeshConfig(data=1),
    )
    layout = sharding.make_layout(experiment.mesh, jax.devices()[:1])
    prog = train.program(experiment, layout)
    state = train.abstract_state(prog)
    rows = prog.batch_sharding()
    kinds = {"bytes": np.int32, "index": np.uint32, "weights": np.float32}
    batch = {
        name: jax.ShapeDtypeStruct(
            (4, 64)[: 1 if name in ("bytes", "index") else 2],
            kinds.get(name, np.int32),
            sharding=prog.sharding(jax.sharding.PartitionSpec(rows.spec[0])),
        )
        for name in ("tokens", "targets", "segments", "positions", *kinds)
    }
    began = time.process_time()
    lowered = train.make_train_step(prog).lower(state, batch)
    traced = time.process_time()
    lowered.compile()
    return Seconds(traced - began, time.process_time() - traced)


def measure(depths: tuple[int, ...], dim: int, rounds: int) -> dict[int, Seconds]:
    """Returns the least seconds of each depth."""
    flax.config.update("nnx_graph_mode", False)
    flax.config.update("nnx_graph_updates", False)
    jax.config.update("jax_enable_compilation_cache", False)
    once(2, dim)  # what only the first compilation of a process pays
    found: dict[int, list[Seconds]] = {layers: [] for layers in depths}
    for i in range(rounds):
        for layers in depths if i % 2 == 0 else depths[::-1]:
            found[layers].append(once(layers, dim))
    return {n: min(some, key=lambda s: s.total) for n, some in found.items()}


def report(quick: bool = False) -> str:
    """Returns a Markdown table and the ratio of the deepest to the shallowest."""
    depths, dim, rounds = ((2, 4), 32, 1) if quick else ((4, 24), 256, 3)
    found = measure(depths, dim, rounds)
    lines = ["| layers | trace s | XLA s | total s |", "|---|---|---|---|"]
    for layers, s in found.items():
        lines.append(f"| {layers} | {s.trace:.2f} | {s.compile:.2f} | {s.total:.2f} |")
    first, last = found[depths[0]], found[depths[-1]]
    ratio = last.total / first.total
    lines += ["", f"{depths[-1]} ÷ {depths[0]} layers: {ratio:.2f} (CPU time)"]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    print(report(parser.parse_args().quick))
