"""What most decoders of Hugging Face have in common: names, shapes and the keys of config.json.

Letters: D width of the model, N heads, K kv heads, H head dim, F hidden.
"""

from typing import Any

from lm.config import ConfigError
from lm.convert.family import Table
from lm.convert.fields import Fields
from lm.convert.steps import Fold, Row, Transpose, row
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import RmsNorm
from lm.nn.rope import Linear, Llama3, Rope, Yarn, mscale

ACTIVATIONS = {  # hidden_act → ours, with a gate
    "silu": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}
T = Transpose()


def sizes(f: Fields) -> dict[str, Any]:
    """Returns layers, dim, heads, kv_heads and vocab_size."""
    heads = f.get("num_attention_heads", int)
    return {
        "layers": f.get("num_hidden_layers", int),
        "dim": f.get("hidden_size", int),
        "heads": heads,
        "kv_heads": f.optional("num_key_value_heads", int, heads) or heads,
        "vocab_size": f.get("vocab_size", int),
    }


def activation(f: Fields, name: str = "hidden_act", usual: str = "silu") -> Any:
    """Returns the kind of a gated layer."""
    return ACTIVATIONS[f.only(name, *ACTIVATIONS, default=usual)]


def act_name(kind: str) -> str:
    """Returns the name of a gated layer's activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == kind)


def norm(f: Fields, offset: float = 0.0, usual: float = 1e-6) -> RmsNorm.Config:
    """Returns the norm of every place."""
    return RmsNorm.Config(eps=f.get("rms_norm_eps", float, usual), offset=offset)


def rope(f: Fields, base: float = 10_000.0, length: int = 2048) -> Rope:
    """Returns the rotary positions of all layers.

    Args:
        f: config.json.
        base: where it does not say.
        length: its max_position_embeddings, where it does not say.
    """
    theta = f.get("rope_theta", float, base)
    f.only("partial_rotary_factor", 1.0, default=1.0)
    given = f.part("rope_parameters")
    scaling = f.part("rope_scaling")
    length = f.get("max_position_embeddings", int, length)
    return rope_of(given or scaling, theta, length)


def rope_of(given: Fields | None, base: float, length: int) -> Rope:
    """Returns the positions that a dict `rope_parameters` or `rope_scaling` describes."""
    if given is None:
        return Rope(base=base)
    kinds = ("default", "linear", "llama3", "yarn")
    old = given.get("type", str, "default")
    kind = given.get("rope_type", str, old)
    if kind not in kinds:
        raise ConfigError(
            f"{given.where}: rope_type={kind!r} is not supported; lm knows {', '.join(kinds)}"
        )
    base = given.get("rope_theta", float, base)
    given.only("partial_rotary_factor", 1.0, default=1.0)
    scaling: Any = None
    if kind == "linear":
        scaling = Linear(factor=given.get("factor", float))
    elif kind == "llama3":
        scaling = Llama3(
            factor=given.get("factor", float),
            low=given.get("low_freq_factor", float),
            high=given.get("high_freq_factor", float),
            length=given.get("original_max_position_embeddings", int),
        )
    elif kind == "yarn":
        scaling = _yarn(given, length)
    given.done(frozenset())
    return Rope(base=base, scaling=scaling)


def _yarn(given: Fields, length: int) -> Yarn:
    factor = given.get("factor", float)
    once, all_dims = (given.get(k, float, 0.0) for k in ("mscale", "mscale_all_dim"))
    scale = mscale(factor)
    if once and all_dims:
        scale = mscale(factor, once) / mscale(factor, all_dims)
    return Yarn(
        factor=factor,
        fast=given.get("beta_fast", float, 32.0),
        slow=given.get("beta_slow", float, 1.0),
        length=given.get("original_max_position_embeddings", int, length),
        whole=given.get("truncate", bool, True),
        magnitude=given.get("attention_factor", float, scale),
    )


LOCAL, GLOBAL = "sliding_attention", "full_attention"


def pattern(kinds: tuple[str, ...]) -> tuple[bool, ...]:
    """Returns which layers are local, as short as it can be repeated."""
    local = tuple(kind == LOCAL for kind in kinds)
    for n in range(1, len(local)):
        if all(a == b for a, b in zip(local, local[n:], strict=False)):
            return local[:n]
    return local


def layer_types(model: Transformer.Config) -> list[str]:
    """Returns the kind of every layer."""
    return [LOCAL if model.is_local(i) else GLOBAL for i in range(model.layers)]


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns `rope_parameters`."""
    found: dict[str, Any] = {"rope_theta": rope.base, "rope_type": "default"}
    match rope.scaling:
        case Linear(factor=factor):
            found |= {"rope_type": "linear", "factor": factor}
        case Llama3() as s:
            found |= {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low,
                "high_freq_factor": s.high,
                "original_max_position_embeddings": s.length,
            }
        case Yarn() as s:
            found |= {
                "rope_type": "yarn",
                "factor": s.factor,
                "beta_fast": s.fast,
                "beta_slow": s.slow,
                "original_max_position_embeddings": s.length,
                "truncate": s.whole,
                "attention_factor": s.magnitude,
            }
    return found


