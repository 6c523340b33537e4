"""Training, top to bottom: text, state, steps, and what is done between them."""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm import (
    checkpoint,
    config,
    evaluate,
    generate,
    metrics,
    plot,
    resume,
    sharding,
    train,
)
from lm.data import loader
from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment
from lm.plan import chips, flops
from lm.terminal import Stopwatch, Terminal
from lm.train import Program, TrainState

DONE, PREEMPTED = 0, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits.h: run it again
CHECKPOINTS = "checkpoints"  # folder in the work directory


class RunError(RuntimeError):
    """The run can't go on, told in one line."""


def run(experiment: Experiment, workdir: str, watch: Stopwatch) -> int:
    """Trains `experiment` in `workdir`, from where its checkpoints end; returns the exit code.

    Raises:
        ConfigError: a wrong input, before anything is written over.
        RunError: too many skipped steps in a row.
    """
    layout = sharding.make_layout(experiment.mesh)
    prog = train.program(experiment, layout)
    primary = jax.process_index() == 0
    say = _say if primary else _silent
    say(_describe(prog))
    watch.mark("devices")

    checkpoints = checkpoint.Checkpoints(
        f"{workdir}/{CHECKPOINTS}",
        keep=experiment.checkpoint.keep,
        keep_period=experiment.checkpoint.keep_period,
        report=say,
    )
    coder = loader.tokenizer(experiment.data, experiment.model.vocab_size)
    dataset = loader.examples(
        experiment.data, loader.stores(experiment.data, coder), experiment.train.seed
    )
    held_out = evaluate.stores(experiment, coder)
    watch.mark("data")

    state, examples, tokens = _start(prog, checkpoints, coder, say)
    first = int(state.step)
    resumed = first > 0
    if primary:
        _write_config(experiment, workdir)
    watch.mark("restore" if resumed else "init")

    terminal = Terminal(experiment.train.steps, first)
    writer = metrics.Writer(workdir, step=first, primary=primary, terminal=terminal)
    steps = Steps(prog, state, terminal)
    eval_step = train.make_eval_step(prog)
    stop = Stop()

    def save(step: int) -> None:
        meta = {
            "config": config.to_json(experiment),
            "examples": examples,
            "tokens": tokens,
            "tokenizer": coder.fingerprint,
            "jax": jax.__version__,
        }
        checkpoints.save(step, state, meta, coder.files())
        writer.flush()

    def score(step: int) -> None:
        params = state.params
        if state.ema is not None and experiment.eval.use_ema:
            params = train.averaged(prog, state)
        for chosen in experiment.eval.sets:
            terminal.status(f"evaluating {chosen.name}")
            values = evaluate.score(
                prog, eval_step, params, held_out[chosen.name], chosen
            )
            writer.write("eval", step, {"set": chosen.name, **values})
        terminal.status("training")

    log = Log(prog, writer, terminal, tokens)
    saved = first if resumed else -1
    step, code = first, DONE
    with stop.listening(), terminal_and_files(terminal, writer):
        batches = _batches(prog, dataset, examples, first)
        for step in range(first, experiment.train.steps):
            batch = next(batches)
            state, result = steps(state, batch)
            examples += experiment.train.batch_at(step)
            log.add(step + 1, result)
            if step == first:
                log.arrive()
                watch.mark("first step")
                writer.write("startup", step + 1, watch.report())
                terminal.print(watch.line())
                log.restart()
            tokens = log.tokens
            done = step + 1
            if stop.asked(done):
                code = PREEMPTED
                break
            last = done == experiment.train.steps
            if not last and due(done, experiment.eval.every):
                log.arrive()
                score(done)
                log.restart()
            if not last and due(done, experiment.checkpoint.every):
                log.arrive()
                tokens = log.tokens
                save(done)
                saved = done
                log.restart()
        log.arrive()
        tokens, done = log.tokens, int(state.step)
        if code == DONE:
            score(done)
        if saved != done:
            terminal.status("saving")
            save(done)
        checkpoints.close()
        if code == DONE and experiment.generate.prompts:
            _samples(prog, state, coder, workdir, primary)
    if primary:
        plot.draw(
            metrics.read(epath.Path(workdir) / metrics.FILE),
            epath.Path(workdir) / "metrics.png",
            experiment.name,
        )
    if code == PREEMPTED:
        say(
            f"stopped by {stop.name} at step {done}, saved; the same command goes on from there"
        )
    return code


