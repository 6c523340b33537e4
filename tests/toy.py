"""Tiny experiments, batches and runs for the tests. Shapes: B batch, T length, D embed."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from lm import config, sharding, train, trees
from lm.config import ConfigError
from lm.data import loader
from lm.data.loader import Data
from lm.data.tokenizer import Bytes
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.blockwise import Tokens
from lm.nn.ffn import Mlp
from lm.optim import Constant, Optim, Sgd

ROWS, LENGTH, VOCAB = 16, 16, 257
EPS = float(np.finfo(np.float32).eps)

# Every way to lay a model over eight devices that must not change its maths.
MESHES = {
    "data 8": ["mesh.data=8"],
    "fsdp 8": ["mesh.fsdp=8"],
    "data 2 x fsdp 2 x tensor 2": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "data 4 x tensor 2": ["mesh.data=4", "mesh.tensor=2"],
    "data 2 x tensor 4": ["mesh.data=2", "mesh.tensor=4"],
    "data 2 x tensor 4, sequence": [
        "mesh.data=2",
        "mesh.tensor=4",
        "mesh.sequence_parallel=true",
    ],
    "pipe 2 x data 2 x tensor 2": [
        "mesh.pipe=2",
        "mesh.data=2",
        "mesh.tensor=2",
        "pipeline.microbatches=4",
    ],
    "pipe 2 x data 2 x fsdp 2, gpipe": [
        "mesh.pipe=2",
        "mesh.data=2",
        "mesh.fsdp=2",
        "pipeline.schedule=gpipe",
        "pipeline.microbatches=2",
    ],
    "seq 8": ["mesh.data=1", "mesh.seq=8", "model.attention.context=ring"],
    "data 2 x seq 2 x tensor 2": ["mesh.data=2", "mesh.seq=2", "mesh.tensor=2"],
    "fsdp 2 x seq 4": [
        "mesh.data=1",
        "mesh.fsdp=2",
        "mesh.seq=4",
        "model.attention.context=ring",
    ],
    "data 4 x tensor 2, zero1": [
        "mesh.data=4",
        "mesh.tensor=2",
        "mesh.zero1=true",
        "mesh.sequence_parallel=true",
    ],
}

BASE = Experiment(
    name="toy",
    model=Transformer.Config(
        layers=2,
        dim=32,
        heads=4,
        kv_heads=2,
        vocab_size=VOCAB,
        vocab_multiple=64,
        attention=Attention.Config(qk_norm=True),
        ffn=Mlp.Config(hidden=64),
    ),
    data=Data(source=("text:none",), length=LENGTH, tokenizer=Bytes()),
    optim=Optim(
        algorithm=Sgd(),
        learning_rate=0.1,
        schedule=Constant(),
        weight_decay=0.0,
        clip_norm=None,
    ),
    mesh=sharding.MeshConfig(data=1),
    train=Train(steps=10, batch_size=ROWS),
)

# The other choices of every part of the model.
CLASSIC = [
    "model.norm=LayerNorm",
    "model.positions=Learned",
    "model.positions.length=16",
    "model.ffn.activation=gelu",
    "model.ffn.bias=true",
    "model.attention.bias=true",
    "model.attention.out_bias=true",
    "model.attention.qk_norm=false",
    "model.kv_heads=4",
]
CAPPED = [
    "model.tied=false",
    "model.ffn.activation=geglu",
    "model.ffn.bias=true",
    "model.attention.softcap=5",
    "model.attention.window=5",
    "model.attention.bias=true",
    "model.head_softcap=4",
    "model.kv_heads=1",
]


def experiment(*sets: str) -> Experiment:
    """Returns the toy experiment with overrides."""
    return config.override(BASE, sets)


def layout(mesh: sharding.MeshConfig) -> sharding.Layout:
    """Returns the layout of as many of the devices as the mesh has places."""
    count = int(np.prod([n for n in mesh.sizes().values() if n > 0]))
    return sharding.make_layout(mesh, jax.devices()[:count])


def program(*sets: str) -> train.Program:
    """Returns the program of the toy experiment with overrides, on emulated devices."""
    chosen = experiment(*sets)
    return train.program(chosen, layout(chosen.mesh))


def batch(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """Returns packed rows of random tokens: up to three documents each, then padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (2, rows, length), np.int32)
    cuts = np.sort(rng.integers(1, length + 1, (rows, 3)), 1)
    segments = (np.arange(length) >= cuts[:, :2, None]).sum(1) + 1
    segments[np.arange(length) >= cuts[:, 2:]] = 0
    segments[: rows // 4] = 1  # some rows are one whole document
    scored = (segments > 0) & (rng.random((rows, length)) > 0.2)
    return {
        "tokens": ids[0],
        "targets": ids[1],
        "segments": segments.astype(np.int32),
        "positions": restart(segments),
        "weights": scored.astype(np.float32),
        "bytes": rng.integers(1, 50, rows).astype(np.int32),
        "index": np.arange(rows, dtype=np.uint32) + np.uint32(1000 * seed),
    }


def pairs(seed: int = 0, rows: int = ROWS, length: int = 12) -> dict[str, Any]:
    """Returns rows of `length` tokens that are written for rows of LENGTH that are read: up to
    three pairs in each, and some that have nothing on one side."""
    read, host = batch(seed + 1, rows), batch(seed, rows, length)
    names = {"inputs": "tokens", "input_segments": "segments"}
    names |= {"input_positions": "positions"}
    return {**host, **{name: read[of] for name, of in names.items()}}


def restart(segments: np.ndarray) -> np.ndarray:
    """Returns positions [B, T] that count from 0 in each run of equal segments."""
    new = np.diff(segments, axis=1, prepend=-1) != 0
    here = np.arange(segments.shape[1])
    return (here - np.maximum.accumulate(np.where(new, here, 0), 1)).astype(np.int32)


def place(prog: train.Program, host: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch on the program's devices."""
    return loader.to_devices(host, prog.batch_sharding())


@functools.cache
def _initial(chosen: Experiment) -> Any:
    prog = train.program(chosen, layout(chosen.mesh))
    return jax.tree.map(np.asarray, train.make_init(prog)(jax.random.key(1)))


def start(prog: train.Program, noise: float = 0.0) -> train.TrainState:
    """Returns the initial state: computed on one device, put where the program wants it.

    With `noise`, parameters are normal numbers of that size instead, around 1 for scales: no bias
    is 0, and nothing is compiled.
    """
    abstract = train.saved(prog, train.abstract_state(prog))
    where = jax.tree.map(lambda x: x.sharding, abstract)
    if not noise:
        one = dataclasses.replace(prog.experiment, mesh=BASE.mesh, train=BASE.train)
        return train.loaded(prog, jax.device_put(_initial(one), where))
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = {
        path: noise * rng.standard_normal(x.shape, np.float32)
        + path.endswith("scale_d")
        for path, x in trees.flatten(abstract.params).items()
    }
    params = trees.nest({k: v.astype(np.float32) for k, v in params.items()})
    ema = params if state.ema is not None else None
    state = dataclasses.replace(state, params=params, ema=ema)
    return train.loaded(prog, jax.device_put(state, where))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves by path, on the host."""
    return {path: np.asarray(x) for path, x in trees.flatten(tree).items()}


def hidden(prog: train.Program) -> Any:
    """Returns the compiled function from parameters and a host's batch to (hidden, logits)."""

    @jax.jit
    def run(params, batch):
        tokens = Tokens(batch["positions"], batch["segments"])
        model = prog.model(params)
        x_BTD, _, _ = model(batch["tokens"], tokens, None, prog.experiment.data.isolate)
        return x_BTD, model.logits(x_BTD)

    def call(params, host):
        with sharding.use(prog.layout):
            found = run(params, place(prog, host))
            order = sharding.order(found[0].shape[1], prog.layout.size("length"))
            return [np.asarray(x)[:, np.argsort(order)] for x in found]

    return call


@dataclasses.dataclass(frozen=True)
class Run:
    """What a few steps of training left."""

    text: str  # the compiled step
    losses: list[float]
    metrics: list[dict[str, float]]  # of every step
    gradient: dict[str, np.ndarray]  # of the first step; empty but under SGD
    params: dict[str, np.ndarray]
    state: train.TrainState


def run(
    prog: train.Program, batches: Sequence[dict[str, Any]], state: Any = None
) -> Run:
    """Takes a step on each batch, in order, from the initial state or `state`."""
    state = start(prog) if state is None else state
    step = train.make_train_step(prog).lower(state, place(prog, batches[0])).compile()
    metrics, gradient = [], {}
    for host in batches:
        state, sums = step(state, place(prog, host))
        metrics.append({k: float(v) for k, v in sums.items() if not v.ndim})
        if not gradient and isinstance(prog.experiment.optim.algorithm, Sgd):
            momentum = flat(train.saved(prog, state.opt_state))
            trained = [p for p, axes in prog.axes.items() if "balance" not in axes]
            gradient = {p: _ending(momentum, p) for p in trained}
    losses = [m["loss"] for m in metrics]
    params = flat(train.saved(prog, state.params))
    return Run(step.as_text(), losses, metrics, gradient, params, state)


def _ending(leaves: dict[str, np.ndarray], path: str) -> np.ndarray:
    return next(x for name, x in leaves.items() if name.endswith(f"/{path}"))


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expects a ConfigError of one line that holds these words, in order."""
    with pytest.raises(ConfigError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words)), message), message


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the norm of the difference, in float64."""
    return float(np.linalg.norm((np.asarray(a, np.float64) - b).ravel()))
