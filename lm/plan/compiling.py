"""What the target's own compiler says of a train step: a compilation in a process of its own.

The child has the environment that compiling for absent devices needs, and what compilers print does
not reach the user. What was found is kept under the cache directory, by all that it depends on.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from lm import config, executables, train
from lm.config import ConfigError
from lm.data import artifacts
from lm.experiment import Experiment
from lm.plan import collectives, local, report, topology
from lm.plan import target as targets
from lm.plan.target import Target
from lm.program import Program, program

CHILD = ("-m", "lm.plan.compiling")  # arguments of Python
FOLDER = "compiled"  # within the cache
WAIT = 0.5  # seconds between looks at the child
# Of lm/plan no step depends on what else is there: the model of a cost does not change it.
MINE = ("collectives", "compiling", "local", "report", "target", "topology")
FULL = "RESOURCE_EXHAUSTED"  # what compilers say of a program too large


def compiled(
    experiment: Experiment, target: Target, tell: Callable[[float], Any] | None = None
) -> report.Compiled:
    """Returns what the compiler of `target` says of the experiment's train step.

    Args:
        experiment: whose mesh the target has.
        target: that plugins can compile for.
        tell: called every half second of the compilation with the seconds so far.

    Raises:
        ConfigError: nothing here compiles for it, the mesh does not fit it, or compiling failed.
    """
    topology.check(target)
    program(experiment, target.layout(experiment.mesh))  # refuse here, not in the child
    path = _path(experiment, target)
    with contextlib.suppress(OSError, ValueError, TypeError):  # damaged: made anew
        return report.Compiled(**json.loads(path.read_text()))
    found = _child(experiment, target, tell)
    with contextlib.suppress(OSError):  # a full disk: the next plan compiles again
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(json.dumps(dataclasses.asdict(found)))
        scratch.replace(path)
    return found


def _path(experiment: Experiment, target: Target) -> pathlib.Path:
    plugins = [n.replace("_", "-") for n in topology.PLUGINS[target.chip.platform]]
    there = [n for n in plugins if any(importlib.metadata.distributions(name=n))]
    names = (p.name for p in pathlib.Path(__file__).parent.glob("*.py"))
    others = tuple(sorted(f"plan/{n}" for n in names if n[:-3] not in MINE))
    whole = (
        json.dumps(config.to_json(experiment), sort_keys=True),
        *(
            target.name,
            sys.version,
            executables.source(others),
            executables.versions(there),
        ),
        *(os.environ.get(name, "") for name in executables.OPTIONS),
    )
    key = hashlib.sha256(repr(whole).encode()).hexdigest()
    return pathlib.Path(artifacts.cache_dir()) / FOLDER / f"{key}.json"


def _child(
    experiment: Experiment, target: Target, tell: Callable[[float], Any] | None
) -> report.Compiled:
    """Compiles in a process of its own, which ends when this one does."""
    task = {"experiment": config.to_json(experiment), "target": target.name}
    environment = {**os.environ, **topology.ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(
            [sys.executable, *CHILD],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        ) as child,
    ):
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(task) + "\n")
            child.stdin.flush()  # and left open: its end is this process's
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(WAIT)
                if tell is not None:
                    tell(time.monotonic() - began)
        finally:
            child.kill()
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines()
        if child.returncode or not lines:
            said = err.read().strip().splitlines() or ["it said nothing"]
            raise ConfigError(
                f"--target={target.name}: compiling ended with {_ending(child.returncode)}: "
                f"{said[-1][:300]}; use --depth=model"
            )
        return report.Compiled(**json.loads(lines[-1]))


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def main() -> None:
    """The child: reads a task, compiles it, writes what it found."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_with_parent, daemon=True).start()
    experiment = config.from_json(Experiment, task["experiment"])
    found = here(experiment, targets.read(task["target"]))
    print(json.dumps(dataclasses.asdict(found)))


def _with_parent() -> None:
    """Ends this process with the one that asked."""
    sys.stdin.read()
    os._exit(1)


def here(experiment: Experiment, target: Target) -> report.Compiled:
    """Compiles in this process, whose environment is `topology.ENVIRONMENT`."""
    devices = topology.described(target)
    prog = program(experiment, topology.sharding.make_layout(experiment.mesh, devices))
    step: Any = train.make_train_step(prog)
    state, batch = train.abstract_state(prog), train.abstract_batch(prog)
    began = time.monotonic()
    lowered = step.lower(state, batch)
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        return refused(str(error), held((state, batch)), time.monotonic() - began)
    seconds = time.monotonic() - began
    memory = done.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    if target.chip.platform == "tpu":
        # What a TPU counts as temporary is in the chip's own small memories too.
        peak = memory.peak_memory_in_bytes
        temporaries = max(0, peak - memory.argument_size_in_bytes - output)
    return report.Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries,
        output=output,
        sent=_sent(done.as_text(), prog),
        refusal="",
    )


def held(tree: Any) -> int:
    """Returns the bytes of a device's shards."""
    return sum(local.size(x) for x in jax.tree.leaves(tree))


def refused(message: str, arguments: int, seconds: float) -> report.Compiled:
    """Returns what a compiler says that ran out of memory.

    Before it has tried all: "temporaries (49.29G) exceeds available HBM (15.75G)", and after that:
    "Used 20.54G of 15.75G hbm".
    """
    said = " ".join(message.split())
    number = r"([\d.]+)([KMGT]?)"
    early = re.search(rf"temporaries \({number}\) exceeds [\w ]*\({number}\)", said)
    late = re.search(rf"Used {number} of {number}", said)
    used, why = arguments, said[:300]
    if numbers := early or late:
        used, there = (_bytes(*numbers.group(i, i + 1)) for i in (1, 3))
        used += arguments if early else 0
        what = "state and temporaries need" if early else "the step needs"
        why = f"{what} {used / 1e9:.2f} GB, and a device has {there / 1e9:.2f} GB"
    return report.Compiled(
        seconds=seconds,
        arguments=arguments,
        temporaries=max(0, used - arguments),
        output=0,
        sent={},
        refusal=why,
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _sent(text: str, prog: Program) -> dict[str, float]:
    """Returns the bytes a device receives, by kind and mesh axes, the most first."""
    sums: dict[str, float] = {}
    for c in collectives.read(text, prog.layout.mesh):
        axes = " x ".join(a for a in prog.layout.mesh.axis_names if a in c.axes)
        # A loop whose length depends on the data: at least once.
        least = c if c.times is not None else dataclasses.replace(c, times=1)
        name = f"{c.kind} over {axes}" + ("" if c.times is not None else ", at least")
        if axes:
            sums[name] = sums.get(name, 0.0) + least.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
