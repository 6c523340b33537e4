"""gpt-oss: attention sinks, every other layer local, clamped experts with shifts, YaRN."""

from typing import Any

from lm.convert import decoder, sparse
from lm.convert.decoder import T
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Deal, row
from lm.models.transformer import Local, Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import STEEP
from lm.nn.moe import Moe, Softmax
from lm.nn.rope import Rope, Yarn, mscale

USUAL = Yarn(factor=32.0, length=4096, whole=False, magnitude=mscale(32.0))


def _read(f: Fields) -> Transformer.Config:
    f.only("hidden_act", "silu", default="silu")
    f.only("swiglu_alpha", STEEP, default=STEEP)
    f.skip("experts_per_token", "initial_context_length")
    experts = f.get("num_local_experts", int, 0) or f.get("num_experts", int, 128)
    ffn = Moe.Config(
        experts=experts,
        top_k=f.get("num_experts_per_tok", int, 4),
        hidden=f.get("intermediate_size", int),
        activation="clamped",
        limit=f.get("swiglu_limit", float, 7.0),
        bias=True,
        router_bias=True,
        gate=Softmax(),
        **sparse.losses(f),
    )
    bias = f.get("attention_bias", bool, True)
    attention = Attention.Config(
        head_dim=f.get("head_dim", int, 64), bias=bias, out_bias=bias, sinks=True
    )
    kinds = f.types("layer_types")
    local = Local(
        window=f.get("sliding_window", int, 128),
        pattern=(True, False) if kinds is None else decoder.pattern(kinds),
    )
    given = "rope_parameters" in f or "rope_scaling" in f
    base = f.get("rope_theta", float, 150_000.0)
    return Transformer.Config(
        **decoder.sizes(f),
        attention=attention,
        ffn=ffn,
        norm=decoder.norm(f, usual=1e-5),
        positions=decoder.rope(f, base) if given else Rope(base=base, scaling=USUAL),
        local=local,
        tied=f.get("tie_word_embeddings", bool, False),
    )


def _write(model: Transformer.Config) -> dict[str, Any]:
    c, ffn, local = model.attention, sparse.moe(model), model.local
    assert isinstance(c, Attention.Config)
    assert local is not None
    return decoder.write(
        model,
        num_local_experts=ffn.experts,
        num_experts_per_tok=ffn.top_k,
        intermediate_size=ffn.expert(model.dim).hidden,
        hidden_act="silu",
        swiglu_limit=ffn.limit,
        attention_bias=c.bias,
        sliding_window=local.window,
        layer_types=decoder.layer_types(model),
        router_aux_loss_coef=ffn.balance,
    )


def _table(model: Transformer.Config) -> Table:
    def of_layer(i: int) -> list[Any]:
        at, attention = f"model.layers.{i}.mlp.", f"model.layers.{i}.self_attn."
        both = ("ffn/gate_edf", "ffn/up_edf")
        shifts = ("ffn/gate_bias_ef", "ffn/up_bias_ef")
        return [
            row("mixer/sink_n", f"{attention}sinks"),
            row("ffn/router_de", f"{at}router.weight", T),
            row("ffn/router_bias_e", f"{at}router.bias"),
            row(both, f"{at}experts.gate_up_proj", Deal(-1)),
            row(shifts, f"{at}experts.gate_up_proj_bias", Deal(-1)),
            row("ffn/down_efd", f"{at}experts.down_proj"),
            row("ffn/down_bias_ed", f"{at}experts.down_proj_bias"),
        ]

    return sparse.table(model, of_layer)


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    table=_table,
)
