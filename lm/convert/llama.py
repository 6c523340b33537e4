"""Llama 2 and 3 and SmolLM (`llama`), and Mistral, which adds a window (`mistral`)."""

from typing import Any

from lm.convert import decoder
from lm.convert.family import Family
from lm.convert.fields import Fields
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp


def _read(f: Fields) -> Transformer.Config:
    f.only("pretraining_tp", 1, default=1)
    f.only("rope_interleaved", False, default=False)
    f.skip("is_llama_config")
    bias = f.get("attention_bias", bool, False)
    head_dim = f.get("head_dim", int, 0) or None
    attention = Attention.Config(head_dim=head_dim, bias=bias, out_bias=bias)
    return decoder.dense(f, attention, bias=f.get("mlp_bias", bool, False))


def _write(model: Transformer.Config) -> dict[str, Any]:
    c, ffn = model.attention, model.ffn
    assert isinstance(c, Attention.Config)
    assert isinstance(ffn, Mlp.Config)
    return decoder.write(
        model, attention_bias=c.bias, mlp_bias=ffn.bias, pretraining_tp=1
    )


def _read_mistral(f: Fields) -> Transformer.Config:
    head_dim = f.get("head_dim", int, 0) or None
    window = f.optional("sliding_window", int, 4096)
    return decoder.dense(f, Attention.Config(head_dim=head_dim, window=window))


def _write_mistral(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(model.attention, Attention.Config)
    return decoder.write(model, sliding_window=model.attention.window)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    table=decoder.table,
    buffers=("*.rotary_emb.inv_freq",),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read_mistral,
    write=_write_mistral,
    table=decoder.table,
)
