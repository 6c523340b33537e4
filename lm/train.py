"""The train state and the steps on it: pure functions, compiled once, sharded by types.

Shapes: B global batch, A microbatches a step, R data replicas, T length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array

from lm import batches, gradients, objectives, optim, sharding, stacked, trees
from lm.program import Params, Program, build, program

__all__ = ["Params", "Program", "program"]  # from here, as a script would look for them

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


def _placed(params: Params, specs: dict[str, P]) -> Params:
    """Moves every parameter-like leaf to its spec."""
    flat = trees.flatten(params)
    return trees.nest({path: reshard(x, specs[path]) for path, x in flat.items()})


def make_init(prog: Program) -> Callable[[Array], TrainState]:
    """Returns the compiled function from a PRNG key to the state before the first step.

    Every device computes only its own shards; parameters are bitwise the same on every mesh.
    """

    def init(key: Array) -> TrainState:
        leaves = jax.tree.leaves(build(prog.experiment.model, key))
        flat = trees.nest(dict(zip(prog.shapes, leaves, strict=True)))
        params = _placed(stacked.arranged(prog, flat), prog.specs)
        averaged = prog.experiment.optim.ema is not None
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=prog.optimizer.init(_placed(params, prog.updates)),
            ema=optim.ema_init(_placed(params, prog.updates)) if averaged else None,
            health=optim.health_init(),
        )

    return prog.compiled(init)


def abstract_state(prog: Program) -> TrainState:
    """Returns the state's shapes, dtypes and shardings."""
    return make_init(prog).shapes(jax.random.key(0))  # type: ignore[attr-defined]


def abstract_batch(prog: Program, rows: int | None = None) -> dict[str, Any]:
    """Returns the shapes and shardings of a step's batch, or of one of so many rows."""
    e = prog.experiment
    rows = e.train.batch_size if rows is None else rows
    with sharding.use(prog.layout):
        whole = sharding.spec("batch", "length")

    def of(x: jax.ShapeDtypeStruct) -> Any:
        place = prog.sharding(P(*whole[: 1 + len(x.shape)]))
        return jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=place)

    row = batches.row(e.objective, e.data)
    return {name: of(x) for name, x in row.items()}


def saved(prog: Program, tree: Any) -> Any:
    """Returns a state, or a part of one, as checkpoints hold it: stacks in the order of layers.

    Abstract leaves give abstract ones. Where that is another order, both are held.
    """
    if prog.ordered:
        return tree
    order = prog.compiled(functools.partial(stacked.plain, prog))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return order.shapes(tree)  # type: ignore[attr-defined]
    return order(tree)


def loaded(prog: Program, tree: Any) -> Any:
    """Returns what a checkpoint held as the step wants it; the inverse of `saved`.

    Consumes the tree: arrays that change their order are deleted one by one.
    """
    return tree if prog.ordered else stacked.moved(prog, tree)


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
        sums, grads = gradients.of(prog, state.params, batch, state.step, count)
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

    return prog.compiled(train_step, donate_argnums=0)


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
        load = sums["moe_load_LE"].astype(jnp.float32)
        short = jnp.sign(load.mean(1, keepdims=True) - load)
        short = stacked.rows(prog, path, short)
        step = reshard(model.ffn.gate.rate * short, prog.updates[path])
        flat[path] = flat[path] + step
    return trees.nest(flat)


def make_eval_step(prog: Program) -> Callable[[Params, objectives.Batch], Metrics]:
    """Returns the compiled function from parameters and a batch to the sums of its scores."""

    def eval_step(params: Params, batch: objectives.Batch) -> Metrics:
        plain = objectives.plain(prog.experiment.objective)
        if prog.staged:
            return gradients.scores(prog, plain, params, batch)
        _, sums = objectives.causal(
            plain, prog.model(params), batch, None, prog.packed, graded=True
        )
        return sums

    return prog.compiled(eval_step)


def average_of(prog: Program, state: TrainState) -> Params:
    """Returns the average of one state alone: its parameters, where averages are kept."""
    place = functools.partial(_placed, specs=prog.updates)
    return prog.compiled(lambda params: optim.ema_init(place(params)))(state.params)


def evaluated(prog: Program, state: TrainState) -> Params:
    """Returns the weights to evaluate: the averaged ones where they are kept and wanted."""
    if state.ema is None or not prog.experiment.eval.use_ema:
        return state.params
    return prog.compiled(functools.partial(_placed, specs=prog.specs))(state.ema)
