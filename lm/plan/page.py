"""A plan as one HTML page that needs nothing else: pictures are SVG, styles are in it."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from etils import epath

from lm.plan import drawings, tables
from lm.plan.drawings import Element, node
from lm.plan.report import Plan
from lm.terminal import duration, human, size

# Fills are Okabe and Ito's, which people tell apart whatever colours they see.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff;
  --card: #f6f8fa; --edge: #d1d9e0; --good: #116329; --bad: #a40e26; --code: #eaeef2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117;
  --card: #161b22; --edge: #30363d; --good: #56d364; --bad: #ff7b72; --code: #21262d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 24px 20px 48px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; }
h2 { font-size: 17px; margin: 0 0 10px; }
p { margin: 4px 0; }
.soft, .note, footer { color: var(--soft); }
.note { font-size: 13px; margin-top: 8px; }
.verdict { font-weight: 600; font-size: 17px; margin: 12px 0 0; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 10px 12px; }
.tile b { display: block; font-size: 20px; white-space: nowrap; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
section { padding: 16px 18px; min-width: 0; }
section.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 8px; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; vertical-align: baseline;
  font-variant-numeric: tabular-nums; }
th { white-space: normal; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { border-bottom: 1px solid var(--edge); }
tbody tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.few { max-width: 620px; }
.few td:first-child { white-space: nowrap; }
.many { min-width: 620px; }
.words { text-align: left; white-space: normal; }
pre { background: var(--code); border-radius: 6px; padding: 8px 12px; margin: 10px 0 4px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px;
  margin-right: 8px; }
.legend { font-size: 13px; margin-bottom: 8px; }
.legend span + span { margin-left: 14px; }
svg { display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 13px; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round; paint-order: stroke; }
svg text.strong { fill: var(--ink); font-weight: 600; }
svg text .plain { fill: var(--soft); font-weight: 400; }
svg text.number { fill: #1b1f24; font-size: 10px; stroke: none; dominant-baseline: central; }
svg text.axis { font-size: 12px; }
.cell { stroke: var(--card); stroke-width: 1px; }
.pale { opacity: 0.62; }
.limit { stroke: var(--bad); stroke-width: 2.5px; }
.mark { stroke: var(--ink); stroke-width: 1.5px; }
.range, .roof { stroke: var(--ink); stroke-width: 2px; }
.grid { stroke: var(--edge); stroke-width: 1px; }
.gap { stroke: var(--soft); stroke-width: 1.5px; stroke-dasharray: 3 4; }
.point { fill: #d55e00; stroke: var(--card); stroke-width: 1.5px; }
.idle { fill: var(--code); }
@media (max-width: 760px) { .cards { grid-template-columns: minmax(0, 1fr); }
  body { padding: 16px 12px 32px; } section { padding: 14px 12px; }
  .tile { padding: 8px 10px; } .tile b { font-size: 18px; } }
"""
FILLS = {
    "#0072b2": ("cause-parameters", "cause-compute", "near"),
    "#56b4e9": ("cause-optimizer", "cause-hbm", "kindF"),
    "#009e73": ("cause-gradients", "kindH"),
    "#e69f00": ("cause-activations", "cause-bubble", "kindB"),
    "#d55e00": ("cause-layer", "cause-exposed", "far"),
    "#f0e442": ("cause-loss", "cause-starts"),
    "#cc79a7": ("cause-collectives", "cause-host"),
    "#999999": ("cause-margin", "group"),
}


def write(plan: Plan, path: os.PathLike | str) -> None:
    """Writes the page; `path` may be `gs://…`."""
    epath.Path(path).write_text(html(plan))


