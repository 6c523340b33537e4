"""What is known of an experiment on a mesh before any array exists."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lm import config, executables, optim, sharding, trees
from lm.experiment import Experiment
from lm.models import chunk, kinds, stack, timetable
from lm.models.model import STACK, Model

Params = dict[str, Any]

# 2026-11: of an all-gather whose devices cut their own share out again, which an earlier pass does
# not always find, this pass of XLA for GPUs makes zeros (openxla/xla pull request 45218).
WRONG_PASS = "all-gather-to-collective-permute-simplifier"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """An experiment on a mesh: its model, where everything lives, its optimizer."""

    experiment: Experiment
    layout: sharding.Layout
    structure: Any  # tree structure of the model, with its static parts
    shapes: dict[
        str, jax.ShapeDtypeStruct
    ]  # of parameters by path, in the model's order
    axes: dict[str, tuple[str, ...]]  # their logical axes
    specs: dict[str, P]  # where they are stored
    updates: dict[
        str, P
    ]  # where they are updated: `specs`, split over data too by ZeRO-1
    working: dict[str, P]  # where a step computes with them: `specs`, or gathered
    optimizer: optax.GradientTransformationExtraArgs
    rate: Callable[[Any], Array]  # learning rate by step
    stacks: dict[str, chunk.Places]  # which layer lies in which place of which stage

    @property
    def chunks(self) -> chunk.Places:
        """The places of the stack that every model has."""
        return self.stacks[STACK]

    @property
    def places(self) -> np.ndarray:
        """int [P, v, l]: the layer in each place, -1: none."""
        return self.chunks.layers

    def model(self, params: Params) -> Model:
        """Returns the model with these parameters."""
        flat = trees.flatten(params)
        return jax.tree.unflatten(self.structure, [flat[path] for path in self.shapes])

    def sharding(self, spec: P) -> jax.sharding.NamedSharding:
        """Returns the NamedSharding of `spec` on this mesh."""
        return sharding.shard(self.layout, spec)

    @property
    def staged(self) -> bool:
        """Whether the layers lie on the stages of a pipeline."""
        return len(self.places) > 1

    @property
    def whole(self) -> bool:
        """Whether stored weights are gathered, and held so with their gradients, once a step."""
        return self.working != self.specs

    @property
    def copies(self) -> tuple[str, ...]:
        """Logical axes whose devices each add up a gradient of all that they compute with."""
        return ("replica", "embed") if self.whole else ("replica",)

    @property
    def unused(self) -> list[str]:
        """Lines on settings of the pipeline that do nothing on this mesh."""
        chosen, usual = self.experiment.pipeline, timetable.Pipeline()
        fields = [f.name for f in dataclasses.fields(chosen)]
        changed = {
            name: f"pipeline.{name}={getattr(chosen, name)}"
            for name in fields
            if getattr(chosen, name) != getattr(usual, name)
        }
        if changed and not self.staged:
            return [f"mesh.pipe=1: {', '.join(changed.values())} not used"]
        if "gather" in changed and not self.whole:
            return [f"mesh.fsdp=1: {changed['gather']} not used, nothing is gathered"]
        return []

    @property
    def packed(self) -> bool:
        """Whether a row may hold several segments."""
        return self.experiment.data.isolate

    @property
    def microbatches(self) -> int:
        """Microbatches of a pipeline; 1 without stages."""
        return self.experiment.pipeline.count(len(self.places)) if self.staged else 1

    @property
    def eval_microbatches(self) -> int:
        """Microbatches of an evaluation batch: as many as there are rows for, up to those."""
        rows = self.experiment.eval_size() // self.layout.size("batch")
        group = 1 if self.experiment.pipeline.rounds == 1 else len(self.places)
        fits = (n for n in range(group, self.microbatches + 1, group) if rows % n == 0)
        return max(fits, default=0)

    def rows(self, path: str) -> np.ndarray:
        """Returns int [P, v, n]: which row of a stacked parameter, in the order of layers, lies
        where in memory; -1: none."""
        return self._places(path).rows(_stack(self._places(path), path))

    def layers(self, path: str) -> list[int]:
        """Returns the numbers of a stacked parameter's layers."""
        return self._places(path).stacks[_stack(self._places(path), path)]

    def stacked(self, path: str) -> bool:
        """Returns whether the parameter is one of a stack: its rows are layers."""
        return _name(path) in self.stacks

    def _places(self, path: str) -> chunk.Places:
        return self.stacks[_name(path)]

    def computed(self, part: str, name: str = STACK) -> list[Any]:
        """Returns the configs of a part (`mixer`, `ffn`) that a device computes one after another:
        of every layer of a stack, or of a chunk's places and all kinds that stages have there."""
        blocks = self.experiment.model.stacks[name]
        if self.staged:
            return self.stacks[name].computed(blocks, part)
        return [getattr(block, part) for block in blocks]

    def use(self, path: str) -> float:
        """Returns how much of a stacked parameter on a device is used at a time."""
        if not self.staged:
            return 1.0
        name, places = _name(path), self._places(path)
        stack_path = _stack(places, path)
        part = (
            path.removeprefix(f"{name}/").removeprefix(f"{stack_path}/").split("/")[0]
        )
        part = "norm" if part.startswith(("norm", "after")) else part
        blocks = self.experiment.model.stacks[name]
        return places.share(blocks, stack_path, part) / places.layers.shape[1]

    @property
    def ordered(self) -> bool:
        """Whether every row of the stacks lies in memory in the order of layers."""
        rows = (self.rows(path).ravel() for path in self.axes if self.stacked(path))
        return all(np.array_equal(r, np.arange(len(r))) for r in rows)

    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Returns the sharding of a [B, T] batch."""
        with sharding.use(self.layout):
            return self.sharding(sharding.spec("batch", "length"))

    def compiled(self, f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compiles `f` for this mesh; calling it needs no context.

        `ready` returns the executable for some arguments, from an earlier process if there was one:
        for functions that depend on nothing but this program.
        """
        if self.layout.platform == "gpu":
            options["compiler_options"] = {"xla_disable_hlo_passes": WRONG_PASS}
        jitted = jax.jit(f, **options)

        def call(*args: Any) -> Any:
            with sharding.use(self.layout):
                return jitted(*args)

        def lower(*args: Any) -> Any:
            with sharding.use(self.layout):
                return jitted.lower(*args)

        def shapes(*args: Any) -> Any:
            with sharding.use(self.layout):
                return jax.tree.map(self.abstract, jitted.eval_shape(*args))

        def ready(*args: Any) -> Callable[..., Any]:
            made_from = {
                "function": f"{f.__module__}.{f.__qualname__}",
                "options": str(options),
                "experiment": json.dumps(config.to_json(self.experiment)),
                "mesh": str(self.layout.mesh),
            }
            devices: Any = self.layout.mesh.devices
            devices = list(devices.flat)
            return executables.ready(
                lambda: lower(*args).compile(), args, devices, made_from
            )

        call.ready = ready  # type: ignore[attr-defined]
        call.lower = lower  # type: ignore[attr-defined]
        call.shapes = shapes  # type: ignore[attr-defined]
        return call

    def abstract(self, x: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape and sharding, on this mesh, of what a trace gave."""
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(spec))


def program(experiment: Experiment, layout: sharding.Layout) -> Program:
    """Builds the abstract model, its shardings and its optimizer; allocates nothing.

    Raises:
        ConfigError: a dimension that the mesh does not divide, or an optimizer that does not fit.
    """
    experiment.fit(layout)
    stages = layout.size("layers")
    rounds = experiment.pipeline.rounds if stages > 1 else 1
    stacks = {
        name: _placed(name, blocks, stages, rounds)
        for name, blocks in experiment.model.stacks.items()
    }
    structure, params = _abstract(experiment.model)
    with sharding.use(layout):
        axes = {
            path: ("layers",) * (len(p.shape) - len(p.axes)) + p.axes
            for path, p in params.items()
        }
        shapes = {
            path: jax.ShapeDtypeStruct(_stored(path, p.shape, stacks), p.dtype)
            for path, p in params.items()
        }
        specs = working = {
            path: sharding.storage(path, x.shape, axes[path])
            for path, x in shapes.items()
        }
        if stages > 1 and experiment.pipeline.gather == "step":
            with sharding.mapped("replica", "embed"):
                working = {
                    path: sharding.storage(path, x.shape, axes[path])
                    for path, x in shapes.items()
                }
    updates = specs
    if experiment.mesh.zero1:
        updates = {
            path: _zero1(layout, shapes[path], spec) for path, spec in specs.items()
        }
    return Program(
        experiment=experiment,
        layout=layout,
        structure=structure,
        shapes=shapes,
        axes=axes,
        specs=specs,
        updates=updates,
        working=working,
        optimizer=optim.build(experiment.optim, experiment.train.steps, axes),
        rate=optim.schedule(experiment.optim, experiment.train.steps),
        stacks=stacks,
    )


def varied(prog: Program, experiment: Experiment) -> Program:
    """Returns the program of an experiment that differs from that of `prog` in nothing but
    `model.remat`, `train.accumulate`, `pipeline.microbatches` and what does not concern programs.

    Raises:
        ConfigError: as of `program`.
    """
    experiment.fit(prog.layout)
    structure, _ = _abstract(experiment.model)
    return dataclasses.replace(prog, experiment=experiment, structure=structure)


@functools.lru_cache(maxsize=16)
def _abstract(model: kinds.Config) -> tuple[Any, dict[str, nnx.Param]]:
    """Returns the model's tree structure and its abstract parameters by path: of no mesh."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use(sharding.abstract_layout(sharding.MeshConfig(), 1)):
        abstract = jax.eval_shape(functools.partial(build, model), key)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=lambda x: isinstance(x, nnx.Param)
    )
    params = {_path(keys): leaf for keys, leaf in leaves}
    return jax.tree.structure(abstract), params


