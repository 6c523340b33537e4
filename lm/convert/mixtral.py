"""Mixtral: Mistral with experts."""

from typing import Any

from lm.convert import decoder, sparse
from lm.convert.decoder import T
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import row
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.moe import Moe, Softmax


def _read(f: Fields) -> Transformer.Config:
    f.only("router_jitter_noise", 0.0, default=0.0)
    ffn = Moe.Config(
        experts=f.get("num_local_experts", int, 8),
        top_k=f.get("num_experts_per_tok", int, 2),
        hidden=f.get("intermediate_size", int),
        activation=decoder.activation(f),
        gate=Softmax(),
        **sparse.losses(f),
    )
    attention = Attention.Config(
        head_dim=f.get("head_dim", int, 0) or None,
        window=f.optional("sliding_window", int, None),
    )
    return Transformer.Config(
        **decoder.sizes(f),
        attention=attention,
        ffn=ffn,
        norm=decoder.norm(f, usual=1e-5),
        positions=decoder.rope(f, base=1_000_000.0),
        tied=f.get("tie_word_embeddings", bool, False),
    )


def _write(model: Transformer.Config) -> dict[str, Any]:
    c, ffn = model.attention, sparse.moe(model)
    assert isinstance(c, Attention.Config)
    return decoder.write(
        model,
        num_local_experts=ffn.experts,
        num_experts_per_tok=ffn.top_k,
        intermediate_size=ffn.expert(model.dim).hidden,
        hidden_act=decoder.act_name(ffn.activation),
        sliding_window=c.window,
        router_aux_loss_coef=ffn.balance,
    )


def _table(model: Transformer.Config) -> Table:
    def of_layer(i: int) -> list[Any]:
        at = f"model.layers.{i}.block_sparse_moe."
        return [
            row("ffn/router_de", f"{at}gate.weight", T),
            *sparse.expert_rows(model, f"{at}experts.", ("w1", "w3", "w2")),
        ]

    return sparse.table(model, of_layer)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    table=_table,
)