def html(plan: Plan) -> str:
    """Returns the page, which is well-formed XML too."""
    root = node(
        "html",
        node(
            "head",
            node("meta", charset="utf-8"),
            node(
                "meta", name="viewport", content="width=device-width, initial-scale=1"
            ),
            node("title", f"{plan.experiment} on {plan.target}"),
            node("style", STYLE + _fills()),
        ),
        node("body", *_head(plan), _cards(plan), _foot(plan)),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode")


def _fills() -> str:
    rules = []
    for colour, names in FILLS.items():
        where = ", ".join(f".{name}" for name in names)
        rules.append(f"{where} {{ fill: {colour}; background: {colour}; }}")
    return "\n".join(rules) + "\n"


def _head(plan: Plan) -> Iterable[Element]:
    yield node("h1", plan.experiment)
    if plan.about:
        yield node("p", plan.about)
    yield node("p", tables.head(plan), class_="soft")
    if plan.changes:
        yield node("pre", tables.sets(plan.changes))
    kind = "good" if plan.fits else "bad"
    yield node("p", tables.fit(plan), class_=f"verdict {kind}")
    if limits := tables.limits(plan):
        yield node("p", limits, class_="verdict")
    yield node("div", *(_tile(*tile) for tile in _tiles(plan)), class_="tiles")


def _tiles(plan: Plan) -> Iterable[tuple[str, str]]:
    yield human(sum(plan.parameters.values())), "parameters"
    yield size(plan.memory.total), f"planned, of {size(plan.chip.hbm)} a device"
    if plan.time is not None:
        yield duration(plan.time.step), "a step"
    if plan.speed is not None:
        yield human(plan.speed.tokens_per_second), "tokens a second"
        yield f"{plan.speed.mfu:.1%}", "MFU (causal)"
        yield tables.days(plan.speed.days), f"for {plan.steps:,} steps"
        if plan.speed.price is not None:
            yield f"{plan.speed.price:,.0f}", "price of the training"


def _tile(number: str, what: str) -> Element:
    return node("div", node("b", number), node("span", what), class_="tile")


def _cards(plan: Plan) -> Element:
    found = {table.title: table for table in tables.of(plan)}
    memory, time = tables.memory(plan), tables.time(plan)
    cards = [_card(memory, drawings.memory(plan), wide=True)]
    if time is not None:
        cards.append(_card(time, drawings.time(plan), wide=True))
    pictures = (
        ("Roofline: what the chip allows", drawings.roofline(plan), ()),
        (
            "Pipeline: stages down, time across",
            drawings.timeline(plan),
            (_legend(plan),),
        ),
        ("Mesh, slowest links first", drawings.mesh(plan), ()),
    )
    cards += [_picture(t, p, *before) for t, p, before in pictures if p is not None]
    drawn = {memory.title, time.title if time else ""}
    cards += [
        _card(t, wide=len(t.head) > 4) for t in found.values() if t.title not in drawn
    ]
    if plan.found:
        change = tables.sets(tables.best(plan.found)[0].change)
        card = _card(tables.ranked(plan.found), wide=True)
        card.append(node("pre", change))
        cards.append(card)
    if plan.advice:
        lines = []
        for change, effect in tables.advice(plan):
            lines += [node("pre", change), node("p", effect)]
        cards.append(node("section", node("h2", tables.ADVICE), *lines, class_="wide"))
    if plan.notes:
        notes = (node("p", note) for note in plan.notes)
        cards.append(node("section", node("h2", "Notes"), *notes, class_="wide"))
    return node("div", *cards, class_="cards")


def _card(
    table: tables.Table, picture: Element | None = None, *, wide: bool = False
) -> Element:
    made = node("section", node("h2", table.title), class_="wide" if wide else "part")
    if picture is not None:
        made.append(picture)
    made.append(node("div", _table(table), class_="scroll"))
    if table.note:
        made.append(node("p", table.note, class_="note"))
    return made


def _picture(title: str, picture: Element, *before: Element) -> Element:
    """A card of a picture that may be wider than the screen, with what it says below."""
    said = picture.findtext("desc", "")
    drawn = node("div", picture, class_="scroll")
    note = node("p", said, class_="note")
    return node("section", node("h2", title), *before, drawn, note, class_="wide")


def _legend(plan: Plan) -> Element:
    seen = {t.kind for t in plan.timetable}
    swatches = (
        node("span", node("span", " ", class_=f"swatch kind{kind}"), name)
        for kind, name in drawings.KINDS.items()
        if kind in seen
    )
    return node("p", *swatches, class_="legend")


def _table(table: tables.Table) -> Element:
    rows = []
    if any(table.head):
        heads = (_cell("th", table, i, name) for i, name in enumerate(table.head))
        rows.append(node("thead", node("tr", *heads)))
    body = node("tbody")
    for n, row in enumerate(table.rows):
        cells = [_cell("td", table, i, text) for i, text in enumerate(row)]
        if n < len(table.shares):
            cause = table.shares[n].cause
            swatch = node("span", " ", class_=f"swatch cause-{cause}")
            swatch.tail, cells[0].text = cells[0].text, None
            cells[0].insert(0, swatch)
        body.append(node("tr", *cells))
    few = "few" if len(table.head) <= 4 else "many"
    return node("table", *rows, body, class_=few)


def _cell(tag: str, table: tables.Table, column: int, text: str) -> Element:
    made = node(tag, text)
    if column in table.words:
        made.set("class", "words")
    return made


def _foot(plan: Plan) -> Element:
    """The chip's numbers are only as good as where they come from."""
    lines = [
        node("p", f"{fields}: {source}") for fields, source in plan.chip.sources.items()
    ]
    return node(
        "footer",
        node("h2", f"Where the numbers of {plan.chip.name} are from"),
        *lines,
        class_="note",
    )
