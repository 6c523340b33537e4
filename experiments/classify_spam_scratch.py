"""Spam told from mail by an encoder trained from nothing; `make spam` writes the data."""

from lm.batches import Classification
from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.data.words import Words
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.encoder import Encoder
from lm.nn.heads import Classes
from lm.nn.layers import Learned
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns a small encoder whose words' mean, after one layer, says ham or spam."""
    return Experiment(
        name="classify_spam_scratch",
        about="SpamAssassin's mail, ham or spam; first `make spam`",
        model=Encoder.Config(
            layers=1,
            dim=96,
            heads=4,
            vocab_size=4096,
            positions=Learned(length=512),
            head=Classes.Config(classes=2),
            dropout=0.2,
            init_std=0.05,
        ),
        data=Data(
            source=("jsonl:.cache/spam/train.jsonl#text+label",),
            length=512,
            packing="documents",
            holdout=0.0,
            tokenizer=SentencePiece(model_type="bpe", sample_bytes=8_000_000),
        ),
        objective=Classification(
            labels=("ham", "spam"), words=Words(lower=True), long="ends"
        ),
        optim=Optim(learning_rate=1e-3, schedule=Cosine(warmup=50)),
        train=Train(steps=400, batch_size=32),
        eval=Eval(
            every=200,
            sets=(
                EvalSet(
                    source=("jsonl:.cache/spam/valid.jsonl#text+label",),
                    split="train",  # all of that file
                ),
            ),
        ),
        checkpoint=Checkpoint(every=300),
        target="cpu:1",
    )
