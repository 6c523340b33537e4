"""Everything that needs a GPU, in one call of under ten minutes: `python -m benchmarks --gpu`.

Runs the tests marked `gpu`, writes XLA's description of the card (`--out FILE`), then
trains GPT-2's smallest shape in bf16 with `lm`, with bare JAX and with PyTorch, and
times attention. Each part has a process and a time limit of its own; one that fails
prints a line and the others go on. `--toy` runs it all at toy size, on a CPU too.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant: `name` of benchmarks/gpu_steps.py, with overrides of lm's experiment."""

    name: str
    sets: tuple[str, ...] = ()


CONTEST = {
    "bare JAX": Entry("bare"),
    "lm": Entry("lm"),
    "torch.compile, flash": Entry("torch-flash"),
    "torch.compile, cuDNN": Entry("torch-cudnn"),
    "lm, unrolled": Entry("lm", ("model.scan=false",)),
    "lm, loss chunks of 8192": Entry("lm", ("objective.chunk=8192",)),
    "lm, attention blockwise": Entry(
        "lm", ("model.attention.implementation=blockwise",)
    ),
    "lm, remat=attention": Entry("lm", ("model.remat=attention",)),
}


class PartError(RuntimeError):
    """A part failed; told in one line."""


class Runner:
    """Runs processes until a deadline."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    def output(
        self, arguments: Sequence[str], seconds: float, codes: Sequence[int] = (0,)
    ) -> str:
        """Returns the standard output of `python -m ARGUMENTS`.

        Raises PartError with the end of what it said if it fails or takes too long.
        """
        limit = min(seconds, self._end - time.perf_counter())
        if limit < 10:
            raise PartError("no time left")
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ},
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise PartError(f"took more than {limit:.0f} s") from error
        finally:
            if child.poll() is None:  # the process and those that it started
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
        if child.returncode not in codes:
            said = [line.strip() for line in f"{err}\n{out}".splitlines()]
            telling = [s for s in said if "Error" in s or any(m in s for m in MEMORY)]
            line = (telling or [s for s in said if s] or ["it said nothing"])[-1]
            raise PartError(f"code {child.returncode}: {line[:300]}")
        return out

    def step(self, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
        """Returns the JSON that `benchmarks.gpu_steps` prints last."""
        text = self.output(["benchmarks.gpu_steps", *arguments], seconds)
        return json.loads(text.strip().splitlines()[-1])


def contest(runner: Runner, batches: Sequence[int], toy: bool) -> None:
    """Prints the table: the largest batch that `lm` fits, then all at that batch."""
    from benchmarks.gpu_steps import sizes

    extra = ["--toy", "--steps=2"] if toy else []
    batch, found = batches[-1], {}
    for batch in batches:
        try:
            found["lm"] = _entry(runner, "lm", batch, extra)
            break
        except PartError as error:
            _say(f"lm at batch {batch}: {error}")
            if not any(word in str(error) for word in MEMORY):
                break
    gpt = sizes(batch, toy)
    _say(
        f"{gpt.layers} layers of {gpt.dim}, vocabulary {gpt.vocab}, T {gpt.length}, "
        f"batch {batch}, bf16\n"
    )
    columns = "tokens/s|step ms, best|median|MFU|MFU causal|peak GiB|first step s|loss"
    _say(f"| contestant | {columns.replace('|', ' | ')} |")
    _say("|---" * (len(columns.split("|")) + 1) + "|")
    failed = []
    for label in CONTEST:
        try:
            result = found.get(label) or _entry(runner, label, batch, extra)
            found[label] = result
            _say(_row(label, result, gpt))
        except PartError as error:
            failed.append(f"{label}: {error}")
    _say("")
    for line in failed:
        _say(f"- failed: {line}")
    if "lm" in found:
        for label in [name for name in found if name != "lm"]:
            ratio = found[label]["best"] / found["lm"]["best"]
            _say(f"- speed of lm ÷ {label}: {ratio:.3f}")


def _entry(runner: Runner, label: str, batch: int, extra: list[str]) -> dict[str, Any]:
    entry = CONTEST[label]
    sets = [f"--set={text}" for text in entry.sets]
    return runner.step([entry.name, f"--batch={batch}", *sets, *extra], 110)


def _row(label: str, result: dict[str, Any], gpt: Any) -> str:
    """Returns the table's row; MFU counts the same operations for every contestant."""
    from benchmarks import step
    from lm.plan import chips, flops

    model = step.experiment(gpt).model
    rate = result["tokens"] / result["best"]
    kind = result["device"]
    peak = chips.peak(kind)
    costs = [flops.train(model, gpt.length, causal=c) for c in (False, True)]
    used = [f"{rate * cost / peak:.1%}" if peak else "?" for cost in costs]
    memory = f"{result['peak'] / 2**30:.1f}" if result["peak"] else "?"
    cells = [
        f"{rate:,.0f}",
        f"{result['best'] * 1e3:.1f}",
        f"{result['median'] * 1e3:.1f}",
        *used,
        memory,
        f"{result['first']:.1f}",
        f"{result['losses'][0]:.4f} → {result['losses'][-1]:.4f}",
    ]
    return f"| {label} | {' | '.join(cells)} |"


def attention(runner: Runner, toy: bool) -> None:
    """Prints milliseconds of attention, forward and backward."""
    for case, times in runner.step(["attention", *["--toy"] * toy], 70).items():
        said = ", ".join(
            f"{how} {t} ms" if isinstance(t, float) else f"{how}: {t}"
            for how, t in times.items()
        )
        _say(f"- {case}, forward and backward: {said}")


def tests(runner: Runner) -> None:
    """Runs the tests that need a GPU, and prints which failed and how many passed.

    Raises PartError if one failed.
    """
    arguments = ["pytest", "-q", "-rf", "--tb=no", "-m", "gpu", "tests/gpu_test.py"]
    lines = runner.output(arguments, 120, codes=(0, 1)).strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    for line in failed:
        _say(f"- {line[:300]}")
    if failed:
        raise PartError(lines[-1])
    _say(lines[-1])


def card() -> str:
    """Returns name, memory and driver as nvidia-smi tells them."""
    query = "--query-gpu=name,memory.total,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks --gpu")
    parser.add_argument("--out", default="", metavar="FILE", help="for the XLA target")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--batches", default="64,32,16,8", help="sequences, falling")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    flags = parser.parse_args(arguments)
    from benchmarks.__main__ import heading

    _say(heading(["--gpu", *(arguments or [])]))
    runner = Runner(flags.minutes * 60)
    batches = [2] if flags.toy else [int(n) for n in flags.batches.split(",")]
    parts = {
        "Card": lambda: _say(card().strip()),
        "XLA target": lambda: _say(
            str(runner.step(["target", f"--out={flags.out}"], 60))
            if flags.out
            else "not asked for (--out FILE)"
        ),
        "Tests": lambda: tests(runner),
        "Attention": lambda: attention(runner, flags.toy),
        "Training step": lambda: contest(runner, batches, flags.toy),
    }
    failed = False
    for title, part in parts.items():
        _say(f"\n### {title}\n")
        try:
            part()
        except Exception as error:  # one part must not cost the others
            failed = True
            _say(
                f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
    return int(failed)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
