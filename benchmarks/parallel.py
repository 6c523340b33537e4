"""Pipelines and meshes on emulated devices: bubble, memory, compile time, and step time.

`python -m benchmarks.parallel [--quick]`. The schedules' tables against theory, the temporary
memory and the compile time of their programs (no cache), and the CPU time of a step on eight
emulated devices over that of one device with the same batch: no claim of scaling, for all of them
are the same cores. Bytes between devices: docs/parallelism.md, "What is sent".
"""

import argparse
import time
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


def step(*sets: str) -> tuple[Any, Any, Any, float, Any]:
    """Returns the program, its compiled step, its first state, seconds to compile, and a batch."""
    from lm import config, sharding, train
    from lm import experiment as experiments
    from lm.data import loader

    chosen = config.override(experiments.load("tiny"), [*BASE, *sets])
    sizes = chosen.mesh.sizes()
    count = int(np.prod([n for n in sizes.values() if n > 0]))
    layout = sharding.make_layout(chosen.mesh, jax.devices()[:count])
    prog = train.program(chosen, layout)
    state = train.make_init(prog)(jax.random.key(0))
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
    batch = loader.to_devices(host, prog.batch_sharding())
    lowered = train.make_train_step(prog).lower(state, batch)
    began = time.process_time()
    compiled = lowered.compile()
    return prog, compiled, state, time.process_time() - began, batch


def schedules(microbatches: tuple[int, ...]) -> list[str]:
    """Returns the table of schedules: theory and table, memory, and time to compile."""
    from lm import gradients

    lines = [
        "| schedule, P=4 | M | ticks | bubble | theory | inputs kept | temporaries, MB "
        "| compile, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sets in SCHEDULES.items():
        for M in microbatches:
            rows = [f"train.batch_size={2 * M}", f"eval.batch_size={2 * M}"]
            mesh = ["mesh.pipe=4", "mesh.data=1", f"pipeline.microbatches={M}"]
            prog, compiled, _, seconds, _ = step(*sets, *mesh, *rows)
            table = gradients.table(prog)
            v = table.rounds
            theory = 3 / (v * M + 3)
            memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
            lines.append(
                f"| {name} | {M} | {len(table.forward)} | {table.bubble:.4f} | {theory:.4f} | "
                f"{table.slots} | {memory:.1f} | {seconds:.1f} |"
            )
    return lines


def meshes(rounds: int) -> list[str]:
    """Returns the table of steps on eight emulated devices over one, interleaved."""
    made = {name: list(step(*sets)) for name, sets in MESHES.items()}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    loss: dict[str, float] = {}
    for k in range(rounds + 1):
        for name, (_, compiled, state, _, batch) in made.items():
            began = time.process_time()
            state, sums = compiled(state, batch)
            jax.block_until_ready(state)
            if k:
                cpu[name].append(time.process_time() - began)
            else:
                loss[name] = float(sums["loss"])
            made[name][2] = state
    one = min(cpu["one device"])
    lines = [
        "| mesh | loss of the first step | CPU s a step | over one device |",
        "|---|---|---|---|",
    ]
    for name, seconds in cpu.items():
        best = min(seconds)
        lines.append(f"| {name} | {loss[name]:.5f} | {best:.2f} | {best / one:.2f} |")
    return lines


def report(quick: bool = False) -> str:
    """Returns the tables in Markdown."""
    setup()
    counts = (4,) if quick else (8, 32)
    lines = schedules(counts)
    return "\n".join([*lines, "", *meshes(1 if quick else 5)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of it")
    print(report(**vars(parser.parse_args())))
