"""What a plan says, as sentences and tables of text: the terminal and the page show the same."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence

from lm.plan.report import Candidate, Plan
from lm.terminal import duration, human, size

DEPTHS = {  # what the next depth would add
    "types": "--depth=model adds activations, seconds and advice; compile asks the compiler",
    "model": "--depth=compile asks the target's own compiler",
}
ADVICE = "What would change it"
PARTS = {  # of a step's time, by field
    "compute": "arithmetic",
    "hbm": "waiting for HBM",
    "starts": "starting kernels",
    "exposed": "exposed transfers",
    "bubble": "pipeline bubble",
    "host": "waiting for input",
}
CAUSES = {  # of memory, by field
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "layer": "the layer computed",
    "loss": "loss chunk",
    "collectives": "gathered and sent",
    "margin": "code, and gaps between arrays",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a bar: seconds or bytes, with what it is of."""

    cause: str  # a key of PARTS or CAUSES
    name: str
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)  # columns that are no numbers
    note: str = ""
    shares: tuple[Share, ...] = ()  # the first rows' parts of a bar
    sums: tuple[float, ...] = ()  # bars of the rows after them
    whole: float = 0.0  # what the bars are of


def of(plan: Plan) -> list[Table]:
    """Returns all that the plan's depth knows."""
    made = (memory(plan), time(plan), speed(plan), work(plan), transfers(plan))
    more = (parameters(plan), tokens(plan), hosts(plan), compiled(plan))
    return [table for table in (*made, *more) if table is not None]


def head(plan: Plan) -> str:
    """Returns what is planned, in a line."""
    hosts = "a host" if plan.hosts == 1 else f"{plan.hosts} hosts"
    slices = f", {plan.slices} slices" if plan.slices > 1 else ""
    chips = f"{plan.devices} {plan.chip.name}" if plan.devices > 1 else plan.chip.name
    return f"{plan.target}: {chips} in {hosts}{slices}; mesh {mesh(plan)}; depth {plan.depth}"


def mesh(plan: Plan) -> str:
    """Returns 'data 2 × tensor 8', without axes of one device."""
    axes = [f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1]
    return " × ".join(axes) or "of one device"


def sets(change: Sequence[str]) -> str:
    """Returns arguments to paste into a shell."""
    return " ".join(f"--set {shlex.quote(c)}" for c in change)


def fit(plan: Plan) -> str:
    """Returns whether a device holds it, in a sentence."""
    compiled, has = plan.compiled, plan.chip.hbm
    if compiled is not None and compiled.refusal:
        return f"Does not fit, says the compiler: {compiled.refusal}."
    needs = plan.needs
    if plan.depth == "types" and plan.fits:
        part = f"{needs / has:.0%}"
        return f"The state of training alone is {size(needs)} of a device's {size(has)} ({part})."
    by = "" if compiled is None else " by the compiler's count"
    said = f"a device needs {size(needs)} of {size(has)}{by}"
    if plan.fits:
        return f"Fits: {said} ({needs / has:.0%}, {size(has - needs)} free)."
    return f"Does not fit: {said}, {size(needs - has)} too much."


def limits(plan: Plan) -> str:
    """Returns what limits the step and by how much, in a sentence; "" where that is not known."""
    if plan.time is None:
        return ""
    parts = sorted(time_shares(plan), key=lambda share: -share.value)
    whole = plan.time.step
    said = [f"{p.name} {p.value / whole:.0%}" for p in parts if p.value > 0.005 * whole]
    return f"Limited by {plan.time.limit}: of a step's {duration(whole)}, {', '.join(said)}."


def memory_shares(plan: Plan) -> tuple[Share, ...]:
    """Returns what a device holds, by cause."""
    found = []
    for field, name in CAUSES.items():
        value = getattr(plan.memory, field)
        kept = value if isinstance(value, dict) else {"": value}
        found += [
            Share(cause=field, name=f"{name}: {what}" if what else name, value=n)
            for what, n in kept.items()
        ]
    return tuple(share for share in found if share.value)


def time_shares(plan: Plan) -> tuple[Share, ...]:
    """Returns where a step's seconds go."""
    if plan.time is None:
        return ()
    parts = ((f, name, getattr(plan.time, f)) for f, name in PARTS.items())
    return tuple(Share(cause=f, name=name, value=v) for f, name, v in parts if v)


