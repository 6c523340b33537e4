"""The default: Shakespeare's plays, minutes on two CPU cores, faster on anything else."""

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Generate, Train
from lm.models.transformer import Transformer
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns a small Transformer that learns to write plays."""
    return Experiment(
        name="shakespeare",
        about="38 plays; two held out whole for validation, two for the test",
        model=Transformer.Config(
            layers=4,
            dim=256,
            heads=4,
            kv_heads=4,
            vocab_size=2048,
            dropout=0.0,
            scan=False,
        ),
        data=Data(
            source=("tfds:lm_text/shakespeare",), length=256, tokenizer=SentencePiece()
        ),
        optim=Optim(learning_rate=3e-3, schedule=Cosine(warmup=50)),
        train=Train(steps=600, batch_size=16, log_every=10),
        eval=Eval(
            every=200,
            sets=(EvalSet(name="valid"),),
        ),
        checkpoint=Checkpoint(every=200),
        generate=Generate(tokens=200, samples=1, prompts=("HAMLET.", "JULIET.")),
    )
