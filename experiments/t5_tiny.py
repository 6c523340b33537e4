"""Pretraining of an encoder and a decoder in minutes: spans cut out of the embedded text."""

from lm.batches import SpanCorruption
from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns a small T5 (v1.1) that writes what was cut out of Shakespeare's plays."""
    return Experiment(
        name="t5_tiny",
        about="minutes on a laptop: spans cut out of the plays, written by a decoder",
        model=EncoderDecoder.Config(
            encoder_layers=2,
            layers=2,
            dim=128,
            heads=4,
            vocab_size=1044,  # the tokenizer's 1024, and a sentinel for each span
            attention=Attention.Config(scale=1.0),
            ffn=Mlp.Config(hidden=256, activation="geglu"),
            tied=False,
            init_std=0.05,
        ),
        data=Data(
            source=("tfds:lm_text/shakespeare",),
            length=128,
            tokenizer=SentencePiece(model_type="bpe", sample_bytes=4_000_000),
        ),
        objective=SpanCorruption(sentinels=20),
        optim=Optim(learning_rate=2e-3, schedule=Cosine(warmup=50)),
        train=Train(steps=600, batch_size=16),
        eval=Eval(every=200, sets=(EvalSet(batches=16),)),
        checkpoint=Checkpoint(every=300),
        target="cpu:1",
    )
