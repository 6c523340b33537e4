"""The small GPT of `bare.py` as one PyTorch step, eager or compiled; the same maths.

`python -m benchmarks.torch_gpt` compares loss, gradients and three steps with `bare.py`
from the same weights. PyTorch is an optional dependency of the benchmarks alone.
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import gpt as small

Weights = dict[str, torch.Tensor]


def parameters(weights: small.Tree) -> Weights:
    """Returns the numpy weights as leaves; matrices as torch has them, [out, in]."""
    leaves = {}
    for name, value in weights.items():
        value = value.T if "/" in name else value
        leaves[name] = torch.from_numpy(value.copy()).requires_grad_()
    return leaves


def loss(
    gpt: small.Gpt, w: Weights, tokens_BT: torch.Tensor, target_BT: torch.Tensor
) -> torch.Tensor:
    """Returns the mean cross-entropy of one batch, a float32 scalar."""
    B, T, D, N, H = gpt.batch, gpt.length, gpt.dim, gpt.heads, gpt.head_dim
    x_BTD = F.embedding(tokens_BT, w["embed"]) + w["positions"]
    for i in range(gpt.layers):
        y_BTD = F.layer_norm(x_BTD, (D,), w[f"{i}/norm1"], eps=gpt.norm_eps)
        qkv = F.linear(y_BTD, w[f"{i}/qkv"]).split(D, -1)
        q_BNTH, k_BNTH, v_BNTH = (a.view(B, T, N, H).transpose(1, 2) for a in qkv)
        o_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        o_BTD = o_BNTH.transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + F.linear(o_BTD, w[f"{i}/out"])
        y_BTD = F.layer_norm(x_BTD, (D,), w[f"{i}/norm2"], eps=gpt.norm_eps)
        h_BTF = F.gelu(F.linear(y_BTD, w[f"{i}/up"]), approximate="tanh")
        x_BTD = x_BTD + F.linear(h_BTF, w[f"{i}/down"])
    x_BTD = F.layer_norm(x_BTD, (D,), w["norm"], eps=gpt.norm_eps)
    logits_MV = F.linear(x_BTD.view(B * T, D), w["embed"]).float()
    return F.cross_entropy(logits_MV, target_BT.view(-1))


def _batch(gpt: small.Gpt) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = small.batch(gpt)
    return torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()


def loss_and_gradients(gpt: small.Gpt, weights: small.Tree) -> tuple[float, small.Tree]:
    """Returns the loss and every gradient of `small.batch`, laid out as in `bare`."""
    w = parameters(weights)
    total = loss(gpt, w, *_batch(gpt))
    total.backward()
    gradients = {}
    for name, leaf in w.items():
        assert leaf.grad is not None, name
        g = leaf.grad.numpy()
        gradients[name] = g.T if "/" in name else g
    return total.item(), gradients


def factory(
    compiled: bool = False, gpt: small.Gpt | None = None
) -> Callable[[], float]:
    """Returns `step()`, which trains one step and returns its loss."""
    gpt = gpt or small.Gpt()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    w = parameters(small.weights(gpt))
    tokens, targets = _batch(gpt)
    groups = [
        {"params": [a for n, a in w.items() if small.decayed(n)]},
        {
            "params": [a for n, a in w.items() if not small.decayed(n)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=gpt.learning_rate,
        betas=(gpt.beta1, gpt.beta2),
        eps=gpt.adam_eps,
        weight_decay=gpt.weight_decay,
        fused=True,
    )
    forward = torch.compile(loss) if compiled else loss

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = forward(gpt, w, tokens, targets)
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), gpt.clip)
        optimizer.step()
        return total.item()

    return step


def eager() -> Callable[[], float]:
    """The contestant that runs the model as it is written."""
    return factory()


def compiled() -> Callable[[], float]:
    """The contestant whose forward and backward pass go through `torch.compile`."""
    return factory(compiled=True)


def disagreement(gpt: small.Gpt | None = None) -> dict[str, float]:
    """Returns the largest differences between torch and bare JAX from equal weights.

    "loss" and "losses" (three steps) are relative; "gradient" is the largest, over the
    weights, of the norm of the difference over the norm of the gradient.
    """
    from benchmarks import bare

    gpt = gpt or small.Gpt(layers=2, length=64, batch=2, vocab=1024)
    weights = small.weights(gpt)
    loss_j, gradients_j = bare.loss_and_gradients(gpt, weights)
    loss_t, gradients_t = loss_and_gradients(gpt, weights)
    norm = np.linalg.norm
    worst = max(
        float(norm(g - gradients_t[name]) / norm(g)) for name, g in gradients_j.items()
    )
    step_j, step_t = bare.factory(gpt), factory(gpt=gpt)
    steps = [(step_j(), step_t()) for _ in range(3)]
    return {
        "loss": abs(loss_j - loss_t) / loss_j,
        "gradient": worst,
        "losses": max(abs(a - b) / a for a, b in steps),
    }


if __name__ == "__main__":
    found = disagreement()
    print({name: f"{value:.1e}" for name, value in found.items()})
    sys.exit(max(found.values()) > 1e-4)
