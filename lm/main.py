"""The entry point: python -m lm.main --experiment=NAME [--mode=train|eval|generate|…]."""

import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence

from lm import heap
from lm.terminal import Stopwatch

WATCH = Stopwatch()  # before the slow imports, which it times
heap.keep()
heap.take()
gc.disable()  # imports leave no garbage, and it would be looked for a hundred times

import flax  # noqa: E402
import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from etils import epath  # noqa: E402

from lm import (  # noqa: E402
    batches,
    checkpoint,
    config,
    evaluate,
    generate,
    hosts,
    loop,
    sharding,
    train,
)
from lm import experiment as experiments  # noqa: E402
from lm.config import ConfigError  # noqa: E402
from lm.convert import work  # noqa: E402
from lm.data import tokenizer  # noqa: E402
from lm.data.chat import Chat  # noqa: E402
from lm.experiment import Experiment  # noqa: E402
from lm.hosts import FAILED, WRONG_USE  # noqa: E402
from lm.log import RunError  # noqa: E402
from lm.lookout import Lookout  # noqa: E402
from lm.models import kinds  # noqa: E402
from lm.plan import run as plan  # noqa: E402

gc.freeze()  # modules stay
gc.enable()
WATCH.mark("imports")

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MODES = ("train", "eval", "generate", "prepare", "import", "export", "plan")

_EXPERIMENT = flags.DEFINE_string("experiment", "", "Name of a file in experiments/.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where the run lives; default: runs/EXPERIMENT."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "path=value: changes a field of the experiment."
)
_PRINT = flags.DEFINE_bool(
    "print_config", False, "Print the resolved experiment and exit."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue, for --mode=generate."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")
_CPUS = flags.DEFINE_integer("cpu_devices", None, "Emulate so many devices on the CPU.")
_FROM = flags.DEFINE_string(
    "from", "", "A Hugging Face directory or GGUF file, for --mode=import."
)
_TO = flags.DEFINE_string("to", "", "A directory to write, for --mode=export.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Prompts are what a user says, by the model's chat template."
)
_TARGET = flags.DEFINE_string(
    "target", "", "Devices to plan for, like v5p:4x4x4, h100:8x8, cpu:8 or here."
)
_DEPTH = flags.DEFINE_string(
    "depth", "model", "How deep --mode=plan looks: types, model or compile."
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "With --mode=plan: rank meshes, remat, microbatches, schedules."
)
_PRICE = flags.DEFINE_float(
    "price_per_chip_hour", None, "What a chip costs for an hour, for --mode=plan."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0 of several; auto: ask the cluster."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes run together.")
_PROCESS = flags.DEFINE_integer("process_id", None, "The number of this one, from 0.")


def main(argv: Sequence[str]) -> None:
    """Runs one mode and exits with its code."""
    try:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; options begin with --")
        sys.exit(_run())
    except (ConfigError, RunError, checkpoint.CheckpointError, OSError) as error:
        code, line = _told(error)
        if not line:
            raise
        print(f"lm: {line}", file=sys.stderr)
        sys.exit(code)


def _told(error: Exception) -> tuple[int, str]:
    """Returns the exit code and the line for an error; no line for one of the program."""
    if isinstance(error, ConfigError):
        return WRONG_USE, str(error)
    if isinstance(error, RunError | checkpoint.CheckpointError):
        return FAILED, str(error)
    if isinstance(error, OSError) and (error.filename or error.errno in DISK):
        where = error.filename or f"a file of the run in {_workdir()}"
        return FAILED, f"{where}: {error.strerror}"
    return FAILED, ""


