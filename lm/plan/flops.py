"""Floating-point operations of a model, counted from its config (a multiply-add is two)."""

from lm.models.transformer import Transformer


def forward(config: Transformer.Config, length: int, *, causal: bool) -> float:
    """Returns the operations of one token's forward pass in a sequence of `length` tokens.

    Products with weights, and attention's two products over the keys; norms, softmax and the
    like are left out, as is usual. `causal=False` counts every key of the row, as most published
    MFU figures do (Chowdhery et al. 2022, appendix B); True only the keys a token may see.
    """
    c = config
    projections = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    matrices = 2 if c.ffn.activation == "gelu" else 3
    feed_forward = matrices * c.dim * c.ffn.width(c.dim)
    weights = c.layers * (projections + feed_forward) + c.vocab_rows * c.dim
    keys = float(length)
    if causal:
        window = min(c.attention.window or length, length)
        keys = window - window * (window - 1) / (
            2 * length
        )  # the mean over the positions
    return 2.0 * weights + 4.0 * c.layers * c.heads * c.head_dim * keys


def train(config: Transformer.Config, length: int, *, causal: bool) -> float:
    """Returns the operations of one token's forward and backward pass, without recomputation."""
    return 3 * forward(config, length, causal=causal)
