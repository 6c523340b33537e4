"""Bag: a text is the mean of its tokens' vectors, and an MLP tells its class.

The deep averaging network (Iyyer et al. 2015) with one hidden layer: the head's. It knows
nothing of order, and is what a classifier that reads should beat.
"""

import dataclasses

from flax import nnx

from lm.config import ConfigError
from lm.models import stack
from lm.models.model import Model
from lm.nn.heads import Classes


class Bag(Model):
    """A model without layers: the embedding, a norm, and a head over the mean."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Model.Config):
        layers: int = 0
        head: Classes.Config = Classes.Config()

        def _check_layers(self) -> None:
            if self.layers:
                raise ConfigError(
                    f"model.layers={self.layers}: model=Bag has none; set model.layers=0 and "
                    "model.head.hidden, or model=Encoder"
                )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head.pool != "mean":
                raise ConfigError(
                    f"model.head.pool={self.head.pool}: model=Bag takes the mean; set it to mean"
                )

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """No layers."""
            return ()

        @property
        def ffn(self) -> None:
            """No feed-forward layers either."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        D, std = config.dim, config.init_std
        self.end = Classes(config.head, D, config.vocab_rows, std, rngs)
