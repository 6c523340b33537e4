"""Metrics: one clean curve whatever is killed, and speeds that time work, not dispatch."""

import io
import json
import math
import pathlib
import random
import re
import subprocess
import sys
import time
import types

import fsspec
import numpy as np
import pytest
import toy
from etils import epath
from fsspec.implementations import memory
from tensorboardX.proto import event_pb2

from lm import log, metrics, plot, terminal


def _steps(path: pathlib.Path) -> list[int]:
    return [record["step"] for record in metrics.read(path / metrics.FILE)]


def _train(folder: pathlib.Path, first: int, last: int, **kwargs: bool) -> None:
    with metrics.Writer(folder, step=first, tensorboard=False, **kwargs) as writer:
        for step in range(first + 1, last + 1):
            writer.write("train", step, {"loss": 1 / step})


def test_a_killed_and_restarted_run_leaves_one_curve(tmp_path: pathlib.Path) -> None:
    _train(tmp_path, 0, 9)
    _train(tmp_path, 6, 12)  # the newest checkpoint of the first run was at 6
    assert _steps(tmp_path) == list(range(1, 13))
    with metrics.Writer(tmp_path, step=8) as writer:
        assert writer.dropped == 4
    _train(tmp_path, 0, 2)  # no checkpoint was left: the run starts from scratch
    assert _steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", random.Random(0).sample(range(1, 60), 8))
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: pathlib.Path, cut: int) -> None:
    _train(tmp_path, 0, 3)
    file = tmp_path / metrics.FILE
    whole = file.read_bytes()
    file.write_bytes(
        whole + b'{"step": 4, "kind": "train", "loss": 0.25, "tokens": 123}'[:cut]
    )
    with metrics.Writer(tmp_path, tensorboard=False) as writer:
        assert writer.dropped == 1
        writer.write("train", 4, {"loss": 0.25})
    lines = file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert file.read_bytes().startswith(whole)


def test_a_record_is_on_disk_when_write_returns(tmp_path: pathlib.Path) -> None:
    script = (
        "import os, signal, sys; from lm import metrics\n"
        "w = metrics.Writer(sys.argv[1], step=0, tensorboard=False)\n"
        "for s in range(1, 6): w.write('train', s, {'loss': 2.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -9
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]


def test_records_are_strict_json_of_plain_numbers(tmp_path: pathlib.Path) -> None:
    values = {
        "loss": np.float32(0.1),
        "bad": math.nan,
        "worse": np.inf,
        "n": np.int32(3),
    }
    with metrics.Writer(tmp_path, step=0) as writer:
        writer.write("eval", 7, {"set": "valid", **values})
    record = json.loads(
        (tmp_path / metrics.FILE).read_text(), parse_constant=pytest.fail
    )
    assert record.pop("time") == pytest.approx(time.time(), abs=60)
    assert record == {
        "step": 7,
        "kind": "eval",
        "set": "valid",
        "loss": float(np.float32(0.1)),
        "bad": None,
        "worse": None,
        "n": 3,
    }


def test_other_processes_write_nothing(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture
) -> None:
    _train(tmp_path / "run", 0, 3, primary=False)
    assert not (tmp_path / "run").exists()
    mute = terminal.Terminal(10, primary=False)
    mute.tick(1, 2.0, None)
    mute.print("hello")
    mute.close()
    assert capfd.readouterr() == ("", "")


def _events(folder: pathlib.Path) -> list[event_pb2.Event]:
    """Reads event files: length, its checksum, an Event, its checksum, and again."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path: pathlib.Path) -> None:
    with metrics.Writer(tmp_path, step=4) as writer:
        writer.write("train", 5, {"loss": 1.5, "mfu": None})
        writer.write("eval", 5, {"set": "valid", "loss": 2.5})
    events = _events(tmp_path / metrics.EVENTS)
    seen = {(v.tag, e.step, v.simple_value) for e in events for v in e.summary.value}
    assert seen == {("train/loss", 5, 1.5), ("eval/valid/loss", 5, 2.5)}
    # What a killed run wrote after step 4 is hidden from here on.
    assert any(e.session_log.status == 1 and e.step == 5 for e in events)


class Bucket(memory.MemoryFileSystem):
    """An object store: files appear whole, and can't be appended to."""

    store: dict = {}  # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        assert "a" not in mode and "+" not in mode
        return super()._open(path, mode, **kwargs)


