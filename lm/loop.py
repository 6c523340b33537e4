"""Training, top to bottom: text, state, steps, and what is done between them."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from lm import (
    batches,
    checkpoint,
    config,
    evaluate,
    generate,
    gradients,
    metrics,
    plot,
    resume,
    sharding,
    start,
    train,
)
from lm.data import loader
from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment
from lm.log import Log, due
from lm.lookout import Lookout
from lm.plan import placement
from lm.program import STACK
from lm.stop import Stop
from lm.terminal import Stopwatch, Terminal
from lm.train import Program, TrainState

DONE, PREEMPTED = 0, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits.h: run it again


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is."""

    step: int  # steps done
    examples: int  # the next example
    tokens: int  # scored so far, up to the last save

    def after(self, examples: int) -> "Position":
        """Returns the position after a step on so many examples."""
        return dataclasses.replace(
            self, step=self.step + 1, examples=self.examples + examples
        )


def run(experiment: Experiment, workdir: str, watch: Stopwatch, guard: Lookout) -> int:
    """Trains in `workdir`, from where its checkpoints end; returns the exit code.

    Raises:
        ConfigError: a wrong input, before anything is written over.
        RunError: too many skipped steps in a row.
        CheckpointError: a save failed, or no checkpoint is whole.
    """
    prog = train.program(experiment, sharding.make_layout(experiment.mesh))
    primary = jax.process_index() == 0
    say = _say if primary else _silent
    say("\n".join([_describe(prog), *prog.unused]))
    watch.mark("devices")
    checkpoints = _checkpoints(experiment, workdir, say)
    coder, stores, held_out = _tokenized(experiment)
    watch.mark("data")

    state, position = _start(prog, checkpoints, coder, say)
    first, steps = position.step, experiment.train.steps
    watch.mark("restore" if first else "init")
    with contextlib.ExitStack() as stack:
        terminal = Terminal(steps, first, primary=primary)
        stack.callback(terminal.close)
        writer = metrics.Writer(workdir, step=first, primary=primary, terminal=terminal)
        stack.enter_context(writer)
        stack.callback(checkpoints.close)
        if primary:
            _write_config(experiment, workdir)
        stack.enter_context((stop := Stop()).listening())
        step = Step(prog, terminal, guard)
        scores = Scores(prog, held_out, coder, writer, terminal, guard, workdir)
        log = Log(prog, writer, terminal, position.tokens)
        made = _batches(prog, stores, coder, position)
        stopped = False
        while position.step < steps and not stopped:
            state, result = step(position.step + 1, state, next(made))
            position = position.after(experiment.train.batch_at(position.step))
            log.add(position.step, result)
            if position.step == first + 1:
                _report_start(log, watch, writer, terminal, position.step)
            stopped = stop.asked(position.step)
            last = stopped or position.step == steps
            if not stopped and (last or due(position.step, experiment.eval.every)):
                log.arrive()
                scores.write(state, position.step)
                log.restart()
            if last or due(position.step, experiment.checkpoint.every):
                log.arrive()
                guard.rest()
                position = dataclasses.replace(position, tokens=log.tokens)
                _save(checkpoints, prog, state, position, coder)
                writer.flush()
                log.restart()
        checkpoints.wait()
    if not stopped and experiment.generate.prompts:
        _samples(prog, state, coder, workdir, primary)
    return _finish(experiment, workdir, first, position, stop.name if stopped else "")


def _tokenized(
    experiment: Experiment,
) -> tuple[Tokenizer, list[loader.Store], dict[str, list[loader.Store]]]:
    """Returns the tokenizer, the text to train on, and that of each evaluation set."""
    objective, data = experiment.objective, experiment.data
    coder = batches.tokenizer(objective, data, experiment.model.vocab_size)
    generate.encode(coder, experiment.generate.prompts, data.length)
    stores = batches.stores(objective, data, coder)
    return coder, stores, evaluate.stores(experiment, coder)


def _report_start(
    log: Log, watch: Stopwatch, writer: metrics.Writer, terminal: Terminal, step: int
) -> None:
    """Waits for the first step, and says what the time until then went to."""
    log.arrive()
    watch.mark("first step")
    writer.write("startup", step, watch.report())
    terminal.print(watch.line())
    log.measure()
    log.restart()


