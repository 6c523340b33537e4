"""From the start of a process to the end of its first step: `lm.main` ÷ bare JAX.

`python -m benchmarks.startup [--rounds N]`. Each start is a fresh Python with a warm
compilation cache, `lm.main --experiment=tiny` and a script that does nothing but an
equal step by turns; every program is cached, the text is tokenized already.
Wall seconds count on an idle machine, CPU seconds on a busy one.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# The same width, depth, batch and length as `tiny`; what it prints is what LM prints.
BARE = """
import json, os, sys, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from benchmarks import bare, gpt
bare.factory(gpt.Gpt(layers=2, dim=64, heads=4, vocab=512, length=64, batch=16))()
cpu = time.process_time()
from lm import terminal  # imports no third party
wall = time.perf_counter() - terminal.process_start()
print(json.dumps({"wall": wall, "cpu": cpu}))
"""
# Runs lm.main as it is, until it would report its start.
LM = """
import json, os, runpy, sys, time
from lm import terminal
def report(self):
    cpu = time.process_time()
    wall = self._last - self._start
    phases = {f"{k} wall": v for k, v in self._phases.items()}
    print(json.dumps({"wall": wall, "cpu": cpu, **phases}), flush=True)
    os._exit(0)
terminal.Stopwatch.report = report
cache, folder = sys.argv[1:]
sys.argv = ["lm.main", "--experiment=tiny", "--workdir=" + folder, "--set",
            "train.compilation_cache=" + cache]
runpy.run_module("lm.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """The least seconds of several starts."""

    wall: float
    cpu: float
    phases: dict[str, float]  # wall, of the start whose wall is least


def start(script: str, *args: str) -> dict[str, float]:
    """Runs one process to its first step; returns what it printed.

    Raises RuntimeError with the end of its output if it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode or not done.stdout.strip():
        end = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"a process ended with code {done.returncode}: {end}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(rounds: int) -> dict[str, Start]:
    """Starts each contestant once to fill its cache, then `rounds` times by turns."""
    found: dict[str, list[dict[str, float]]] = {"bare JAX": [], "lm": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds + 1):
            work = str(pathlib.Path(folder) / f"run{i}")
            found["bare JAX"].append(start(BARE, f"{folder}/bare"))
            found["lm"].append(start(LM, f"{folder}/lm", work))
    starts = {}
    for name, all_ in found.items():
        warm = all_[1:]
        best = min(warm, key=lambda s: s["wall"])
        phases = {k[: -len(" wall")]: v for k, v in best.items() if k.endswith(" wall")}
        starts[name] = Start(best["wall"], min(s["cpu"] for s in warm), phases)
    return starts


def report(quick: bool = False, rounds: int = 5) -> str:
    """Returns a Markdown table, the ratios, and where the time of `lm` goes."""
    found = measure(1 if quick else rounds)
    bare, lm = found["bare JAX"], found["lm"]
    lines = ["| start to first step | wall s | CPU s |", "|---|---|---|"]
    for name, s in found.items():
        lines.append(f"| {name} | {s.wall:.2f} | {s.cpu:.2f} |")
    ratios = f"{lm.wall / bare.wall:.2f} (wall), {lm.cpu / bare.cpu:.2f} (CPU)"
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in lm.phases.items())
    return "\n".join([*lines, "", f"lm ÷ bare JAX: {ratios}. Wall of lm: {phases}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5)
    print(report(**vars(parser.parse_args())))
