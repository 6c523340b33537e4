"""How long a save stops the training loop, against a save that is waited for.

    python benchmarks/checkpoint.py [MEGABYTES]

The state is shaped as the parameters and Adam moments of a small GPT. `stall` is the time
until `Checkpoints.save` returns, `synchronous` the time until the checkpoint is
published; the least of several rounds, as the machine may be busy.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from lm import checkpoint, trees

D = 384


@dataclasses.dataclass(frozen=True)
class Result:
    megabytes: float
    stall: float  # seconds
    synchronous: float  # seconds
    restore: float  # seconds, with the check of the digests

    @property
    def ratio(self) -> float:
        return self.stall / self.synchronous


def make_state(megabytes: float) -> trees.Tree:
    layers = max(1, round(megabytes * 2**20 / (3 * 4 * 12 * D * D)))
    shapes = {
        "qkv": (layers, D, 3 * D),
        "out": (layers, D, D),
        "up": (layers, D, 4 * D),
        "down": (layers, 4 * D, D),
        "norm": (layers, D),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    moments = [jax.tree.map(lambda x: x + 1, params) for _ in range(2)]
    return jax.block_until_ready({"params": params, "moments": moments})


def measure(directory: pathlib.Path, megabytes: float = 200, rounds: int = 5) -> Result:
    """Returns the least times over `rounds`; the first save, which compiles, is left out."""
    state = make_state(megabytes)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    checkpoints = checkpoint.Checkpoints(str(directory), keep=1)
    stalls, totals, restores = [], [], []
    for step in range(rounds + 1):
        start = time.perf_counter()
        checkpoints.save(step, state, {}, {})
        stalls.append(time.perf_counter() - start)
        checkpoints.wait()
        totals.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(target)[0])
        restores.append(time.perf_counter() - start)
        state = jax.block_until_ready(
            jax.tree.map(lambda x: x * jnp.float32(1.5), state)
        )
    checkpoints.close()
    return Result(
        trees.nbytes(state) / 2**20, min(stalls[1:]), min(totals[1:]), min(restores[1:])
    )


def main() -> None:
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as directory:
        result = measure(pathlib.Path(directory), megabytes)
    print(
        f"state {result.megabytes:.0f} MiB on {jax.devices()[0].device_kind}:"
        f" stall {result.stall * 1e3:.1f} ms ÷ synchronous"
        f" {result.synchronous * 1e3:.0f} ms = {result.ratio:.3f};"
        f" restore {result.restore * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
