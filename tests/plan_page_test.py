"""A plan's page needs nothing else, and its pictures are to scale."""

import re
import xml.etree.ElementTree as ET

import pytest
from plans import FOUND, parts, plan, whole

from lm.models import timetable
from lm.plan import drawings, page, report, tables
from lm.plan.report import Plan


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
    for table in (*tables.of(one), tables.ranked(one.found)):
        assert {c for r in table.rows for c in r} <= cells
    lines = {e.text for e in root.iter("pre")}
    assert {tables.sets(a.change) for a in (*one.advice, *one.found[1:])} <= lines


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
    """Returns the pixels down times the share across that a class of rectangles fills."""
    found = [r for r in svg.iter("rect") if kind in r.get("class", "").split()]
    sizes = [(r.get("width", "").rstrip("%"), r.get("height", "")) for r in found]
    return sum(float(w) * float(h) / 100 for w, h in sizes)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 8), (16, 64)])
def test_what_the_timeline_leaves_empty_is_the_bubble(schedule, stages, microbatches):
    """Whether cells bear numbers or ticks alike run together."""
    rounds = 1 + (schedule == "interleaved")
    table = timetable.make(schedule, stages, microbatches, rounds)
    ticks = tuple(t for t in report.ticks(table) if t.kind != "H")
    svg = drawings.timeline(whole(timetable=ticks))
    assert svg is not None
    full = float(svg.get("height", ""))
    busy = area(svg, "kindF") + area(svg, "kindB")
    assert 1 - busy / full == pytest.approx(table.bubble, abs=0.01)
    assert area(svg, "kindB") == pytest.approx(2 * area(svg, "kindF"), rel=0.02)
    numbers = [t.text for t in svg.iter("text")]
    assert len(numbers) == (len(ticks) if stages == 2 else 0)
    assert len(ET.tostring(svg)) < 50_000


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
    assert area(svg, "far") == pytest.approx(2 * 20, rel=0.01)  # two whole rows
    one = plan(mesh={"data": 1}, devices=1, hosts=1)
    assert drawings.mesh(one) is None
    assert "mesh of one device" in page.html(one)
