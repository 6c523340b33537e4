"""Chips are data: every number has a source, and what is here is measured."""

import dataclasses
import types

import jax
import pytest

from lm import config, experiment, sharding, train
from lm.plan import chips, cpu, make, speed, target, work

NUMBERS = {f.name for f in dataclasses.fields(chips.Chip)} - {
    *("name", "kinds", "platform", "sources")
}


@pytest.mark.parametrize("chip", [*chips.CHIPS.values()], ids=lambda chip: chip.name)
def test_every_number_of_a_chip_has_a_source(chip):
    named = [field for fields in chip.sources for field in fields.split()]
    assert len(named) == len(set(named))
    unsaid = {name for name in ("reserved", "start") if not getattr(chip, name)}
    assert set(named) | unsaid == NUMBERS
    assert all(chip.sources.values())


@pytest.mark.parametrize(
    ("kind", "limit", "name", "peak", "hbm"),
    [
        ("NVIDIA A100-SXM4-40GB", 30 * 10**9, "a100:1x2", 312e12, 30 * 10**9),
        ("NVIDIA H100 PCIe", None, "h100:1x2", 756e12, chips.CHIPS["h100"].hbm),
    ],
)
def test_gpus_here_are_measured(monkeypatch, kind, limit, name, peak, hbm):
    stats = None if limit is None else {"bytes_limit": limit}
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind=kind, memory_stats=lambda: stats
    )
    asked = []
    monkeypatch.setattr(jax, "devices", lambda: [gpu, gpu])
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu, gpu])
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(
        chips, "product_rate", lambda shape, on, dtype: asked.append(on) or 2e14
    )
    monkeypatch.setattr(chips, "copy_rate", lambda size, on: asked.append(on) or 1e12)
    found = target.read("here")
    assert (found.name, found.devices, found.hosts) == (name, 2, 1)
    assert (found.chip.bf16, found.chip.hbm) == (peak, hbm)
    assert found.chip.reach == 2e14 / peak
    assert found.chip.int8 == pytest.approx(2 * peak, rel=0.01)
    assert found.chip.bandwidth == 1e12
    assert asked == [gpu, gpu]
    assert found.chip.sources["reach"] == found.chip.sources["bandwidth"] == "measured"


@pytest.mark.parametrize("cores", [1, 2])
def test_tpus_here_are_a_slice(monkeypatch, cores):
    """A virtual machine of eight is one host; cores that are devices of their own are refused."""
    tpus = [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(x, y, 0),
            memory_stats=lambda: None,
        )
        for x in range(2)
        for y in range(4)
        for _ in range(cores)
    ]
    monkeypatch.setattr(jax, "devices", lambda: tpus)
    monkeypatch.setattr(jax, "local_devices", lambda: tpus)
    monkeypatch.setattr(jax, "local_device_count", lambda: len(tpus))
    monkeypatch.setattr(chips, "product_rate", lambda *given: 2e14)
    monkeypatch.setattr(chips, "copy_rate", lambda *given: 1e12)
    if cores == 2:
        with pytest.raises(ValueError, match=r"16 devices are 8 chips.*=v5e:2x4$"):
            target.read("here")
        return
    found = target.read("here")
    assert (found.name, found.devices, found.hosts) == ("v5e:2x4", 8, 1)
    assert found.chip.bf16 == 2e14  # faster than the table says
    assert found.chip.reach == 1.0


def test_a_chip_is_measured_on_its_device(monkeypatch):
    """A CPU in the place of another chip: slower than its table says, and with its own memory."""
    monkeypatch.setattr(chips, "LARGE", (256, 256, 256))
    monkeypatch.setattr(chips, "LONG", 2**20)
    found = chips.measured(chips.CHIPS["v5e"], jax.devices()[0])
    assert 0 < found.reach < 1
    assert found.bf16 == chips.CHIPS["v5e"].bf16
    assert 0 < found.bandwidth < 1e12
    assert found.host_chips == 8


def test_the_cpu_here_is_measured_and_named_by_its_devices(monkeypatch):
    """And a plan for it has a step that takes time."""
    monkeypatch.setattr(cpu, "ROUNDS", 1)
    found = target.read("here")
    assert (found.name, found.devices, found.hosts) == ("cpu:8", 8, 1)
    assert found.chip.bf16 > 0
    plan = make.plan(config.override(experiment.load("tiny"), ["mesh.data=8"]), found)
    assert plan.fits
    assert 0 < plan.speed.mfu < 1
    assert plan.time.low <= plan.time.step <= plan.time.high


def test_several_targets_are_named_in_one_line():
    assert target.names("v5p:8x8x8, h100:64x8") == ["v5p:8x8x8", "h100:64x8"]
    assert target.names("cpu:1") == ["cpu:1"]
    with pytest.raises(ValueError, match="expected v5p:4x4x4"):
        target.names(" ")


RATE, COPIES = 1e11, 4e10


def stopped(monkeypatch, bandwidth, start):
    """Sets what a CPU's products, copies and steps take, whatever this one does."""
    monkeypatch.setattr(cpu, "rates", cpu.rates.__wrapped__)  # measures again
    monkeypatch.setattr(chips, "product_rate", lambda *given: RATE)
    monkeypatch.setattr(chips, "copy_rate", lambda *given: COPIES)

    def seconds(self):
        done = self.work
        seconds = done.hardware_flops / RATE + done.waited_bytes / bandwidth
        return seconds + done.starts * start

    monkeypatch.setattr(cpu.Step, "seconds", seconds)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_plan_of_the_step_that_a_cpu_is_measured_by_says_its_time(
    devices, monkeypatch
):
    """Its rates are those of which the steps' times are made."""
    stopped(monkeypatch, bandwidth=1e10, start=2e-5)
    wanted = target.read(f"cpu:{devices}")
    assert wanted.chip.bandwidth == pytest.approx(1e10 / devices)
    assert wanted.chip.start == pytest.approx(2e-5 * devices)
    assert wanted.chip.links == COPIES / devices / 2
    prog = train.program(
        cpu.SAMPLE, sharding.make_layout(cpu.SAMPLE.mesh, jax.devices()[:1])
    )
    found, took = speed.predict(prog, wanted).time, cpu.Step.seconds
    assert found.step == pytest.approx(
        devices * took(types.SimpleNamespace(work=work.work(prog)))
    )
    assert 0 < found.starts < found.hbm


@pytest.mark.parametrize(
    ("bandwidth", "start", "found"),
    [
        (1e15, 0.0, (COPIES, 0.0)),  # not above the rate of copies
        (1e10, -1e-5, (1.0535e10, 0.0)),  # a row alone took too short
    ],
)
def test_a_cpus_rates_stay_possible(monkeypatch, bandwidth, start, found):
    stopped(monkeypatch, bandwidth, start)
    chip = cpu.chip(1)
    assert (chip.bandwidth, chip.start) == pytest.approx(found, rel=0.01)
