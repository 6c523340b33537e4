"""Recurrent language model: layers that carry a state along the row instead of looking back.

A row begins with an empty state, and so does every document in it. A row of `data.length` tokens,
with `model.mixer.window`, is read in windows, from one to the next of which the state goes on
and no gradient goes back. Rows are shuffled like all examples (an example is a function of its
number alone), so what comes before a row is nowhere to be found when it is read.
"""

import dataclasses

from flax import nnx

from lm.config import ConfigError
from lm.models import stack
from lm.models.model import Model
from lm.nn.ffn import Mlp
from lm.nn.heads import Classes
from lm.nn.recurrent import Gru, Lstm


class Recurrent(Model):
    """A causal language model of LSTM or GRU layers; its cache has one size for any length."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Model.Config):
        mixer: Lstm.Config | Gru.Config = Lstm.Config()
        ffn: Mlp.Config | None = None  # after each mixer; None: there is none
        head: Classes.Config | None = None  # of texts; None: the next token

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head is not None and self.head.pool == "first":
                raise ConfigError(
                    "model.head.pool=first: the first state of a recurrent model has read one "
                    "token; use last or mean"
                )

        @property
        def blocks(self) -> tuple[stack.Block.Config, ...]:
            """Every layer's config."""
            return (self._block_of(mixer=self.mixer, ffn=self.ffn),) * self.layers

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if config.head is not None:
            self.end = Classes(
                config.head, config.dim, config.vocab_rows, config.init_std, rngs
            )
