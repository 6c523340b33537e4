"""Every kind of model that an experiment may have."""

from typing import Any, TypeAlias

from flax import nnx

from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.model import Model
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer

Config: TypeAlias = (
    Transformer.Config | Recurrent.Config | Encoder.Config | EncoderDecoder.Config
)

_MODELS: dict[Any, Any] = {
    model.Config: model for model in (Transformer, Recurrent, Encoder, EncoderDecoder)
}


def build(config: Config, rngs: nnx.Rngs) -> Model:
    """Returns the model that the config describes."""
    return _MODELS[type(config)](config, rngs)
