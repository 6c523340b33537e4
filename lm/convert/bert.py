"""BERT: an encoder with its norms after the sums, bare, or with a head for words or for classes."""

from typing import Any

from lm.config import ConfigError
from lm.convert.family import Family, Table
from lm.convert.fields import Fields
from lm.convert.steps import Fold, Row, Transpose, row
from lm.models.encoder import Encoder
from lm.nn.ffn import Mlp
from lm.nn.heads import Classes, Pooler, Words
from lm.nn.layers import LayerNorm, Learned

GELUS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
HEADS: dict[str, Any] = {
    "BertModel": Pooler.Config,
    "BertForMaskedLM": Words.Config,
    "BertForPreTraining": Words.Config,  # and whether a text follows another: left out
    "BertForSequenceClassification": Classes.Config,
}


def _read(f: Fields) -> Encoder.Config:
    f.only("position_embedding_type", "absolute", default="absolute")
    f.only("is_decoder", False, default=False)
    f.only("add_cross_attention", False, default=False)
    f.only("tie_word_embeddings", True, default=True)
    f.skip("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
           "pooler_size_per_head", "pooler_type", "directionality")  # fmt: skip
    eps = f.get("layer_norm_eps", float, 1e-12)
    act: Any = GELUS[f.only("hidden_act", *GELUS, default="gelu")]
    return Encoder.Config(
        layers=f.get("num_hidden_layers", int, 12),
        dim=f.get("hidden_size", int, 768),
        heads=f.get("num_attention_heads", int, 12),
        vocab_size=f.get("vocab_size", int, 30_522),
        norm=LayerNorm.Config(eps=eps),
        ffn=Mlp.Config(
            hidden=f.get("intermediate_size", int, 3072), activation=act, bias=True
        ),
        positions=Learned(length=f.get("max_position_embeddings", int, 512)),
        types=f.get("type_vocab_size", int, 2),
        head=_head(f, eps, act),
    )


def _head(f: Fields, eps: float, act: Any) -> Any:
    """Returns what the class that `architectures` names ends in."""
    (name,) = f.get("architectures", list, ["BertModel"])[:1] or ["BertModel"]
    if name not in HEADS:
        raise ConfigError(
            f"{f.where}: architectures=[{name!r}] is not supported; lm knows {', '.join(HEADS)}"
        )
    kind = HEADS[name]
    if kind is Words.Config:
        return Words.Config(eps=eps, activation=act)
    if kind is Classes.Config:
        f.only("problem_type", "single_label_classification", None, default=None)
        names = f.get("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
        return Classes.Config(classes=len(names), pool="first")
    return Pooler.Config()


def _write(model: Encoder.Config) -> dict[str, Any]:
    assert isinstance(model.norm, LayerNorm.Config)
    names = [name for name, kind in HEADS.items() if kind is type(model.head)]
    data = {
        "architectures": names[:1],
        "num_hidden_layers": model.layers,
        "hidden_size": model.dim,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn.hidden or 4 * model.dim,
        "hidden_act": next(n for n, k in GELUS.items() if k == model.ffn.activation),
        "layer_norm_eps": model.norm.eps,
        "max_position_embeddings": model.positions.length,
        "type_vocab_size": model.types,
        "vocab_size": model.vocab_size,
    }
    if isinstance(model.head, Classes.Config):
        labels = {str(i): f"LABEL_{i}" for i in range(model.head.classes)}
        data |= {
            "id2label": labels,
            "label2id": {name: int(i) for i, name in labels.items()},
            "problem_type": "single_label_classification",
        }
    return data


def _both(ours: str, theirs: str, *steps: Any, bias: str, shift: Any = ()) -> list[Row]:
    """Returns the rows of a linear layer: its weight and its shift."""
    weight = row(ours, f"{theirs}.weight", *steps)
    return [weight, row(bias, f"{theirs}.bias", *shift)]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [
        row(f"{ours}/scale_d", f"{theirs}.weight"),
        row(f"{ours}/bias_d", f"{theirs}.bias"),
    ]


def _layer(at: str, heads: int, size: int) -> tuple[Row, ...]:
    t, apart = Transpose(), (heads, size)
    rows: list[Row] = []
    for ours, theirs, axis in (
        ("query", "query", "n"),
        ("key", "key", "k"),
        ("value", "value", "k"),
    ):
        rows += _both(
            f"mixer/{ours}_d{axis}h", f"{at}.attention.self.{theirs}", t, Fold(1, apart),
            bias=f"mixer/{ours}_bias_{axis}h", shift=(Fold(0, apart),),
        )  # fmt: skip
    rows += _both("mixer/out_nhd", f"{at}.attention.output.dense", t, Fold(0, apart),
                  bias="mixer/out_bias_d")  # fmt: skip
    rows += _norm("sum1", f"{at}.attention.output.LayerNorm")
    rows += _both("ffn/up_df", f"{at}.intermediate.dense", t, bias="ffn/up_bias_f")
    rows += _both("ffn/down_fd", f"{at}.output.dense", t, bias="ffn/down_bias_d")
    rows += _norm("sum2", f"{at}.output.LayerNorm")
    return tuple(rows)


def _table(c: Encoder.Config) -> Table:
    t = Transpose()
    at = "" if type(c.head) is Pooler.Config else "bert."
    whole = [
        row("embed_vd", f"{at}embeddings.word_embeddings.weight"),
        row("position_pd", f"{at}embeddings.position_embeddings.weight"),
        row("type_cd", f"{at}embeddings.token_type_embeddings.weight"),
        *_norm("norm", f"{at}embeddings.LayerNorm"),
    ]
    if isinstance(c.head, Words.Config):
        words = "cls.predictions"
        whole += _both("end/dense_de", f"{words}.transform.dense", t,
                       bias="end/dense_bias_e")  # fmt: skip
        whole += _norm("end/after", f"{words}.transform.LayerNorm")
        whole.append(row("end/bias_v", f"{words}.bias"))
    else:
        whole += _both("end/pool_df", f"{at}pooler.dense", t, bias="end/pool_bias_f")
    if isinstance(c.head, Classes.Config):
        whole += _both("end/class_dc", "classifier", t, bias="end/class_bias_c")
    size = c.attention.head_dim or c.dim // c.heads
    layers = (_layer(f"{at}encoder.layer.{i}", c.heads, size) for i in range(c.layers))
    return Table(
        tuple(whole), tuple(layers), copies=("cls.predictions.decoder.weight",)
    )


def _renamed(name: str) -> str:
    """Returns today's name of a norm's tensor; those of the first files are TensorFlow's."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


BERT = Family(
    model_type="bert",
    architecture="BertModel",
    read=_read,
    write=_write,
    table=_table,
    buffers=(
        "*embeddings.position_ids",
        "cls.predictions.decoder.bias",  # the same as cls.predictions.bias
        "bert.pooler.dense.*",  # beside a head for words: of no use to it
        "cls.seq_relationship.*",
    ),
    prefix="",
    model=Encoder.Config,
    renamed=_renamed,
)
