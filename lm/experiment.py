"""An experiment: everything a run is made of, checked together before anything is allocated."""

import dataclasses
import importlib
import math
import pkgutil
from typing import Any

from lm import batches, config, schedules, sharding
from lm.config import ConfigError, kind, nearest
from lm.data.loader import Data
from lm.data.tokenizer import Bytes
from lm.models import kinds
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.recurrent import Recurrent
from lm.models.timetable import Pipeline
from lm.models.transformer import Transformer
from lm.nn.moe import Moe
from lm.objectives import Causal, refuse
from lm.optim import Optim
from lm.sampling import Generate
from lm.scores import texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How long, on how much at a time, and when to say so."""

    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 32  # sequences a step, over all devices and microbatches
    batch_ramp: tuple[tuple[int, int], ...] = ()  # (until step, batch size), rising
    accumulate: int = 1  # microbatches a step, one after the other
    seed: int = 0  # of initialisation, data order and dropout
    log_every: int = 10  # steps between lines of metrics
    init_from: str = ""  # a checkpoint directory or step to take the weights from
    require_accelerator: bool = False  # fail where jax finds only a CPU
    deterministic: bool = (
        False  # ask XLA for bitwise repeatable GPU kernels, at some cost
    )
    compilation_cache: str = (
        ""  # where compiled programs are kept; "" for ~/.cache/lm/jax
    )

    heartbeat_seconds: int = 100  # without a sign of life a process counts as lost
    connect_seconds: int = 300  # for several processes to find each other

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "accumulate", "log_every"),
            *("heartbeat_seconds", "connect_seconds"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"train.{name}={getattr(self, name)}: expected 1 or more"
                )
        ends = [end for end, _ in self.batch_ramp]
        if ends != sorted(set(ends)) or any(size < 1 for _, size in self.batch_ramp):
            raise ConfigError(
                f"train.batch_ramp={self.batch_ramp}: expected (until step, batch size) pairs "
                "with rising steps and sizes of 1 or more"
            )

    def batch_at(self, step: int) -> int:
        """Returns the sequences of the global batch at a step, counted from 0."""
        return next(
            (size for end, size in self.batch_ramp if step < end), self.batch_size
        )

    def batch_sizes(self) -> list[int]:
        """Returns every batch size of the run."""
        return sorted({size for _, size in self.batch_ramp} | {self.batch_size})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Text to evaluate on."""

    name: str = "valid"
    source: tuple[str, ...] = ()  # like data.source; () for the same
    split: str = "validation"
    batches: int | None = None  # at most so many; None: all of it
    stride: int | None = None  # targets scored a window, the rest is context; None: all

    def __post_init__(self) -> None:
        for name in ("batches", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"eval.sets {self.name!r}: {name}={value}, expected 1 or more, or none"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """What is evaluated and how often."""

    every: int = 200  # steps; 0: only at the end
    batch_size: int | None = None  # sequences; None: train.batch_size
    sets: tuple[EvalSet, ...] = (EvalSet(),)
    scores: tuple[
        texts.Name, ...
    ] = ()  # of texts generated from first texts, see `generate`
    texts: int | None = 200  # of each set, drawn at random once and for all; None: all
    use_ema: bool = True  # evaluate the averaged weights where optim.ema keeps them

    def __post_init__(self) -> None:
        names = [s.name for s in self.sets]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"eval.sets: two sets have the same name ({', '.join(names)})"
            )
        if len(set(self.scores)) < len(self.scores):
            raise ConfigError(f"eval.scores={self.scores}: name each score once")
        if self.texts is not None and self.texts < 1:
            raise ConfigError(f"eval.texts={self.texts}: expected 1 or more, or none")
        if self.every < 0:
            raise ConfigError(f"eval.every={self.every}: expected 0 or more steps")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(
                f"eval.batch_size={self.batch_size}: expected 1 or more, or none"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved and which saves are kept."""

    every: int = 500  # steps; 0: only at the end and when interrupted
    keep: int = 3  # of the newest
    keep_period: int | None = None  # steps; those at its multiples stay for ever

    def __post_init__(self) -> None:
        period = 1 if self.keep_period is None else self.keep_period
        for name, value, least in (
            ("every", self.every, 0),
            ("keep", self.keep, 1),
            ("keep_period", period, 1),
        ):
            if value < least:
                raise ConfigError(
                    f"checkpoint.{name}={value}: expected {least} or more"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole run: model, text, objective, optimizer, mesh, and when to do what."""

    name: str
    about: str = ""  # one line on what it is for
    model: kinds.Config = Transformer.Config()
    data: Data = Data(source=("tfds:lm_text/shakespeare",))
    objective: batches.Objective = Causal()
    optim: Optim = Optim()
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    pipeline: Pipeline = Pipeline()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    generate: Generate = Generate()
    # The devices that it is meant for, see lm/plan/target.py; the first of several counts.
    target: str = "cpu:1"

    def __post_init__(self) -> None:
        positions = self.model.learned
        if positions is not None and positions.length < self.data.length:
            raise ConfigError(
                f"model.positions.length={positions.length} is less than "
                f"data.length={self.data.length}: raise it, or use --set model.positions=Rope"
            )
        refuse(self.objective, self.model)
        if kinds.head(self.model) is not None and self.generate.prompts:
            raise ConfigError(
                f"generate.prompts={self.generate.prompts}: model={kind(type(self.model))} reads "
                "whole texts and continues none; set generate.prompts=()"
            )
        batches.check(self.objective, self.data)
        if self.eval.scores and not isinstance(self.objective, batches.ANSWERED):
            names = " or ".join(kind(c) for c in batches.ANSWERED)
            raise ConfigError(
                f"eval.scores={','.join(self.eval.scores)}: objective="
                f"{kind(type(self.objective))} has no second text to compare with; use "
                f"objective={names}, or set eval.scores=()"
            )
        more = batches.added(self.objective)
        size = 257 + more
        if isinstance(self.data.tokenizer, Bytes) and self.model.vocab_size != size:
            ids = (
                f", {more} more for objective={kind(type(self.objective))}"
                if more
                else ""
            )
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size}: the byte tokenizer has 257 tokens"
                f"{ids}; set model.vocab_size={size}"
            )
        if isinstance(self.model, Recurrent.Config):
            window, length = self.model.mixer.window, self.data.length
            if window is not None and window > length:
                raise ConfigError(
                    f"model.mixer.window={window}: rows have data.length={length} tokens; "
                    f"set model.mixer.window={length} or lower, or none"
                )
        schedules.rate(self.optim.schedule, self.optim.learning_rate, self.train.steps)
        for size in self.train.batch_sizes():
            if size % self.train.accumulate:
                raise ConfigError(
                    f"train.batch_size={size} is not divisible by "
                    f"train.accumulate={self.train.accumulate}; use a multiple of it"
                )

    def _fit_experts(self, devices: int) -> None:
        if devices == 1:
            return
        if not isinstance(self.model.ffn, Moe.Config):
            raise ConfigError(
                f"mesh.expert={devices}: the model has no experts to split; set mesh.expert=1 "
                "and use data or fsdp, or model.ffn=Moe"
            )
        experts = self.model.ffn.experts
        if experts % devices:
            fits = [n for n in range(1, experts + 1) if experts % n == 0]
            below = experts // devices * devices
            near = [str(n) for n in (below, below + devices) if n]
            raise ConfigError(
                f"model.ffn.experts={experts} is not divisible by mesh.expert={devices}; set "
                f"mesh.expert to {' or '.join(map(str, _nearest(fits, devices)))}, or "
                f"model.ffn.experts to {' or '.join(near)}"
            )

    def eval_size(self) -> int:
        """Returns the sequences of an evaluation batch."""
        return self.eval.batch_size or self.train.batch_size

    def fit(self, layout: sharding.Layout) -> None:
        """Checks that batch, length and vocabulary split over the mesh of `layout`.

        Raises:
            ConfigError: one that does not, with the sizes and the fix.
        """
        rows = layout.size("batch")
        axes = " x ".join(f"{a} {layout.mesh.shape[a]}" for a in layout.axes("batch"))
        stages = layout.size("layers")
        micro = self.pipeline.count(stages) if stages > 1 else 1
        for size in self.train.batch_sizes():
            least = rows * self.train.accumulate * micro
            if size % least:
                flow = f", pipeline.microbatches={micro}" if stages > 1 else ""
                raise ConfigError(
                    f"train.batch_size={size} is not divisible by {least} ({axes or 'one device'}, "
                    f"train.accumulate={self.train.accumulate}{flow}); use a multiple of {least}"
                )
        if self.eval_size() % rows:
            raise ConfigError(
                f"eval.batch_size={self.eval_size()} is not divisible by {rows} ({axes}); use a "
                f"multiple of {rows}"
            )
        group = rows * (stages if self.pipeline.rounds > 1 else 1)
        if stages > 1 and self.eval_size() % group:
            raise ConfigError(
                f"eval.batch_size={self.eval_size()} is not divisible by {group} (mesh.pipe="
                f"{stages} in rounds); use a multiple of {group}"
            )
        self._fit_two_stacks(layout)
        self._fit_length(layout)
        if self.model.remat == "offload" and layout.platform == "cpu":
            raise ConfigError(
                "model.remat=offload needs an accelerator whose activations go to host memory; "
                "on a CPU use model.remat=full"
            )
        self._fit_experts(layout.size("expert"))
        rows = layout.size("vocab")
        if self.model.vocab_rows % rows:
            raise ConfigError(
                f"model.vocab_multiple={self.model.vocab_multiple} pads the vocabulary to "
                f"{self.model.vocab_rows} rows, which {rows} devices (tensor x pipe) do not "
                f"divide; set model.vocab_multiple to a multiple of {rows}"
            )

    def _fit_two_stacks(self, layout: sharding.Layout) -> None:
        """Checks what an encoder beside a decoder can be split over."""
        if not isinstance(self.model, EncoderDecoder.Config):
            return
        if layout.size("layers") > 1 and self.pipeline.schedule != "gpipe":
            raise ConfigError(
                f"pipeline.schedule={self.pipeline.schedule}: model=EncoderDecoder has two stacks, "
                "and no backward begins before both are through with all microbatches; set "
                "pipeline.schedule=gpipe"
            )
        length, parts = batches.written(self.objective, self.data), _parts(layout)
        if length % parts:
            axes = ", ".join(
                f"mesh.{a}={layout.mesh.shape[a]}" for a in layout.axes("residual")
            )
            raise ConfigError(
                f"objective={kind(type(self.objective))} has targets of {length} tokens, which "
                f"is not divisible by {parts} ({axes}); use a length that is, or set mesh.seq=1 "
                "and mesh.sequence_parallel=false"
            )

    def _fit_length(self, layout: sharding.Layout) -> None:
        """Checks that rows split over the mesh; context parallelism needs two chunks a device."""
        T, shards, parts = self.data.length, layout.size("length"), _parts(layout)
        if shards > 1 and isinstance(self.model, Recurrent.Config):
            raise ConfigError(
                f"mesh.seq={shards}: a recurrent layer reads a row from beginning to end, so "
                "devices cannot share one; set mesh.seq=1 and use mesh.data, fsdp or tensor"
            )
        if T % parts:
            near = sorted({max(T // parts, 1) * parts, -(-T // parts) * parts})
            axes = " x ".join(
                f"{a} {layout.mesh.shape[a]}" for a in layout.axes("residual")
            )
            why = f"twice mesh.seq={shards}" if shards > 1 else "mesh.sequence_parallel"
            raise ConfigError(
                f"data.length={T} is not divisible by {parts} ({axes}; {why}); set data.length to "
                f"{' or '.join(map(str, near))}"
            )


def _parts(layout: sharding.Layout) -> int:
    """Returns into how many equal parts rows fall; two chunks for each device of a split length."""
    shards, parts = layout.size("length"), layout.size("residual")
    return math.lcm(2 * shards, parts) if shards > 1 else parts


def _nearest(values: list[int], wanted: int) -> list[int]:
    """Returns the largest of the sorted values up to `wanted`, and the one after it."""
    below = [v for v in values if v <= wanted]
    return below[-1:] + values[len(below) : len(below) + 1]


def stored(data: Any, where: str) -> Experiment:
    """Returns the experiment that a run has left as JSON; `where` says where it did.

    Raises:
        ConfigError: it has fields or values that this version does not know.
    """
    try:
        return config.from_json(Experiment, data)
    except ConfigError as error:
        raise ConfigError(
            f"{where} is of another version of lm ({error}); use that version, or take the weights "
            "to another --workdir by --set train.init_from=DIR"
        ) from error


def names() -> list[str]:
    """Returns the names of the experiments in the package `experiments`."""
    package = importlib.import_module("experiments")
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"
    )


def load(name: str) -> Experiment:
    """Returns what `experiments/NAME.py`'s `experiment()` returns.

    Raises:
        ConfigError: there is no such file; the nearest name is suggested.
    """
    if name not in names():
        known = ", ".join(names())
        raise ConfigError(
            f"no experiment {name!r}{nearest(name, names())} (there are: {known})"
        )
    return importlib.import_module(f"experiments.{name}").experiment()
