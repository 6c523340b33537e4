"""Gemma 1, 2 and 3 (text): scales around 0, a scaled embedding, local layers beside global ones.

Gemma 2 has soft caps and norms before and after; Gemma 3 has QK-norm and two rotary bases instead.
"""

from typing import Any

from lm.convert import decoder
from lm.convert.decoder import row
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.models.transformer import Local, Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import RmsNorm
from lm.nn.rope import Rope


def _model(f: Fields, act: str, **more: Any) -> Transformer.Config:
    """What all three share."""
    sizes = decoder.sizes(f)
    return Transformer.Config(
        **sizes,
        ffn=Mlp.Config(
            hidden=f.get("intermediate_size", int),
            activation=_activation(f, act),
        ),
        norm=decoder.norm(f, offset=1.0),
        embed_scale=sizes["dim"] ** 0.5,
        tied=f.get("tie_word_embeddings", bool, True),
        **more,
    )


def _activation(f: Fields, name: str) -> Any:
    """Returns GeGLU; plain "gelu" was written where its tanh formula was meant (Gemma 1)."""
    known = ("gelu_pytorch_tanh", "gelu_new", "gelu")[
        : 3 if name == "hidden_act" else 2
    ]
    f.only(name, *known, default="gelu_pytorch_tanh")
    return "geglu"


def _attention(f: Fields, **more: Any) -> Attention.Config:
    bias = f.get("attention_bias", bool, False)
    head_dim = f.get("head_dim", int, 256)
    return Attention.Config(head_dim=head_dim, bias=bias, out_bias=bias, **more)


def _read1(f: Fields) -> Transformer.Config:
    f.only("use_bidirectional_attention", False, default=False)
    f.only("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    return _model(f, "hidden_act", attention=_attention(f), positions=decoder.rope(f))


def _read2(f: Fields) -> Transformer.Config:
    f.only("use_bidirectional_attention", False, default=False)
    f.skip("hidden_act", "sliding_window_size")
    attention = _attention(
        f,
        softcap=f.optional("attn_logit_softcapping", float, 50.0),
        scale=f.get("query_pre_attn_scalar", int, 256) ** -0.5,
    )
    kinds = f.types("layer_types")
    local = Local(
        window=f.get("sliding_window", int, 4096),
        pattern=(True, False) if kinds is None else decoder.pattern(kinds),
    )
    return _model(
        f,
        "hidden_activation",
        attention=attention,
        positions=decoder.rope(f),
        norms="both",
        local=local,
        head_softcap=f.optional("final_logit_softcapping", float, 30.0),
    )


def _read3(f: Fields) -> Transformer.Config:
    f.only("use_bidirectional_attention", False, default=False)
    f.skip("hidden_act")
    attention = _attention(
        f,
        qk_norm=True,
        softcap=f.optional("attn_logit_softcapping", float, None),
        scale=f.get("query_pre_attn_scalar", int, 256) ** -0.5,
    )
    every = f.get("sliding_window_pattern", int, 6)
    every = f.get("_sliding_window_pattern", int, every)
    kinds = f.types("layer_types")
    usual = (True,) * (every - 1) + (False,)
    positions, of_local = _ropes(f)
    local = Local(
        window=f.get("sliding_window", int, 4096),
        pattern=usual if kinds is None else decoder.pattern(kinds),
        positions=of_local,
    )
    return _model(
        f,
        "hidden_activation",
        attention=attention,
        positions=positions,
        norms="both",
        local=local,
        head_softcap=f.optional("final_logit_softcapping", float, None),
    )


def _ropes(f: Fields) -> tuple[Rope, Rope]:
    """Returns the rotary positions of global and of local layers."""
    length = f.get("max_position_embeddings", int, 131_072)
    base = f.get("rope_theta", float, 1_000_000.0)
    local = f.get("rope_local_base_freq", float, 10_000.0)
    given, scaling = f.part("rope_parameters"), f.part("rope_scaling")
    if given is None:
        return decoder.rope_of(scaling, base, length), Rope(base=local)
    found = (
        decoder.rope_of(given.part("full_attention"), base, length),
        decoder.rope_of(given.part("sliding_attention"), local, length),
    )
    given.done(frozenset())
    return found


def _write1(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(model.attention, Attention.Config)
    return decoder.write(model, attention_bias=model.attention.bias)


def _write2(model: Transformer.Config) -> dict[str, Any]:
    c, local = model.attention, model.local
    assert isinstance(c, Attention.Config)
    assert local is not None
    data = decoder.write(
        model,
        attention_bias=c.bias,
        attn_logit_softcapping=c.softcap,
        final_logit_softcapping=model.head_softcap,
        query_pre_attn_scalar=round((c.scale or model.head_dim**-0.5) ** -2),
        sliding_window=local.window,
        layer_types=decoder.layer_types(model),
    )
    return data | {"hidden_activation": data.pop("hidden_act")}


def _write3(model: Transformer.Config) -> dict[str, Any]:
    data, local = _write2(model), model.local
    assert local is not None
    assert local.positions is not None
    ropes = {
        "full_attention": data["rope_parameters"],
        "sliding_attention": decoder.write_rope(local.positions),
    }
    return data | {"rope_parameters": ropes}


def _table(model: Transformer.Config) -> Table:
    assert isinstance(model.norm, RmsNorm.Config)

    def layer(i: int) -> tuple[Any, ...]:
        at = f"model.layers.{i}."
        return (
            row("norm1/scale_d", f"{at}input_layernorm.weight"),
            *decoder.attention_rows(model, f"{at}self_attn."),
            row("after1/scale_d", f"{at}post_attention_layernorm.weight"),
            row("norm2/scale_d", f"{at}pre_feedforward_layernorm.weight"),
            *decoder.mlp_rows(False, f"{at}mlp."),
            row("after2/scale_d", f"{at}post_feedforward_layernorm.weight"),
        )

    return Table(decoder.whole(model), tuple(layer(i) for i in range(model.layers)))


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=_read1,
    write=_write1,
    table=decoder.table,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read2,
    write=_write2,
    table=_table,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read3,
    write=_write3,
    table=_table,
)
