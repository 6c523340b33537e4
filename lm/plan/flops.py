"""Floating-point operations of a model, counted from its config (a multiply-add is two)."""

from lm.models import kinds
from lm.models.bag import Bag
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.heads import Words
from lm.nn.latent import Latent
from lm.nn.moe import Moe
from lm.nn.recurrent import Gru, Lstm


def forward(
    config: kinds.Config, length: int, *, causal: bool, written: int | None = None
) -> float:
    """Returns the operations of one token's forward pass in a sequence of `length` tokens.

    Products with weights, and attention's two products over the keys; norms, softmax and the
    like are left out, as is usual; so are experts that a token is not sent to.

    Of a model with an encoder a token is one that is written, and what is read for it counts:
    `length` tokens for each row of `written` ones.

    `causal=False` counts every key of the row, as most published MFU figures do (Chowdhery et
    al. 2022, appendix B); True only the keys a token may see.
    """
    c = config
    if isinstance(c, Bag.Config):
        return 2.0 * c.dim  # the mean; the head is a text's
    if isinstance(c, Recurrent.Config):
        head = 0 if c.head else c.vocab_rows * c.dim
        return 2.0 * (c.layers * _recurrent(c) + head)
    if isinstance(c, Encoder.Config):
        return _encoder(c, length)
    if isinstance(c, EncoderDecoder.Config):
        return _encoder_decoder(c, length, written or length, causal)
    weights = c.layers * _projections(c) + _feed_forward(c) + c.vocab_rows * c.dim
    return 2.0 * weights + 2.0 * c.heads * _head(c) * _keys(c, length, causal=causal)


def _projections(c: Transformer.Config) -> int:
    """Returns the weights of one layer's attention that a token meets."""
    a, N = c.attention, c.heads
    if not isinstance(a, Latent.Config):
        return c.dim * c.head_dim * (2 * N + 2 * c.kv_heads)
    queries = c.dim * N * a.head_dim
    if a.query_rank is not None:
        queries = a.query_rank * (c.dim + N * a.head_dim)
    latents = c.dim * (a.rank + a.rope_dim)
    return (
        queries
        + latents
        + N * (a.rank * (a.plain_dim + a.value_dim) + a.value_dim * c.dim)
    )


def _head(c: Transformer.Config) -> int:
    """Returns the entries of a head's query and value: what each key costs."""
    a = c.attention
    return c.head_dim + (a.value_dim if isinstance(a, Latent.Config) else c.head_dim)


def _keys(c: Transformer.Config, length: int, *, causal: bool) -> float:
    """Returns the keys of all layers that one query is compared with."""
    if not causal:
        return float(c.layers * length)
    total = 0.0
    for i in range(c.layers):
        window = getattr(c.attention, "window", None)
        window = c.local.window if c.local and c.is_local(i) else window
        window = min(window or length, length)
        # The mean over the positions.
        total += window - window * (window - 1) / (2 * length)
    return total


def _feed_forward(c: Transformer.Config) -> int:
    """Returns the weights of all layers' feed-forward parts that one token meets."""
    if not isinstance(c.ffn, Moe.Config):
        return c.layers * _mlp(c.ffn, c.dim)
    active = _mlp(c.ffn.expert(c.dim), c.dim) * (c.ffn.top_k + c.ffn.shared)
    sparse = len(c.sparse) * (active + c.dim * c.ffn.experts)
    return sparse + (c.layers - len(c.sparse)) * _mlp(c.ffn.dense, c.dim)


def _encoder(c: Encoder.Config, length: int) -> float:
    """Returns the operations a token; every query sees the whole row."""
    wide = c.heads * (c.attention.head_dim or c.dim // c.heads)
    weights = c.layers * (4 * c.dim * wide + _mlp(c.ffn, c.dim))
    if isinstance(c.head, Words.Config):
        weights += c.dim * (c.dim + c.vocab_rows)
    return 2.0 * weights + 4.0 * c.layers * wide * length


def _encoder_decoder(
    c: EncoderDecoder.Config, read: int, written: int, causal: bool
) -> float:
    """Returns the operations a written token."""
    wide = c.heads * (c.attention.head_dim or c.dim // c.heads)
    half, mlp = 2 * c.dim * wide, _mlp(c.ffn, c.dim)  # two of four projections
    keys = (written + 1) / 2 if causal else written
    own = 2.0 * (3 * half + mlp) + 4.0 * wide * (keys + read)
    once = c.encoder_layers * (2.0 * (2 * half + mlp) + 4.0 * wide * read)
    once += c.layers * 2.0 * half  # keys and values of what was read
    head = 2.0 * c.vocab_rows * c.dim
    return c.layers * own + head + once * read / written


def _recurrent(c: Recurrent.Config) -> int:
    """Returns the weights of a layer."""
    H = c.mixer.width(c.dim)
    gates = Gru.gates if isinstance(c.mixer, Gru.Config) else Lstm.gates
    mixer = gates * H * (c.dim + H) + H * c.dim
    return mixer + (0 if c.ffn is None else _mlp(c.ffn, c.dim))


def _mlp(c: Mlp.Config, dim: int) -> int:
    return (3 if c.gated else 2) * dim * c.width(dim)


def train(
    config: kinds.Config, length: int, *, causal: bool, written: int | None = None
) -> float:
    """Returns the operations of one token's forward and backward pass, without recomputation."""
    return 3 * forward(config, length, causal=causal, written=written)
