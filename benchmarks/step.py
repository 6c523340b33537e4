"""The small GPT as `lm` trains it: the contestant that is to equal the hand-written step."""

from collections.abc import Callable

import flax
import jax
import numpy as np

from benchmarks import gpt as small
from lm import sharding, train, trees
from lm.data import loader
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Learned
from lm.objectives import Causal
from lm.optim import AdamW, Constant, Optim


def experiment(gpt: small.Gpt) -> Experiment:
    """Returns the config of the same model, loss and optimizer."""
    return Experiment(
        name="small_gpt",
        model=Transformer.Config(
            layers=gpt.layers,
            dim=gpt.dim,
            heads=gpt.heads,
            kv_heads=gpt.heads,
            vocab_size=gpt.vocab,
            ffn=Mlp.Config(activation="gelu"),
            norm=LayerNorm.Config(eps=gpt.norm_eps, bias=False),
            positions=Learned(length=gpt.length),
            dtype="float32",
            scan=False,
        ),
        data=loader.Data(source=("none",), length=gpt.length, isolate=False),
        objective=Causal(chunk=512),
        optim=Optim(
            algorithm=AdamW(b1=gpt.beta1, b2=gpt.beta2, eps=gpt.adam_eps),
            learning_rate=gpt.learning_rate,
            schedule=Constant(),
            weight_decay=gpt.weight_decay,
            clip_norm=gpt.clip,
        ),
        train=Train(batch_size=gpt.batch),
        mesh=sharding.MeshConfig(data=1),
    )


def batch(gpt: small.Gpt) -> dict[str, np.ndarray]:
    """Returns the contest's batch in the form that the loader gives."""
    tokens, targets = small.batch(gpt)
    shape = tokens.shape
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "weights": np.ones(shape, np.float32),
        "bytes": np.full(shape[0], shape[1], np.int32),
        "index": np.arange(shape[0], dtype=np.uint32),
    }


def parameters(gpt: small.Gpt) -> dict[str, np.ndarray]:
    """Returns the contest's initial weights under the names and shapes of `lm`."""
    weights = small.weights(gpt)
    L, D, N, H = gpt.layers, gpt.dim, gpt.heads, gpt.head_dim

    def stack(name: str) -> np.ndarray:
        return np.stack([weights[f"{i}/{name}"] for i in range(L)])

    qkv = stack("qkv").reshape(L, D, 3, N, H)
    return {
        "embed_vd": weights["embed"],
        "position_pd": weights["positions"],
        "norm/scale_d": weights["norm"],
        "layers/norm1/scale_d": stack("norm1"),
        "layers/norm2/scale_d": stack("norm2"),
        "layers/mixer/query_dnh": qkv[:, :, 0],
        "layers/mixer/key_dkh": qkv[:, :, 1],
        "layers/mixer/value_dkh": qkv[:, :, 2],
        "layers/mixer/out_nhd": stack("out").reshape(L, N, H, D),
        "layers/ffn/up_df": stack("up"),
        "layers/ffn/down_fd": stack("down"),
    }


def factory(gpt: small.Gpt | None = None) -> Callable[[], float]:
    """Returns `step()`, which trains one step, waits for it and returns its loss."""
    gpt = gpt or small.Gpt()
    flax.config.update("nnx_graph_mode", False)
    flax.config.update("nnx_graph_updates", False)
    layout = sharding.make_layout(sharding.MeshConfig(data=1), jax.devices()[:1])
    prog = train.program(experiment(gpt), layout)
    state = train.make_init(prog)(jax.random.key(0))
    assert set(parameters(gpt)) == set(prog.shapes)
    placed = {
        path: jax.device_put(x, prog.sharding(prog.specs[path]))
        for path, x in parameters(gpt).items()
    }
    state = train.TrainState(
        state.step, trees.nest(placed), state.opt_state, state.ema, state.health
    )
    data = loader.to_devices(batch(gpt), prog.batch_sharding())
    compiled = train.make_train_step(prog).lower(state, data).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, data)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step