def write(model: Transformer.Config, **more: Any) -> dict[str, Any]:
    """Returns the keys that all of these families share, and `more`."""
    assert isinstance(model.ffn, Mlp.Config) or "hidden_act" in more
    assert isinstance(model.norm, RmsNorm.Config)
    assert isinstance(model.positions, Rope)
    dense: Any = model.ffn
    longest = {}
    if isinstance(scaling := model.positions.scaling, Yarn):
        longest["max_position_embeddings"] = round(scaling.factor * scaling.length)
    return {
        **longest,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm.eps,
        "rope_parameters": write_rope(model.positions),
        "tie_word_embeddings": model.tied,
        **({} if "hidden_act" in more else {"hidden_act": act_name(dense.activation)}),
        **({} if "intermediate_size" in more else {"intermediate_size": dense.width(model.dim)}),
        **more,
    }  # fmt: skip


def attention_rows(model: Transformer.Config, at: str) -> list[Row]:
    """Returns the rows of one layer's attention; `at` is its prefix."""
    c, H = model.attention, model.head_dim
    assert isinstance(c, Attention.Config)
    N, K = model.heads, model.kv_heads
    rows = [
        row("mixer/query_dnh", f"{at}q_proj.weight", T, Fold(1, (N, H))),
        row("mixer/key_dkh", f"{at}k_proj.weight", T, Fold(1, (K, H))),
        row("mixer/value_dkh", f"{at}v_proj.weight", T, Fold(1, (K, H))),
        row("mixer/out_nhd", f"{at}o_proj.weight", T, Fold(0, (N, H))),
    ]
    if c.bias:
        rows += [
            row("mixer/query_bias_nh", f"{at}q_proj.bias", Fold(0, (N, H))),
            row("mixer/key_bias_kh", f"{at}k_proj.bias", Fold(0, (K, H))),
            row("mixer/value_bias_kh", f"{at}v_proj.bias", Fold(0, (K, H))),
        ]
    if c.out_bias:
        rows.append(row("mixer/out_bias_d", f"{at}o_proj.bias"))
    if c.qk_norm:
        rows += [
            row("mixer/query_norm/scale_d", f"{at}q_norm.weight"),
            row("mixer/key_norm/scale_d", f"{at}k_norm.weight"),
        ]
    return rows


def mlp_rows(bias: bool, at: str, ours: str = "ffn") -> list[Row]:
    """Returns the rows of one gated layer."""
    names = {"gate_df": "gate_proj", "up_df": "up_proj", "down_fd": "down_proj"}
    rows = [row(f"{ours}/{k}", f"{at}{v}.weight", T) for k, v in names.items()]
    if bias:
        names = {
            "gate_bias_f": "gate_proj",
            "up_bias_f": "up_proj",
            "down_bias_d": "down_proj",
        }
        rows += [row(f"{ours}/{k}", f"{at}{v}.bias") for k, v in names.items()]
    return rows  # fmt: skip


def whole(model: Transformer.Config) -> tuple[Row, ...]:
    """Returns the rows of the embedding, the last norm and the head."""
    rows = [
        row("embed_vd", "model.embed_tokens.weight"),
        row("norm/scale_d", "model.norm.weight"),
    ]
    if not model.tied:
        rows.append(row("head_vd", "lm_head.weight"))
    return tuple(rows)


def dense(
    f: Fields, attention: Attention.Config, bias: bool = False, **more: Any
) -> Transformer.Config:
    """Reads a decoder whose layers are all attention and an MLP, with or without biases."""
    return Transformer.Config(
        **sizes(f),
        attention=attention,
        ffn=Mlp.Config(
            hidden=f.get("intermediate_size", int), activation=activation(f), bias=bias
        ),
        norm=norm(f),
        positions=rope(f),
        tied=f.get("tie_word_embeddings", bool, False),
        **more,
    )


def dense_layer(model: Transformer.Config, i: int) -> tuple[Row, ...]:
    """Returns the rows of a layer with norms before attention and feed-forward."""
    at = f"model.layers.{i}."
    assert isinstance(model.ffn, Mlp.Config)
    return (
        row("norm1/scale_d", f"{at}input_layernorm.weight"),
        *attention_rows(model, f"{at}self_attn."),
        row("norm2/scale_d", f"{at}post_attention_layernorm.weight"),
        *mlp_rows(model.ffn.bias, f"{at}mlp."),
    )


def table(model: Transformer.Config) -> Table:
    """Returns the table of a decoder whose layers are all `dense_layer`s."""
    layers = tuple(dense_layer(model, i) for i in range(model.layers))
    return Table(whole(model), layers)
