"""Every kind of model that an experiment may have."""

from typing import Any, TypeAlias

from flax import nnx

from lm.config import ConfigError
from lm.models.bag import Bag
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.model import Model
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.heads import Pooler

Config: TypeAlias = (
    Transformer.Config
    | Recurrent.Config
    | Encoder.Config
    | EncoderDecoder.Config
    | Bag.Config
)

_MODELS: dict[Any, Any] = {
    model.Config: model
    for model in (Transformer, Recurrent, Encoder, EncoderDecoder, Bag)
}


def head(config: Config) -> Any:
    """Returns the config of what a model ends in besides its embedding; None: nothing."""
    return getattr(config, "head", None)


def untrained(model: Config) -> None:
    """Refuses a model that nothing can be learned or measured with.

    Raises:
        ConfigError: it ends in a bare pooler.
    """
    if type(head(model)) is Pooler.Config:
        raise ConfigError(
            "model.head=Pooler predicts nothing; give the model a head: --set model.head=Classes "
            "--set objective=Classification with its labels, or --set model.head=Words for "
            "objective=Masked"
        )


def build(config: Config, rngs: nnx.Rngs) -> Model:
    """Returns the model that the config describes."""
    return _MODELS[type(config)](config, rngs)
