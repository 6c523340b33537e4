"""Pictures of a plan as SVG elements, sharp at any width: places across are in per cent.

Colours are classes of the page's style sheet, so that they fit light and dark.
"""

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence

from lm.plan import tables
from lm.plan.report import Plan, Tick
from lm.plan.tables import Share
from lm.terminal import duration, human, size

Element = ET.Element
NUMBERED = 60  # forwards that a timetable lasts, up to which its cells bear numbers
DRAWN = 128  # parts of a mesh that are drawn in a row at most
KINDS = {"F": "forward", "H": "head and loss", "B": "backward"}


def node(tag: str, *children: "Element | str", **attributes: object) -> Element:
    """Returns an element; `class_` and `text_anchor` are its class and text-anchor."""
    names = {k.rstrip("_").replace("_", "-"): str(v) for k, v in attributes.items()}
    made = ET.Element(tag, names)
    for child in children:
        if isinstance(child, str):
            if len(made):
                made[-1].tail = (made[-1].tail or "") + child
            else:
                made.text = (made.text or "") + child
        else:
            made.append(child)
    return made


def memory(plan: Plan) -> Element:
    """Draws what a device holds, against its HBM."""
    total, has, compiled = plan.memory.total, plan.chip.hbm, plan.compiled
    most = 1.02 * max(total, has, compiled.total if compiled else 0)
    totals = [(100 * total / most, f"planned {size(total)}")]
    if compiled and compiled.total:
        totals.append((100 * compiled.total / most, f"compiled {size(compiled.total)}"))
    drawn = [
        *_bar(tables.memory_shares(plan), most, size),
        *_mark(100 * has / most, f"HBM {size(has)}", 14, 66, "limit"),
        *_below(sorted(totals)),
    ]
    height = 74 + 20 * len(totals)
    return _svg("memory", "Memory of a device", tables.fit(plan), height, drawn)


def _below(marks: list[tuple[float, str]]) -> Iterable[Element]:
    """Marks of a bar from left to right, text under text so that no line crosses one."""
    leftward = marks[-1][0] > 65
    for i, (at, text) in enumerate(marks):
        row = i if leftward else len(marks) - 1 - i
        side = "end" if leftward and at > 35 else "start"
        yield from _mark(at, text, 86 + 20 * row, 66, "mark", side)


def time(plan: Plan) -> Element | None:
    """Draws where the seconds of a step go, with the range predicted below."""
    if plan.time is None:
        return None
    t = plan.time
    most = 1.02 * max(t.step, t.high)
    low, high = 100 * t.low / most, 100 * t.high / most
    text = f"predicted {duration(t.low)} to {duration(t.high)}"
    drawn = [
        *_bar(tables.time_shares(plan), most, duration),
        *_mark(100 * t.step / most, duration(t.step), 14, 66, "mark"),
        _line(low, 76, high, 76, "range"),
        _line(low, 71, low, 81, "range"),
        _line(high, 71, high, 81, "range"),
        _text(high, 98, text, "end"),
    ]
    return _svg("time", "Time of a step", tables.limits(plan), 106, drawn)