def _run() -> int:
    if _MODE.value not in MODES:
        hint = config.nearest(_MODE.value, MODES)
        raise ConfigError(
            f"--mode={_MODE.value}: expected one of {', '.join(MODES)}{hint}"
        )
    hosts.check(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    experiment, base = _resolve()
    if _PRINT.value:
        _print_config(experiment, base)
        return loop.DONE
    _configure(experiment)
    if _MODE.value in ("train", "eval", "prepare"):
        kinds.untrained(experiment.model)
    modes = {
        "train": _train,
        "eval": _eval,
        "generate": _generate,
        "prepare": _prepare,
        "import": _import,
        "export": _export,
        "plan": _plan,
    }
    lookout = Lookout(_workdir(), experiment.train.heartbeat_seconds)
    try:
        with lookout:
            lookout.agree(config.flatten(experiment))
            return modes[_MODE.value](experiment, _workdir(), lookout)
    except Exception as error:
        if lookout.several:
            _fail_together(lookout, error)
        raise


def _fail_together(lookout: Lookout, error: Exception) -> None:
    """Ends one of several processes; jax would wait at the exit for the others."""
    code, line = _told(error)
    if not isinstance(error, ConfigError | RunError):
        lookout.explain()
    if not line:
        traceback.print_exception(error)
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"lm: {line}", file=sys.stderr, flush=True)
    lookout.fail(line)
    sys.stdout.flush()
    os._exit(code)


def _workdir() -> str:
    return _WORKDIR.value or f"runs/{_EXPERIMENT.value}"


def _resolve() -> tuple[Experiment, Experiment]:
    """Returns the experiment with the overrides, and as it was before them."""
    stored = epath.Path(_workdir()) / "config.json"
    _need_folders()
    if _MODE.value == "import":
        base = work.experiment(_FROM.value, _workdir())
        return config.override(base, _SET.value), base
    alone = _MODE.value == "train" and not _EXPERIMENT.value and stored.exists()
    reads = _MODE.value in ("eval", "generate", "export")
    if (reads and (_WORKDIR.value or _EXPERIMENT.value)) or alone:
        if not stored.exists():
            raise ConfigError(
                f"{stored.parent} has no config.json: nothing was trained there"
            )
        try:
            base = experiments.stored(json.loads(stored.read_text()), str(stored))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{stored} is not JSON ({error}); --mode=train writes it anew"
            ) from error
        if _EXPERIMENT.value not in ("", base.name):
            raise ConfigError(
                f"{stored.parent} holds a run of {base.name}, not of {_EXPERIMENT.value}"
            )
    elif _EXPERIMENT.value:
        base = experiments.load(_EXPERIMENT.value)
    else:
        known = ", ".join(experiments.names())
        raise ConfigError(f"--experiment=NAME is missing; there are: {known}")
    return config.override(base, _SET.value), base


def _need_folders() -> None:
    """Checks that flags which belong to a mode are there with it, and with no other."""
    for mode, flag in (("import", _FROM), ("export", _TO)):
        if (_MODE.value == mode) != bool(flag.value):
            verb = "needs" if not flag.value else "is the mode for"
            raise ConfigError(f"--mode={mode} {verb} --{flag.name}=DIR")
    if _MODE.value == "import" and not _WORKDIR.value:
        raise ConfigError(
            "--mode=import needs --workdir=DIR, where the model will live"
        )
    for flag, modes in (
        *((f, ("generate",)) for f in (_CHAT, _PROMPT)),
        *((f, ("plan",)) for f in (_TARGET, _DEPTH, _SEARCH, _PRICE)),
        (_STEP, ("eval", "generate", "export")),
        (_EXPERIMENT, [m for m in MODES if m != "import"]),
    ):
        if flag.value != flag.default and _MODE.value not in modes:
            named = ", ".join(modes)
            raise ConfigError(f"--{flag.name} is for --mode={named}, not {_MODE.value}")


def _print_config(experiment: Experiment, base: Experiment) -> None:
    for path, value in config.flatten(experiment).items():
        print(f"{path}={value}")
    print(f"\ndiffers from {base.name}:")
    for path, old, new in config.diff(base, experiment):
        print(f"  {path}: {old} → {new}")


