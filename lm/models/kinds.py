"""Every kind of model that an experiment may have."""

from typing import TypeAlias

from flax import nnx

from lm.models.model import Model
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer

Config: TypeAlias = Transformer.Config | Recurrent.Config

_MODELS = {model.Config: model for model in (Transformer, Recurrent)}


def build(config: Config, rngs: nnx.Rngs) -> Model:
    """Returns the model that the config describes."""
    return _MODELS[type(config)](config, rngs)
