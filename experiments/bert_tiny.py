"""Pretraining of an encoder in a minute: hidden words of the embedded text."""

from lm.batches import Masked
from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.encoder import Encoder
from lm.nn.layers import Learned
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns an encoder of 0.6 M parameters that fills gaps in Shakespeare's plays."""
    return Experiment(
        name="bert_tiny",
        about="minutes on a laptop: words hidden in the plays, told from both sides",
        model=Encoder.Config(
            layers=2,
            dim=128,
            heads=4,
            vocab_size=1025,  # the tokenizer's, and the mask
            positions=Learned(length=128),
            init_std=0.05,
        ),
        data=Data(
            source=("tfds:lm_text/shakespeare",),
            length=128,
            tokenizer=SentencePiece(model_type="bpe", sample_bytes=4_000_000),
        ),
        objective=Masked(),
        optim=Optim(learning_rate=2e-3, schedule=Cosine(warmup=50)),
        train=Train(steps=600, batch_size=16),
        eval=Eval(every=200, sets=(EvalSet(batches=16),)),
        checkpoint=Checkpoint(every=300),
        target="cpu:1",
    )
