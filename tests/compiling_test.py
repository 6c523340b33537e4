"""A target's compiler is asked once, in a process of its own, and what goes wrong is one line."""

import concurrent.futures
import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import pytest
import toy

from lm import config
from lm.experiment import load
from lm.plan import chips, compiling, memory, report, target, topology
from lm.program import program

FOUND = report.Compiled(
    seconds=1.0,
    arguments=10,
    temporaries=5,
    output=1,
    sent={"all-reduce over data": 3.0},
    refusal="",
)
EIGHT = ["mesh.data=8", "train.batch_size=16"]


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Puts a script in the place of the child; returns how often it was asked."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setattr(topology, "check", lambda wanted: None)

    def instead(script):
        count = tmp_path / "asked"
        ask = f"open({str(count)!r}, 'a').write('x'); task = input(); {script}"
        monkeypatch.setattr(compiling, "CHILD", ("-c", ask))
        return lambda: len(count.read_text()) if count.exists() else 0

    return instead


def test_what_was_found_is_kept_until_something_changes(child):
    answer = json.dumps(dataclasses.asdict(FOUND))
    asked = child(f"import sys; print('chatter', file=sys.stderr); print({answer!r})")
    chosen, h100 = toy.experiment(*EIGHT), target.read("h100:8")
    told = []
    assert compiling.compiled(chosen, h100, told.append) == FOUND
    assert told and told[0] > 0
    assert compiling.compiled(chosen, h100) == FOUND
    assert asked() == 1
    other = config.override(chosen, ["optim.learning_rate=0.5"])
    compiling.compiled(other, h100)
    compiling.compiled(chosen, target.read("v5e:2x4"))
    assert asked() == 3


def test_two_at_once_both_end_right(child, tmp_path):
    """Two that race for one find, and one beside them: each is asked and answered for itself."""
    answers = {"h100:8": FOUND, "v5e:2x4": dataclasses.replace(FOUND, arguments=20)}
    known = {n: json.dumps(dataclasses.asdict(f)) for n, f in answers.items()}
    began = tmp_path / "began"
    asked = child(
        "import json, os, time; t = json.loads(task)['target']; "
        f"open({str(began)!r}, 'a').write('x')\n"
        "end = time.monotonic() + 30\n"
        f"while os.path.getsize({str(began)!r}) < 3:\n"
        "    time.sleep(0.01); assert time.monotonic() < end, 'alone'\n"
        f"print({known!r}[t])"
    )
    names = ("h100:8", "h100:8", "v5e:2x4")
    chosen = toy.experiment(*EIGHT)
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = pool.map(lambda n: compiling.compiled(chosen, target.read(n)), names)
        assert [*found] == [answers[n] for n in names]
    assert asked() == 3
    assert len([*tmp_path.glob("compiled/*")]) == 2  # whole, and nothing beside them
    assert compiling.compiled(chosen, target.read("h100:8")) == FOUND
    assert asked() == 3


def test_the_child_is_told_what_is_here_by_name(child, monkeypatch):
    """Where it runs there are other devices."""
    gpu = types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        memory_stats=lambda: {"bytes_limit": 60 * 10**9},
    )
    answer = json.dumps(dataclasses.asdict(FOUND))
    child(f"print({answer!r}) if 'h100:1x8' in task else exit(task)")
    with monkeypatch.context() as here:
        here.setattr(jax, "devices", lambda: [gpu] * 8)
        here.setattr(jax, "local_devices", lambda: [gpu] * 8)
        here.setattr(chips, "product_rate", lambda *given: 6e14)
        here.setattr(chips, "copy_rate", lambda *given: 3e12)
        wanted = target.read("here")
    assert compiling.compiled(toy.experiment(*EIGHT), wanted) == FOUND


def test_a_chip_of_two_devices_is_refused():
    with toy.refused("--target=7x:2x2x1", "a chip is two devices", "--depth=model"):
        topology.devices("7x:2x2x1")


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v6e:4x4", "2*v5e:16x16"]
)
def test_a_compiler_counts_the_devices_and_hosts_of_a_target(name):
    wanted, found = target.read(name), topology.devices(name)
    assert len(found) == wanted.devices
    hosts = {(getattr(d, "slice_index", 0), d.process_index) for d in found}
    assert len(hosts) == wanted.hosts


