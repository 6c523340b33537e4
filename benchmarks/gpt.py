"""The small GPT that every contestant trains: sizes, weights and a batch, in numpy.

Letters: B batch, T length, D embed, N heads, H head dim, F mlp, V vocab, L layers.
GPT-2 without biases: learned positions, pre-LayerNorm (scale only), GELU (tanh), tied
head, no dropout; mean cross-entropy; gradients clipped by their global norm; AdamW
whose decay spares the norms. Imports neither jax nor torch.
"""

import dataclasses

import numpy as np

Tree = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt:
    """Sizes and optimizer of the contest; the defaults are what RESULTS.md reports."""

    layers: int = 6
    dim: int = 384
    heads: int = 6
    vocab: int = 8192
    length: int = 256  # tokens a sequence
    batch: int = 8  # sequences a step
    norm_eps: float = 1e-5
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest global norm of the gradient

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def step_flops(self) -> float:
        """Matmul FLOPs of one step, forward and backward, attention counted in full."""
        tokens = self.batch * self.length
        weights = self.layers * 12 * self.dim**2 + self.vocab * self.dim
        attention = self.layers * 2 * self.length * self.dim
        return 6.0 * tokens * (weights + attention)


def weights(gpt: Gpt, seed: int = 0) -> Tree:
    """Returns fp32 weights as {"embed", "positions", "norm", "0/qkv", "0/out", ...}.

    A matrix is [input, output]; "I/qkv" is [D, 3D] with queries, keys, values in turn,
    each split into heads of H.
    """
    random = np.random.default_rng(seed)
    D = gpt.dim

    def normal(*shape: int, scale: float = 0.02) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    residual = 0.02 / np.sqrt(2 * gpt.layers)
    tree = {
        "embed": normal(gpt.vocab, D),
        "positions": normal(gpt.length, D),
        "norm": np.ones(D, np.float32),
    }
    for i in range(gpt.layers):
        tree[f"{i}/norm1"] = np.ones(D, np.float32)
        tree[f"{i}/qkv"] = normal(D, 3 * D)
        tree[f"{i}/out"] = normal(D, D, scale=residual)
        tree[f"{i}/norm2"] = np.ones(D, np.float32)
        tree[f"{i}/up"] = normal(D, 4 * D)
        tree[f"{i}/down"] = normal(4 * D, D, scale=residual)
    return tree


def batch(gpt: Gpt, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns random tokens and targets, both int32 [B, T]."""
    random = np.random.default_rng(seed)
    stream = random.integers(0, gpt.vocab, (gpt.batch, gpt.length + 1), np.int32)
    return stream[:, :-1].copy(), stream[:, 1:].copy()


def decayed(name: str) -> bool:
    """Whether weight decay applies to the weight of this name: to all but the norms."""
    return "norm" not in name
