"""From the start of a process to the end of its first step: `lm.main` ÷ bare JAX.

`python -m benchmarks.startup [--rounds N]`. Each start is a fresh Python with a warm
compilation cache, `lm.main --experiment=tiny` and a script that does nothing but an
equal step by turns; every program is cached, the text is tokenized already. Once with
the sizes of `tiny`, where imports are most of it, and once with those of the contest.
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

from benchmarks import gpt as small

# What it prints is what LM prints.
BARE = """
import json, os, sys, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from benchmarks import bare, gpt
bare.factory(gpt.Gpt(**json.loads(sys.argv[2])))()
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
cache, folder, *sets = sys.argv[1:]
sets = [f"--set={s}" for s in ["train.compilation_cache=" + cache, *sets]]
sys.argv = ["lm.main", "--experiment=tiny", "--workdir=" + folder, *sets]
runpy.run_module("lm.main", run_name="__main__", alter_sys=True)
"""


TINY = small.Gpt(layers=2, dim=64, heads=4, vocab=512, length=64, batch=16)


@dataclasses.dataclass(frozen=True)
class Start:
    """The least seconds of several starts."""

    wall: float
    cpu: float
    phases: dict[str, float]  # wall, of the start whose wall is least


def overrides(gpt: small.Gpt) -> list[str]:
    """Returns what makes the model of `tiny` the contest's, in size and kind."""
    return [
        *(f"model.{name}={getattr(gpt, name)}" for name in ("layers", "dim", "heads")),
        *(f"model.kv_heads={gpt.heads}", f"model.vocab_multiple={gpt.vocab}"),
        *("model.norm=LayerNorm", "model.norm.bias=false", "model.scan=false"),
        *("model.positions=Learned", f"model.positions.length={gpt.length}"),
        *("model.ffn.activation=gelu", f"data.length={gpt.length}"),
        f"train.batch_size={gpt.batch}",
    ]


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


def measure(gpt: small.Gpt, rounds: int) -> dict[str, Start]:
    """Starts each contestant once to fill its cache, then `rounds` times by turns."""
    found: dict[str, list[dict[str, float]]] = {"bare JAX": [], "lm": []}
    sizes = json.dumps(dataclasses.asdict(gpt))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds + 1):
            work = str(pathlib.Path(folder) / f"run{i}")
            found["bare JAX"].append(start(BARE, f"{folder}/bare", sizes))
            found["lm"].append(start(LM, f"{folder}/lm", work, *overrides(gpt)))
    starts = {}
    for name, all_ in found.items():
        warm = all_[1:]
        best = min(warm, key=lambda s: s["wall"])
        phases = {k[: -len(" wall")]: v for k, v in best.items() if k.endswith(" wall")}
        starts[name] = Start(best["wall"], min(s["cpu"] for s in warm), phases)
    return starts


def report(quick: bool = False, rounds: int = 5) -> str:
    """Returns a Markdown table, the ratios, and where the time of `lm` goes."""
    lines = [
        "| start to first step | wall s | CPU s | lm ÷ bare JAX: wall | CPU |",
        "|---|---|---|---|---|",
    ]
    for name, gpt in {
        "tiny": TINY,
        **({} if quick else {"small GPT": small.Gpt()}),
    }.items():
        found = measure(gpt, 1 if quick else rounds)
        bare, lm = found["bare JAX"], found["lm"]
        lines.append(f"| {name}, bare JAX | {bare.wall:.2f} | {bare.cpu:.2f} | | |")
        ratios = f"{lm.wall / bare.wall:.2f} | {lm.cpu / bare.cpu:.2f}"
        phases = ", ".join(f"{name} {s:.2f}" for name, s in lm.phases.items())
        lines.append(
            f"| {name}, lm ({phases}) | {lm.wall:.2f} | {lm.cpu:.2f} | {ratios} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5)
    print(report(**vars(parser.parse_args())))
