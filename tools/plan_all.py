"""Plans every experiment on its targets: python tools/plan_all.py [--depth=types|model|compile]."""

import pathlib

from absl import app, flags
from rich.console import Console
from rich.table import Table

from lm import experiment, terminal
from lm.config import ConfigError
from lm.plan import make, run, target
from lm.plan.report import Plan

_DEPTH = flags.DEFINE_enum("depth", "model", make.DEPTHS, "How deep to look.")
_OUT = flags.DEFINE_string("out", "build/plans", "Where plan.json and plan.html go.")


def main(argv: list[str]) -> None:
    """Prints a row for each experiment; exits with 1 if one of them does not fit."""
    del argv
    table = Table("experiment", "target", "mesh", "of a device", "step", "MFU", "limit")
    wrong = []
    for name in experiment.names():
        chosen = experiment.load(name)
        for i, wanted in enumerate(target.names(chosen.target)):
            try:
                plan = make.plan(chosen, target.read(wanted), _DEPTH.value)
            except ConfigError as error:
                wrong.append(f"{name}: {error}")
                continue
            table.add_row(*_row(plan))
            folder = name if i == 0 else f"{name}_{wanted.replace(':', '_')}"
            run.write(plan, str(pathlib.Path(_OUT.value) / folder))
            if not plan.fits:
                wrong.append(f"{name}: does not fit {wanted}")
    Console(width=120).print(table)
    for line in wrong:
        print(line)
    raise SystemExit(bool(wrong))


def _row(plan: Plan) -> tuple[str, ...]:
    mesh = " x ".join(f"{a} {n}" for a, n in plan.mesh.items() if n > 1)
    spent = plan.time
    timed = (
        (terminal.duration(spent.step), f"{plan.speed.mfu:.0%}", spent.limit)
        if spent and plan.speed
        else ("", "", "")
    )
    share = f"{plan.needs / 2**30:.3g} of {plan.chip.hbm / 2**30:.3g} GiB"
    return plan.experiment, plan.target, mesh, share, *timed


if __name__ == "__main__":
    app.run(main)