def memory(plan: Plan) -> Table:
    shares, total, has = memory_shares(plan), plan.memory.total, plan.chip.hbm
    kept = plan.chip.reserved
    rows = [(s.name, size(s.value), _share(s.value / has)) for s in shares]
    sums = {"together": total}
    if plan.compiled is not None:
        sums["by the compiler's count"] = plan.compiled.total
    if max(sums.values()) > has:
        sums["there is"] = has
    rows += [(name, size(n), _share(n / has)) for name, n in sums.items()]
    return Table(
        title=f"Memory of a device, {'its state' if plan.depth == 'types' else 'at its fullest'}",
        head=("", "bytes", f"of {size(has)}"),
        rows=tuple(rows),
        note=f"{size(kept)} more are not the program's" if kept else "",
        shares=shares,
        sums=tuple(sums.values()),
        whole=has,
    )


def time(plan: Plan) -> Table | None:
    if plan.time is None:
        return None
    t, shares = plan.time, time_shares(plan)
    rows = [(s.name, duration(s.value), _share(s.value / t.step)) for s in shares]
    return Table(
        title="Time of a step",
        head=("", "seconds", "share"),
        rows=(*rows, ("together", duration(t.step), "")),
        note=f"predicted: between {duration(t.low)} and {duration(t.high)}",
        shares=shares,
        whole=t.step,
    )


def speed(plan: Plan) -> Table | None:
    if plan.speed is None or plan.work is None:
        return None
    s = plan.speed
    chip_hours = plan.devices * s.days * 24
    rows = [
        ("tokens a second", human(s.tokens_per_second), "of all devices"),
        ("MFU", f"{s.mfu:.1%}", "queries see their keys only"),
        ("MFU", f"{s.mfu_full:.1%}", "every key counted, as most published figures do"),
        (
            "training",
            days(s.days),
            f"{plan.steps:,} steps, {human(chip_hours)} chip-hours",
        ),
    ]
    if s.kwh is not None:
        guess = plan.chip.sources.get("watts", "").startswith("assumed")
        more = ", whose power is assumed" if guess else ""
        about = f"the chips alone, at full load{more}"
        rows.append(("energy", f"{human(s.kwh)} kWh", about))
    if s.price is not None:
        rows.append(
            ("price", f"{s.price:,.0f}", "in the currency of --price_per_chip_hour")
        )
    return Table(
        title="Speed and cost", head=("", "", ""), rows=tuple(rows), words=(0, 2)
    )


def work(plan: Plan) -> Table | None:
    if plan.work is None:
        return None
    w = plan.work
    again = w.hardware_flops / w.model_flops
    return Table(
        title="Work",
        head=("", "queries see their keys", "every key counted"),
        rows=(
            _flops("a token, forward", w.forward_flops, w.forward_flops_full),
            _flops("a device's step", w.model_flops, w.model_flops_full),
            ("a device's step, done", human(w.hardware_flops, "FLOP"), ""),
            ("HBM read and written", size(w.hbm_bytes), ""),
        ),
        note=f"done: {again:.2f} times the first, with what is computed again and what a pipeline "
        "does in vain",
    )


def transfers(plan: Plan) -> Table | None:
    if not plan.transfers:
        return None
    sums: dict[tuple[str, ...], list[float]] = {}
    for t in plan.transfers:
        kind = t.kind.removeprefix("collective-")  # collective-permute
        alike = sums.setdefault((t.what, kind, " × ".join(t.axes), t.link), [0.0] * 3)
        for i, number in enumerate((t.bytes, t.seconds, t.hidden)):
            alike[i] += number
    ordered = sorted(sums.items(), key=lambda row: -row[1][1])
    rows = [(*words, *_sent(*numbers)) for words, numbers in ordered]
    every = [sum(column) for column in zip(*sums.values(), strict=True)]
    return Table(
        title="Transfers a device receives in a step",
        head=("what", "how", "over", "link", "bytes", "takes", "can hide"),
        rows=(*rows, ("together", "", "", "", *_sent(*every))),
        words=(0, 1, 2, 3),
    )


