"""`--mode=plan`: makes a plan, shows it, and writes plan.json and plan.html."""

import dataclasses
import json
import math
from collections.abc import Callable

from etils import epath

from lm import config
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.plan import compiling, make, page, search, target, tell, topology, walk
from lm.plan.report import Candidate, Plan, to_json
from lm.plan.target import Target

CONFIRMED = 3  # of the best candidates are compiled
SHOWN = 10  # rows of the ranked table

Say = Callable[[str], None]


def run(
    experiment: Experiment,
    workdir: str,
    changes: tuple[str, ...],
    *,
    name: str,
    depth: str,
    searching: bool,
    price: float | None,
    say: Say,
) -> None:
    """Plans the experiment on the target `name`, or on its own, and shows what was found.

    Raises:
        ConfigError: an experiment, target or depth that cannot be planned, with the fix.
    """
    wanted = target.read(name or experiment.target)
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price_per_chip_hour={price}: expected 0 or more")
    if searching:
        _search(experiment, workdir, wanted, depth, price, say)
        return
    plan = make.plan(experiment, wanted, depth, changes=changes, price=price, say=say)
    if plan.time is not None:
        plan = dataclasses.replace(plan, advice=search.advice(experiment, plan, wanted))
    tell.show(plan)
    write(plan, workdir)
    say(f"wrote {workdir}/plan.json and plan.html")


def write(plan: Plan, workdir: str) -> None:
    """Writes plan.json and plan.html."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(to_json(plan), indent=1) + "\n")
    page.write(plan, folder / "plan.html")


def _search(
    experiment: Experiment,
    workdir: str,
    wanted: Target,
    depth: str,
    price: float | None,
    say: Say,
) -> None:
    """Ranks candidates by the model; at depth compile asks the compiler about the best."""
    make.known(depth)
    if depth == "types":
        raise ConfigError(
            "--search ranks by --depth=model (or compile, which confirms the best); types knows "
            "no seconds"
        )

    def progress(done: int, best: float | None) -> None:
        say(
            f"{done} candidates, best step {'none yet' if best is None else f'{best:.3g} s'}"
        )

    result = walk.search(experiment, wanted, progress)
    say(
        f"{result.count} candidates, {result.closely} of them looked at closely; of the best, "
        f"looked at exactly, {len(result.found)} fit"
    )
    if not result.found:
        raise ConfigError(_none(result, wanted))
    rows = search.ranked(result.found[:SHOWN])
    if depth == "compile":
        topology.check(wanted)
        rows = [
            _confirmed(experiment, wanted, row, say) if i < CONFIRMED else row
            for i, row in enumerate(rows)
        ]
        rows = [row for row in rows if row is not None]
    if not rows:
        raise ConfigError(
            f"--target={wanted.name}: its compiler refuses the best {CONFIRMED} candidates; use "
            "--depth=model to see them"
        )
    tell.search(rows)
    best = config.override(experiment, list(rows[0].change))
    plan = make.plan(best, wanted, changes=rows[0].change, price=price)
    write(dataclasses.replace(plan, found=tuple(rows)), workdir)
    say(f"wrote the plan of the first to {workdir}/plan.json and plan.html")


def _none(result: walk.Result, wanted: Target) -> str:
    """Returns the line that says why nothing was found, with what came nearest."""
    head = f"--target={wanted.name}: none of {result.count} candidates"
    if result.nearest is None:
        return f"{head} can run: {result.refusal or 'no mesh divides train.batch_size'}"
    near, there = result.nearest, wanted.chip.hbm
    sets = " ".join(f"--set {s}" for s in near.sets)
    return (
        f"{head} fits into {there / 2**30:.0f} GiB a device; the nearest needs "
        f"{near.bytes / 2**30:.1f} GiB ({sets or 'the experiment as it is'}); use more devices, or "
        "a smaller model"
    )


def _confirmed(
    experiment: Experiment, wanted: Target, row: Candidate, say: Say
) -> Candidate | None:
    """Returns the row with the compiler's bytes, None where it does not fit after all."""
    changed = config.override(experiment, list(row.change))
    result = compiling.compiled(changed, wanted, make.progress(wanted, say))
    if result.refusal or result.total > wanted.chip.hbm:
        return None
    return dataclasses.replace(row, memory=result.total, confirmed=True)
