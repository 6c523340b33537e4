"""Interleaved timing of contestants, each in its own process, one running at a time.

    python -m benchmarks.timing bare=benchmarks.bare:factory \
        eager=benchmarks.torch_gpt:eager --rounds 10

A contestant is `NAME=MODULE:FUNCTION`. FUNCTION takes nothing and returns `step()`:
it does one unit of work, waits for it, and returns a float as proof of work (a loss).
Each runs in a process of its own, so that thread pools and allocators do not disturb
each other; the parent hands out one step at a time, round by round, in an order that
reverses every round. So load on the machine and its slow drift meet all alike.

Reported: CPU seconds (user and system, of all threads) and wall seconds, minimum and
median over the rounds; ratios are speeds against the first contestant, of minimum CPU
time and as the median over the rounds of the paired CPU ratio. Wall time counts where
the machine is idle, CPU time where it is not. A thread pool that spins while it waits
pays for that in CPU time: on a busy machine set OMP_WAIT_POLICY=passive.
"""

import argparse
import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm import heap

CHILD = "import sys; from benchmarks import timing; timing.serve(sys.argv[1])"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something to time: where its `step` comes from and what its process needs."""

    factory: str  # MODULE:FUNCTION
    python: str = sys.executable
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warmup: int = 2  # steps that are not timed; the first compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What one contestant took, in seconds, a list entry a round."""

    start: float  # wall: imports, set-up, compilation and warm-up
    cpu: list[float] = dataclasses.field(default_factory=list)
    system: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)


def serve(factory: str) -> None:
    """The child: builds `step`, then runs it once for every line on standard input.

    Answers one JSON object a line on the original standard output; what the contestant
    itself prints goes to standard error.
    """
    heap.keep()  # as lm.main does; for every contestant
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, function = factory.split(":")
    step = getattr(importlib.import_module(module), function)()
    for _ in sys.stdin:
        before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        value = step()
        wall = time.perf_counter() - wall
        after = resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        cpu = after.ru_utime - before.ru_utime + system
        answers.write(json.dumps([cpu, system, wall, value]) + "\n")


class _Process:
    """A contestant's process; `step()` runs one step in it."""

    def __init__(self, name: str, contestant: Contestant):
        self.name = name
        self.child = subprocess.Popen(
            [contestant.python, "-c", CHILD, contestant.factory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(contestant.environment),
        )

    def step(self) -> tuple[float, float, float, float]:
        assert self.child.stdin and self.child.stdout
        try:
            self.child.stdin.write("step\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                f"contestant {self.name!r} ended with code {self.child.wait()}; "
                "its error is above"
            )
        return tuple(json.loads(line))

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def run(
    contestants: Mapping[str, Contestant], rounds: int = 10, seconds: float = 600.0
) -> dict[str, Timing]:
    """Times every contestant `rounds` times, or until the rounds took `seconds`.

    Raises RuntimeError if a contestant's process ends.
    """
    processes: dict[str, _Process] = {}
    timings: dict[str, Timing] = {}
    try:
        for name, contestant in contestants.items():
            started = time.perf_counter()
            processes[name] = _Process(name, contestant)
            for _ in range(contestant.warmup):
                processes[name].step()
            timings[name] = Timing(start=time.perf_counter() - started)
        began = time.perf_counter()
        for index in range(rounds):
            order = list(processes) if index % 2 == 0 else list(processes)[::-1]
            for name in order:
                cpu, system, wall, value = processes[name].step()
                timings[name].cpu.append(cpu)
                timings[name].system.append(system)
                timings[name].wall.append(wall)
                timings[name].values.append(value)
            if time.perf_counter() - began > seconds:
                break
    finally:
        for process in processes.values():
            process.close()
    return timings


def summary(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """Returns minima, medians and speeds against the first, for each contestant."""
    first = next(iter(timings.values()))
    rows = {}
    for name, t in timings.items():
        paired = [a / b for a, b in zip(first.cpu, t.cpu, strict=True)]
        rows[name] = {
            "cpu_min": min(t.cpu),
            "cpu_median": statistics.median(t.cpu),
            "system_median": statistics.median(t.system),
            "wall_min": min(t.wall),
            "wall_median": statistics.median(t.wall),
            "speed_cpu_min": min(first.cpu) / min(t.cpu),
            "speed_cpu_paired": statistics.median(paired),
            "speed_wall_min": min(first.wall) / min(t.wall),
            "start": t.start,
            "first_value": t.values[0],
            "last_value": t.values[-1],
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the summary as a Markdown table, seconds and speed ratios."""
    keys = list(next(iter(rows.values())))
    lines = ["| contestant | " + " | ".join(k.replace("_", " ") for k in keys) + " |"]
    lines.append("|---" * (len(keys) + 1) + "|")
    for name, row in rows.items():
        cells = " | ".join(f"{row[key]:.3f}" for key in keys)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `NAME=MODULE:FUNCTION ...`, runs the contest and prints the table."""
    parser = argparse.ArgumentParser(description="Interleaved timing of contestants.")
    parser.add_argument("contestants", nargs="+", metavar="NAME=MODULE:FUNCTION")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after these")
    parser.add_argument("--json", help="also write every measurement to this file")
    flags = parser.parse_args(arguments)
    named = [text.partition("=") for text in flags.contestants]
    for name, _, factory in named:
        if ":" not in factory:
            parser.error(f"{name!r}: write a contestant as NAME=MODULE:FUNCTION")
    timings = run(
        {name: Contestant(factory=factory) for name, _, factory in named},
        rounds=flags.rounds,
        seconds=flags.seconds,
    )
    print(table(summary(timings)))
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump({n: dataclasses.asdict(t) for n, t in timings.items()}, file)


if __name__ == "__main__":
    main()
