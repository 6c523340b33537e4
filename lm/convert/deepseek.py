"""DeepSeek V2 and V3: latent attention, experts in groups and shared ones, dense layers first."""

import math
from typing import Any

from lm.convert import decoder, sparse
from lm.convert.decoder import T
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Cut, Fold, Halves, Row, row
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.latent import Latent
from lm.nn.moe import Limited, Moe, Sigmoid, Softmax
from lm.nn.rope import Rope, Yarn, mscale

NAMES = ("gate_proj", "up_proj", "down_proj")


def _attention(f: Fields) -> Latent.Config:
    """Latent attention; under YaRN the scores have a scale of their own."""
    plain, turned = f.get("qk_nope_head_dim", int), f.get("qk_rope_head_dim", int)
    f.skip("head_dim", "qk_head_dim")
    scale = None
    given = f.part("rope_parameters") or f.part("rope_scaling")
    weight = given.get("mscale_all_dim", float, 0.0) if given else 0.0
    if given is not None and weight:
        factor = given.get("factor", float)
        scale = (plain + turned) ** -0.5 * mscale(factor, weight) ** 2
    return Latent.Config(
        rank=f.get("kv_lora_rank", int),
        query_rank=f.optional("q_lora_rank", int, 1536),
        plain_dim=plain,
        rope_dim=turned,
        value_dim=f.get("v_head_dim", int),
        bias=f.get("attention_bias", bool, False),
        scale=scale,
    )


def _model(f: Fields, gate: Any, limited: Limited | None) -> Transformer.Config:
    f.only("pretraining_tp", 1, default=1)
    f.only("moe_layer_freq", 1, default=1)
    f.only("mlp_bias", False, default=False)
    f.skip("ep_size")
    act = decoder.activation(f)
    ffn = Moe.Config(
        experts=f.get("n_routed_experts", int),
        top_k=f.get("num_experts_per_tok", int),
        hidden=f.get("moe_intermediate_size", int),
        activation=act,
        shared=f.get("n_shared_experts", int),
        gate=gate,
        limited=limited,
        dense_first=f.get("first_k_dense_replace", int, 0),
        dense=Mlp.Config(hidden=f.get("intermediate_size", int), activation=act),
        **sparse.losses(f),
    )
    return Transformer.Config(
        **decoder.sizes(f),
        attention=_attention(f),
        ffn=ffn,
        norm=decoder.norm(f),
        positions=decoder.rope(f),
        tied=f.get("tie_word_embeddings", bool, False),
    )


def _limited(f: Fields) -> Limited | None:
    groups, keep = f.optional("n_group", int, None), f.optional("topk_group", int, None)
    return Limited(groups=groups, keep=keep or 1) if groups and groups > 1 else None


def _read2(f: Fields) -> Transformer.Config:
    f.only("norm_topk_prob", False, default=False)
    f.only("scoring_func", "softmax", default="softmax")
    how = f.only("topk_method", "greedy", "group_limited_greedy", default="greedy")
    gate = Softmax(renormalize=False, scale=f.get("routed_scaling_factor", float, 1.0))
    limited = _limited(f)
    return _model(f, gate, limited if how == "group_limited_greedy" else None)


def _read3(f: Fields) -> Transformer.Config:
    f.only("scoring_func", "sigmoid", default="sigmoid")
    f.only("topk_method", "noaux_tc", default="noaux_tc")
    f.only("rope_interleave", True, default=True)
    f.skip("num_nextn_predict_layers")  # their tensors are left out
    gate = Sigmoid(
        renormalize=f.get("norm_topk_prob", bool, True),
        scale=f.get("routed_scaling_factor", float, 2.5),
    )
    return _model(f, gate, _limited(f))


