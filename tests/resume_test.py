"""A run that was stopped or killed goes on as if nothing had happened, on any mesh."""

import pathlib
import random
import shutil
import signal
import time

import pytest
import runs

from lm import loop

STEPS = runs.SMALL["train.steps"]
# The same run on other devices adds in another order; losses near 5 in float32.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work directory of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = runs.small(workdir)
    assert result.code == loop.DONE, result.err
    return workdir


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The work directory of a run that was interrupted after step 6, saved at 4 and 6."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    with runs.signalled(6):
        result = runs.small(workdir)
    assert result.code == loop.PREEMPTED == 75, result.err
    lines = result.err.splitlines()
    assert lines[-1] == (
        "stopped by SIGTERM at step 6, saved; the same command goes on from there"
    )
    return workdir


@pytest.fixture
def copied(half, tmp_path):
    """A copy of the interrupted run."""
    return pathlib.Path(shutil.copytree(half, tmp_path / "run"))


def same_run(workdir, whole):
    """Are parameters, optimizer and everything logged the same, bit for bit?"""
    assert runs.digests(workdir, STEPS) == runs.digests(whole, STEPS)
    assert runs.losses(workdir) == runs.losses(whole)
    for kind in ("train", "eval"):
        mine, theirs = runs.records(workdir, kind), runs.records(whole, kind)
        names = ("step", "loss", "tokens", "bits_per_byte", "learning_rate")
        assert [[r.get(n) for n in names] for r in mine] == [
            [r.get(n) for n in names] for r in theirs
        ]


def test_stopped_by_sigterm_and_resumed_is_uninterrupted(copied, whole):
    result = runs.small(copied)
    assert result.code == loop.DONE, result.err
    assert "resuming from step 6 of 12" in result.err.splitlines()
    assert "changed" not in result.err
    same_run(copied, whole)
    again = runs.small(copied)
    assert again.code == loop.DONE
    assert (
        again.err.splitlines()[-1] == f"nothing to do: {copied} is at step 12 already"
    )
    same_run(copied, whole)


def test_stopped_by_sigint_again_and_again_is_uninterrupted(tmp_path, whole):
    for step in (1, 4, 11):  # the first, one that was due to be saved, the last but one
        with runs.signalled(step, signal.SIGINT):
            result = runs.small(tmp_path)
        assert result.code == loop.PREEMPTED, result.err
        assert f"stopped by SIGINT at step {step}, saved" in result.err
    assert runs.small(tmp_path).code == loop.DONE
    same_run(tmp_path, whole)


def test_killed_at_random_moments_is_uninterrupted(tmp_path, whole):
    rng = random.Random(0)
    words = runs.arguments(tmp_path, {"checkpoint.every": 1}, cpu_devices=8)
    for step in (1, 5, 8):  # a save is under way all the time
        child = runs.start(*words)
        runs.wait_for_step(child, step)
        time.sleep(rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
    result = runs.small(tmp_path, {"checkpoint.every": 1})
    assert result.code == loop.DONE, result.err
    assert "resuming from step" in result.err
    same_run(tmp_path, whole)


def test_a_signal_to_a_process_makes_it_save_and_exit_with_75(tmp_path):
    changed = {"train.steps": 100_000, "checkpoint.every": 0}
    child = runs.start(*runs.arguments(tmp_path, changed))
    runs.wait_for_step(child, 3)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == loop.PREEMPTED, output
    last = output.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM at step "), output
    step = int(last.split()[5].rstrip(","))
    assert step >= 3
    assert runs.digests(tmp_path, step)
    assert max(runs.losses(tmp_path)) == step


def test_resumed_on_another_mesh_and_back_the_losses_agree(copied, whole):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    with runs.signalled(9):
        there = runs.small(copied, mesh)
    assert there.code == loop.PREEMPTED, there.err
    assert "  changed: mesh.tensor: 1 → 2" in there.err.splitlines()
    back = runs.small(copied)
    assert back.code == loop.DONE, back.err
    assert "  changed: mesh.tensor: 2 → 1" in back.err.splitlines()
    assert runs.losses(copied) == pytest.approx(runs.losses(whole), rel=ROUNDING)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(
            {"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.zero1": "true"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "mesh.pipe": 2,
                "mesh.fsdp": 2,
                "mesh.tensor": 2,
                "pipeline.microbatches": 2,
            },
            marks=pytest.mark.slow,
        ),
        {"mesh.seq": 4, "mesh.fsdp": 2, "model.attention.context": "ring"},
    ],
    ids=["fsdp", "pipe", "seq"],
)
def test_the_next_ten_losses_on_a_mesh_agree(mesh, tmp_path):
    long = {"train.steps": 16, "checkpoint.every": 0}
    with runs.signalled(6):
        assert runs.small(tmp_path / "a", long).code == loop.PREEMPTED
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert runs.small(tmp_path / "a", long).code == loop.DONE
    assert runs.small(tmp_path / "b", {**long, **mesh}).code == loop.DONE
    assert runs.losses(tmp_path / "b") == pytest.approx(
        runs.losses(tmp_path / "a"), rel=ROUNDING
    )


