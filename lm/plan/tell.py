"""A plan on the terminal: sentences, tables and bars; plain text where it is none."""

import io
import sys
from collections.abc import Iterator, Sequence

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm.plan import tables
from lm.plan.report import Candidate, Plan

WIDTH = 120  # columns at most
LEAST = 80  # columns that tables are made for; in fewer they read less well
BAR = 32  # columns
COLOURS = ("blue", "cyan", "green", "yellow", "red", "magenta", "bright_blue", "white")


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints all that the plan's depth knows, to stdout unless a console is given."""
    console = console or _console()
    console.print(Text(plan.experiment, "bold"), Text(plan.about))
    console.print(Text(tables.head(plan)))
    if plan.changes:
        _paste(console, tables.sets(plan.changes))
    console.print()
    console.print(Text(tables.fit(plan), "bold green" if plan.fits else "bold red"))
    if limits := tables.limits(plan):
        console.print(Text(limits, "bold"))
    console.print()
    for table in tables.of(plan):
        _print(console, table)
    if plan.found:
        search(plan.found, console)
    if plan.advice:
        console.print(Text(tables.ADVICE, "bold"))
    for change, effect in tables.advice(plan):
        _paste(console, change)
        console.print(Text(f"    {effect}"))
    console.print()
    for note in (*plan.notes, tables.DEPTHS.get(plan.depth, "")):
        if note:
            console.print(Text(note))


def search(found: Sequence[Candidate], console: Console | None = None) -> None:
    """Prints what a search found, the fastest first, and its change to paste."""
    console = console or _console()
    if not found:
        console.print("The search found nothing that fits.")
        return
    _print(console, tables.ranked(found))
    _paste(console, tables.sets(tables.best(found)[0].change))


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of an encoding without × or bars
    console = Console(highlight=False, emoji=False, markup=False)
    console.width = min(console.width, WIDTH)
    return console


def _paste(console: Console, line: str) -> None:
    """Prints a line that a person copies: never broken, never cut."""
    console.print(Text(line, "cyan"), soft_wrap=True)


def _print(console: Console, table: tables.Table) -> None:
    made = Table(box=SIMPLE_HEAD, show_header=any(table.head), show_edge=False)
    made.pad_edge = False
    made.padding = (0, 1, 0, 0)
    for i, name in enumerate(table.head):
        side = "left" if i in table.words else "right"
        # A column of single words or numbers stays whole; but what cannot be broken may be cut, so
        # on a narrow terminal everything breaks.
        words = i in table.words and any(" " in row[i] for row in table.rows)
        whole = console.width >= LEAST and not words
        made.add_column(Text(name), justify=side, no_wrap=whole, overflow="fold")
    if table.shares:
        made.add_column("")
    bars = [*_bars(table), *([] for _ in table.rows)]
    for row, bar in zip(table.rows, bars, strict=False):
        made.add_row(*map(Text, row), *bar)
    console.print(Text(table.title, "bold"))
    console.print(made)
    if table.note:
        console.print(Text(table.note))
    console.print()


def _bars(table: tables.Table) -> Iterator[list[Bar]]:
    """Yields the bar of each row that has one: parts where the last one ended, then sums."""
    whole = max(table.whole, *table.sums, sum(s.value for s in table.shares), 0)
    causes = list(dict.fromkeys(s.cause for s in table.shares))
    at = 0.0
    for share in table.shares:
        colour = COLOURS[causes.index(share.cause) % len(COLOURS)]
        yield [Bar(whole, at, at + share.value, width=BAR, color=colour)]
        at += share.value
    for n in table.sums:
        yield [Bar(whole, 0, n, width=BAR)]