def due(step: int, every: int) -> bool:
    """Returns whether something done every so many steps (0: never) is done after `step`."""
    return bool(every) and step % every == 0


class Steps:
    """The train step, compiled ahead for each batch size of the run."""

    def __init__(self, prog: Program, state: TrainState, terminal: Terminal):
        self._prog, self._terminal = prog, terminal
        self._step = train.make_train_step(prog)
        self._compiled: dict[int, Callable[..., Any]] = {}

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, Any]:
        size = batch["tokens"].shape[0]
        if size not in self._compiled:
            self._terminal.status("compiling")
            self._compiled[size] = self._step.lower(state, batch).compile()
            self._terminal.status("training")
        return self._compiled[size](state, batch)


class Log:
    """Metrics of steps, fetched one step late so that the device never waits for the host."""

    def __init__(
        self, prog: Program, writer: metrics.Writer, terminal: Terminal, tokens: int
    ):
        self._prog, self._writer, self._terminal = prog, writer, terminal
        self._pending: tuple[int, Any] | None = None
        self._means, self._speed = metrics.Means(), metrics.Throughput()
        self.tokens = tokens  # scored so far
        self._skipped_at = 0
        model, length = prog.experiment.model, prog.experiment.data.length
        self._cost = {
            "mfu": flops.train(model, length, causal=False),
            "mfu_causal": flops.train(model, length, causal=True),
        }
        devices = prog.layout.mesh.devices.size
        peak = chips.peak_flops(jax.devices()[0], devices)
        self._peak = peak * devices if peak else None

    def add(self, step: int, result: Any) -> None:
        """Takes the metrics of a step just dispatched, and fetches those of the step before."""
        self.arrive()
        self._pending = step, result

    def restart(self) -> None:
        """Leaves the time of other work out of the speed."""
        self._speed.restart()

    def arrive(self) -> None:
        """Waits for the pending metrics, and writes a line where one is due.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        if self._pending is None:
            return
        (step, result), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(result).items()}
        self._speed.arrived(values["tokens"])
        self.tokens += int(values["tokens"])
        guard = self._prog.experiment.optim.guard
        if values["consecutive"] >= guard.max_consecutive:
            raise RunError(
                f"step {step}: {guard.max_consecutive} steps in a row were skipped (loss "
                f"{values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}); the parameters "
                "are those before them. Lower optim.learning_rate, or look at the data of these "
                "steps; optim.guard says what is skipped"
            )
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite:
            bits = metrics.bits_per_byte(
                values["nll"] / max(values["tokens"], 1),
                values["tokens"],
                values["bytes"],
            )
            shown = {"loss": values["loss"], "grad_norm": values["grad_norm"]}
            self._means.add(
                {**shown, **({} if bits is None else {"bits_per_byte": bits})}
            )
        self._terminal.tick(step, values["loss"], self._speed.tokens_per_second)
        if due(step, self._prog.experiment.train.log_every) or values["consecutive"]:
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        speed = self._speed.take()
        rate = speed["tokens_per_second"]
        record: dict[str, Any] = {
            **{"loss": values["loss"], "grad_norm": values["grad_norm"]},
            **self._means.take(),
            "learning_rate": values["learning_rate"],
            "tokens": self.tokens,
            **speed,
            "skipped": int(values["skipped"]),
        }
        for name, cost in self._cost.items():
            record[name] = rate * cost / self._peak if rate and self._peak else None
        if memory := jax.local_devices()[0].memory_stats():
            record["memory_bytes"] = memory.get("bytes_in_use")
            record["memory_peak_bytes"] = memory.get("peak_bytes_in_use")
        self._writer.write("train", step, record)


class Stop:
    """A wish to stop, by SIGTERM or SIGINT; a second signal is not caught."""

    def __init__(self) -> None:
        self.name = ""

    def listening(self) -> Any:
        """Returns a context in which the signals are caught."""
        return _Handlers(self)

    def asked(self, step: int) -> bool:
        """Returns whether to stop after `step`: in all processes or in none."""
        if jax.process_count() > 1:
            wanted = (
                multihost_utils.process_allgather(np.bool_(self.name))
                if due(step, 1)
                else ()
            )
            if np.any(wanted) and not self.name:
                self.name = "a signal to another process"
        return bool(self.name)


class _Handlers:
    def __init__(self, stop: Stop):
        self._stop = stop
        self._old: dict[int, Any] = {}

    def _caught(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._stop.name = signal.Signals(number).name
        signal.signal(number, self._old[number])

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._caught)

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


class terminal_and_files:  # noqa: N801  used like contextlib.closing
    """Closes the progress bar and the metrics files, whatever happens."""

    def __init__(self, *things: Any):
        self._things = things

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for thing in self._things:
            thing.close()


def _start(
    prog: Program,
    checkpoints: checkpoint.Checkpoints,
    coder: Tokenizer,
    say: Callable[[str], None],
) -> tuple[TrainState, int, int]:
    """Returns the state to go on from, the next example and the tokens seen."""
    experiment = prog.experiment
    if checkpoints.latest() is None:
        state = train.make_init(prog)(jax.random.key(experiment.train.seed))
        if experiment.train.init_from:
            state = _warm(prog, state, experiment.train.init_from, say)
        return state, 0, 0
    stored = checkpoints.read_run()
    resume.same_tokenizer(stored.meta["tokenizer"], coder)
    changed = resume.changes(stored.meta["config"], experiment)
    state, found = checkpoints.restore(train.abstract_state(prog))
    step, meta = found.step, found.meta
    say(f"resuming from step {step} of {experiment.train.steps}")
    for line in changed:
        say(f"  changed: {line}")
    return state, meta["examples"], meta["tokens"]


def _warm(
    prog: Program, state: TrainState, source: str, say: Callable[[str], None]
) -> TrainState:
    """Returns `state` with the weights of another run's checkpoint."""
    with_params = {"params": train.abstract_state(prog).params}
    loaded, found = restore_from(source, with_params)
    say(f"starting from the weights of {source}, step {found.step}")
    return dataclasses.replace(state, params=loaded["params"])