def _write(model: Transformer.Config, **more: Any) -> dict[str, Any]:
    c, ffn, rope = model.attention, sparse.moe(model), model.positions
    assert isinstance(c, Latent.Config)
    assert isinstance(rope, Rope)
    groups = ffn.limited or Limited(groups=1, keep=1)
    data = decoder.write(
        model,
        kv_lora_rank=c.rank,
        q_lora_rank=c.query_rank,
        qk_nope_head_dim=c.plain_dim,
        qk_rope_head_dim=c.rope_dim,
        v_head_dim=c.value_dim,
        attention_bias=c.bias,
        n_routed_experts=ffn.experts,
        num_experts_per_tok=ffn.top_k,
        moe_intermediate_size=ffn.expert(model.dim).hidden,
        intermediate_size=ffn.dense.width(model.dim),
        hidden_act=decoder.act_name(ffn.activation),
        n_shared_experts=ffn.shared,
        first_k_dense_replace=ffn.dense_first,
        n_group=groups.groups,
        topk_group=groups.keep,
        routed_scaling_factor=ffn.gate.scale,
        norm_topk_prob=ffn.gate.renormalize,
        **more,
    )
    data["head_dim"] = c.rope_dim
    if c.scale is not None and isinstance(rope.scaling, Yarn):
        # The weight that gives this scale: a short decimal wherever it came from a file.
        ratio = math.sqrt(c.scale * math.sqrt(c.head_dim))
        weight = round((ratio - 1) / (0.1 * math.log(rope.scaling.factor)), 6)
        data["rope_parameters"]["mscale_all_dim"] = weight
    return data


def _write2(model: Transformer.Config) -> dict[str, Any]:
    limited = sparse.moe(model).limited
    how = "greedy" if limited is None else "group_limited_greedy"
    assert isinstance(sparse.moe(model).gate, Softmax)
    return _write(model, topk_method=how)


def _write3(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(sparse.moe(model).gate, Sigmoid)
    return _write(model, rope_interleave=True)


def _attention_rows(model: Transformer.Config, at: str) -> list[Row]:
    c, N = model.attention, model.heads
    assert isinstance(c, Latent.Config)
    H, pairs = c.head_dim, Halves(-1, c.rope_dim)
    both = (c.plain_dim, c.value_dim)
    rows = [
        row("mixer/down_dc", f"{at}kv_a_proj_with_mqa.weight", T, pairs),
        row("mixer/norm/scale_d", f"{at}kv_a_layernorm.weight"),
        row(
            ("mixer/key_cnp", "mixer/value_cnv"),
            f"{at}kv_b_proj.weight", T, Fold(1, (N, sum(both))), Cut(-1, both),
        ),
        row("mixer/out_nvd", f"{at}o_proj.weight", T, Fold(0, (N, c.value_dim))),
    ]  # fmt: skip
    heads = (T, Fold(1, (N, H)), pairs)
    if c.query_rank is None:
        rows.append(row("mixer/query_dnh", f"{at}q_proj.weight", *heads))
    else:
        rows += [
            row("mixer/query_down_dq", f"{at}q_a_proj.weight", T),
            row("mixer/query_norm/scale_d", f"{at}q_a_layernorm.weight"),
            row("mixer/query_qnh", f"{at}q_b_proj.weight", *heads),
        ]
    if c.bias:
        rows.append(row("mixer/down_bias_c", f"{at}kv_a_proj_with_mqa.bias", pairs))
        rows.append(row("mixer/out_bias_d", f"{at}o_proj.bias"))
        if c.query_rank is not None:
            rows.append(row("mixer/query_bias_q", f"{at}q_a_proj.bias"))
    return rows


def _table(model: Transformer.Config) -> Table:
    ffn = sparse.moe(model)

    def of_ffn(i: int) -> list[Row]:
        at = f"model.layers.{i}.mlp."
        if i not in model.sparse:
            return decoder.mlp_rows(False, at)
        rows = [
            row("ffn/router_de", f"{at}gate.weight", T),
            *sparse.expert_rows(model, f"{at}experts.", NAMES),
            *decoder.mlp_rows(False, f"{at}shared_experts.", "ffn/shared"),
        ]
        if isinstance(ffn.gate, Sigmoid):
            rows.append(row("ffn/balance_e", f"{at}gate.e_score_correction_bias"))
        return rows

    return sparse.table(model, of_ffn, _attention_rows)


V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=_read2,
    write=_write2,
    table=_table,
)
V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read3,
    write=_write3,
    table=_table,
    buffers=("model.layers.61.*",),  # a further prediction head, for training
)