def test_an_object_store_gets_whole_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: Bucket())
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    folder = epath.Path("gs://bucket/run")
    try:
        with metrics.Writer(folder, step=0) as writer:
            writer.write("train", 1, {"loss": 2.0})
            writer.flush()
            assert [r["step"] for r in metrics.read(folder / metrics.FILE)] == [1]
            writer.write("train", 2, {"loss": 1.0})
            local = writer._folder
        with metrics.Writer(folder, step=1) as writer:
            assert writer.dropped == 1
            writer.write("train", 2, {"loss": 0.5})
        assert [r["loss"] for r in metrics.read(folder / metrics.FILE)] == [2.0, 0.5]
        assert len(list((folder / metrics.EVENTS).iterdir())) >= 1
        assert not local.exists()
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()


def test_means_are_weighted_by_tokens() -> None:
    means = metrics.Means()
    means.add({"loss": 1.0}, weight=3)
    means.add({"loss": 5.0, "aux": 2.0}, weight=1)
    means.add({"loss": math.nan}, weight=0)
    assert means.take() == {"loss": 2.0, "aux": 2.0}
    assert means.take() == {}


def test_means_lose_nothing_in_single_precision() -> None:
    means = metrics.Means()
    values = np.random.default_rng(0).normal(3, 1, 10_000).astype(np.float32)
    for value in values:
        means.add({"loss": value})
    assert means.take()["loss"] == pytest.approx(math.fsum(values) / 10_000, rel=1e-13)


def test_speed_leaves_out_compilation_and_evaluation() -> None:
    now = [0.0]
    speed = metrics.Throughput(clock=lambda: now[0])

    def arrive(after: float) -> None:
        now[0] += after
        speed.arrived(100)

    arrive(60.0)  # a minute of compilation
    assert speed.take() == {"tokens_per_second": None, "step_seconds": None}
    arrive(2.0)
    arrive(2.0)
    assert speed.take() == {"tokens_per_second": 50.0, "step_seconds": 2.0}
    arrive(2.0)
    now[0] += 30.0  # an evaluation, while one more step ends on the device
    speed.restart()
    arrive(0.0)
    arrive(2.0)
    assert speed.take() == {"tokens_per_second": 50.0, "step_seconds": 2.0}
    assert speed.tokens_per_second == 50.0  # of the last window, for the bar


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    # Uniform over 256 bytes is 8 bits; so are tokens of two bytes, uniform over 65,536.
    assert metrics.bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert metrics.bits_per_byte(math.log(65536), 500, 1000) == pytest.approx(8)
    assert metrics.bits_per_byte(1.0, 10, 0) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (0.5, "0.5"), (950, "950"), (999.7, "1k"), (12_345, "12.3k")),
        *((1_234_567, "1.23M"), (-2e9, "-2G"), (4e15, "4P"), (math.inf, "inf")),
    ],
)
def test_numbers_read_well(number: float, text: str) -> None:
    assert terminal.human(number) == text


