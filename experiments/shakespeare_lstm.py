"""Shakespeare's plays by an LSTM, to set beside the Transformer of `shakespeare`."""

import dataclasses

from experiments import shakespeare
from lm.experiment import Experiment
from lm.models.recurrent import Recurrent
from lm.nn.recurrent import Lstm


def experiment() -> Experiment:
    """Returns as many parameters as `shakespeare` has, in two layers of LSTM."""
    base = shakespeare.experiment()
    return dataclasses.replace(
        base,
        name="shakespeare_lstm",
        about="the plays of shakespeare, by two layers of LSTM of as many parameters",
        model=Recurrent.Config(
            layers=2,
            dim=256,
            mixer=Lstm.Config(hidden=320),
            vocab_size=2048,
        ),
        target="cpu:1",
    )