def roofline(plan: Plan, height: int = 300) -> Element | None:
    """Draws the operations a second that the chip allows by operations a byte, and the step's."""
    if plan.work is None or plan.time is None or not plan.work.hbm_bytes:
        return None
    chip, work = plan.chip, plan.work
    at = work.hardware_flops / work.hbm_bytes
    rate = work.hardware_flops / plan.time.step
    ridge = chip.bf16 / chip.bandwidth
    roof = min(chip.bf16, at * chip.bandwidth)
    left = math.floor(math.log10(min(at, ridge)) - 0.5)
    right = math.ceil(math.log10(max(at, ridge)) + 0.5)
    top = math.log10(chip.bf16) + 0.4
    bottom = min(
        math.floor(math.log10(rate)), math.floor(left + math.log10(chip.bandwidth))
    )

    def x(intensity: float) -> float:
        return 100 * (math.log10(intensity) - left) / (right - left)

    def y(flops: float) -> float:
        return (height - 40) * (top - math.log10(flops)) / (top - bottom) + 4

    drawn = []
    for power in range(bottom, math.floor(top) + 1):
        level = y(10.0**power)
        drawn.append(_line(0, level, 100, level, "grid"))
        if power > bottom and abs(level + 22 - y(chip.bf16)) > 14:  # room for its name
            name = human(10.0**power, "FLOP/s")
            drawn.append(_text(100, level + 14, name, "end", "axis"))
    for power in range(left, right + 1):
        drawn.append(_line(x(10.0**power), 4, x(10.0**power), height - 36, "grid"))
        side = {left: "start", right: "end"}.get(power, "middle")
        drawn.append(
            _text(x(10.0**power), height - 20, f"{10.0**power:g}", side, "axis")
        )
    low = max(10.0**left, 10.0**bottom / chip.bandwidth)
    drawn += [
        _text(100, height - 3, "operations a byte of HBM", "end", "axis"),
        _line(x(low), y(low * chip.bandwidth), x(ridge), y(chip.bf16), "roof"),
        _line(x(ridge), y(chip.bf16), 100, y(chip.bf16), "roof"),
        _text(100, y(chip.bf16) - 8, f"bf16 {human(chip.bf16, 'FLOP/s')}", "end"),
        _text(x(ridge) - 2, y(chip.bf16) - 8, f"HBM {size(chip.bandwidth)}/s", "end"),
        _line(x(at), y(roof), x(at), y(rate), "gap"),
        node("circle", cx=_p(x(at)), cy=_n(y(rate)), r="6", class_="point"),
    ]
    side, shift = ("end", -1.5) if x(at) > 68 else ("start", 1.5)
    said = human(rate, "FLOP/s"), f"{rate / roof:.0%} of the roof"
    for i, line in enumerate(said):
        drawn.append(_text(x(at) + shift, y(rate) + 18 + 18 * i, line, side, "strong"))
    desc = (
        f"This step: {', '.join(said)}, at {at:.3g} operations a byte; "
        f"the roof bends at {ridge:.3g}."
    )
    return _svg("roofline", "Roofline of the chip", desc, height, drawn)