class Step:
    """The train step, compiled for each batch size of the run when it first comes."""

    def __init__(self, prog: Program, terminal: Terminal, guard: Lookout):
        self._terminal, self._guard = terminal, guard
        self._step = train.make_train_step(prog)
        self._compiled: dict[int, Callable[..., Any]] = {}

    def __call__(
        self, number: int, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, Any]:
        size = batch["tokens"].shape[0]
        self._guard.enter(number)
        if size not in self._compiled:
            self._guard.rest()  # compilation, and the first run of a program, may be slow
            self._terminal.status("compiling")
            self._compiled[size] = self._step.ready(state, batch)  # type: ignore[attr-defined]
            self._terminal.status("training")
        return self._compiled[size](state, batch)


class Scores:
    """Evaluates the weights, averaged ones where they are kept, on every set."""

    def __init__(
        self,
        prog: Program,
        stores: dict[str, list[loader.Store]],
        coder: Tokenizer,
        writer: metrics.Writer,
        terminal: Terminal,
        guard: Lookout,
        workdir: str,
    ):
        self._prog, self._stores, self._guard = prog, stores, guard
        self._coder, self._workdir = coder, workdir
        self._writer, self._terminal = writer, terminal
        self._step = train.make_eval_step(prog)

    def write(self, state: TrainState, step: int) -> None:
        """Writes one record for each set."""
        self._guard.rest()
        chosen = self._prog.experiment.eval
        weights = train.evaluated(self._prog, state)
        for one in chosen.sets:
            self._terminal.status(f"evaluating {one.name}")
            values = evaluate.of_set(
                *(self._prog, self._step, weights, self._stores[one.name], one),
                *(self._coder, self._workdir, self._terminal.print),
            )
            self._writer.write("eval", step, {"set": one.name, **values})
        self._terminal.status("training")


def _checkpoints(
    experiment: Experiment, workdir: str, say: Callable[[str], None]
) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(
        f"{workdir}/{checkpoint.FOLDER}",
        keep=experiment.checkpoint.keep,
        keep_period=experiment.checkpoint.keep_period,
        report=say,
    )


def _start(
    prog: Program,
    checkpoints: checkpoint.Checkpoints,
    coder: Tokenizer,
    say: Callable[[str], None],
) -> tuple[TrainState, Position]:
    """Returns the state to go on from, and where it is."""
    experiment = prog.experiment
    newest = checkpoints.latest()
    imported = newest == 0 and checkpoints.read_run().meta.get("imported", False)
    if newest is None or imported:
        key = jax.random.key(experiment.train.seed)
        state = train.make_init(prog).ready(key)(key)  # type: ignore[attr-defined]
        if imported or experiment.train.init_from:
            source = checkpoints if imported else None
            params = start.weights(prog, state.params, source, say)
            state = dataclasses.replace(state, params=params)
            if state.ema is not None:
                state = dataclasses.replace(state, ema=train.average_of(prog, state))
        say("\n".join(placement.lines(prog, state)))
        return state, Position(0, 0, 0)
    stored = checkpoints.read_run()
    resume.same_tokenizer(stored.meta["tokenizer"], coder)
    changed = resume.changes(stored.meta["config"], experiment)
    target = train.saved(prog, train.abstract_state(prog))
    arrays, found = checkpoints.restore(target)
    state = train.loaded(prog, arrays)
    say(f"resuming from step {found.step} of {experiment.train.steps}")
    for line in [
        *(f"  changed: {line}" for line in changed),
        *placement.lines(prog, state),
    ]:
        say(line)
    meta = found.meta
    return state, Position(found.step, meta["examples"], meta["tokens"])


def _batches(
    prog: Program, stores: list[loader.Store], coder: Tokenizer, position: Position
) -> Iterator[dict[str, jax.Array]]:
    experiment, sharding_BT = prog.experiment, prog.batch_sharding()
    host = loader.batches(
        batches.examples(
            *(experiment.objective, experiment.data, stores, coder),
            experiment.train.seed,
        ),
        sizes=experiment.train.batch_at,
        rows=lambda size: loader.local_rows(sharding_BT, size),
        start=position.examples,
        step=position.step,
        threads=experiment.data.threads,
        prefetch=experiment.data.prefetch,
    )
    for batch in host:
        yield loader.to_devices(batch, sharding_BT)