def _configure(experiment: Experiment) -> None:
    """Sets jax up, before it looks for devices."""
    logging.set_verbosity(logging.WARNING)
    flax.config.update("nnx_graph_mode", False)
    flax.config.update("nnx_graph_updates", False)
    # An executable for several CPU devices that comes from the cache has lost the order of its
    # collectives, which then wait for each other for ever (jaxlib 0.10.2 and 0.12.0).
    if (_CPUS.value or 1) == 1:
        cache = experiment.train.compilation_cache or "~/.cache/lm/jax"
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if experiment.train.deterministic:
        flag = " --xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    if _MODE.value == "plan" and _TARGET.value != "here":
        jax.config.update("jax_platforms", "cpu")  # no other device is looked for
    if _CPUS.value is not None:
        if _CPUS.value < 1:
            raise ConfigError(f"--cpu_devices={_CPUS.value}: expected 1 or more")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPUS.value)
    if _COORDINATOR.value or _CPUS.value:
        # Programs in flight together on CPU devices may meet in collectives of different
        # programs, and wait for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if _COORDINATOR.value:
        hosts.connect(
            *(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
            wait=experiment.train.connect_seconds,
            heartbeat=experiment.train.heartbeat_seconds,
        )
    if experiment.train.require_accelerator and jax.default_backend() == "cpu":
        raise ConfigError(
            "train.require_accelerator: jax found only a CPU; install the cuda or tpu extra and "
            "check the driver, or set train.require_accelerator=false"
        )


def _train(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    return loop.run(experiment, workdir, WATCH, lookout)


def _prepare(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del workdir, lookout
    objective, data = experiment.objective, experiment.data
    coder = batches.tokenizer(objective, data, experiment.model.vocab_size)
    parts = {
        "train": batches.stores(objective, data, coder),
        **evaluate.stores(experiment, coder),
    }
    for name, some in parts.items():
        print(
            f"{name}: {sum(part.tokens for part in some):,} tokens in {len(some)} store(s)"
        )
    return loop.DONE


def _restored(
    experiment: Experiment, workdir: str
) -> tuple[train.Program, dict, tokenizer.Tokenizer, int]:
    """Returns the program, the weights, the tokenizer and the step of a checkpoint."""
    prog = train.program(experiment, sharding.make_layout(experiment.mesh))
    if jax.process_index() == 0:
        for line in prog.unused:
            _say(line)
    state = train.abstract_state(prog)
    averaged = state.ema is not None and experiment.eval.use_ema
    key = "ema" if averaged else "params"
    source = (
        workdir
        if _STEP.value is None
        else f"{workdir}/{checkpoint.FOLDER}/{_STEP.value}"
    )
    target = train.saved(prog, {key: state.params})
    kept, step = checkpoint.found_at(source)
    arrays, found = kept.restore(target, step, partial=True)
    params = train.loaded(prog, arrays)[key]
    return prog, params, tokenizer.from_files(found.files), found.step


def _eval(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del lookout
    prog, params, coder, step = _restored(experiment, workdir)
    eval_step = train.make_eval_step(prog)
    parts = evaluate.stores(experiment, coder)
    for chosen in experiment.eval.sets:
        some = parts[chosen.name]
        values = evaluate.of_set(
            *(prog, eval_step, params, some, chosen, coder, workdir),
            _say if jax.process_index() == 0 else _silent,
        )
        if jax.process_index() == 0:
            print(
                json.dumps({"step": step, "kind": "eval", "set": chosen.name, **values})
            )
    return loop.DONE


def _generate(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del lookout
    prompts = _PROMPT.value or list(experiment.generate.prompts) or [""]
    prog, params, coder, _ = _restored(experiment, workdir)
    if _CHAT.value:
        coder = Chat(coder)
    texts = generate.texts(prog, params, coder, prompts, experiment.generate, _say)
    if jax.process_index() == 0:
        print(*generate.shown(prog, prompts, texts), sep="\n")
    return loop.DONE


def _import(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del lookout
    work.bring_in(experiment, _FROM.value, workdir, _say)
    return loop.DONE


def _export(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del lookout
    prog, params, coder, _ = _restored(experiment, workdir)
    plain = train.saved(prog, params)
    work.send_out(experiment, plain, coder, _TO.value, workdir, prog, _say)
    return loop.DONE


def _plan(experiment: Experiment, workdir: str, lookout: Lookout) -> int:
    del lookout
    plan.run(
        experiment,
        workdir,
        tuple(_SET.value),
        name=_TARGET.value,
        depth=_DEPTH.value,
        searching=_SEARCH.value,
        price=_PRICE.value,
        say=_say,
    )
    return loop.DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _silent(line: str) -> None:
    del line


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        line = " ".join(str(error).split())
        print(f"lm: {line}", file=sys.stderr)
        sys.exit(WRONG_USE)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