def test_every_mesh_saves_the_same_digests_and_examples(tmp_path):
    """Initialisation and its checkpoint know no mesh: a step of rate 0 shows them."""
    found = []
    for k, mesh in enumerate(
        (
            {},
            {"mesh.data": 4, "mesh.tensor": 2},
            {"mesh.pipe": 2, "mesh.fsdp": 2, "pipeline.microbatches": 2},
            {"mesh.seq": 4},
        )
    ):
        changed = {**mesh, "train.steps": 1, "optim.learning_rate": 0.0}
        changed["model.layers"] = 3  # which two stages do not divide
        changed |= {"model.dropout": 0.0, "train.accumulate": 1}  # less to compile
        changed |= {"optim.weight_decay": 0.0, "optim.schedule.warmup": 0}
        assert runs.small(tmp_path / str(k), changed).code == loop.DONE
        every = runs.digests(tmp_path / str(k), 1)
        found.append({p: d for p, d in every.items() if p.startswith("params/")})
    assert found[0]
    assert all(one == found[0] for one in found)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(copied, whole):
    big = max(
        (copied / "checkpoints" / "6" / "arrays").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    data = bytearray(big.read_bytes())
    data[len(data) // 2] ^= 1
    big.write_bytes(data)
    result = runs.small(copied)
    assert result.code == loop.DONE, result.err
    lines = result.err.splitlines()
    assert any("checkpoints/6 is damaged: " in line for line in lines)
    assert any(line.startswith("using checkpoint 4 instead of 6") for line in lines)
    assert "resuming from step 4 of 12" in lines
    same_run(copied, whole)


def test_a_warm_start_takes_the_weights_and_nothing_else(half, tmp_path):
    changed = {"train.init_from": half, "optim.learning_rate": 0.0}
    changed |= {"optim.weight_decay": 0.0, "train.steps": 3}
    result = runs.small(tmp_path, changed)
    assert result.code == loop.DONE, result.err
    assert f"starting from the weights of {half}, step 6" in result.err.splitlines()
    mine, theirs = runs.digests(tmp_path, 3), runs.digests(half, 6)
    params = [p for p in theirs if p.startswith("params/")]
    assert [mine[p] for p in params] == [theirs[p] for p in params]
    assert mine["step"] != theirs["step"]
    assert min(runs.losses(tmp_path)) == 1


def test_what_may_change_is_changed_and_reported(copied):
    changed = {"optim.learning_rate": 0.001, "train.steps": 14, "train.batch_size": 16}
    result = runs.small(copied, {**changed, "train.accumulate": 4})
    assert result.code == loop.DONE, result.err
    reported = [line for line in result.err.splitlines() if "changed: " in line]
    assert reported == [
        "  changed: optim.learning_rate: 0.003 → 0.001",
        "  changed: train.steps: 12 → 14",
        "  changed: train.batch_size: 8 → 16",
        "  changed: train.accumulate: 2 → 4",
    ]
    records = runs.records(copied)
    assert [r["step"] for r in records] == list(range(1, 15))
    assert records[6]["tokens"] - records[5]["tokens"] == 16 * 32


@pytest.mark.slow
def test_a_growing_batch_is_resumed_in_the_middle(tmp_path):
    changed = {"train.batch_ramp": "((3,2),(7,4))"}
    assert runs.small(tmp_path / "a", changed).code == loop.DONE
    with runs.signalled(5):
        assert runs.small(tmp_path / "b", changed).code == loop.PREEMPTED
    assert runs.small(tmp_path / "b", changed).code == loop.DONE
    same_run(tmp_path / "b", tmp_path / "a")
    tokens = [r["tokens"] for r in runs.records(tmp_path / "a")]
    assert tokens[:8] == [32 * n for n in (2, 4, 6, 10, 14, 18, 22, 30)]
