"""What a person sees of a run: numbers in words, a progress bar, the start-up times."""

import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_IMPORTED = time.perf_counter()


def human(number: float, unit: str = "") -> str:
    """Returns three digits and a suffix: 1234567 -> '1.23M', 950 -> '950', (1e9, 'B') -> '1 GB'."""
    space = " " if unit else ""
    if not math.isfinite(number):
        return f"{number}{space}{unit}"
    suffixes = iter(("", "k", "M", "G", "T", "P", "E"))
    suffix = next(suffixes)
    while abs(number) >= 999.5 and suffix != "E":
        number, suffix = number / 1000, next(suffixes)
    digits = ".3g" if abs(number) < 999.5 else ".0f"
    return f"{number:{digits}}{space}{suffix}{unit}"


def size(bytes: float) -> str:
    """Returns '950 B', '1.23 MB': decimal, as links and disks are sold."""
    return human(bytes, "B")


def duration(seconds: float) -> str:
    """Returns '45ms', '3.21s', '4m05s' or '1h02m' for a number of seconds."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g}ms"
    if seconds < 59.95:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def describe(kind: str, step: int, values: Mapping[str, Any]) -> str:
    """Returns the line that a person reads for one record."""
    form: dict[str, Callable[[Any], str]] = {
        "loss": lambda v: f"loss {v:.4f}",
        "perplexity": lambda v: f"perplexity {v:.2f}",
        "bits_per_byte": lambda v: f"{v:.3f} bits/byte",
        "macro_f1": lambda v: f"macro F1 {v:.4f}",
        "bleu": lambda v: f"BLEU {v:.2f}",
        "chrf": lambda v: f"chrF {v:.2f}",
        "rougeL": lambda v: f"ROUGE-L {v:.4f}",
        "exact_match": lambda v: f"exact {v:.4f}",
        "answer_f1": lambda v: f"answer F1 {v:.4f}",
        "grad_norm": lambda v: f"grad norm {v:.3g}",
        "learning_rate": lambda v: f"lr {v:.3g}",
        "tokens_per_second": lambda v: f"{human(v)} tok/s",
        "step_seconds": lambda v: f"{duration(v)}/step",
        "mfu": lambda v: f"{v:.1%} MFU",
        "skipped": lambda v: f"{v} skipped" if v else "",
    }
    shown = [form[k](values[k]) for k in form if values.get(k) is not None]
    name = " ".join(filter(None, (kind, str(values.get("set", "")))))
    return "  ".join([f"step {step:>6}  {name:<5}", *filter(None, shown)])


class Terminal:
    """A live progress bar on a terminal, plain lines anywhere else, both on stderr.

    stderr, because stdout belongs to what a mode was asked for (samples, scores, a
    config) and may be piped. What is printed while the bar is up appears above it.
    """

    def __init__(self, steps: int, step: int = 0, *, primary: bool = True) -> None:
        """Shows a run of `steps` steps, `step` of them done; mute unless `primary`."""
        from rich import console, progress

        self._steps = steps
        self._began: tuple[float, int] | None = None  # time and step of the first tick
        self._bar: Any = None
        self._console = console.Console(stderr=True, highlight=False, quiet=not primary)
        if not primary or not self._console.is_interactive:
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(compact=True),
        )
        self._bar = progress.Progress(
            *columns,
            console=self._console,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=600,  # seconds; a step may take longer than 30
            redirect_stdout=sys.stdout.isatty(),  # a piped stdout stays piped
        )
        self._task = self._bar.add_task("starting", total=steps, numbers="")
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def tick(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """Moves the bar to `step`."""
        self._began = self._began or (time.perf_counter(), step)
        if self._bar is not None:
            speed = f" {human(tokens_per_second)} tok/s" if tokens_per_second else ""
            numbers = f"loss {loss:.3f}{speed}"
            self._bar.update(self._task, completed=step, numbers=numbers)

    def status(self, text: str) -> None:
        """Says beside the bar what is being done: 'compiling', 'training', …"""
        if self._bar is not None:
            self._bar.update(self._task, description=text, refresh=True)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Prints a record, unless the bar shows it already."""
        if kind == "startup" or (kind == "train" and self._bar is not None):
            return
        running = kind == "train" and self._began and step < self._steps
        eta = f"  ETA {self._eta(step)}" if running else ""
        self.print(describe(kind, step, values) + eta)

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        since, first = self._began or (0.0, step)
        done, seconds = step - first, time.perf_counter() - since
        return duration(seconds / done * (self._steps - step)) if done > 0 else "?"


class Stopwatch:
    """Times the phases of start-up one after another, from the start of the process."""

    def __init__(self, start: float | None = None) -> None:
        """`start`, a `time.perf_counter` value, replaces the start of the process."""
        self._start = self._last = process_start() if start is None else start
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Gives the time since the last mark to `phase`: 'imports', 'first step', …"""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def report(self) -> dict[str, float]:
        """Returns {'imports_seconds': …, 'total_seconds': …} for a `startup` line."""
        phases = {**self._phases, "total": self._last - self._start}
        return {
            f"{k.replace(' ', '_')}_seconds": round(s, 4) for k, s in phases.items()
        }

    def line(self) -> str:
        """Returns 'started in 7.91s: imports 2.1s, devices 80ms, …'."""
        parts = ", ".join(f"{name} {duration(s)}" for name, s in self._phases.items())
        return f"started in {duration(self._last - self._start)}: {parts}"


def process_start() -> float:
    """Returns when this process began, on the clock of `time.perf_counter`.

    Linux tells (proc(5), field 22 of stat, to 10 ms); elsewhere the import of this
    module stands for it.
    """
    try:
        stat = pathlib.Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return _IMPORTED
    start = time.perf_counter() - age
    return start if age >= 0 and start <= _IMPORTED else _IMPORTED
