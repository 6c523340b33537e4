"""Processes that are killed, stopped or stuck, and what the others say and do."""

import contextlib
import json
import signal
import socket
import time
from unittest import mock

import pytest
import runs

from lm import hosts, lookout, loop, main

MESH = {"mesh.data": 2, "mesh.fsdp": 2}
LONG = {
    **MESH,
    "train.steps": 100_000,
    "optim.schedule": "Constant",
    "train.heartbeat_seconds": 4,
}
FLOW = {"pipeline.microbatches": 2}
# Sums over processes add in another order than sums within one; losses in float32.
ROUNDING = 1e-5


def start(workdir, changed, processes, devices):
    """Starts processes that train together."""
    together = {
        "coordinator": f"127.0.0.1:{runs.free_port()}",
        "processes": processes,
        "cpu_devices": devices,
    }
    return [
        runs.start(*runs.arguments(workdir, changed, **together, process_id=i))
        for i in range(processes)
    ]


def finish(children, timeout=120):
    """Waits for all of them; returns their exit codes and what they printed since."""
    try:
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()  # where one did not end
            child.communicate()
    return [child.returncode for child in children], outputs


def same(mine, theirs):
    """Compares two {step: loss} where both have steps."""
    shared = mine.keys() & theirs.keys()
    assert shared
    assert {k: mine[k] for k in shared} == pytest.approx(
        {k: theirs[k] for k in shared}, rel=ROUNDING
    )
    return len(shared)


def test_a_killed_process_is_named_and_another_number_goes_on(tmp_path):
    children = start(tmp_path / "run", LONG, processes=2, devices=2)
    runs.wait_for_step(children[0], 10)
    children[1].kill()
    killed = time.monotonic()
    codes, outputs = finish(children)
    assert time.monotonic() - killed < 4 + 6
    assert codes == [hosts.LOST, -signal.SIGKILL], outputs
    line = outputs[0].splitlines()[-1]
    assert "process 0 of 2 stops: process 1 (" in line and "for 4 s" in line
    stacks = tmp_path / "run" / lookout.STACKS / "process-0.txt"
    assert str(stacks) in line
    assert "lm/main.py" in stacks.read_text()

    # One process goes on from the newest checkpoint, with the losses of a run of its own.
    saved = max(int(p.name) for p in (tmp_path / "run/checkpoints").glob("*[0-9]"))
    assert saved >= 8
    more = {**LONG, "train.steps": saved + 4}
    resumed = runs.small(tmp_path / "run", more)
    assert resumed.code == loop.DONE, resumed.err
    assert f"resuming from step {saved} of" in resumed.err
    with runs.signalled(saved + 4):
        alone = runs.small(tmp_path / "alone", LONG)
    assert alone.code == loop.PREEMPTED, alone.err
    losses = runs.losses(tmp_path / "run")
    assert same(losses, runs.losses(tmp_path / "alone")) == len(losses) == saved + 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number", "said"),
    [
        (0, signal.SIGKILL, "process 0, the coordinator, is gone"),
        (0, signal.SIGSTOP, "process 0, the coordinator, has not answered for"),
        (1, signal.SIGSTOP, "process 1 ("),
    ],
    ids=("first-killed", "first-stopped", "second-stopped"),
)
def test_a_lost_process_ends_the_others(tmp_path, who, number, said):
    children = start(tmp_path, LONG, processes=2, devices=2)
    runs.wait_for_step(children[0], 3)
    sent = time.monotonic()
    children[who].send_signal(number)
    other = children[1 - who]
    output = other.communicate(timeout=60)[0]
    passed = time.monotonic() - sent
    children[who].kill()
    children[who].communicate()
    assert other.returncode == hosts.LOST, output
    assert said in output.splitlines()[-1]
    assert passed < 4 + 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (4, 2, {"mesh.pipe": 2, "mesh.fsdp": 2, "mesh.tensor": 2, **FLOW}),
        (2, 4, {"mesh.data": 2, "mesh.seq": 2, "mesh.expert": 2, "model.ffn": "Moe"}),
    ],
    ids=("pipe-fsdp-tensor", "data-seq-expert"),
)
def test_every_axis_spans_processes(tmp_path, processes, devices, mesh):
    """And another number of them goes on from where they were."""
    changed = {**mesh, "optim.schedule": "Constant", "train.steps": 4}
    codes, outputs = finish(start(tmp_path / "many", changed, processes, devices), 400)
    assert codes == [loop.DONE] * processes, outputs
    changed["train.steps"] = 8
    codes, outputs = finish(start(tmp_path / "many", changed, devices, processes), 400)
    assert codes == [loop.DONE] * devices, outputs
    assert "resuming from step 4 of 8" in outputs[0]
    alone = {k: v for k, v in changed.items() if not k.startswith("mesh.")}
    one = runs.small(tmp_path / "one", alone)
    assert one.code == loop.DONE, one.err
    assert same(*(runs.losses(tmp_path / name) for name in ("many", "one"))) == 8


