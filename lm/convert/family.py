"""What a model family is to the converters: a config read and written, and a table of names."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm.convert.fields import Fields
from lm.convert.steps import Row
from lm.models.transformer import Transformer

# Of a model, what a checkpoint's weights do not depend on: the user's to choose.
FREE = {
    *("vocab_multiple", "dropout", "init_std", "dtype", "remat", "scan"),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Which tensor is which parameter."""

    whole: tuple[Row, ...]  # outside the layers; paths in the model
    layers: tuple[tuple[Row, ...], ...]  # of each layer; paths in its block
    head: str = (
        "lm_head.weight"  # the head of a tied model, where a file has it all the same
    )

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        rows = [*self.whole, *(row for layer in self.layers for row in layer)]
        return [name for row in rows for name in row.names()]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's config.json."""

    model_type: str
    architecture: str  # the class of transformers
    read: Callable[[Fields], Transformer.Config]
    write: Callable[[Transformer.Config], dict[str, Any]]  # keys that say the same
    table: Callable[[Transformer.Config], Table]
    buffers: tuple[str, ...] = ()  # patterns of tensors that are no weights
    prefix: str = "model."  # which files of a bare base model leave out


def essence(model: Transformer.Config) -> Transformer.Config:
    """Returns the config with what its weights do not depend on at its default."""
    plain = Transformer.Config()
    model = dataclasses.replace(model, **{name: getattr(plain, name) for name in FREE})
    attention = dataclasses.replace(
        model.attention, implementation="auto", context="auto"
    )
    return dataclasses.replace(model, attention=attention)
