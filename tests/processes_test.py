"""Two processes under jax.distributed on this machine are one run."""

import re
import shutil
import signal

import pytest
import runs

from lm import loop

# Two devices in each of two processes, or four of this one's eight.
MESH = {"mesh.data": 2, "mesh.fsdp": 2}
LONG = {
    **MESH,
    "train.steps": 100_000,
    "optim.schedule": "Constant",
    "checkpoint.every": 0,
}
# Sums over processes add in another order than sums within one; losses in float32.
ROUNDING = 1e-5
# What JAX's Gloo prints, a piece at a time, from several threads at once: lines may be mixed.
GLOO = re.compile(
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : "
)


def start_two(workdir, changed):
    """Starts two processes that train together."""
    together = {"coordinator": f"127.0.0.1:{runs.free_port()}", "processes": 2}
    return [
        runs.start(
            *runs.arguments(workdir, changed, cpu_devices=2, **together, process_id=i)
        )
        for i in range(2)
    ]


def ends(children):
    """Waits for both; returns their exit codes and what they printed since."""
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()  # where one did not end
            child.communicate()
    return [child.returncode for child in children], outputs


def test_two_processes_train_as_one_and_stop_and_resume_together(tmp_path):
    children = start_two(tmp_path / "two", LONG)
    runs.wait_for_step(children[0], 4)
    children[1].send_signal(signal.SIGTERM)  # to one of them
    codes, outputs = ends(children)
    assert codes == [loop.PREEMPTED] * 2, outputs
    assert "saved; the same command goes on from there" in outputs[0].splitlines()[-1]
    stopped = max(runs.losses(tmp_path / "two"))
    assert runs.digests(tmp_path / "two", stopped)

    # One process with as many devices has the same losses from the start …
    first = min(stopped, 12)
    with runs.signalled(first):
        alone = runs.small(tmp_path / "one", LONG)
    assert alone.code == loop.PREEMPTED, alone.err
    mine, theirs = (runs.losses(tmp_path / name) for name in ("one", "two"))
    assert mine == pytest.approx({k: theirs[k] for k in mine}, rel=ROUNDING)

    # … and goes on from the checkpoint of two as these do.
    shutil.copytree(tmp_path / "two", tmp_path / "joined")
    more = {**LONG, "train.steps": stopped + 4}
    codes, outputs = ends(start_two(tmp_path / "two", more))
    assert codes == [loop.DONE] * 2, outputs
    assert f"resuming from step {stopped} of {stopped + 4}" in outputs[0]
    assert not GLOO.sub("", outputs[1]).split(), "only the first process speaks"
    joined = runs.small(tmp_path / "joined", more)
    assert joined.code == loop.DONE, joined.err
    mine, theirs = (runs.losses(tmp_path / name) for name in ("joined", "two"))
    assert mine == pytest.approx(theirs, rel=ROUNDING)
    assert len(mine) == stopped + 4


@pytest.mark.slow
def test_a_row_may_be_split_over_processes(tmp_path):
    """Each reads whole rows and keeps its chunks; keys and values travel between them."""
    changed = {"mesh.seq": 4, "model.attention.context": "ring", "train.steps": 4}
    codes, outputs = ends(start_two(tmp_path / "two", changed))
    assert codes == [loop.DONE] * 2, outputs
    alone = runs.small(tmp_path / "one", {"train.steps": 4})
    assert alone.code == loop.DONE, alone.err
    mine, theirs = (runs.losses(tmp_path / name) for name in ("one", "two"))
    assert mine == pytest.approx(theirs, rel=ROUNDING) and len(mine) == 4
    mine, theirs = (
        [r["loss"] for r in runs.records(tmp_path / name, "eval")]
        for name in ("one", "two")
    )
    assert mine and mine == pytest.approx(theirs, rel=ROUNDING)
