"""A step of GPT-2's shape in bf16 on one GPU, in a process of its own; prints JSON.

    python -m benchmarks.gpu_steps lm|bare|torch-flash|torch-cudnn|attention|target ...

The same model, batch, loss and AdamW for all: `benchmarks/gpt.py` at 12 layers of 768,
weights and moments in fp32, products in bf16. Shapes: B batch, T length, D embed,
N heads, H head dim, M = B T, C tokens of a chunk, V vocabulary.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks import gpt as small
from lm.terminal import process_start

Step = Callable[[], Any]  # dispatches a step, returns its loss without waiting


def sizes(batch: int, toy: bool) -> small.Gpt:
    """Returns GPT-2's smallest shape, its vocabulary padded to a multiple of 256."""
    if toy:
        return small.Gpt(layers=2, dim=64, heads=2, vocab=512, length=64, batch=batch)
    return small.Gpt(
        layers=12, dim=768, heads=12, vocab=50_432, length=1024, batch=batch,
        learning_rate=6e-4,
    )  # fmt: skip


def bare(gpt: small.Gpt, sets: list[str]) -> Step:
    """The step by hand."""
    from benchmarks import gpu_bare

    return gpu_bare.factory(gpt, sets)


def lm(gpt: small.Gpt, sets: list[str]) -> Step:
    """The step of `lm.main`, with overrides of the experiment."""
    import flax
    import jax

    from benchmarks import step as contestant
    from lm import config, sharding, train, trees
    from lm.data import loader

    flax.config.update("nnx_graph_mode", False)
    flax.config.update("nnx_graph_updates", False)
    base = ["model.dtype=bfloat16", "model.scan=true", "objective.chunk=1024"]
    experiment = config.override(contestant.experiment(gpt), [*base, *sets])
    layout = sharding.make_layout(experiment.mesh, jax.devices()[:1])
    prog = train.program(experiment, layout)
    state = train.make_init(prog)(jax.random.key(0))
    weights = {
        path: jax.device_put(x, prog.sharding(prog.specs[path]))
        for path, x in contestant.parameters(gpt).items()
    }
    state = dataclasses.replace(state, params=trees.nest(weights))
    data = loader.to_devices(contestant.batch(gpt), prog.batch_sharding())
    compiled = train.make_train_step(prog).lower(state, data).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, data)
        return metrics["loss"]

    return step


def torch_loss(gpt: small.Gpt, weights: Any, tokens_BT: Any, target_BT: Any) -> Any:
    """Returns PyTorch's mean cross-entropy, its products in bf16."""
    from benchmarks import torch_gpt

    w = {name: a.bfloat16() for name, a in weights.items()}
    return torch_gpt.loss(gpt, w, tokens_BT, target_BT)


