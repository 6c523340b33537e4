"""A run of seconds, for tests and for trying things out."""

from lm.data.loader import Data
from lm.data.tokenizer import Bytes
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Generate, Train
from lm.models.transformer import Transformer
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns a byte-level model of 0.1 M parameters on 1 MB of text."""
    return Experiment(
        name="tiny",
        about="seconds on a laptop: a byte-level model on 1 MB of the embedded text",
        model=Transformer.Config(layers=2, dim=64, heads=4, kv_heads=2, vocab_size=257),
        data=Data(source=("tfds:lm_text/slice",), length=64, tokenizer=Bytes()),
        optim=Optim(learning_rate=3e-3, schedule=Cosine(warmup=10)),
        train=Train(steps=50, batch_size=16, log_every=5),
        eval=Eval(every=0, sets=(EvalSet(batches=8),)),
        checkpoint=Checkpoint(every=20),
        generate=Generate(tokens=32, prompts=("The ",)),
        target="cpu:1",
    )
