"""A plan as JSON and on the terminal says what it holds, and nothing else."""

import dataclasses
import io
import json
import re
import typing

import pytest
from plans import FOUND, parts, plan, whole
from rich.console import Console

from lm.models import timetable
from lm.plan import chips, report, tables, tell
from lm.plan.report import Plan


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
        "reach",
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
        "starts",  # of kernels, in work; seconds in time
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
        assert set(report.UNITS.get(cls, {})) <= {*hints, "total", "step", "needs"}
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
    assert "The state of training alone is 39.7 GB of a device's 84.9 GB (47%)." in text
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
        *("reduce-scatter", "data × fsdp", "network", "502 MB", "10ms", "70.0%")
    ]
    assert row(text, "RAM")[1:] == ["48 GB", "of 2 TB (2.4%)"]
    assert row(text, "data  ")[1] == "274 kB/s"
    assert row(text, "checkpoint")[1] == "96.4 GB"
    assert row(text, "to write it")[1:] == ["12s", "at 1 GB/s a host"]
    assert row(text, "temporaries")[1] == "42.5 GB"
    assert row(text, "sent: all-reduce over tensor")[1] == "370 GB"
    advised = "--set mesh.tensor=4 --set mesh.data=4 --set 'model.remat=(a, b)'"
    assert advised in text.splitlines()
    did = "memory 45.5 GB → 61 GB, step 7.65s → 6.6s (-14%)"
    assert did in text
    assert "Read this." in text


def test_what_is_not_published_or_priced_is_left_out():
    speed = dataclasses.replace(parts()["speed"], kwh=None, price=None)
    text = shown(whole(speed=speed))
    assert "kWh" not in text and "price" not in text and "None" not in text


def test_what_does_not_fit_is_said_with_what_is_missing():
    held = dataclasses.replace(plan().memory, optimizer=60 * 10**9)
    large = "Does not fit: a device needs 97.7 GB of 84.9 GB, 12.8 GB too much."
    text = shown(plan(memory=held))
    assert large in text
    assert row(text, "there is") == ["there is", "84.9 GB", "100.0%"]
    free = "Fits: a device needs 39.7 GB of 84.9 GB (47%, 45.2 GB free)."
    assert free in shown(plan(depth="model"))
    refused = dataclasses.replace(parts()["compiled"], refusal="needs 91.2G of 79.1G")
    assert "Does not fit, says the compiler: needs 91.2G of 79.1G." in shown(
        whole(compiled=refused)
    )


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_no_line_is_wider_than_the_terminal_but_those_to_paste(width):
    """And nothing is cut: what does not fit a column goes on below."""
    one = whole(found=FOUND)
    sent = dataclasses.replace(one.transfers[1], axes=("data", "fsdp", "seq", "expert"))
    text = shown(dataclasses.replace(one, transfers=(sent,) * 2), width)
    lines = [x for x in text.splitlines() if not x.startswith("--set")]
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "--set mesh.tensor=4 --set mesh.data=4 --set 'model.remat=(a, b)'" in text
    if width >= 80:
        assert "pipeline.microbatches=32" in text
        assert "reduce-scatter" in text and "expert" in text and "network" in text


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


def test_names_are_no_markup():
    name = "[bold]x[/bold] :smile: [/]"
    text = shown(plan(experiment=name, about=name, notes=(name,), parameters={name: 1}))
    assert text.count(name) == 4


def test_a_terminal_without_the_signs_gets_the_numbers(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    tell.show(plan())
    ascii_only.seek(0)
    assert "mesh pipe 4 ? data 2" in ascii_only.read()


def test_what_is_assumed_of_power_and_left_out_of_parameters_is_said():
    sparse = whole(active=10**9, optimal_tokens=2e10, chip=chips.CHIPS["v5p"])
    for one, says in ((sparse, True), (whole(), False)):
        energy = next(r for r in tables.speed(one).rows if r[0] == "energy")
        assert ("assumed" in energy[2]) == says
        tokens = tables.tokens(one)
        assert ("of the parameters that a token meets" in tokens.note) == says
        assert tokens.rows[-1][2] == "20"  # tokens for each of those