def parameters(plan: Plan) -> Table:
    total = sum(plan.parameters.values())
    kinds = sorted(plan.parameters.items(), key=lambda kind: -kind[1])
    rows = [(name, human(n), _share(n / total)) for name, n in kinds if n]
    rows += [("together", human(total), "")]
    if plan.active != total:
        rows += [("a token meets", human(plan.active), _share(plan.active / total))]
    return Table(title="Parameters", head=("", "number", "share"), rows=tuple(rows))


def tokens(plan: Plan) -> Table:
    planned = plan.steps * plan.tokens_per_step
    sparse = plan.active < sum(plan.parameters.values())
    of = "; of the parameters that a token meets" if sparse else ""
    return Table(
        title="Tokens",
        head=("", "tokens", "a parameter" + (", active" if sparse else "")),
        rows=(
            ("a step", human(plan.tokens_per_step), ""),
            ("planned", human(planned), _each(planned, plan)),
            (
                "compute-optimal",
                human(plan.optimal_tokens),
                _each(plan.optimal_tokens, plan),
            ),
        ),
        note=f"planned: {planned / plan.optimal_tokens:.2g} times the compute-optimal number "
        f"(Hoffmann et al. 2022{of})",
    )


def hosts(plan: Plan) -> Table | None:
    if plan.host is None:
        return None
    h = plan.host
    took, rate = duration(h.checkpoint_seconds), size(h.disk_rate)
    return Table(
        title=f"Hosts ({plan.hosts})",
        head=("", "", ""),
        rows=(
            (
                "RAM",
                size(h.ram),
                f"of {size(h.ram_there)} ({_share(h.ram / h.ram_there)})",
            ),
            ("data", f"{size(h.data_rate)}/s", "of tokens, read by each"),
            ("checkpoint", size(h.checkpoint), "all hosts together"),
            ("to write it", took, f"at {rate}/s a host"),
        ),
        words=(0, 2),
    )


def compiled(plan: Plan) -> Table | None:
    if plan.compiled is None:
        return None
    c = plan.compiled
    sent = sorted(c.sent.items(), key=lambda kind: -kind[1])
    return Table(
        title="What the target's compiler says",
        head=("", "bytes of a device"),
        rows=(
            ("state and batch", size(c.arguments)),
            ("temporaries", size(c.temporaries)),
            ("output", size(c.output)),
            ("together", size(c.total)),
            *((f"sent: {kind}", size(n)) for kind, n in sent),
        ),
        note=f"it took {duration(c.seconds)}",
    )


def ranked(found: Sequence[Candidate]) -> Table:
    """Returns what a search found, the fastest first."""
    rows = [
        (
            human(c.tokens_per_second), duration(c.step), f"{c.mfu:.1%}",
            size(c.memory), "yes" if c.confirmed else "no", c.limit, " ".join(c.change),
        )
        for c in best(found)
    ]  # fmt: skip
    return Table(
        title="Found by the search, the fastest first",
        head=("tokens/s", "step", "MFU", "memory", "sure", "limit", "change"),
        rows=tuple(rows),
        words=(5, 6),
        note="sure: the target's compiler says that it fits",
    )


def best(found: Sequence[Candidate]) -> list[Candidate]:
    """Returns them by tokens a second, the most first."""
    return sorted(found, key=lambda c: -c.tokens_per_second)


def advice(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yields each change to paste, and what it does."""
    for a in plan.advice:
        said = f"memory {size(plan.needs)} → {size(a.memory)}"
        if plan.time is not None:
            change = f"{a.step / plan.time.step - 1:+.0%}"
            said += f", step {duration(plan.time.step)} → {duration(a.step)} ({change})"
        yield sets(a.change), said


def _sent(received: float, seconds: float, hidden: float) -> tuple[str, str, str]:
    return (
        size(received),
        duration(seconds),
        _share(hidden / seconds) if seconds else "",
    )


def _flops(name: str, causal: float, full: float) -> tuple[str, str, str]:
    return name, human(causal, "FLOP"), human(full, "FLOP")


def _each(tokens: float, plan: Plan) -> str:
    return f"{tokens / plan.active:.3g}"


def _share(part: float) -> str:
    return f"{part:.1%}"


def days(number: float) -> str:
    """Returns '12.3 days', or hours where they are few."""
    return f"{number:.3g} days" if number >= 1.5 else duration(number * 86400)