def _placed(
    name: str, blocks: Sequence[stack.Block.Config], stages: int, rounds: int
) -> chunk.Places:
    """Returns where the layers of a stack lie."""
    setting = "model.layers" if name == STACK else f"model.{name}_layers"
    places = timetable.placement(len(blocks), stages, rounds, setting)
    return chunk.Places(places, stack.entries(blocks))


def _stored(
    path: str, shape: tuple[int, ...], stacks: dict[str, chunk.Places]
) -> tuple[int, ...]:
    """Returns the shape in memory: stacked parameters have a row for every place of a layer."""
    places = stacks.get(_name(path))
    if places is None or len(places.layers) == 1:
        return shape
    return (places.rows(_stack(places, path)).size, *shape[1:])


def _name(path: str) -> str:
    """Returns the name of the stack, or of what else, that a parameter belongs to."""
    return path.split("/")[0]


def _stack(places: chunk.Places, path: str) -> str:
    """Returns the path, among the layers of a name, of the stack that has a parameter."""
    own = path.removeprefix(f"{_name(path)}/")
    return next(s for s in places.stacks if own.startswith(f"{s}/" if s else ""))


def build(config: kinds.Config, key: Array) -> Model:
    return kinds.build(config, nnx.Rngs(params=key))


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _zero1(layout: sharding.Layout, shape: jax.ShapeDtypeStruct, spec: P) -> P:
    """Adds the replica axis to the first dimension that it divides (ZeRO stage 1)."""
    extra = layout.axes("replica")
    if not extra:
        return spec
    entries: Any = [*spec, *[None] * (len(shape.shape) - len(spec))]
    for i, entry in enumerate(entries):
        over: tuple[str, ...] = sharding.names(entry) + extra
        if shape.shape[i] % math.prod(layout.mesh.shape[a] for a in over) == 0:
            entries[i] = over[0] if len(over) == 1 else over
            return P(*entries)
    return spec
