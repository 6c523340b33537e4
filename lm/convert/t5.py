"""T5: an encoder and a decoder, scores of distances instead of positions, no scale of scores.

Version 1.0 has ReLU and one table for embedding and head, before which it scales by 1 / sqrt(D);
1.1, and Flan-T5, have gated GELU and a head of its own.
"""

from typing import Any

from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Fold, Row, Transpose, row
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import RmsNorm
from lm.nn.relative import Relative

FEED_FORWARD: dict[str, Any] = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
# Of files, of a classifier that is not read, and what `feed_forward_proj` says already.
OWN = ("output_past", "classifier_dropout", "initializer_factor", "is_gated_act", "dense_act_fn",
       "n_positions")  # fmt: skip
T = Transpose()


def _read(f: Fields) -> EncoderDecoder.Config:
    f.only("is_decoder", False, default=False)
    f.only("is_encoder_decoder", True, default=True)
    f.skip(*OWN)
    # What newer versions say for it, and then write that the two tables are one all the same.
    tied = f.get("tie_word_embeddings", bool, True)
    tied = f.get("scale_decoder_outputs", bool, tied)
    dim, layers = f.get("d_model", int, 512), f.get("num_layers", int, 6)
    start = f.get("decoder_start_token_id", int, -1)
    start = f.get("pad_token_id", int, -1) if start < 0 else start
    return EncoderDecoder.Config(
        encoder_layers=layers,
        layers=f.get("num_decoder_layers", int, layers),
        dim=dim,
        heads=f.get("num_heads", int, 8),
        vocab_size=f.get("vocab_size", int, 32_128),
        attention=Attention.Config(head_dim=f.get("d_kv", int, 64), scale=1.0),
        ffn=Mlp.Config(
            hidden=f.get("d_ff", int, 2048),
            activation=FEED_FORWARD[f.only("feed_forward_proj", *FEED_FORWARD, default="relu")],
        ),
        norm=RmsNorm.Config(eps=f.get("layer_norm_epsilon", float, 1e-6)),
        positions=Relative(
            buckets=f.get("relative_attention_num_buckets", int, 32),
            distance=f.get("relative_attention_max_distance", int, 128),
        ),
        tied=tied,
        head_scale=dim**-0.5 if tied else 1.0,
        start=None if start < 0 else start,
    )  # fmt: skip


def _write(model: EncoderDecoder.Config) -> dict[str, Any]:
    assert isinstance(model.norm, RmsNorm.Config)
    assert isinstance(model.positions, Relative)
    theirs = {ours: name for name, ours in FEED_FORWARD.items()}
    return {
        "num_layers": model.encoder_layers,
        "num_decoder_layers": model.layers,
        "d_model": model.dim,
        "d_kv": model.attention.head_dim or model.dim // model.heads,
        "d_ff": model.ffn.width(model.dim),
        "num_heads": model.heads,
        "vocab_size": model.vocab_size,
        "feed_forward_proj": theirs[model.ffn.activation],
        "layer_norm_epsilon": model.norm.eps,
        "relative_attention_num_buckets": model.positions.buckets,
        "relative_attention_max_distance": model.positions.distance,
        "decoder_start_token_id": model.start,
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tied,
    }


def _table(model: EncoderDecoder.Config) -> Table:
    N, H = model.heads, model.attention.head_dim or model.dim // model.heads

    def norm(ours: str, at: str) -> Row:
        return row(f"{ours}/scale_d", f"{at}.layer_norm.weight")

    def heads(ours: str, at: str) -> list[Row]:
        names = {"query_dnh": "q", "key_dkh": "k", "value_dkh": "v"}
        split = [
            row(f"{ours}/{mine}", f"{at}.{name}.weight", T, Fold(1, (N, H)))
            for mine, name in names.items()
        ]
        return [*split, row(f"{ours}/out_nhd", f"{at}.o.weight", T, Fold(0, (N, H)))]

    def forward(at: str) -> list[Row]:
        names = {"up_df": "wi", "down_fd": "wo"}
        if model.ffn.gated:
            names = {"gate_df": "wi_0", "up_df": "wi_1", "down_fd": "wo"}
        at = f"{at}.DenseReluDense"
        return [row(f"ffn/{k}", f"{at}.{v}.weight", T) for k, v in names.items()]

    def layer(at: str, cross: bool) -> tuple[Row, ...]:
        last = f"{at}.layer.{1 + cross}"
        rows = [norm("norm1", f"{at}.layer.0")]
        rows += heads("mixer", f"{at}.layer.0.SelfAttention")
        if cross:
            rows += [norm("norm3", f"{at}.layer.1")]
            rows += heads("cross", f"{at}.layer.1.EncDecAttention")
        return (*rows, norm("norm2", last), *forward(last))

    distances = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    whole = [
        row("embed_vd", "shared.weight"),
        row("encoder_distance_nb", f"encoder.{distances}", T),
        row("encoder_norm/scale_d", "encoder.final_layer_norm.weight"),
        row("distance_nb", f"decoder.{distances}", T),
        row("norm/scale_d", "decoder.final_layer_norm.weight"),
    ]
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if model.tied:
        copies.append("lm_head.weight")
    else:
        whole.append(row("head_vd", "lm_head.weight"))
    return Table(
        whole=tuple(whole),
        layers=tuple(layer(f"decoder.block.{i}", True) for i in range(model.layers)),
        encoder=tuple(
            layer(f"encoder.block.{i}", False) for i in range(model.encoder_layers)
        ),
        copies=tuple(copies),
    )


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    read=_read,
    write=_write,
    table=_table,
    # Of cross-attention there are no distances; the first files have a table that nobody reads.
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    prefix="",
    model=EncoderDecoder.Config,
)
