"""Floating-point operations of a model, counted from its config (a multiply-add is two)."""

from lm.models import kinds
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.moe import Moe
from lm.nn.recurrent import Gru, Lstm


def forward(config: kinds.Config, length: int, *, causal: bool) -> float:
    """Returns the operations of one token's forward pass in a sequence of `length` tokens.

    Products with weights, and attention's two products over the keys; norms, softmax and the
    like are left out, as is usual; so are experts that a token is not sent to. `causal=False`
    counts every key of the row, as most published MFU figures do (Chowdhery et al. 2022, appendix
    B); True only the keys a token may see.
    """
    c = config
    if isinstance(c, Recurrent.Config):
        return 2.0 * (c.layers * _recurrent(c) + c.vocab_rows * c.dim)
    projections = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = c.layers * projections + _feed_forward(c) + c.vocab_rows * c.dim
    keys = float(length)
    if causal:
        window = min(c.attention.window or length, length)
        keys = window - window * (window - 1) / (
            2 * length
        )  # the mean over the positions
    return 2.0 * weights + 4.0 * c.layers * c.heads * c.head_dim * keys


def _feed_forward(c: Transformer.Config) -> int:
    """Returns the weights of all layers' feed-forward parts that one token meets."""
    if not isinstance(c.ffn, Moe.Config):
        return c.layers * _mlp(c.ffn, c.dim)
    active = _mlp(c.ffn.expert(c.dim), c.dim) * (c.ffn.top_k + c.ffn.shared)
    sparse = len(c.sparse) * (active + c.dim * c.ffn.experts)
    return sparse + (c.layers - len(c.sparse)) * _mlp(c.ffn.dense, c.dim)


def _recurrent(c: Recurrent.Config) -> int:
    """Returns the weights of a layer."""
    H = c.mixer.width(c.dim)
    gates = Gru.gates if isinstance(c.mixer, Gru.Config) else Lstm.gates
    mixer = gates * H * (c.dim + H) + H * c.dim
    return mixer + (0 if c.ffn is None else _mlp(c.ffn, c.dim))


def _mlp(c: Mlp.Config, dim: int) -> int:
    return (2 if c.activation == "gelu" else 3) * dim * c.width(dim)


def train(config: kinds.Config, length: int, *, causal: bool) -> float:
    """Returns the operations of one token's forward and backward pass, without recomputation."""
    return 3 * forward(config, length, causal=causal)
