"""The train state and the steps on it: pure functions, compiled once, sharded by types.

Shapes: B global batch, A microbatches a step, R data replicas, T length.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array

from lm import objectives, optim, sharding, trees
from lm.experiment import Experiment
from lm.models.transformer import Transformer
from lm.nn.layers import dropout_keys

Params = dict[str, Any]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; donated to it."""

    step: Any  # int32[]: steps done; any leaf may be abstract
    params: Params
    opt_state: Any
    ema: Params | None  # averaged parameters, where optim.ema asks for them
    health: dict[str, Any]  # running statistics of losses and skipped steps


jax.tree_util.register_dataclass(
    TrainState, ["step", "params", "opt_state", "ema", "health"], []
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is known of an experiment on a mesh before any array exists."""

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
    optimizer: optax.GradientTransformationExtraArgs
    rate: Callable[[Any], Array]  # learning rate by step

    def model(self, params: Params) -> Transformer:
        """Returns the model with these parameters."""
        flat = trees.flatten(params)
        return jax.tree.unflatten(self.structure, [flat[path] for path in self.shapes])

    def sharding(self, spec: P) -> jax.sharding.NamedSharding:
        """Returns the NamedSharding of `spec` on this mesh."""
        return sharding.shard(self.layout, spec)

    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Returns the sharding of a [B, T] batch."""
        with sharding.use(self.layout):
            return self.sharding(sharding.spec("batch", "length"))


def program(experiment: Experiment, layout: sharding.Layout) -> Program:
    """Builds the abstract model, its shardings and its optimizer; allocates nothing.

    Raises:
        ConfigError: a dimension that the mesh does not divide, or an optimizer that does not fit.
    """
    experiment.fit(layout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use(layout):
        abstract = jax.eval_shape(functools.partial(_build, experiment.model), key)
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            abstract, is_leaf=lambda x: isinstance(x, nnx.Param)
        )
        params = {_path(keys): leaf for keys, leaf in leaves}
        axes = {
            path: ("layers",) * (len(p.shape) - len(p.axes)) + p.axes
            for path, p in params.items()
        }
        specs = {
            path: sharding.storage(path, p.shape, axes[path])
            for path, p in params.items()
        }
    shapes = {
        path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in params.items()
    }
    updates = specs
    if experiment.mesh.zero1:
        updates = {
            path: _zero1(layout, shapes[path], spec) for path, spec in specs.items()
        }
    return Program(
        experiment=experiment,
        layout=layout,
        structure=jax.tree.structure(abstract),
        shapes=shapes,
        axes=axes,
        specs=specs,
        updates=updates,
        optimizer=optim.build(experiment.optim, experiment.train.steps, axes),
        rate=optim.schedule(experiment.optim, experiment.train.steps),
    )


def _build(config: Transformer.Config, key: Array) -> Transformer:
    return Transformer(config, nnx.Rngs(params=key))


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


def _placed(params: Params, specs: dict[str, P]) -> Params:
    """Moves every parameter-like leaf to its spec."""
    flat = trees.flatten(params)
    return trees.nest({path: reshard(x, specs[path]) for path, x in flat.items()})


def make_init(prog: Program) -> Callable[[Array], TrainState]:
    """Returns the compiled function from a PRNG key to the state before the first step.

    Every device computes only its own shards; parameters are bitwise the same on every mesh.
    """

    def init(key: Array) -> TrainState:
        leaves = jax.tree.leaves(_build(prog.experiment.model, key))
        flat = dict(zip(prog.shapes, leaves, strict=True))
        params = _placed(trees.nest(flat), prog.specs)
        averaged = prog.experiment.optim.ema is not None
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=prog.optimizer.init(_placed(params, prog.updates)),
            ema=optim.ema_init(_placed(params, prog.updates)) if averaged else None,
            health=optim.health_init(),
        )

    return _compiled(prog, init)


def abstract_state(prog: Program) -> TrainState:
    """Returns the state's shapes, dtypes and shardings."""
    state = make_init(prog).shapes(jax.random.key(0))  # type: ignore[attr-defined]

    def place(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=prog.sharding(spec))

    return jax.tree.map(place, state)


