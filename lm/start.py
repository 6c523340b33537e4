"""The weights that a run begins with, where others were trained before."""

from collections.abc import Callable
from typing import Any

from lm import checkpoint, train, trees
from lm.nn.heads import END
from lm.train import Program


def weights(
    prog: Program,
    fresh: Any,
    imported: checkpoint.Checkpoints | None,
    say: Callable[[str], None],
) -> Any:
    """Returns the parameters to begin with: imported ones, or those of train.init_from.

    What the head has and they lack is taken from `fresh`, the initial parameters.
    """
    source = prog.experiment.train.init_from
    target = train.saved(prog, {"params": train.abstract_state(prog).params})
    wanted, ends = trees.flatten(target), f"params/{END}/"
    try:
        kept, step = (imported, 0) if imported else checkpoint.found_at(source)
        there = kept.names(step)
        new = [p for p in wanted if p.startswith(ends) and p not in there]
        taken = trees.nest({p: x for p, x in wanted.items() if p not in new})
        loaded, found = kept.restore(taken, step, partial=True)
    except checkpoint.CheckpointError as error:
        if imported:
            raise
        what = f"train.init_from={source}: {error}"
        raise checkpoint.CheckpointError(what) from error
    where = "that were imported" if imported else f"of {source}, step {found.step}"
    say(f"starting from the weights {where}")
    unused = [p for p in there if p.startswith(ends) and p not in wanted]
    for what, paths in (("new, as they have none", new), ("not used", unused)):
        if paths:
            names = ", ".join(p.removeprefix("params/") for p in paths)
            say(f"  {what}: {names}")
    first = trees.flatten({"params": fresh})
    whole = trees.flatten(loaded) | {p: first[p] for p in new}
    return train.loaded(prog, trees.nest({p: whole[p] for p in wanted}))["params"]