def test_no_cluster_is_told_with_what_was_looked_for():
    child = runs.start("--experiment=tiny", "--coordinator=auto", "--cpu_devices=1")
    output = child.communicate(timeout=60)[0]
    assert child.returncode == main.WRONG_USE, output
    line = output.splitlines()[-1]
    assert all(name in line for name in ("SLURM_JOB_ID", "Cloud TPU", "KUBERNETES"))


def test_a_port_in_use_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        options = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process_id=0"]
        told = runs.here("--experiment=tiny", *options)
    assert told.code == main.WRONG_USE
    assert f"cannot listen at port {port}" in told.err


class Board:
    """The part of jax's coordination service that processes talk through."""

    def __init__(self):
        self.keys = {}

    def key_value_set(self, key, value, overwrite=False):
        assert overwrite or key not in self.keys
        self.keys[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in self.keys.items() if k.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        if key in self.keys:
            return self.keys[key]
        raise RuntimeError(f"DEADLINE_EXCEEDED after {milliseconds} ms")


@contextlib.contextmanager
def three(seconds=10.0):
    """Yields process 0 of three, a clock that is set by hand, and what sets a beat."""
    board, clock = Board(), mock.Mock(return_value=100.0)
    state = mock.Mock(client=board, process_id=0, num_processes=3)

    def beat(i, number, step=5, still=0.0, resting=False):
        told = {"beat": number, "step": step, "still": still, "resting": resting}
        key = f"lm/hosts/beat/{i}"
        board.key_value_set(key, json.dumps({**told, "host": f"h{i}"}), True)

    with (
        mock.patch.object(lookout.distributed, "global_state", state),
        mock.patch.object(lookout.time, "monotonic", clock),
    ):
        yield lookout.Lookout("nowhere", seconds), clock, beat, board


def test_the_silent_ones_are_named():
    with three() as (first, clock, beat, _):
        for now in range(100, 112):
            clock.return_value = float(now)
            beat(0, now)
            beat(1, min(now, 103))
            said = first._judge()
            if now < 111:  # the third has had a while to begin, the second from 103 on
                assert not said
        assert "process 2 (never heard of) gave no sign of life for 10 s" in said
        clock.return_value = 114.0
        assert "processes 1 (h1), 2 (never heard of)" in first._judge()


def test_the_one_behind_is_named_unless_it_may_take_its_time():
    with three() as (first, _, beat, _):
        for i, step in enumerate((8, 7, 8)):
            beat(i, 1, step, still=0.0)
        assert not first._judge()
        for i, step in enumerate((8, 7, 8)):
            beat(i, 2, step, still=12.0 * (i != 1))
        assert "12 s: process 1 (h1) hangs after step 7" in first._judge()
        beat(1, 3, 7, resting=True)
        assert not first._judge()
        for i in range(3):
            beat(i, 4, 8, still=11.0)
        assert "all processes are in step 8" in first._judge()


def test_a_failure_is_passed_on_after_a_while_and_all_end_together():
    with three() as (first, clock, beat, board):
        for i in range(3):
            beat(i, 1)
        board.key_value_set("lm/hosts/end/2", "failed: no space left")
        assert not first._judge()  # the others may find it themselves
        clock.return_value += lookout._GRACE
        assert first._judge() == "process 2 failed: no space left"
        for i in range(3):
            board.key_value_set(f"lm/hosts/end/{i}", "done", True)
        assert first._judge() == "done"


def test_steps_may_take_ten_times_the_longest_so_far():
    with three() as (_, clock, _, _):
        steps = lookout._Steps(10)  # and at least twice ten seconds
        clock.return_value += 1000
        assert not steps.still()  # before the first
        for number in range(3):  # three seconds each
            steps.enter(number)
            clock.return_value += 3
        clock.return_value += 26
        assert not steps.still()
        clock.return_value += 2
        assert steps.still() == 31
        steps.rest()
        assert steps.resting and not steps.still()


def test_processes_with_other_options_are_refused():
    with three() as (first, _, _, _):
        first.agree({"train.steps": 5, "name": "tiny"})
        lookout.distributed.global_state.process_id = 1
        second = lookout.Lookout("nowhere", 10)
        second.agree({"train.steps": 5, "name": "tiny"})
        with pytest.raises(lookout.ConfigError, match=r"train.steps is 6 here, 5 in"):
            second.agree({"train.steps": 6, "name": "tiny"})
