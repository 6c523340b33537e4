"""A plan as JSON, on the terminal and as a page says what it holds, and nothing else."""

import dataclasses
import io
import json
import re
import typing
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from rich.console import Console

from lm.models import timetable
from lm.plan import chips, drawings, page, report, tables, tell
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
        ),
        "transfers": (
            report.Transfer(
                what="activations: attention and feed-forward", kind="all-reduce",
                axes=("tensor",), link="nvlink", bytes=3.6e11, seconds=0.8, hidden=0.1,
            ),
            report.Transfer(
                what="weights: gradients", kind="reduce-scatter", axes=("data", "fsdp"),
                link="network", bytes=5.02e8, seconds=0.01, hidden=0.01,
            ),
        ),
        "time": report.Time(
            compute=6.1, hbm=0.25, exposed=0.7, bubble=0.6, host=0.0, low=6.9, high=9.2,
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
        "idle": 3 / 19,
        "compiled": report.Compiled(
            seconds=93.0, arguments=3_030_000_000, temporaries=42_500_000_000,
            output=12_000_000, sent={"all-reduce over tensor": 3.7e11}, refusal="",
        ),
        "advice": (
            report.Advice(
                change=("mesh.tensor=4", "mesh.data=4", "model.remat=(a, b)"),
                memory=61 * 10**9, step=6.6, effect="halves the exposed transfers",
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
        chip=chips.CHIPS["h100"],
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


def shown(one: Plan, width: int = 120) -> str:
    """Returns what a file gets of `tell.show`."""
    file = io.StringIO()
    tell.show(one, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    """Returns the cells of the first line that begins with `name`, without its bar."""
    line = next(x for x in text.splitlines() if x.startswith(name))
    return [c for c in re.split(r"  +", line.strip()) if not re.search("[▀-▟]", c)]


@pytest.mark.parametrize("one", [plan(), whole(found=FOUND, notes=("a", "b"))])
def test_json_has_all_of_a_plan_and_reads_back(one):
    data = json.loads(json.dumps(report.to_json(one), allow_nan=False))
    assert report.from_json(Plan, data) == one
    assert data["fits"] is True
    assert data["memory"]["total_bytes"] == one.memory.total
    assert data["ways"]["tensor"] == {"link": "nvlink", "rate_bytes_per_second": 450e9}
    if one.time:
        assert data["time"]["step_seconds"] == pytest.approx(7.65)
        assert data["time"]["limit"] == "compute"


def test_every_number_of_json_has_a_unit_or_needs_none():
    counted = {
        "devices",
        "hosts",
        "slices",
        "steps",
        "idle",
        "mfu",
        "days",
        "kwh",
        "price",
    }
    counted |= {
        "active",
        "tokens_per_step",
        "optimal_tokens",
        "stage",
        "tick",
        "microbatch",
    }
    counted |= {
        "round",
        "mfu_full",
        "tokens_per_second",
        "torus",
        "watts",
        "host_chips",
    }
    named = re.compile("bytes|seconds|flops|operations|chips")
    for cls in (*report.UNITS, report.Work, report.Speed, report.Tick, Plan):
        hints = typing.get_type_hints(cls)
        assert set(report.UNITS.get(cls, {})) <= {*hints, "total", "step"}
        for name, hint in hints.items():
            key = name + report.UNITS.get(cls, {}).get(name, "")
            if hint in (int, float, float | None) and name not in counted:
                assert named.search(key), f"{cls.__name__}.{name}"


def test_ticks_are_those_of_the_timetable():
    """Each stage runs each microbatch once each way; a head is work for all stages at once."""
    P, M, v = 4, 8, 2
    ticks = report.ticks(timetable.make("interleaved", P, M, v))
    for stage in range(P):
        mine = [t for t in ticks if t.stage == stage]
        jobs = {(m, r) for m in range(M) for r in range(v)}
        for kind in "FB":
            done = [(t.microbatch, t.round) for t in mine if t.kind == kind]
            assert len(done) == len(jobs) and set(done) == jobs
        heads = {
            t.microbatch: t.tick for t in mine if t.kind == "H" and t.round == v - 1
        }
        ends = {
            t.microbatch: t.tick
            for t in ticks
            if (t.stage, t.kind, t.round) == (P - 1, "F", v - 1)
        }
        assert heads == ends


def test_the_terminal_says_all_that_types_know_and_nothing_else():
    text = shown(plan())
    assert "h100:8x8: 64 h100 in 8 hosts; mesh pipe 4 × data 2 × tensor 8" in text
    assert "--set mesh.pipe=4 --set mesh.tensor=8" in text
    assert "Fits: a device needs 39.7 GB of 84.9 GB (47%, 45.2 GB free)." in text
    assert row(text, "optimizer state") == ["optimizer state", "2.01 GB", "2.4%"]
    assert row(text, "activations: attention")[1:] == ["8.6 GB", "10.1%"]
    assert row(text, "together")[1:] == ["39.7 GB", "46.7%"]
    assert row(text, "feed-forward") == ["feed-forward", "5.64G", "70.2%"]
    assert row(text, "planned") == ["planned", "503G", "62.7"]
    assert row(text, "compute-optimal") == ["compute-optimal", "161G", "20"]
    assert "planned: 3.1 times" in text
    assert "--depth=model adds" in text
    for unknown in (
        "Time",
        "MFU",
        "Work",
        "Transfers",
        "Hosts (",
        "compiler says",
        "None",
    ):
        assert unknown not in text
    assert "\x1b" not in text  # no colours in a file


def test_the_terminal_says_all_of_a_whole_plan():
    text = shown(whole(found=FOUND, notes=("Read this.",)))
    assert (
        "Limited by compute: of a step's 7.65s, arithmetic 80%, exposed transfers 9%"
        in text
    )
    assert "45.5 GB of 84.9 GB by the compiler's count" in text
    assert row(text, "exposed transfers") == ["exposed transfers", "700ms", "9.2%"]
    assert "between 6.9s and 9.2s" in text
    assert row(text, "tokens a second")[1] == "548k"
    assert row(text, "MFU")[1:] == ["41.8%", "queries see their keys only"]
    assert "44.7%" in text
    assert row(text, "training")[1:] == ["10.6 days", "120,000 steps, 16.3k chip-hours"]
    assert row(text, "energy")[1] == "11.4k kWh"
    assert row(text, "price")[1] == "40,704"
    assert row(text, "a token, forward")[1:] == ["16.1 GFLOP", "17.2 GFLOP"]
    assert row(text, "a device's step, done")[1] == "4.37 PFLOP"
    assert "done: 1.38 times" in text
    sent = row(text, "weights: gradients")[1:]
    assert sent == [
        *("reduce-scatter", "data × fsdp", "network", "502 MB", "10ms", "100.0%")
    ]
    assert row(text, "RAM")[1:] == ["48 GB", "of 2 TB (2.4%)"]
    assert row(text, "data  ")[1] == "274 kB/s"
    assert row(text, "checkpoint")[1] == "96.4 GB"
    assert row(text, "to write it")[1:] == ["12s", "at 1 GB/s a host"]
    assert row(text, "temporaries")[1] == "42.5 GB"
    assert row(text, "sent: all-reduce over tensor")[1] == "370 GB"
    advised = "--set mesh.tensor=4 --set mesh.data=4 --set 'model.remat=(a, b)'"
    assert advised in text.splitlines()
    assert "halves the exposed transfers (step 6.6s, memory 61 GB)" in text
    assert "Read this." in text


def test_what_is_not_published_or_priced_is_left_out():
    speed = dataclasses.replace(parts()["speed"], kwh=None, price=None)
    text = shown(whole(speed=speed))
    assert "kWh" not in text and "price" not in text and "None" not in text


def test_what_does_not_fit_is_said_with_what_is_missing():
    held = dataclasses.replace(plan().memory, optimizer=60 * 10**9)
    large = "Does not fit: a device needs 97.7 GB of 84.9 GB, 12.8 GB too much."
    assert large in shown(plan(memory=held))
    refused = dataclasses.replace(parts()["compiled"], refusal="needs 91.2G of 79.1G")
    assert "Does not fit, says the compiler: needs 91.2G of 79.1G." in shown(
        whole(compiled=refused)
    )


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_no_line_is_wider_than_the_terminal_but_those_to_paste(width):
    """And nothing is cut: what does not fit a column goes on below."""
    text = shown(whole(found=FOUND), width)
    lines = [x for x in text.splitlines() if not x.startswith("--set")]
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "pipeline.microbatches=32" in text or width < 80


def test_the_search_ranks_and_ends_with_a_line_to_paste():
    file = io.StringIO()
    tell.search(FOUND, Console(file=file, width=100))
    text = file.getvalue()
    ranked = [x.split() for x in text.splitlines() if "%" in x]
    assert [r[:5] for r in ranked] == [
        ["640k", "6.5s", "47.0%", "70", "GB"],
        ["630k", "6.6s", "46.0%", "61", "GB"],
    ]
    assert [r[5] for r in ranked] == ["no", "yes"]
    assert text.splitlines()[-1] == "--set mesh.tensor=2"
    tell.search((), Console(file=file))
    assert file.getvalue().endswith("The search found nothing that fits.\n")


def elements(one: Plan) -> tuple[str, ET.Element]:
    """Returns the page as text and, for it is well-formed, as a tree."""
    text = page.html(one)
    return text, ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


@pytest.mark.parametrize("one", [plan(), whole(found=FOUND, notes=("Read.",))])
def test_the_page_needs_nothing_else_and_pictures_say_what_they_show(one, tmp_path):
    page.write(one, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    _, root = elements(one)
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    tags = {e.tag for e in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "{" in style and "&" not in style  # a browser reads styles raw
    pictures = list(root.iter("svg"))
    assert len(pictures) == (2 if one.time is None else 5)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert picture.findtext("title") and picture.findtext("desc")
        named = picture.get("aria-labelledby", "").split()
        assert len(named) == 2 and set(named) <= set(ids)
    cells = {"".join(e.itertext()).strip() for e in root.iter("td")}
    for table in tables.of(one):
        assert {c for r in table.rows for c in r} <= cells


def test_names_are_escaped():
    name = "<b>&\"'x"
    odd = whole(
        experiment=name, about=name, changes=(name,), notes=(name,), mesh={name: 2},
        parameters={name: 1}, target=name,
    )  # fmt: skip
    text, root = elements(odd)
    assert "<b>&" not in text
    assert root.findtext("body/h1") == name
    assert name in {"".join(e.itertext()) for e in root.iter("td")}
    assert name in shown(odd)  # and no markup of rich's


def test_the_bar_of_memory_is_to_scale_with_the_chip():
    one = whole()
    svg = drawings.memory(one)
    bars = [r for r in svg.iter("rect") if "cause" in r.get("class", "")]
    widths = [float(r.get("width", "").rstrip("%")) for r in bars]
    limit = next(e for e in svg.iter("line") if e.get("class") == "limit")
    scale = float(limit.get("x1", "").rstrip("%")) / one.chip.hbm
    held = [s.value for s in tables.memory_shares(one)]
    assert widths == pytest.approx([scale * h for h in held], abs=0.002)
    marks = [float(e.get("x1", "%")[:-1]) for e in svg.iter("line") if e is not limit]
    compiled = parts()["compiled"].total
    wanted = [scale * one.memory.total, scale * compiled]
    assert marks == pytest.approx(wanted, abs=0.002)


def test_the_roofline_has_its_bend_and_the_step_where_they_belong():
    one = whole()
    svg = drawings.roofline(one, 340)
    assert svg is not None
    slope, flat = (e for e in svg.iter("line") if e.get("class") == "roof")
    assert (slope.get("x2"), slope.get("y2")) == (flat.get("x1"), flat.get("y1"))
    assert flat.get("y1") == flat.get("y2")
    point = next(svg.iter("circle"))
    # Between them as many decades as the numbers are apart: across operations a byte,
    # of which 10 to 10000 are three; down operations a second, as steep a decade as the slope's.
    right, bend = (float(x.rstrip("%")) for x in (point.get("cx"), slope.get("x2")))
    at = one.work.hardware_flops / one.work.hbm_bytes
    ratio = at / (one.chip.bf16 / one.chip.bandwidth)
    assert 10 ** ((right - bend) * 3 / 100) == pytest.approx(ratio, rel=1e-3)
    rise = float(slope.get("y1")) - float(slope.get("y2"))
    run = (bend - float(slope.get("x1").rstrip("%"))) * 3 / 100
    below = (float(point.get("cy")) - float(flat.get("y1"))) / (rise / run)
    rate = one.work.hardware_flops / one.time.step
    assert 10**-below == pytest.approx(rate / one.chip.bf16, rel=0.02)


def area(svg: ET.Element, kind: str) -> float:
    """Returns the share of the picture's rectangles of a class that colours fill."""
    found = [r for r in svg.iter("rect") if kind in r.get("class", "").split()]
    return sum(float(r.get("width", "").rstrip("%")) for r in found) / 100


@pytest.mark.parametrize(("stages", "microbatches"), [(4, 16), (64, 256)])
def test_the_timeline_draws_every_job_for_one_tick(stages, microbatches):
    """In many ticks cells run together, but cover as much."""
    table = timetable.make("1f1b", stages, microbatches)
    svg = drawings.timeline(whole(timetable=report.ticks(table)))
    assert svg is not None
    wanted = stages * microbatches / len(table.forward)
    for kind in ("kindF", "kindB"):
        assert area(svg, kind) == pytest.approx(wanted, rel=2e-3)
    numbers = [t.text for t in svg.iter("text")]
    assert ("15" in numbers) == (stages == 4)
    assert len(ET.tostring(svg)) < 200_000


@pytest.mark.parametrize("data", [2, 64, 4096])
def test_the_mesh_is_cut_by_its_axes(data):
    sizes = {"pipe": 4, "data": data, "tensor": 8}
    svg = drawings.mesh(whole(mesh=sizes, devices=32 * data, hosts=4 * data))
    assert svg is not None
    names = [e.text for e in svg.iter("text")]
    assert names == [f"{4 * data} hosts", "pipe 4", f"data {data}", "tensor 8"]
    links = ["".join(e.itertext()) for e in svg.iter("text")]
    assert "network, 50 GB/s a device" in links[1]
    assert "nvlink, 450 GB/s a device" in links[3]
    assert len([r for r in svg.iter("rect") if "near" in r.get("class", "")]) in (64, 8)
    assert area(svg, "far") == pytest.approx(2, abs=0.01)  # two whole rows
    one = plan(mesh={"data": 1}, devices=1, hosts=1)
    assert drawings.mesh(one) is None
    assert "mesh of one device" in page.html(one)