def test_a_damaged_find_is_made_again(child, tmp_path):
    answer = json.dumps(dataclasses.asdict(FOUND))
    asked = child(f"print({answer!r})")
    chosen, h100 = toy.experiment(*EIGHT), target.read("h100:8")
    compiling.compiled(chosen, h100)
    (kept,) = tmp_path.glob("compiled/*")
    kept.write_text(kept.read_text()[:20])
    assert compiling.compiled(chosen, h100) == FOUND
    assert asked() == 2
    assert len([*tmp_path.glob("compiled/*")]) == 1  # nothing half written


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; print('a', file=sys.stderr); sys.exit('no luck')", "no luck"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("pass", "said nothing"),
    ],
)
def test_a_child_that_fails_gives_one_line(child, script, words):
    child(script)
    with toy.refused("--target=h100:8", words, "--depth=model"):
        compiling.compiled(toy.experiment(*EIGHT), target.read("h100:8"))


def test_a_child_ends_with_who_asked():
    """The pipe to it closes when its parent is gone, whatever ended that."""
    running = subprocess.Popen(
        [sys.executable, *compiling.CHILD],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert running.stdin is not None
    running.stdin.close()
    assert running.wait(60) != 0


REFUSALS = {
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
        "space hbm. Used 20.54G of 15.75G hbm. Exceeded hbm capacity by 4.79G.\n\nTotal hbm "
        "usage >= 20.80G:\n    reserved        258.00M"
    ): ("the step needs 22.05 GB, and a device has 16.91 GB", 20.54 * 2**30),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (49.29G) exceeds available HBM (15.75G)."
    ): (
        "state and temporaries need 54.00 GB, and a device has 16.91 GB",
        50.29 * 2**30,
    ),
    "RESOURCE_EXHAUSTED: no\nroom": ("RESOURCE_EXHAUSTED: no room", 2**30),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_refusal_is_one_line_with_the_numbers(message):
    line, total = REFUSALS[message]
    found = compiling.refused(message, arguments=2**30, seconds=3.0)
    assert found.refusal == line
    assert found.total == pytest.approx(total, rel=1e-9)


def test_what_cannot_be_compiled_for_is_refused_before_anything_starts(
    monkeypatch, tmp_path, given_cpu
):
    chosen = toy.experiment(*EIGHT)
    with toy.refused("--target=cpu:8", "--depth=model"):
        compiling.compiled(chosen, target.read("cpu:8"))
    monkeypatch.setattr(topology, "CARDS", tmp_path)
    with toy.refused("--target=a100:8", "lm/plan/cards/a100.txtpb", "--depth=model"):
        compiling.compiled(chosen, target.read("a100:8"))


GPUS = [name for name, chip in chips.CHIPS.items() if chip.platform == "gpu"]


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_knows_every_gpu_as_the_table_does(name):
    card = topology.CARDS.joinpath(f"{name}.txtpb").read_text(encoding="utf-8")
    stated = dict(re.findall(r"(memory_bandwidth|device_memory_size): (\d+)", card))
    chip = chips.CHIPS[name]
    assert int(stated["memory_bandwidth"]) == pytest.approx(chip.bandwidth, rel=0.05)
    assert int(stated["device_memory_size"]) == pytest.approx(
        chip.hbm + chip.reserved, rel=0.08
    )


def installed(name):
    """Returns a target that something here compiles for."""
    wanted = target.read(name)
    try:
        topology.check(wanted)
    except config.ConfigError as error:
        pytest.skip(str(error))
    return wanted


@pytest.mark.compile
@pytest.mark.parametrize("name", GPUS)
def test_a_model_compiled_for_gpus_that_are_not_here(monkeypatch, tmp_path, name):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    wanted = installed(f"{name}:8")
    found = compiling.compiled(toy.experiment(*EIGHT), wanted)
    assert not found.refusal and found.total > 0
    assert found.sent["all-reduce over data"] > 0


@pytest.mark.tpu_compile
def test_a_model_too_large_for_a_tpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    v5e = installed("v5e:2x4")
    chosen = config.override(load("llama_1b"), ["mesh.fsdp=1", "mesh.data=8"])
    found = compiling.compiled(chosen, v5e)
    assert "GB, and a device has 16.91 GB" in found.refusal
    assert found.total > v5e.chip.hbm


@pytest.mark.compile
@pytest.mark.parametrize("name", ["gpt2_124m", "llama_1b"])
def test_a_shipped_experiment_is_held_as_its_plan_says(name, monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    chosen = load(name)
    wanted = installed(chosen.target)
    planned = memory.memory(program(chosen, wanted.layout(chosen.mesh)))
    found = compiling.compiled(chosen, wanted)
    state = planned.parameters + planned.optimizer
    assert state == pytest.approx(found.arguments, rel=0.005)
    assert planned.total == pytest.approx(found.total, rel=0.1)
