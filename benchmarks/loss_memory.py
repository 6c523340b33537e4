"""Memory of the chunked loss against the naive one: `python -m benchmarks.loss_memory`.

What XLA says that a compiled `value_and_grad` needs besides its arguments and results;
nothing is run. Shapes: B batch, T length, D embed, V vocabulary.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import objectives, sharding

MEBI = 2**20


def naive(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Returns the summed cross-entropy from all logits at once."""
    log_p_BTV = jax.nn.log_softmax(x_BTD @ w_VD.T)
    label_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
    return -(label_BT * weights_BT).sum()


def chunked(vocab: int, chunk: int) -> Callable[..., jax.Array]:
    """Returns the loss of `lm`, with so many tokens' logits at once."""
    head = objectives.Head(
        vocab=vocab, softcap=None, chunk=chunk, z_loss=0.0, smoothing=0.0
    )
    return lambda *args: objectives.cross_entropy(head, *args)[0]


def temporary(loss: Callable[..., jax.Array], args: tuple) -> int:
    """Returns the bytes that the compiled loss and gradient need while they run."""
    layout = sharding.make_layout(sharding.MeshConfig(data=1), jax.devices()[:1])
    with sharding.use(layout):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        analysis = step.lower(*args).compile().memory_analysis()
    assert analysis is not None, "this backend tells nothing about memory"
    return analysis.temp_size_in_bytes


def measure(tokens: int, vocab: int, dim: int, chunks: tuple[int, ...]) -> list[dict]:
    """Returns {"loss", "MiB", "ratio"} of the naive loss, then of each chunk size."""
    length = min(tokens, 1024)
    rows = tokens // length
    args = (
        jax.ShapeDtypeStruct((rows, length, dim), jnp.float32),
        jax.ShapeDtypeStruct((vocab, dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )
    bytes_ = {"naive": temporary(naive, args)}
    for chunk in chunks:
        bytes_[f"chunks of {chunk}"] = temporary(chunked(vocab, chunk), args)
    return [
        {"loss": name, "MiB": size / MEBI, "ratio": bytes_["naive"] / size}
        for name, size in bytes_.items()
    ]


def report(quick: bool = False) -> str:
    """Returns a Markdown table."""
    tokens, vocab, dim = (512, 1024, 32) if quick else (8192, 32_768, 512)
    chunks = (64, 128) if quick else (256, 1024, 4096)
    lines = [
        f"{tokens} tokens, vocabulary {vocab}, width {dim}, fp32: the logits alone are"
        f" {tokens * vocab * 4 / MEBI:.0f} MiB.",
        "",
        "| loss and gradient | temporary MiB | naive ÷ this |",
        "|---|---|---|",
    ]
    for row in measure(tokens, vocab, dim, chunks):
        lines.append(f"| {row['loss']} | {row['MiB']:.1f} | {row['ratio']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    print(report(parser.parse_args().quick))