def test_sizes_have_a_unit() -> None:
    sizes = [terminal.size(n) for n in (950, 999.7, 84_929_347_584, 4e21)]
    assert sizes == ["950 B", "1 kB", "84.9 GB", "4000 EB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.045, "45ms"), (3.21, "3.21s"), (59.99, "1m00s"), (245, "4m05s")),
        *((3599.7, "1h00m"), (3725, "1h02m"), (math.nan, "?")),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


def _show(monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns what a short run shows on stderr."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    shown = terminal.Terminal(200, 100)
    shown.status("training")
    for step in (101, 102):
        shown.tick(step, 2.5, 12_345.0)
        values = {"loss": 2.5, "tokens_per_second": 12_345.0, "mfu": None, "skipped": 0}
        shown.write("train", step, values)
    shown.write("eval", 102, {"set": "valid", "loss": math.nan, "bits_per_byte": 2.125})
    shown.print("[bold] :smile: saved")
    shown.close()
    return screen.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, fourth = _show(monkeypatch).splitlines()
    assert first == "step    101  train  loss 2.5000  12.3k tok/s  ETA ?"
    assert re.fullmatch(r"step    102  train  .*tok/s  ETA [\d.]+\w+", second)
    assert third == "step    102  eval valid  loss nan  2.125 bits/byte"
    assert fourth == "[bold] :smile: saved"


def test_a_terminal_gets_a_bar_with_lines_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    raw = _show(monkeypatch)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", raw)
    assert re.search(r"training ━+.* 102/200 loss 2.500 12.3k tok/s ETA", text)
    assert "eval valid  loss nan" in text
    assert "train  loss" not in text  # the bar shows it already
    assert "\x1b[?25h" in raw  # the cursor is back


def test_start_up_times_add_up_to_the_age_of_the_process() -> None:
    script = (
        "import time; began = time.perf_counter(); time.sleep(0.2)\n"
        "from lm import terminal; watch = terminal.Stopwatch()\n"
        "watch.mark('imports'); time.sleep(0.1); watch.mark('first step')\n"
        "import json; print(json.dumps({'age': time.perf_counter() - began,"
        " **watch.report()})); print(watch.line())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    numbers, line = done.stdout.splitlines()
    times = json.loads(numbers)
    total = times["imports_seconds"] + times["first_step_seconds"]
    assert times["total_seconds"] == pytest.approx(total, abs=1e-3)
    # 10 ms is the resolution of the kernel's clock; the interpreter's start comes on top.
    assert times["total_seconds"] >= times["age"] - 0.02
    assert times["first_step_seconds"] >= 0.1
    assert re.fullmatch(r"started in \S+: imports \S+, first step \S+", line)


def test_a_run_becomes_a_picture(tmp_path: pathlib.Path) -> None:
    records = [
        {"step": step, "kind": "train", "loss": 9 / step, "tokens": 64 * step}
        | {"tokens_per_second": None if step == 1 else 1000.0}
        for step in range(1, 200)
    ]
    records.append({"step": 199, "kind": "eval", "set": "valid", "loss": 3.0})
    records.append({"step": 150, "kind": "train", "loss": None})  # was not finite
    assert plot.draw(records, tmp_path / "run.png", "tiny")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert plot.draw(records[:1], tmp_path / "short.png")
    assert not plot.draw([], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


class Told(terminal.Terminal):
    """Remembers the steps that it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def tick(self, step: int, loss: float, rate: float | None) -> None:
        self.steps.append(step)


@pytest.mark.parametrize("runs_on", [False, True])
def test_a_step_that_returns_when_it_is_done_is_told_at_once(
    runs_on: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that runs on after it returned the metrics are fetched a step later."""
    values = {"jax_cpu_enable_async_dispatch": runs_on}
    config = types.SimpleNamespace(values=values)
    monkeypatch.setattr(
        log, "jax", types.SimpleNamespace(config=config, device_get=dict)
    )
    prog, shown = toy.program("train.log_every=10"), Told()
    names = ("loss", "grad_norm", "tokens", "nll", "bytes", "consecutive")
    with metrics.Writer(tmp_path, tensorboard=False) as writer:
        taken = log.Log(prog, writer, shown, 0)
        for step in (1, 2):
            taken.add(step, dict.fromkeys(names, 0.0))
            assert shown.steps == [*range(1, step + 1 - runs_on)]
