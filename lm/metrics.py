"""The numbers of a run: gathered between log lines, written to files.

The step computes metrics on the device; the loop fetches them one step late and hands
plain numbers to the classes here. `Means` and `Throughput` gather them between two log
lines, `Writer` puts them in `metrics.jsonl`, in TensorBoard events and on the terminal.
Nothing here touches jax, so that importing it costs nothing.
"""

import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from etils import epath

FILE = "metrics.jsonl"  # in the work directory
EVENTS = "tensorboard"  # folder of the event files in the work directory
UPLOAD_SECONDS = 60.0  # a remote work directory gets its copy at most this often


def bits_per_byte(loss: float, tokens: float, text_bytes: float) -> float | None:
    """Returns the loss per UTF-8 byte of text, which no choice of tokenizer can flatter.

    `loss` is the mean cross-entropy in nats per scored token, `tokens` their number,
    `text_bytes` the UTF-8 bytes that they spell; 0 bytes, so unknown, give None.
    """
    return loss * tokens / (math.log(2) * text_bytes) if text_bytes else None


class Means:
    """Weighted means of named numbers, summed on the host in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Any], weight: float = 1.0) -> None:
        """Adds numbers that are themselves means over `weight` tokens (or examples)."""
        for name, value in values.items() if weight else ():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def take(self) -> dict[str, float]:
        """Returns the means since the last call and starts anew; empty if none came."""
        means = {name: self._sums[name] / self._weights[name] for name in self._sums}
        self._sums, self._weights = {}, {}
        return means


class Throughput:
    """Speed, from the moments at which steps' metrics arrive on the host.

    A step's metrics arrive when the step is done, so the time between two arrivals is
    the time of a step; dispatch, which returns at once, is never what is timed. The
    first arrival only starts the clock, which leaves compilation out.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None  # when the previous step's metrics arrived
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0
        self._rate: float | None = None

    def arrived(self, tokens: float) -> None:
        """Tells that the metrics of a step of `tokens` tokens are on the host now."""
        now = self._clock()
        if self._last is not None:
            self._steps += 1
            self._tokens += tokens
            self._seconds += now - self._last
        self._last = now

    def restart(self) -> None:
        """Tells that other work (an evaluation, a save, a compilation) came between.

        The next arrival starts the clock again, so that neither this work nor the step
        that ran beside it is counted.
        """
        self._last = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed since the last `take`, or before it if nothing was timed since."""
        return self._tokens / self._seconds if self._seconds > 0 else self._rate

    def take(self) -> dict[str, float | None]:
        """Returns the speed since the last call; None where no step was timed."""
        timed = self._steps and self._seconds > 0
        self._rate = self.tokens_per_second
        speed = {
            "tokens_per_second": self._tokens / self._seconds if timed else None,
            "step_seconds": self._seconds / self._steps if timed else None,
        }
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0
        return speed


@runtime_checkable
class Sink(Protocol):
    """What else takes each record: `terminal.Terminal`."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...


class Writer:
    """Appends records to `metrics.jsonl`, TensorBoard events and the terminal.

    Only the primary process writes; elsewhere every method does nothing. A record
    reaches the operating system before `write` returns, so `kill -9` loses nothing.

    An object store can't append. A work directory there (`gs://…`) is written through a
    local folder, whose files are copied whole every `UPLOAD_SECONDS`, by `flush` (call
    it with every checkpoint) and by `close`; a reader always sees a whole file.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int | None = None,
        primary: bool = True,
        terminal: Sink | None = None,
        tensorboard: bool = True,
    ) -> None:
        """Opens the files for a run that goes on from `step`, the last one it kept.

        Records after `step` are of a run that was killed and are dropped, so that the
        file stays one curve; 0 starts a new file, None keeps every record. A last line
        torn by a kill is dropped too. `dropped` says how many lines went.
        """
        self.dropped = 0
        self._primary = primary
        self._terminal = terminal
        self._events: Any = None
        if not primary:
            return
        self._workdir = epath.Path(workdir)
        self._remote = "://" in os.fspath(self._workdir)
        self._uploaded: dict[pathlib.Path, int] = {}  # size of each file when copied
        self._next_upload = time.monotonic() + UPLOAD_SECONDS
        self._folder = pathlib.Path(
            tempfile.mkdtemp(prefix="lm-metrics-") if self._remote else self._workdir
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._repair(step)
        self._file = open(self._folder / FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._purge = None if step is None else step + 1
        self._tensorboard = tensorboard

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; a number that is not finite becomes null in the file."""
        if not self._primary:
            return
        record = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        record.update({name: _plain(value) for name, value in values.items()})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            self._write_events(kind, step, record)
        if self._terminal is not None:
            self._terminal.write(kind, step, values)
        if self._remote and time.monotonic() >= self._next_upload:
            self.flush()

    def flush(self) -> None:
        """Puts everything written so far where a restarted run will find it."""
        if not self._primary:
            return
        if self._events is not None:
            self._events.flush()
        for path in self._folder.rglob("*") if self._remote else ():
            if path.is_file() and path.stat().st_size != self._uploaded.get(path):
                data = path.read_bytes()
                target = self._workdir / path.relative_to(self._folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                self._uploaded[path] = len(data)
        self._next_upload = time.monotonic() + UPLOAD_SECONDS

    def close(self) -> None:
        if not self._primary or self._file.closed:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()
        self._events = None
        self.flush()
        if self._remote:
            shutil.rmtree(self._folder)

    def _repair(self, step: int | None) -> None:
        """Drops torn lines and those after `step`, and replaces the file at once."""
        source, target = self._workdir / FILE, self._folder / FILE
        if not source.exists():
            return
        text = source.read_text()
        kept = _records(text)
        if step is not None:
            kept = [r for r in kept if 0 < step >= r["step"]]
        self.dropped = len(text.splitlines()) - len(kept)
        scratch = target.with_name(FILE + ".new")
        scratch.write_text("".join(json.dumps(r) + "\n" for r in kept))
        scratch.replace(target)

    def _write_events(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        if self._events is None:
            from tensorboardX import SummaryWriter

            # purge_step makes TensorBoard hide what the killed run wrote after it.
            self._events = SummaryWriter(
                str(self._folder / EVENTS), purge_step=self._purge, flush_secs=30
            )
        prefix = "/".join(filter(None, (kind, record.get("set", ""))))
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in ("step", "time"):
                self._events.add_scalar(f"{prefix}/{name}", value, step)


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, without lines torn by a kill."""
    return _records(epath.Path(path).read_text())


def _records(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _plain(value: Any) -> Any:
    """Returns what JSON holds: numpy and jax scalars as numbers, nan and inf as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