def timeline(plan: Plan) -> Element | None:
    """Draws what each stage of a pipeline does in each tick; what stays empty is its bubble.

    A forward lasts 1 and a backward 2, as in `Timetable.bubble`. In a tick that has both, a stage's
    forward is in the upper third of its row, its backward below; a head is the foot of a forward.
    """
    if not plan.timetable:
        return None
    last = max(t.tick for t in plan.timetable)
    kinds = [set() for _ in range(last + 1)]
    for t in plan.timetable:
        kinds[t.tick].add(t.kind)
    lasts = ((not {*"FH"}.isdisjoint(k)) + 2 * ("B" in k) for k in kinds)
    ends = list(itertools.accumulate(lasts, initial=0))
    stages = 1 + max(t.stage for t in plan.timetable)
    numbered = ends[-1] <= NUMBERED
    row = 54 if numbered else max(4, min(24, 480 // stages))
    drawn = [node("rect", width="100%", height=_n(stages * row), class_="idle")]
    for first, length in _runs(plan.timetable, kinds, merged=not numbered):
        tick = first.tick
        left, right = (100 * ends[t] / ends[-1] for t in (tick, tick + length))
        top, tall = _lane(first.kind, kinds[tick], row)
        edge = " cell" if row > 8 else ""
        drawn.append(
            _rect(
                left,
                first.stage * row + top,
                right - left,
                tall,
                f"kind{first.kind}{edge}",
            )
        )
        if numbered and first.kind != "H":
            middle = (left + right) / 2, first.stage * row + top + tall / 2
            drawn.append(_text(*middle, _job(plan, first), "middle", "number"))
    most = max(t.microbatch for t in plan.timetable) + 1
    desc = (
        f"{stages} stages (rows), {most} microbatches{' (numbers)' if numbered else ''}, "
        f"{last + 1} ticks. A backward is drawn twice as long as a forward; a stage waits "
        f"{plan.idle:.1%} of the time."
    )
    made = _svg("timeline", "Timetable of the pipeline", desc, stages * row, drawn)
    if numbered:
        made.set("style", f"min-width:{ends[-1] * 16}px")
    return made


def _runs(
    timetable: Sequence[Tick], kinds: Sequence[set[str]], *, merged: bool
) -> Iterator[tuple[Tick, int]]:
    """Yields the first of ticks in a row in which a stage does the same, and how many they are."""
    ordered = sorted(timetable, key=lambda t: (t.stage, t.kind, t.tick))
    for _, run in itertools.groupby(
        enumerate(ordered),
        lambda x: (
            *(x[1].stage, x[1].kind, x[1].tick - x[0], frozenset(kinds[x[1].tick])),
            None if merged else x[0],
        ),
    ):
        found = [t for _, t in run]
        yield found[0], len(found)


def _lane(kind: str, there: set[str], row: float) -> tuple[float, float]:
    """Where in a row a job is drawn, and how tall, in a tick that has jobs of kinds `there`."""
    upper = 0 if there == {"B"} else row / 3 if "B" in there else row
    if kind == "B":
        return upper, row - upper
    foot = upper / 4 if "H" in there else 0
    return (upper - foot, foot) if kind == "H" else (0, upper - foot)


def _job(plan: Plan, job: Tick) -> str:
    letter = chr(97 + job.round) if any(t.round for t in plan.timetable) else ""
    return f"{job.microbatch}{letter}"


def mesh(plan: Plan) -> Element | None:
    """Draws the devices cut by one mesh axis after another, slowest links first."""
    axes = [(axis, n) for axis, n in plan.mesh.items() if n > 1]
    if not axes:
        return None
    drawn, parts, y = [], 1, 0
    groups, name = (plan.slices, "slices") if plan.chip.torus else (plan.hosts, "hosts")
    if groups > 1:
        of = f" · {plan.devices // groups} devices each"
        drawn += _cut(f"{groups} {name}", of, groups, groups, y, "group")
        y += 52
    for axis, n in axes:
        way = plan.ways.get(axis)
        more = f" · {way.link}, {size(way.rate)}/s a device" if way else ""
        far = way is not None and way.link == plan.chip.far != plan.chip.link
        if parts * n > DRAWN and parts > 1:
            parts, more = 1, f"{more} · one part of those above"
        parts *= n
        drawn += _cut(f"{axis} {n}", more, parts, n, y, "far" if far else "near")
        y += 52
    desc = f"{plan.devices} devices, {tables.mesh(plan)}, in {plan.hosts} hosts."
    return _svg("mesh", "The mesh", desc, y, drawn)


def _cut(
    name: str, more: str, parts: int, n: int, y: float, kind: str
) -> Iterable[Element]:
    """A row of as many parts; every other one is paler."""
    title = _text(0, y + 14, name, "start", "strong")
    title.append(node("tspan", more, class_="plain"))
    yield title
    drawn = parts if parts <= DRAWN else 1
    for i in range(drawn):
        pale = "" if i % n % 2 == 0 else " pale"
        yield _rect(100 * i / drawn, y + 21, 100 / drawn, 20, f"{kind} cell{pale}")


def _bar(shares: Sequence[Share], most: float, form: object) -> Iterable[Element]:
    """Parts beside each other, each with its size where a pointer rests on it."""
    at = 0.0
    for share in shares:
        part = _rect(
            100 * at / most,
            24,
            100 * share.value / most,
            42,
            f"cause-{share.cause} cell",
        )
        part.append(node("title", f"{share.name}: {form(share.value)}"))  # type: ignore[operator]
        at += share.value
        yield part


def _mark(
    at: float, text: str, y: float, end: float, kind: str, side: str = ""
) -> tuple[Element, Element]:
    """A line through the bar at `at` per cent, up or down to its text."""
    side = side or ("end" if at > 50 else "start")
    line = _line(at, min(y - 10, 24), at, max(y, end), kind)
    return line, _text(at + (0.8 if side == "start" else -0.8), y, text, side)


def _svg(
    name: str, title: str, desc: str, height: float, drawn: Iterable[Element]
) -> Element:
    return node(
        "svg",
        node("title", title, id=f"{name}-title"),
        node("desc", desc, id=f"{name}-desc"),
        *drawn,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        width="100%",
        height=_n(height),
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Element:
    return node(
        "rect", x=_p(x), y=_n(y), width=_p(width), height=_n(height), class_=kind
    )


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> Element:
    return node("line", x1=_p(x), y1=_n(y), x2=_p(to_x), y2=_n(to_y), class_=kind)


def _text(
    x: float, y: float, text: str, anchor: str = "start", kind: str = "plain"
) -> Element:
    return node("text", text, x=_p(x), y=_n(y), text_anchor=anchor, class_=kind)


def _p(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".") + "%"


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
