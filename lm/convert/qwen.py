"""Qwen 2 (shifts of queries, keys and values, a window in upper layers) and Qwen 3 (QK-norm)."""

from typing import Any

from lm.convert import decoder
from lm.convert.family import Family
from lm.convert.fields import Fields
from lm.models.transformer import Local, Transformer
from lm.nn.attention import Attention


def local(f: Fields, layers: int) -> Local | None:
    """Returns which layers have a window, None where none has."""
    window = f.optional("sliding_window", int, 4096)
    used = f.get("use_sliding_window", bool, False)
    upper = f.get("max_window_layers", int, 28)
    kinds = f.types("layer_types")
    if not (used and window):
        return None
    found = tuple(i >= upper for i in range(layers))
    found = found if kinds is None else decoder.pattern(kinds)
    return Local(window=window, pattern=found) if any(found) else None


def write_local(model: Transformer.Config) -> dict[str, Any]:
    """Returns the keys of the window."""
    if model.local is None:
        return {"use_sliding_window": False, "sliding_window": None}
    assert model.local.positions is None
    return {
        "use_sliding_window": True,
        "sliding_window": model.local.window,
        "layer_types": decoder.layer_types(model),
    }


def _dense(f: Fields, attention: Attention.Config) -> Transformer.Config:
    return decoder.dense(f, attention, local=local(f, f.get("num_hidden_layers", int)))


def _read2(f: Fields) -> Transformer.Config:
    f.only("use_mrope", False, default=False)
    head_dim = f.get("head_dim", int, 0) or None
    return _dense(f, Attention.Config(bias=True, head_dim=head_dim))


def _read3(f: Fields) -> Transformer.Config:
    bias = f.get("attention_bias", bool, False)
    head_dim = f.get("head_dim", int, 128)
    return _dense(
        f,
        Attention.Config(bias=bias, out_bias=bias, qk_norm=True, head_dim=head_dim),
    )


def _write2(model: Transformer.Config) -> dict[str, Any]:
    return decoder.write(model, **write_local(model))


def _write3(model: Transformer.Config) -> dict[str, Any]:
    assert isinstance(model.attention, Attention.Config)
    bias = model.attention.bias
    return decoder.write(model, **write_local(model), attention_bias=bias)


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read2,
    write=_write2,
    table=decoder.table,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read3,
    write=_write3,
    table=decoder.table,
)
