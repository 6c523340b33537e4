"""What a model family is to the converters: a config read and written, and a table of names."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from lm.config import ConfigError, kind
from lm.convert.fields import Fields
from lm.convert.steps import Row
from lm.models import kinds
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.moe import Dropless, Moe, Sigmoid

# Of a model, what a checkpoint's weights do not depend on: the user's to choose.
FREE = ("vocab_multiple", "dropout", "init_std", "dtype", "remat", "scan")
UNTRAINED: dict[str, Any] = {"dispatch": Dropless(), "balance": 0.0, "z_loss": 0.0}


# Those of a family.
Model: TypeAlias = Transformer.Config | Encoder.Config | EncoderDecoder.Config


@dataclasses.dataclass(frozen=True)
class Table:
    """Which tensor is which parameter."""

    whole: tuple[Row, ...]  # outside the layers; paths in the model
    layers: tuple[tuple[Row, ...], ...]  # of each layer; paths in its block
    encoder: tuple[tuple[Row, ...], ...] = ()  # of each layer of an encoder beside them
    # The embedding once more, where a file has it all the same: the head of a tied model.
    copies: tuple[str, ...] = ("lm_head.weight",)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        layers = (*self.layers, *self.encoder)
        rows = [*self.whole, *(row for layer in layers for row in layer)]
        return [name for row in rows for name in row.names()]

    @property
    def embedding(self) -> str:
        """The name of the embedding's tensor."""
        return next(r.theirs for r in self.whole if r.ours == ("embed_vd",))


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's config.json."""

    model_type: str
    architecture: str  # the class of transformers
    read: Callable[[Fields], Model]
    write: Callable[[Any], dict[str, Any]]  # from a model to keys that say the same
    table: Callable[[Any], Table]
    buffers: tuple[str, ...] = ()  # patterns of tensors that are no weights
    prefix: str = "model."  # which files of a bare base model leave out
    model: Any = Transformer.Config  # the kind of model that it is
    renamed: Callable[[str], str] | None = None  # from an old name of a tensor


def essence(model: kinds.Config) -> Model:
    """Returns the config with what its weights do not depend on at its default.

    Raises:
        ConfigError: a model of a kind that has no family.
    """
    if not isinstance(model, Model):
        name = kind(type(model))
        raise ConfigError(f"model={name}: no family of lm/convert is of this kind")
    plain = type(model)()
    model = dataclasses.replace(model, **{name: getattr(plain, name) for name in FREE})
    plain_attention: Any = dataclasses.replace(
        model.attention, implementation="auto", context="auto"
    )
    if isinstance(plain_attention, Attention.Config):
        head_dim = plain_attention.head_dim or model.dim // model.heads
        plain_attention = dataclasses.replace(plain_attention, head_dim=head_dim)
    if isinstance(model, Encoder.Config | EncoderDecoder.Config):
        ffn = _width(model.ffn, model.dim)
        return dataclasses.replace(model, attention=plain_attention, ffn=ffn)
    ffn: Any = model.ffn
    if isinstance(ffn, Moe.Config):
        hidden = ffn.expert(model.dim).hidden
        dense = (
            _width(ffn.dense, model.dim)
            if len(model.sparse) < model.layers
            else Mlp.Config()
        )
        ffn = dataclasses.replace(ffn, hidden=hidden, dense=dense, **UNTRAINED)
        if isinstance(ffn.gate, Sigmoid):
            ffn = dataclasses.replace(ffn, gate=dataclasses.replace(ffn.gate, rate=0.0))
    else:
        ffn = _width(ffn, model.dim)
    local = model.local
    if local is not None:
        pattern = tuple(model.is_local(i) for i in range(model.layers))
        local = dataclasses.replace(local, pattern=pattern)
    return dataclasses.replace(model, attention=plain_attention, ffn=ffn, local=local)


def _width(ffn: Mlp.Config, dim: int) -> Mlp.Config:
    return dataclasses.replace(ffn, hidden=ffn.width(dim))
