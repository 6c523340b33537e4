"""GPT-2: learned positions, layer norms with a shift, weights stored input first (Conv1D)."""

from typing import Any

from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Cut, Fold, row
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Learned

OWN = ("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout",
       "summary_proj_to_labels", "reorder_and_upcast_attn", "n_ctx")  # fmt: skip


def _read(f: Fields) -> Transformer.Config:
    f.only("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    f.only("scale_attn_weights", True, default=True)
    f.only("scale_attn_by_inverse_layer_idx", False, default=False)
    f.only("add_cross_attention", False, default=False)
    f.skip(*OWN)
    heads = f.get("n_head", int, 12)
    return Transformer.Config(
        layers=f.get("n_layer", int, 12),
        dim=f.get("n_embd", int, 768),
        heads=heads,
        kv_heads=heads,
        vocab_size=f.get("vocab_size", int, 50_257),
        attention=Attention.Config(bias=True, out_bias=True),
        ffn=Mlp.Config(
            hidden=f.get("n_inner", int, 0) or None, activation="gelu", bias=True
        ),
        norm=LayerNorm.Config(eps=f.get("layer_norm_epsilon", float, 1e-5)),
        positions=Learned(length=f.get("n_positions", int, 1024)),
        tied=f.get("tie_word_embeddings", bool, True),
    )


def _write(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(model.norm, LayerNorm.Config)
    assert isinstance(model.positions, Learned)
    assert isinstance(model.ffn, Mlp.Config)
    return {
        "n_layer": model.layers,
        "n_embd": model.dim,
        "n_head": model.heads,
        "n_inner": model.ffn.hidden,
        "n_positions": model.positions.length,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm.eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": model.tied,
    }


def _table(model: Transformer.Config) -> Table:
    N, H = model.heads, model.head_dim
    three = (N * H,) * 3

    def layer(i: int) -> tuple[Any, ...]:
        at = f"transformer.h.{i}."
        return (
            row("norm1/scale_d", f"{at}ln_1.weight"),
            row("norm1/bias_d", f"{at}ln_1.bias"),
            row(
                ("mixer/query_dnh", "mixer/key_dkh", "mixer/value_dkh"),
                f"{at}attn.c_attn.weight", Cut(-1, three), Fold(1, (N, H)),
            ),
            row(
                ("mixer/query_bias_nh", "mixer/key_bias_kh", "mixer/value_bias_kh"),
                f"{at}attn.c_attn.bias", Cut(-1, three), Fold(0, (N, H)),
            ),
            row("mixer/out_nhd", f"{at}attn.c_proj.weight", Fold(0, (N, H))),
            row("mixer/out_bias_d", f"{at}attn.c_proj.bias"),
            row("norm2/scale_d", f"{at}ln_2.weight"),
            row("norm2/bias_d", f"{at}ln_2.bias"),
            row("ffn/up_df", f"{at}mlp.c_fc.weight"),
            row("ffn/up_bias_f", f"{at}mlp.c_fc.bias"),
            row("ffn/down_fd", f"{at}mlp.c_proj.weight"),
            row("ffn/down_bias_d", f"{at}mlp.c_proj.bias"),
        )  # fmt: skip

    assert model.dim == H * N
    whole = [
        row("embed_vd", "transformer.wte.weight"),
        row("position_pd", "transformer.wpe.weight"),
        row("norm/scale_d", "transformer.ln_f.weight"),
        row("norm/bias_d", "transformer.ln_f.bias"),
    ]
    if not model.tied:
        whole.append(row("head_vd", "lm_head.weight"))
    return Table(tuple(whole), tuple(layer(i) for i in range(model.layers)))


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=_read,
    write=_write,
    table=_table,
    buffers=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    prefix="transformer.",
)
