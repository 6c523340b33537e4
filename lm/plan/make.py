"""Makes a plan: an experiment on a target, at one of three depths.

types: the whole step is traced on a mesh that exists in name only, so that every sharding is
checked, and bytes of state are counted. model: the same, with arithmetic, activations, transfers
and times by formulas. compile: the same, and the target's compiler is asked for memory and sends.
"""

import dataclasses
import math
import pathlib
import re
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from lm import gradients, train
from lm.config import ConfigError, nearest
from lm.experiment import Experiment
from lm.nn.moe import Moe
from lm.plan import compiling, memory, placement, report, speed, topology
from lm.plan.report import Memory, Plan, Way
from lm.plan.target import Target
from lm.program import Program

DEPTHS = ("types", "model", "compile")
CHINCHILLA = 20  # tokens for a parameter (Hoffmann et al. 2022, table 3)
PARTS = {  # of a parameter's path: what it is of; the first that is in it counts
    "embed_vd": "embedding",
    "position_pd": "embedding",
    "type_cd": "embedding",
    "head_vd": "head",
    "end": "head",
    "ffn": "feed-forward",
    "mixer": "mixing",
    "cross": "cross-attention",
}


def plan(
    experiment: Experiment,
    wanted: Target,
    depth: str = "model",
    *,
    changes: tuple[str, ...] = (),
    price: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Returns the plan, without advice.

    Args:
        experiment: with `changes` applied already.
        wanted: the devices.
        depth: of `DEPTHS`.
        changes: as given to --set, to be repeated in advice.
        price: of a chip for an hour, in any currency.
        say: takes a line on what takes long.

    Raises:
        ConfigError: an experiment that the target cannot run, or no such depth.
    """
    known(depth)
    if depth == "compile":
        topology.check(wanted)
    prog = train.program(experiment, wanted.layout(experiment.mesh))
    checked(prog)
    mesh, met = dict(prog.layout.mesh.shape), active(prog)
    made = Plan(
        experiment=experiment.name,
        about=experiment.about,
        target=wanted.name,
        depth=depth,
        chip=wanted.chip,
        devices=wanted.devices,
        hosts=wanted.hosts,
        mesh=mesh,
        ways={a: Way(link=w[1], rate=w[0]) for a, w in wanted.ways(mesh).items()},
        slices=wanted.slices,
        changes=changes,
        parameters=parameters(prog),
        active=met,
        tokens_per_step=speed.tokens_of(prog),
        steps=experiment.train.steps,
        optimal_tokens=CHINCHILLA * met,
        memory=state_only(prog),
        notes=tuple(prog.unused),
    )
    if depth == "types":
        return made
    made = modelled(made, prog, wanted, price)
    if depth == "compile":
        result = compiling.compiled(experiment, wanted, progress(wanted, say))
        made = dataclasses.replace(made, compiled=result)
    return made


def known(depth: str) -> None:
    """Checks that there is such a depth.

    Raises:
        ConfigError: there is none.
    """
    if depth not in DEPTHS:
        hint = nearest(depth, DEPTHS)
        raise ConfigError(f"--depth={depth}: expected one of {', '.join(DEPTHS)}{hint}")


def progress(
    wanted: Target, say: Callable[[str], None], every: float = 10.0
) -> Callable[[float], None]:
    """Returns what says every few seconds how long the compiler has been at work."""
    said = 0.0

    def tell(seconds: float) -> None:
        nonlocal said
        if seconds >= said + every:
            said = seconds
            say(f"compiling for {wanted.name}: {seconds:.0f} s")

    return tell


def modelled(made: Plan, prog: Program, wanted: Target, price: float | None) -> Plan:
    """Returns the plan with all that formulas say."""
    held, found = memory.memory(prog), speed.predict(prog, wanted)
    reached = speed.speed(prog, wanted, found.work, found.time, price)
    return dataclasses.replace(
        made,
        memory=held,
        work=found.work,
        transfers=tuple(found.transfers),
        time=found.time,
        speed=reached,
        host=speed.host(prog, wanted, held, reached.tokens_per_second),
        timetable=report.ticks(gradients.table(prog)) if prog.staged else (),
        idle=gradients.table(prog).bubble if prog.staged else 0.0,
        notes=(*made.notes, *_attention(prog), *_unrolled(prog)),
    )


def _attention(prog: Program) -> tuple[str, ...]:
    """How attention is computed, and how it would be if rows were not packed."""
    if not (here := placement.attention(prog)):
        return ()
    apart = placement.attention(prog, packed=False)
    more = "" if apart == here else f"; {apart} with data.isolate=false"
    return (f"Attention: {here}{more}.",)


def _unrolled(prog: Program) -> tuple[str, ...]:
    """What formulas do not know of layers that are not scanned."""
    model = prog.experiment.model
    if model.scan or model.remat == "none" or model.layers == 1:
        return ()
    return (
        "model.scan=false: compilers keep more of unrolled layers than model.remat says, twice the "
        "memory or more; --depth=compile asks",
    )


def checked(prog: Program) -> None:
    """Traces the whole step, so that every sharding in it is checked.

    Raises:
        ConfigError: one that does not fit, with the operation and jax's reason in one line.
    """
    step: Any = train.make_train_step(prog)
    try:
        step.shapes(train.abstract_state(prog), train.abstract_batch(prog))
    except ConfigError:
        raise
    except Exception as error:
        if "shard" not in f"{type(error).__name__} {error}".lower():
            raise  # of the program, not of how it is split
        raise ConfigError(_explained(error, prog)) from error


def _explained(error: Exception, prog: Program) -> str:
    """One line: the operation of this project that a sharding does not fit, its parameters, and
    why."""
    here = pathlib.Path(__file__).parents[1]
    walked = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(f.filename).is_relative_to(here)
    ]
    last = frames[-1]
    where = pathlib.Path(last.filename).relative_to(here.parent)
    why = " ".join(str(error).split())
    axes = ", ".join(
        f"mesh.{a}={n}"
        for a, n in prog.layout.mesh.shape.items()
        if n > 1 and re.search(rf"['@(]{a}\b", why)
    )
    about = f" (it names {axes})" if axes else ""
    return f"{where}:{last.lineno}, {last.line}{_used(walked)}: {why[:400]}{about}"


def _used(frames: Sequence[types.FrameType]) -> str:
    """Says which parameters the innermost method of a module works with that has any: what an
    operation was given is one of them, or was made with one."""
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if not isinstance(module, nnx.Module):
            continue
        used = [n for n in frame.f_code.co_names if hasattr(module, n)]
        found = [n for n in used if isinstance(getattr(module, n), nnx.Variable)]
        if found:
            return f", with {type(module).__name__}'s {', '.join(found)}"
    return ""


def state_only(prog: Program) -> Memory:
    """Returns the bytes of parameters, optimizer and gradients on a device; the rest is 0."""
    state = train.abstract_state(prog)
    return Memory(
        parameters=placement.held(state.params),
        optimizer=placement.held(state.opt_state) + placement.held(state.ema),
        gradients=sum(placement.working(prog, path) for path in prog.shapes) * 4,
        activations={},
        layer=0,
        loss=0,
        collectives=0,
        margin=0,
    )


def parameters(prog: Program) -> dict[str, int]:
    """Returns the number of parameters by kind, all devices together, without padding."""
    found: dict[str, int] = {}
    for path, count in _real(prog).items():
        words = path.split("/")
        kind = next((PARTS[w] for w in words if w in PARTS), "norms and others")
        if "expert" in prog.axes[path]:
            kind = "experts"
        found[kind] = found.get(kind, 0) + count
    return found


def active(prog: Program) -> int:
    """Returns the number of parameters that one token meets."""
    total = 0.0
    ffn = prog.experiment.model.ffn
    met = ffn.top_k / ffn.experts if isinstance(ffn, Moe.Config) else 1.0
    for path, count in _real(prog).items():
        total += count * (met if "expert" in prog.axes[path] else 1)
    return round(total)


def _real(prog: Program) -> dict[str, int]:
    """Entries of each parameter, without the places of a pipeline that have no layer, and without
    rows of no token."""
    found, model = {}, prog.experiment.model
    for path, x in prog.shapes.items():
        count = math.prod(x.shape)
        if "vocab" in prog.axes[path]:
            count = count * model.vocab_size // model.vocab_rows
        if path.split("/")[0] == "layers":
            rows = prog.rows(path)
            count = count * int((rows >= 0).sum()) // rows.size
        found[path] = count
    return found