def torch_step(gpt: small.Gpt, backend: str, toy: bool) -> Step:
    """PyTorch's step: compiled, fused AdamW, one kernel of SDPA allowed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.torch_gpt import parameters

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    w = {
        name: a.detach().to(device).requires_grad_()
        for name, a in parameters(small.weights(gpt)).items()
    }
    tokens, targets = (torch.from_numpy(a).long().to(device) for a in small.batch(gpt))
    decayed = {"params": [a for n, a in w.items() if small.decayed(n)]}
    spared = {
        "params": [a for n, a in w.items() if not small.decayed(n)],
        "weight_decay": 0.0,
    }
    optimizer = torch.optim.AdamW(
        [decayed, spared],
        lr=gpt.learning_rate,
        betas=(gpt.beta1, gpt.beta2),
        eps=gpt.adam_eps,
        weight_decay=gpt.weight_decay,
        fused=True,
    )
    run = torch_loss if toy else torch.compile(torch_loss)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(kernel[backend]):
            total = run(gpt, w, tokens, targets)
            total.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), gpt.clip)
        optimizer.step()
        return total.detach()

    return step


def measure(step: Step, steps: int, rounds: int = 4) -> dict[str, Any]:
    """Returns the seconds of a step, the time to the first, and the losses.

    Steps are dispatched one behind the other; the clock stops when the last is done.
    """
    losses = [float(step())]
    first = time.perf_counter() - process_start()
    losses += [float(step()) for _ in range(2)]
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        losses.append(float(loss))
        seconds.append((time.perf_counter() - began) / steps)
    median = sorted(seconds)[len(seconds) // 2]
    return {"best": min(seconds), "median": median, "first": first, "losses": losses}


def attention(toy: bool) -> dict[str, Any]:
    """Returns milliseconds of attention with its gradients, by length and implementation."""
    import jax
    import jax.numpy as jnp

    from lm import sharding
    from lm.nn import attend
    from lm.nn.blockwise import Mask, Tokens

    layout = sharding.make_layout(sharding.MeshConfig(data=1), jax.devices()[:1])
    found: dict[str, Any] = {}
    for B, T, N, H in (
        ((1, 64, 2, 16),) if toy else ((32, 1024, 12, 64), (4, 8192, 12, 64))
    ):
        mask = Mask(scale=H**-0.5)
        case = attend.Case(
            platform=layout.platform, queries=T, keys=T, head_dim=H, dtype="bfloat16",
            packed=False, mask=mask,
        )  # fmt: skip
        times: dict[str, Any] = {"auto takes": case.choose("auto")}
        whole = dataclasses.replace(case, packed=True)
        times["auto takes, packed"] = whole.choose("auto")
        tokens = Tokens(
            jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)),
            jnp.ones((B, T), jnp.int32),
        )
        q = jnp.ones((B, T, N, 1, H), jnp.bfloat16)
        k = jnp.ones((B, T, N, H), jnp.bfloat16)
        for how in ("cudnn", "blockwise"):
            if reason := case.obstacle(how):
                times[how] = reason
                continue

            def loss(q, k, v, how=how, mask=mask, tokens=tokens):
                out, _ = attend.attend(q, k, v, tokens, tokens, mask, how, packed=False)
                return out.astype(jnp.float32).sum()

            with sharding.use(layout):
                run = jax.jit(jax.grad(loss, (0, 1, 2)))
                jax.block_until_ready(run(q, k, k))
                rounds = []
                for _ in range(5):
                    began = time.perf_counter()
                    for _ in range(5):
                        out = run(q, k, k)
                    jax.block_until_ready(out)
                    rounds.append((time.perf_counter() - began) / 5)
            times[how] = round(min(rounds) * 1e3, 3)
        found[f"B {B}, T {T}, N {N}, H {H}"] = times
    return found


def target(path: str) -> dict[str, Any]:
    """Writes XLA's description of the card, with which a machine without it can compile."""
    import jax
    from jax._src.lib import xla_client

    topology = xla_client.get_topology_for_devices(jax.devices())
    found = topology.target_config
    text = found.decode() if isinstance(found, bytes) else str(found)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
    return {"bytes": len(text), "path": path}


def contest(name: str, gpt: small.Gpt, sets: list[str], steps: int, toy: bool) -> dict:
    """Returns what one contestant took, and its memory."""
    if name.startswith("torch-"):
        import torch

        result = measure(torch_step(gpt, name.removeprefix("torch-"), toy), steps)
        on_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
    else:
        import jax

        result = measure({"lm": lm, "bare": bare}[name](gpt, sets), steps)
        device = jax.devices()[0].device_kind
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {**result, "device": device, "peak": peak, "tokens": gpt.batch * gpt.length}


def main() -> None:
    """Runs one contestant and prints its result as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="a round")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--out", default="")
    parser.add_argument("--toy", action="store_true")
    flags = parser.parse_args()
    if flags.name == "attention":
        result = attention(flags.toy)
    elif flags.name == "target":
        result = target(flags.out)
    else:
        gpt = sizes(flags.batch, flags.toy)
        result = contest(flags.name, gpt, flags.sets, flags.steps, flags.toy)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