def make_train_step(
    prog: Program,
) -> Callable[[TrainState, objectives.Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled step; its state argument is donated.

    Metrics: `loss` (nats a scored token, with z-loss and smoothing), sums `nll`, `tokens`,
    `bytes` and those of the layers (see `Moe`), and `grad_norm`, `learning_rate`, `skipped`
    (steps so far), `consecutive`.
    """
    config = prog.experiment.optim

    def train_step(
        state: TrainState, batch: objectives.Batch
    ) -> tuple[TrainState, Metrics]:
        count = jnp.maximum(batch["weights"].sum(), 1)
        sums, grads = gradients(prog, state.params, batch, state.step, count)
        grads = _placed(
            grads, prog.updates
        )  # reduce over data, with ZeRO-1 each its share
        params: Any = _placed(state.params, prog.updates)
        norm = optim.global_norm(grads, optim.frozen(config, prog.axes))
        ok, health = optim.judge(config.guard, state.health, sums["loss"], norm)

        updates, opt_state = prog.optimizer.update(
            grads, state.opt_state, params, step=state.step
        )
        params = optax.apply_updates(params, updates)
        params = _rebalanced(prog, params, sums)  # type: ignore[arg-type]
        ema = state.ema
        if config.ema is not None:
            ema = optim.ema_update(config.ema, ema, params, state.step)
        params = _placed(params, prog.specs)  # all-gather over data under ZeRO-1
        new = (params, opt_state, ema)
        kept = jax.tree.map(
            lambda a, b: jnp.where(ok, a, b),
            new,
            (state.params, state.opt_state, state.ema),
        )
        metrics = {
            **sums,
            "grad_norm": norm,
            "learning_rate": prog.rate(state.step),
            "skipped": health["skipped"],
            "consecutive": health["consecutive"],
        }
        params, opt_state, ema = kept
        return TrainState(state.step + 1, params, opt_state, ema, health), metrics

    return _compiled(prog, train_step, donate_argnums=0)


def _rebalanced(prog: Program, params: Params, sums: Metrics) -> Params:
    """Moves the biases of a router's choice: up where an expert had less than the mean load.

    Once a step and by the load of the whole batch, so that nothing depends on its layout.
    """
    paths = optim.balanced(prog.experiment.optim, prog.axes)
    if not paths:
        return params
    flat = trees.flatten(params)
    for path in paths:
        model: Any = prog.experiment.model
        load = sums["moe_load_LE"][np.asarray(model.sparse)].astype(jnp.float32)
        short = jnp.sign(load.mean(1, keepdims=True) - load)
        step = reshard(model.ffn.gate.rate * short, prog.updates[path])
        flat[path] = flat[path] + step
    return trees.nest(flat)


def make_eval_step(prog: Program) -> Callable[[Params, objectives.Batch], Metrics]:
    """Returns the compiled function from parameters and a batch to the sums of its scores."""

    def eval_step(params: Params, batch: objectives.Batch) -> Metrics:
        plain = dataclasses.replace(
            prog.experiment.objective, z_loss=0.0, label_smoothing=0.0
        )
        _, sums = objectives.causal(
            plain, prog.model(params), batch, None, _packed(prog)
        )
        return sums

    return _compiled(prog, eval_step)


def average_of(prog: Program, state: TrainState) -> Params:
    """Returns the average of one state alone: its parameters, where averages are kept."""
    place = functools.partial(_placed, specs=prog.updates)
    return _compiled(prog, lambda params: optim.ema_init(place(params)))(state.params)


def evaluated(prog: Program, state: TrainState) -> Params:
    """Returns the weights to evaluate: the averaged ones where they are kept and wanted."""
    if state.ema is None or not prog.experiment.eval.use_ema:
        return state.params
    return _compiled(prog, functools.partial(_placed, specs=prog.specs))(state.ema)


def gradients(
    prog: Program, params: Params, batch: objectives.Batch, step: Array, count: Array
) -> tuple[Metrics, Params]:
    """Returns the batch's sums (`loss` divided by `count`) and the gradient of that loss.

    With A microbatches the gradients of each data replica add up on their own, in fp32; they are
    reduced over data once, by the last sum.
    """
    experiment, layout = prog.experiment, sharding.current()

    def loss(params: Params, batch: objectives.Batch) -> tuple[Array, Metrics]:
        keys = None
        if experiment.model.dropout:
            length = batch["tokens"].shape[1]
            keys = dropout_keys(experiment.train.seed, step, batch["index"], length)
        total, sums = objectives.causal(
            experiment.objective, prog.model(params), batch, keys, _packed(prog)
        )
        return total / count, {**sums, "loss": total / count}

    A = experiment.train.accumulate
    if A == 1:
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return sums, grads

    R = layout.size("replica")
    replica = layout.axes("replica")
    lead = replica[0] if replica else None
    with sharding.replicas():
        rows = sharding.spec("batch")[0]

        def split(x: Array) -> Array:
            """[B, ...] → [A, R, b, ...], every device keeping its own rows."""
            tail = x.shape[1:]
            spec = P(lead, rows, None, *[None] * len(tail))
            x = x.reshape(R, x.shape[0] // R // A, A, *tail, out_sharding=spec)
            return jnp.moveaxis(x, 2, 0)

        def zeros(path: str) -> Array:
            shape, spec = prog.shapes[path].shape, prog.specs[path]
            return jnp.zeros((R, *shape), jnp.float32, out_sharding=P(lead, *spec))

        def add(carry: Params, part: objectives.Batch) -> tuple[Params, Metrics]:
            grad = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0))
            (_, sums), grads = grad(params, part)
            return jax.tree.map(jnp.add, carry, grads), sums

        parts = jax.tree.map(split, batch)
        grads = trees.nest({path: zeros(path) for path in prog.shapes})
        grads, sums = jax.lax.scan(add, grads, parts)
        sums = jax.tree.map(lambda x: x.sum((0, 1)), sums)
        return sums, jax.tree.map(lambda x: x.sum(0), grads)


def _packed(prog: Program) -> bool:
    return prog.experiment.data.isolate


def _compiled(
    prog: Program, f: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """Compiles `f` for the program's mesh; calling it needs no context."""
    jitted = jax.jit(f, **options)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        with sharding.use(prog.layout):
            return jitted(*args)

    def lower(*args: Any) -> Any:
        with sharding.use(prog.layout):
            return jitted.lower(*args)

    def shapes(*args: Any) -> Any:
        with sharding.use(prog.layout):
            return jax.eval_shape(jitted, *args)

    call.lower = lower  # type: ignore[attr-defined]
    call.shapes = shapes  # type: ignore[attr-defined]
    return call