def _save(
    checkpoints: checkpoint.Checkpoints,
    prog: Program,
    state: TrainState,
    position: Position,
    coder: Tokenizer,
) -> None:
    meta = _meta(prog.experiment, position, coder)
    arrays = train.saved(prog, state)
    checkpoints.save(position.step, arrays, meta, coder.files())


def _meta(
    experiment: Experiment, position: Position, coder: Tokenizer
) -> dict[str, Any]:
    """Returns what a checkpoint holds beside arrays and tokenizer."""
    return {
        "config": config.to_json(experiment),
        **dataclasses.asdict(position),
        "tokenizer": coder.fingerprint,
        "jax": jax.__version__,
    }


def _finish(
    experiment: Experiment, workdir: str, first: int, position: Position, stopped: str
) -> int:
    """Draws the run, says how it ended, and returns the exit code."""
    if jax.process_index() == 0:
        records = metrics.read(epath.Path(workdir) / metrics.FILE)
        plot.draw(records, epath.Path(workdir) / "metrics.png", experiment.name)
        if stopped:
            _say(
                f"stopped by {stopped} at step {position.step}, saved; the same command "
                "goes on from there"
            )
        elif first == position.step:
            _say(f"nothing to do: {workdir} is at step {first} already")
    return PREEMPTED if stopped else DONE


def _samples(
    prog: Program, state: TrainState, coder: Tokenizer, workdir: str, primary: bool
) -> None:
    wanted = prog.experiment.generate
    weights = train.evaluated(prog, state)
    say = _say if primary else _silent
    texts = generate.texts(prog, weights, coder, wanted.prompts, wanted, say)
    if primary:
        samples = generate.shown(prog, wanted.prompts, texts)
        joined = f"\n{'─' * 60}\n".join(samples) + "\n"
        (epath.Path(workdir) / "samples.txt").write_text(joined)
        print(joined, end="")


def _write_config(experiment: Experiment, workdir: str) -> None:
    path = epath.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("config.json.new")  # a full disk leaves the old one
    scratch.write_text(json.dumps(config.to_json(experiment), indent=2) + "\n")
    scratch.replace(path)


def _describe(prog: Program) -> str:
    mesh, devices = prog.layout.mesh, jax.devices()
    axes = " x ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1)
    count = sum(math.prod(s.shape) for s in prog.shapes.values())
    attention = placement.attention(prog)
    if prog.staged:
        axes += f"; {_flow(prog)}"
    of = "" if mesh.size == len(devices) else f" of {len(devices)}"
    return (
        f"{prog.experiment.name}: {count / 1e6:.1f} M parameters on {mesh.size}{of} "
        f"{devices[0].device_kind} ({axes or 'one device'})"
        + (f", attention: {attention}" if attention else "")
    )


def _flow(prog: Program) -> str:
    """How microbatches flow through the stages, where layers do not divide, and what is computed
    in vain because stages have layers of different kinds."""
    table = gradients.table(prog)
    uneven = ""
    for name, places in prog.stacks.items():
        held = (places.layers >= 0).sum((1, 2))
        if len(set(held)) > 1:
            what = "" if name == STACK else f"{name} "
            uneven += f", {what}layers {'+'.join(map(str, held))}"
    scored = prog.eval_microbatches
    fewer = "" if scored == table.microbatches else f" ({scored} in evaluation)"
    places = prog.places.shape[-1]
    more = {part: len(prog.computed(part)) - places for part in ("mixer", "ffn")}
    again = " and ".join(f"{n} {part}" for part, n in more.items() if n)
    return (
        f"{prog.experiment.pipeline.schedule}, {table.microbatches} microbatches{fewer}, "
        f"bubble {table.bubble:.0%}{uneven}"
        + (f", {again} more than a chunk of {places} needs" if again else "")
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    del line
