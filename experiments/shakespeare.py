"""The default: Shakespeare's plays, minutes on two CPU cores, faster on anything else."""

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Generate, Train
from lm.matrices import Muon
from lm.models.transformer import Transformer
from lm.optim import Cosine, Optim


def experiment() -> Experiment:
    """Returns 2.2 M parameters that see 1.2 M tokens, two thirds of the plays."""
    return Experiment(
        name="shakespeare",
        about="34 plays; two more are held out whole for validation, two for the test",
        model=Transformer.Config(
            layers=4,
            dim=192,
            heads=3,
            kv_heads=3,
            vocab_size=2048,
            scan=False,  # four layers unrolled run a tenth faster on a CPU
        ),
        data=Data(
            source=("tfds:lm_text/shakespeare",),
            length=256,
            tokenizer=SentencePiece(model_type="bpe", sample_bytes=4_000_000),
        ),
        optim=Optim(
            algorithm=Muon(),
            learning_rate=6e-3,
            schedule=Cosine(warmup=20, end=0.02),
        ),
        train=Train(steps=600, batch_size=8),
        eval=Eval(every=300, batch_size=16, sets=(EvalSet(stride=128),)),
        checkpoint=Checkpoint(every=150),
        generate=Generate(tokens=160, prompts=("HAMLET.\n", "JULIET.\n")),
        target="cpu:1",
    )