def restore_from(source: str, target: Any) -> tuple[Any, checkpoint.Run]:
    """Restores arrays from a work directory, its checkpoint folder, or one step in it."""
    path = epath.Path(source)
    step = int(path.name) if path.name.isdigit() else None
    folder = path.parent if step is not None else path
    if (folder / CHECKPOINTS).exists():
        folder = folder / CHECKPOINTS
    store = checkpoint.Checkpoints(os.fspath(folder), read_only=True)
    return store.restore(target, step, partial=True)


def _batches(
    prog: Program, dataset: Any, examples: int, step: int
) -> Iterator[dict[str, jax.Array]]:
    sharding_BT, data = prog.batch_sharding(), prog.experiment.data
    host = loader.batches(
        dataset,
        sizes=prog.experiment.train.batch_at,
        rows=lambda size: loader.local_rows(sharding_BT, size),
        start=examples,
        step=step,
        threads=data.threads,
        prefetch=data.prefetch,
    )
    for batch in host:
        yield loader.to_devices(batch, sharding_BT)


def _samples(
    prog: Program, state: TrainState, coder: Tokenizer, workdir: str, primary: bool
) -> None:
    wanted = prog.experiment.generate
    texts = generate.texts(prog, state.params, coder, wanted.prompts, wanted, _say)
    if not primary:
        return
    lines = [
        f"{prompt}{text}"
        for prompt, some in zip(wanted.prompts, texts, strict=True)
        for text in some
    ]
    joined = f"\n{'─' * 60}\n".join(lines)
    (epath.Path(workdir) / "samples.txt").write_text(joined + "\n")
    print(joined)


def _write_config(experiment: Experiment, workdir: str) -> None:
    path = epath.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config.to_json(experiment), indent=2) + "\n")


def _describe(prog: Program) -> str:
    mesh, devices = prog.layout.mesh, jax.devices()
    axes = (
        " x ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1) or "one device"
    )
    count = sum(math.prod(s.shape) for s in prog.shapes.values())
    used = mesh.devices.size
    of = "" if used == len(devices) else f" of {len(devices)}"
    return (
        f"{prog.experiment.name}: {count / 1e6:.1f} M parameters on {used}{of} "
        f"{devices[0].device_kind} ({axes})"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    del line
