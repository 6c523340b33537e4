"""Marian: the Transformer of 2017, in the form that the OPUS translators have.

Norms on the sums, sines before cosines, one table for both embeddings and the head, and beside it
a shift of each id's logit.
"""

from typing import Any

from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Fold, Row, Transpose, row
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Sinusoidal

ACTIVATIONS: dict[str, Any] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
}
# How weights begin and text is sampled, and what other keys or the tensors say already.
OWN = ("init_std", "forced_eos_token_id", "bad_words_ids", "num_beams", "num_hidden_layers",
       "add_bias_logits", "extra_pos_embeddings")  # fmt: skip
UNSUPPORTED = (
    "is_decoder",
    "normalize_before",
    "normalize_embedding",
    "add_final_layer_norm",
)
STACKS = ("encoder", "decoder")


def _read(f: Fields) -> EncoderDecoder.Config:
    f.only("is_encoder_decoder", True, default=True)
    f.only("share_encoder_decoder_embeddings", True, default=True)
    f.only("tie_word_embeddings", True, default=True)
    f.only("static_position_embeddings", True, default=True)
    for name in UNSUPPORTED:
        f.only(name, False, default=False)
    f.skip(*OWN)
    dim, vocab = f.get("d_model", int, 1024), f.get("vocab_size", int, 58_101)
    f.only("decoder_vocab_size", vocab, default=vocab)
    heads, hidden = _both(f, "attention_heads", 16), _both(f, "ffn_dim", 4096)
    act = ACTIVATIONS[f.only("activation_function", *ACTIVATIONS, default="gelu")]
    start = f.get("decoder_start_token_id", int, -1)
    start = f.get("pad_token_id", int, -1) if start < 0 else start
    return EncoderDecoder.Config(
        encoder_layers=f.get("encoder_layers", int, 12),
        layers=f.get("decoder_layers", int, 12),
        dim=dim,
        heads=heads,
        vocab_size=vocab,
        attention=Attention.Config(bias=True, out_bias=True),
        ffn=Mlp.Config(hidden=hidden, activation=act, bias=True),
        norm=LayerNorm.Config(),
        norms="post",
        positions=Sinusoidal(halves=True),
        embed_scale=dim**0.5 if f.get("scale_embedding", bool, False) else 1.0,
        head_shift=True,
        start=None if start < 0 else start,
    )


def _both(f: Fields, name: str, default: int) -> int:
    """Returns a size that both stacks have."""
    found = f.get(f"encoder_{name}", int, default)
    return f.only(f"decoder_{name}", found, default=default)


def _write(model: EncoderDecoder.Config) -> dict[str, Any]:
    assert isinstance(model.positions, Sinusoidal)
    sizes = {
        "attention_heads": model.heads,
        "ffn_dim": model.ffn.width(model.dim),
    }
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.layers,
        "d_model": model.dim,
        **{f"{at}_{name}": size for at in STACKS for name, size in sizes.items()},
        "vocab_size": model.vocab_size,
        "decoder_vocab_size": model.vocab_size,
        "activation_function": theirs[model.ffn.activation],
        "scale_embedding": model.embed_scale != 1,
        "decoder_start_token_id": model.start,
        "pad_token_id": model.start,
        "forced_eos_token_id": None,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def _table(model: EncoderDecoder.Config) -> Table:
    apart = model.heads, model.attention.head_dim or model.dim // model.heads
    T = Transpose()

    def norm(ours: str, theirs: str) -> list[Row]:
        names = {"scale_d": "weight", "bias_d": "bias"}
        return [row(f"{ours}/{k}", f"{theirs}.{v}") for k, v in names.items()]

    def heads(ours: str, at: str) -> list[Row]:
        rows: list[Row] = []
        for name, axis in (("query", "n"), ("key", "k"), ("value", "k")):
            proj = f"{at}.{name[0]}_proj"
            rows += [
                row(f"{ours}/{name}_d{axis}h", f"{proj}.weight", T, Fold(1, apart)),
                row(f"{ours}/{name}_bias_{axis}h", f"{proj}.bias", Fold(0, apart)),
            ]
        return [
            *rows,
            row(f"{ours}/out_nhd", f"{at}.out_proj.weight", T, Fold(0, apart)),
            row(f"{ours}/out_bias_d", f"{at}.out_proj.bias"),
        ]

    def layer(at: str, cross: bool) -> tuple[Row, ...]:
        rows = heads("mixer", f"{at}.self_attn")
        rows += norm("sum1", f"{at}.self_attn_layer_norm")
        if cross:
            rows += heads("cross", f"{at}.encoder_attn")
            rows += norm("sum3", f"{at}.encoder_attn_layer_norm")
        return (
            *rows,
            row("ffn/up_df", f"{at}.fc1.weight", T),
            row("ffn/up_bias_f", f"{at}.fc1.bias"),
            row("ffn/down_fd", f"{at}.fc2.weight", T),
            row("ffn/down_bias_d", f"{at}.fc2.bias"),
            *norm("sum2", f"{at}.final_layer_norm"),
        )

    def layers(at: str, count: int) -> tuple[tuple[Row, ...], ...]:
        cross = at == "decoder"
        return tuple(layer(f"model.{at}.layers.{i}", cross) for i in range(count))

    return Table(
        whole=(
            row("embed_vd", "model.shared.weight"),
            row("shift_v", "final_logits_bias", Fold(0, ())),  # [1, V]
        ),
        layers=layers("decoder", model.layers),
        encoder=layers("encoder", model.encoder_layers),
        copies=("lm_head.weight", *(f"model.{at}.embed_tokens.weight" for at in STACKS)),
    )  # fmt: skip


MARIAN = Family(
    model_type="marian",
    architecture="MarianMTModel",
    read=_read,
    write=_write,
    table=_table,
    buffers=("model.*coder.embed_positions.weight",),  # what `Sinusoidal` computes
    prefix="",
    model=EncoderDecoder.Config,
)
