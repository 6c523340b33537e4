"""Qwen 2 and 3 with experts; those of Qwen 2 stand beside a shared one with a gate of its own."""

from typing import Any

from lm.config import ConfigError
from lm.convert import decoder, qwen, sparse
from lm.convert.decoder import T
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Fold, row
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.moe import Moe, Softmax

NAMES = ("gate_proj", "up_proj", "down_proj")


def _model(f: Fields, attention: Attention.Config, **more: Any) -> Transformer.Config:
    sizes = decoder.sizes(f)
    f.only("mlp_only_layers", [], default=[])
    act = decoder.activation(f)
    experts = f.get("num_local_experts", int, 0) or f.get("num_experts", int)
    f.skip("num_experts")
    ffn = Moe.Config(
        experts=experts,
        top_k=f.get("num_experts_per_tok", int),
        hidden=f.get("moe_intermediate_size", int),
        activation=act,
        gate=Softmax(renormalize=f.get("norm_topk_prob", bool, False)),
        every=f.get("decoder_sparse_step", int, 1),
        dense=Mlp.Config(hidden=f.get("intermediate_size", int), activation=act),
        **sparse.losses(f),
        **more,
    )
    return Transformer.Config(
        **sizes,
        attention=attention,
        ffn=ffn,
        norm=decoder.norm(f),
        positions=decoder.rope(f),
        local=qwen.local(f, sizes["layers"]),
        tied=f.get("tie_word_embeddings", bool, False),
    )


def _read2(f: Fields) -> Transformer.Config:
    hidden = f.get("moe_intermediate_size", int)
    shared = f.get("shared_expert_intermediate_size", int)
    if shared % hidden:
        raise ConfigError(
            f"{f.where}: shared_expert_intermediate_size={shared} is not a multiple of "
            f"moe_intermediate_size={hidden}, which lm needs"
        )
    attention = Attention.Config(
        bias=f.get("qkv_bias", bool, True), head_dim=f.get("head_dim", int, 0) or None
    )
    return _model(f, attention, shared=shared // hidden, shared_gate=True)


def _read3(f: Fields) -> Transformer.Config:
    bias = f.get("attention_bias", bool, False)
    head_dim = f.get("head_dim", int, 0) or None
    return _model(
        f,
        Attention.Config(bias=bias, out_bias=bias, qk_norm=True, head_dim=head_dim),
    )


def _write(model: Transformer.Config, experts: str, **more: Any) -> dict[str, Any]:
    ffn = sparse.moe(model)
    return decoder.write(
        model,
        **qwen.write_local(model),
        **{experts: ffn.experts},
        num_experts_per_tok=ffn.top_k,
        moe_intermediate_size=ffn.expert(model.dim).hidden,
        intermediate_size=ffn.dense.width(model.dim),
        hidden_act=decoder.act_name(ffn.activation),
        norm_topk_prob=ffn.gate.renormalize,
        decoder_sparse_step=ffn.every,
        mlp_only_layers=[],
        router_aux_loss_coef=ffn.balance,
        **more,
    )


def _write2(model: Transformer.Config) -> dict[str, Any]:
    ffn = sparse.moe(model)
    width = ffn.expert(model.dim, ffn.shared).hidden
    assert isinstance(model.attention, Attention.Config)
    bias = model.attention.bias
    return _write(
        model, "num_experts", shared_expert_intermediate_size=width, qkv_bias=bias
    )


def _write3(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(model.attention, Attention.Config)
    return _write(model, "num_experts", attention_bias=model.attention.bias)


def _table(model: Transformer.Config) -> Table:
    ffn = sparse.moe(model)

    def of_layer(i: int) -> list[Any]:
        at = f"model.layers.{i}.mlp."
        if i not in model.sparse:
            return decoder.mlp_rows(False, at)
        rows = [
            row("ffn/router_de", f"{at}gate.weight", T),
            *sparse.expert_rows(model, f"{at}experts.", NAMES),
        ]
        if ffn.shared:
            rows += decoder.mlp_rows(False, f"{at}shared_expert.", "ffn/shared")
            gate = f"{at}shared_expert_gate.weight"
            rows.append(row("ffn/shared_gate_d", gate, Fold(0, ())))
        return rows

    return sparse.table(model, of_layer)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=_read2,
    write=_write2,
    table=_table,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read3,
    write=_write3,
    table=_table,
)
