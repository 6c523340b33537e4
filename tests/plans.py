"""Plans made by hand, for tests of how they are shown."""

import dataclasses
from typing import Any

from lm.models import timetable
from lm.plan import chips, report
from lm.plan.report import Plan


def parts() -> dict[str, Any]:
    """Returns what `--depth=compile` knows: 8 G parameters on eight hosts of eight GPUs."""
    step = 3 * 1.61e10 * 2**22 / 64
    return {
        "work": report.Work(
            forward_flops=1.61e10,
            forward_flops_full=1.72e10,
            model_flops=step,
            model_flops_full=3 * 1.72e10 * 2**22 / 64,
            hardware_flops=1.38 * step,
            hbm_bytes=6.2e12,
            waited_bytes=3.1e12,
            starts=41_000.0,
        ),
        "transfers": (
            report.Transfer(
                what="activations: attention and feed-forward", kind="all-reduce",
                axes=("tensor",), link="nvlink", bytes=3.6e11, seconds=0.8, hidden=0.1,
            ),
            report.Transfer(
                what="weights: gradients", kind="reduce-scatter", axes=("data", "fsdp"),
                link="network", bytes=5.00e8, seconds=0.009, hidden=0.006,
            ),
            report.Transfer(
                what="weights: gradients", kind="reduce-scatter", axes=("data", "fsdp"),
                link="network", bytes=2e6, seconds=0.001, hidden=0.001,
            ),
        ),
        "time": report.Time(
            compute=6.1, hbm=0.25, starts=0.0, exposed=0.7, bubble=0.6, host=0.0, low=6.9, high=9.2,
            limit="compute",
        ),
        "speed": report.Speed(
            tokens_per_second=548_275.0, mfu=0.4184, mfu_full=0.447, days=10.6,
            kwh=11_400.0, price=40_704.0,
        ),
        "host": report.Host(
            ram=48 * 10**9, ram_there=2 * 10**12, data_rate=274_000.0,
            checkpoint=96_360_000_000, checkpoint_seconds=12.0, disk_rate=1e9,
        ),
        "timetable": report.ticks(timetable.make("1f1b", 4, 16)),
        "idle": timetable.make("1f1b", 4, 16).bubble,
        "compiled": report.Compiled(
            seconds=93.0, arguments=3_030_000_000, temporaries=42_500_000_000,
            output=12_000_000, sent={"all-reduce over tensor": 3.7e11}, refusal="",
        ),
        "advice": (
            report.Advice(
                change=("mesh.tensor=4", "mesh.data=4", "model.remat=(a, b)"),
                memory=61 * 10**9, step=6.6,
            ),
        ),
    }  # fmt: skip


def plan(**changes: Any) -> Plan:
    """Returns a plan of depth types with `changes`."""
    known = Plan(
        experiment="llama_8b",
        about="Llama 3.1 8B from scratch.",
        target="h100:8x8",
        depth="types",
        chip=dataclasses.replace(chips.CHIPS["h100"], hbm=84_929_347_584),
        devices=64,
        hosts=8,
        mesh={"pipe": 4, "data": 2, "fsdp": 1, "seq": 1, "expert": 1, "tensor": 8},
        ways={
            "pipe": report.Way(link="network", rate=50e9),
            "data": report.Way(link="network", rate=50e9),
            "tensor": report.Way(link="nvlink", rate=450e9),
        },
        changes=("mesh.pipe=4", "mesh.tensor=8"),
        parameters={
            "embedding": 525_336_576, "attention": 1_342_177_280,
            "feed-forward": 5_637_144_576, "head": 525_336_576, "norms": 266_240,
        },
        active=8_030_261_248,
        tokens_per_step=2**22,
        steps=120_000,
        optimal_tokens=20 * 8_030_261_248,
        memory=report.Memory(
            parameters=1_004_000_000, optimizer=2_008_000_000, gradients=1_004_000_000,
            activations={"residual stream": 17_200_000_000, "attention": 8_600_000_000},
            layer=6_400_000_000, loss=1_050_000_000, collectives=536_000_000,
            margin=1_890_000_000,
        ),
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


def whole(**changes: Any) -> Plan:
    """Returns a plan of depth compile with `changes`."""
    return plan(depth="compile", **{**parts(), **changes})


FOUND = (
    report.Candidate(
        change=("mesh.tensor=4", "pipeline.microbatches=32"), memory=61 * 10**9, step=6.6,
        tokens_per_second=6.3e5, mfu=0.46, limit="compute", confirmed=True,
    ),
    report.Candidate(
        change=("mesh.tensor=2",), memory=70 * 10**9, step=6.5, tokens_per_second=6.4e5,
        mfu=0.47, limit="network (data)", confirmed=False,
    ),
)  # fmt: skip
