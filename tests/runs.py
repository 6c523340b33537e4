"""Runs of the tiny experiment: through `lm.main`, in this process or in one of its own."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import flax
import jax
from absl import flags
from absl.testing import flagsaver
from conftest import CACHE

from lm import loop, main, metrics
from lm.stop import Stop

# Small, and with all that a resumed run could get wrong: dropout, microbatches, decay.
SMALL = {
    "data.length": 32,
    "model.dropout": 0.1,
    "optim.schedule.warmup": 2,
    "train.steps": 12,
    "train.batch_size": 8,
    "train.accumulate": 2,
    "train.log_every": 1,
    "train.compilation_cache": CACHE,
    "checkpoint.every": 4,
    "eval.sets.0.batches": 1,
    "generate.prompts": "()",
    "mesh.data": 1,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left on the terminal."""

    code: int
    out: str
    err: str


def arguments(
    workdir: Any, changed: dict[str, Any] | None = None, **options: Any
) -> list[str]:
    """Returns the command line of a small run with some fields changed."""
    sets = {**SMALL, **(changed or {})}
    options = {"experiment": "tiny", "workdir": workdir, **options}
    return [
        *(f"--{name}={value}" for name, value in options.items()),
        *(f"--set={path}={value}" for path, value in sets.items()),
    ]


def here(*words: Any) -> Result:
    """Runs `lm.main` in this process, which has eight devices already."""
    out, err = io.StringIO(), io.StringIO()
    settings = ("nnx_graph_mode", "nnx_graph_updates")
    before = {name: getattr(flax.config, name) for name in settings}
    cache = jax.config.jax_compilation_cache_dir
    try:
        with (
            flagsaver.flagsaver(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            flags.FLAGS.unparse_flags()
            rest = main._parse(["lm.main", *map(str, words)])
            main.main(rest)
            raise AssertionError("main returned")
    except SystemExit as end:
        code = end.code
    finally:
        for name, value in before.items():
            flax.config.update(name, value)
        jax.config.update("jax_compilation_cache_dir", cache)
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def small(
    workdir: Any, changed: dict[str, Any] | None = None, **options: Any
) -> Result:
    """Trains in this process, to the end or to a failure."""
    return here(*arguments(workdir, changed, **options))


@contextlib.contextmanager
def signalled(step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Raises a signal in this process when a run inside has done `step` steps."""

    class Signalled(Stop):
        def asked(self, now: int) -> bool:
            if now == step:
                signal.raise_signal(number)
            return super().asked(now)

    with mock.patch.object(loop, "Stop", Signalled):
        yield


def start(*words: Any) -> subprocess.Popen:
    """Starts `python -m lm.main`; stdout and stderr come together."""
    return subprocess.Popen(
        [sys.executable, "-m", "lm.main", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(child: subprocess.Popen, step: int) -> None:
    """Reads what a child prints up to its line of `step`."""
    seen = ""
    assert child.stdout is not None
    for line in child.stdout:
        seen += line
        if line.split()[:2] == ["step", str(step)]:
            return
    raise AssertionError(f"the run ended before step {step}:\n{seen}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def records(workdir: Any, kind: str = "train") -> list[dict[str, Any]]:
    """Returns the records of one kind."""
    found = metrics.read(pathlib.Path(workdir) / metrics.FILE)
    return [r for r in found if r["kind"] == kind]


def losses(workdir: Any) -> dict[int, float]:
    """Returns {step: loss} after checking that the file is one curve, each step once."""
    lines = (pathlib.Path(workdir) / metrics.FILE).read_text().splitlines()
    every = [json.loads(line) for line in lines]  # no line is torn
    steps = [r["step"] for r in every]
    assert steps == sorted(steps), steps
    train = [r for r in every if r["kind"] == "train"]
    assert len({r["step"] for r in train}) == len(train), steps
    return {r["step"]: r["loss"] for r in train}


def digests(workdir: Any, step: int) -> dict[str, int]:
    """Returns {path: digest} of the arrays of a checkpoint; equal digests, equal bits."""
    path = pathlib.Path(workdir) / "checkpoints" / str(step) / "run" / "arrays.json"
    return {
        name: entry["digest"] for name, entry in json.loads(path.read_text()).items()
    }
