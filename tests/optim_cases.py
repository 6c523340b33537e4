"""Parameters, algorithms and reference results that the optimizer tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optim, schedules, trees

L, D, N, H, F, E, V = 2, 8, 4, 3, 24, 2, 16
AXES = {
    "embed/table": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "layers/bias": ("layers", "heads", "head_dim"),
    "layers/expert": ("layers", "expert", "embed", "mlp"),
    "layers/expert_bias": ("layers", "expert", "mlp"),
    "layers/gain": ("layers",),
    "layers/norm": ("layers", "embed"),
    "layers/router": ("layers", "embed", "expert"),
    "layers/w_o": ("layers", "heads", "head_dim", "embed"),
    "layers/w_q": ("layers", "embed", "heads", "head_dim"),
}
SIZES = {
    "layers": L,
    "expert": E,
    "embed": D,
    "heads": N,
    "head_dim": H,
    "mlp": F,
    "vocab": V,
}
STACK = {"layers/expert": 2, "layers/expert_bias": 2}  # leading stacked axes, else one
MATRIX = {  # inputs and outputs of one layer's matrix, by hand
    "embed/table": (V, D),
    "head": (D, V),
    "layers/expert": (D, F),
    "layers/router": (D, E),
    "layers/w_o": (N * H, D),
    "layers/w_q": (D, N * H),
}
MUON = set(MATRIX) - {"embed/table", "head"}
RATE, DECAY, CLIP, STEPS = 0.01, 0.1, 4.0, 4
FIXED_RATE = {
    "learning_rate": RATE,
    "schedule": schedules.Constant(),
    "clip_norm": CLIP,
}

QUICK = {  # for compiling: less time on code that runs four times
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def make(seed: int, names=AXES, sizes=SIZES):
    """Random leaves; each layer on another scale, so that mixing layers would show."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name in names:
        x = rng.normal(size=[sizes[a] for a in AXES[name]]).astype(np.float32)
        if name.startswith("layers"):
            x *= (2.0 ** np.arange(len(x), dtype=np.float32)).reshape(
                -1, *[1] * (x.ndim - 1)
            )
        flat[name] = x
    return trees.nest(flat)


def split(tree):
    """Each layer's (and expert's) plain matrix, vector or scalar as a leaf of its own."""
    flat = {}
    for name, x in trees.flatten(tree).items():
        stack = STACK.get(name, int(name.startswith("layers")))
        for index in np.ndindex(x.shape[:stack]):
            part = x[index]
            plain = MATRIX.get(name, (-1,) if part.ndim else ())
            flat[name.replace("/", "_") + "|" + ",".join(map(str, index))] = (
                part.reshape(plain)
            )
    return flat


def is_muon(name: str) -> bool:
    return name.split("|")[0] in {n.replace("/", "_") for n in MUON}


def reference(algorithm) -> optax.GradientTransformation:
    """Optax's own optimizer, for trees of plain matrices and vectors."""
    a = algorithm

    def matrix(tree):
        return {k: getattr(v, "ndim", 0) == 2 for k, v in tree.items()}

    match a:
        case optim.AdamW():
            return optax.adamw(RATE, a.b1, a.b2, a.eps, weight_decay=DECAY, mask=matrix)
        case optim.Adam():
            return optax.adam(RATE, a.b1, a.b2, a.eps)
        case optim.Lion():
            return optax.lion(RATE, a.b1, a.b2, weight_decay=DECAY, mask=matrix)
        case optim.Sgd():
            decay = optax.add_decayed_weights(DECAY, mask=matrix)
            trace = optax.trace(a.momentum, a.nesterov)
            return optax.chain(trace, decay, optax.scale(-RATE))
        case optim.Adafactor():
            return optax.adafactor(
                RATE,
                min_dim_size_to_factor=a.factor_from,
                momentum=a.momentum,
                weight_decay_rate=RATE * DECAY,
                weight_decay_mask=matrix,
            )
        case optim.Muon():
            matrices = optax.contrib.muon(
                RATE, nesterov=a.nesterov, consistent_rms=a.rms, weight_decay=DECAY
            )
            rest = optax.adamw(RATE, a.b1, a.b2, a.eps, weight_decay=DECAY, mask=matrix)
            return optax.partition(
                {True: matrices, False: rest}, lambda t: {k: is_muon(k) for k in t}
            )


ADAFACTOR = optim.Adafactor(factor_from=8, momentum=0.9)
ALGORITHMS = [
    optim.Adam(),
    optim.AdamW(),
    optim.Sgd(nesterov=True),
    ADAFACTOR,
    optim.Lion(),
    optim.Muon(),
    optim.Muon(rms=None, nesterov=False),
]
names = [f"{type(a).__name__}{i}" for i, a in enumerate(ALGORITHMS)]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)


def config(algorithm, **kwargs) -> optim.Optim:
    decay = 0.0 if type(algorithm) is optim.Adam else DECAY
    return optim.Optim(
        **{"algorithm": algorithm, "weight_decay": decay, **FIXED_RATE, **kwargs}
    )


def run(tx, params, gradients):
    """Parameters and state after a step for each entry of the gradients' leading axis."""

    def step(carry, xs):
        (params, state), (grads, i) = carry, xs
        updates, state = tx.update(grads, state, params, step=i)
        return (optax.apply_updates(params, updates), state), None

    @functools.partial(jax.jit, compiler_options=QUICK)
    def steps(params, gradients):
        xs = gradients, jnp.arange(len(jax.tree.leaves(gradients)[0]))
        return jax.lax.scan(step, (params, tx.init(params)), xs)[0]

    return steps(params, gradients)


def train(cfg, params, gradients):
    axes = {name: AXES[name] for name in trees.flatten(params)}
    tx = optim.build(cfg, STEPS, axes)
    return run(tx, params, gradients)


def stack(trees_):
    return jax.tree.map(lambda *x: np.stack(x), *trees_)


def inputs(algorithm):
    """Parameters and gradients: few leaves, as compiling takes the time of these tests."""
    names = ["embed/table", "layers/norm", "layers/w_q"]
    if isinstance(algorithm, optim.Adafactor | optim.Muon):
        names += ["layers/expert", "layers/w_o"]
    if isinstance(algorithm, optim.Adafactor):
        names += ["layers/bias", "layers/gain"]
    return make(0, names), [make(1 + i, names) for i in range(STEPS)]


@functools.cache
def one_device(algorithm):
    params, gradients = inputs(algorithm)
    return jax.device_get(train(config(algorithm), params, stack(gradients))[0])
