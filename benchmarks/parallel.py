"""Pipelines and meshes on emulated devices: bubble, memory, compile time, and step time.

`python -m benchmarks.parallel [--quick]`. The schedules' tables against theory, the temporary
memory and the compile time of their programs (no cache), and the CPU time of a step on eight
emulated devices over that of one device with the same batch: no claim of scaling, for all of them
are the same cores. Bytes between devices: docs/parallelism.md, "What is sent".
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np

DEVICES = 8
BASE = [
    "model.layers=8",
    "model.dim=128",
    "data.length=128",
    "train.batch_size=32",
    "eval.batch_size=32",
    "optim.schedule.warmup=1",
]
SCHEDULES = {
    "gpipe": ["pipeline.schedule=gpipe"],
    "1f1b": ["pipeline.schedule=1f1b"],
    "interleaved": ["pipeline.schedule=interleaved", "pipeline.rounds=2"],
}
MESHES = {
    "one device": ["mesh.data=1"],
    "data 8": ["mesh.data=8"],
    "fsdp 8": ["mesh.fsdp=8", "mesh.data=1"],
    "data 2 x tensor 4": ["mesh.data=2", "mesh.tensor=4"],
    "data 2 x seq 4": ["mesh.data=2", "mesh.seq=4", "model.attention.context=ring"],
    "data 2 x pipe 4": ["mesh.data=2", "mesh.pipe=4", "pipeline.microbatches=16"],
}


def setup() -> None:
    """Emulates the devices; before anything asks jax for one."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    flax.config.update("nnx_graph_mode", False)
    flax.config.update("nnx_graph_updates", False)


def program(*sets: str) -> Any:
    """Returns the program of `tiny` with overrides, on as many devices as its mesh has."""
    from lm import config, sharding, train
    from lm import experiment as experiments

    chosen = config.override(experiments.load("tiny"), [*BASE, *sets])
    count = int(np.prod([n for n in chosen.mesh.sizes().values() if n > 0]))
    layout = sharding.make_layout(chosen.mesh, jax.devices()[:count])
    return train.program(chosen, layout)


def compiled(prog: Any) -> tuple[Any, float]:
    """Returns the compiled step and the CPU seconds that XLA took for it."""
    from lm import train

    step: Any = train.make_train_step(prog)
    lowered = step.lower(train.abstract_state(prog), train.abstract_batch(prog))
    began = time.process_time()
    return lowered.compile(), time.process_time() - began


def batch(prog: Any) -> Any:
    """Returns random tokens on the program's devices, the same on every mesh."""
    from lm.data import loader

    chosen = prog.experiment
    rng, shape = np.random.default_rng(0), (chosen.train.batch_size, chosen.data.length)
    ids = rng.integers(0, chosen.model.vocab_size, shape).astype(np.int32)
    rows, places = shape[0], np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    host = {
        "tokens": ids,
        "targets": np.roll(ids, -1, 1),
        "segments": np.ones(shape, np.int32),
        "positions": np.ascontiguousarray(places),
        "weights": np.ones(shape, np.float32),
        "bytes": np.full(rows, shape[1], np.int32),
        "index": np.arange(rows, dtype=np.uint32),
    }
    return loader.to_devices(host, prog.batch_sharding())


def schedules(microbatches: tuple[int, ...]) -> Iterator[str]:
    """Yields the table of schedules: theory and table, memory, and time to compile."""
    from lm import gradients

    yield (
        "| schedule, P=4 | M | ticks | bubble | theory | inputs kept | temporaries, MB "
        "| compile, CPU s |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for (name, sets), M in itertools.product(SCHEDULES.items(), microbatches):
        rows = [f"train.batch_size={2 * M}", f"eval.batch_size={2 * M}"]
        mesh = ["mesh.pipe=4", "mesh.data=1", f"pipeline.microbatches={M}"]
        prog = program(*sets, *mesh, *rows)
        step, seconds = compiled(prog)
        table = gradients.table(prog)
        theory = 3 / (table.rounds * M + 3)
        memory = step.memory_analysis().temp_size_in_bytes / 1e6
        yield (
            f"| {name} | {M} | {len(table.forward)} | {table.bubble:.4f} | {theory:.4f} | "
            f"{table.slots} | {memory:.1f} | {seconds:.1f} |"
        )


def meshes(rounds: int) -> Iterator[str]:
    """Yields the table of steps on eight emulated devices over one, interleaved."""
    from lm import train

    made = {}
    for name, sets in MESHES.items():
        prog = program(*sets)
        state = train.make_init(prog)(jax.random.key(0))
        made[name] = [compiled(prog)[0], state, batch(prog)]
    cpu: dict[str, list[float]] = {name: [] for name in made}
    loss: dict[str, float] = {}
    for k in range(rounds + 1):
        for name, (step, state, data) in made.items():
            began = time.process_time()
            state, sums = step(state, data)
            jax.block_until_ready(state)
            if k:
                cpu[name].append(time.process_time() - began)
            else:
                loss[name] = float(sums["loss"])
            made[name][1] = state
    one = min(cpu["one device"])
    yield "| mesh | loss of the first step | CPU s a step | over one device |"
    yield "|---|---|---|---|"
    for name, seconds in cpu.items():
        best = min(seconds)
        yield f"| {name} | {loss[name]:.5f} | {best:.2f} | {best / one:.2f} |"


def report(quick: bool = False) -> Iterator[str]:
    """Yields the tables in Markdown, a line at a time."""
    setup()
    yield from schedules((4,) if quick else (8, 32))
    yield ""
    yield from meshes(1 if quick else 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of it")
    for line in report(**vars(parser.parse_args())):
        print(line, flush=True)
