"""Spam told from mail by MiniLM, fine-tuned: an encoder that others trained gets a new head.

make spam real-weights
python -m lm.main --mode=import --from=.cache/real-weights/all-MiniLM-L6-v2 --workdir=runs/minilm
python -m lm.main --experiment=classify_spam

All choices were made on `valid`. Once they are made, the test, all of it:

python -m lm.main --experiment=classify_spam --mode=eval --set data.cleaning.duplicates=false --set eval.sets.0.name=test --set "eval.sets.0.source=jsonl:.cache/spam/test.jsonl#plain+label"
"""  # noqa: E501

from lm.batches import Classification
from lm.data.loader import Data
from lm.data.pretrained import HuggingFace
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.encoder import Encoder
from lm.nn.ffn import Mlp
from lm.nn.heads import Classes
from lm.nn.layers import Learned
from lm.optim import AdamW, Linear, Optim

IMPORTED = "runs/minilm"  # the work directory that --mode=import left


def experiment() -> Experiment:
    """Returns 22.8 M parameters, all of them trained, on both ends of 4087 mails as read."""
    return Experiment(
        name="classify_spam",
        about="SpamAssassin's mail, ham or spam, by MiniLM; first `make spam real-weights`",
        model=Encoder.Config(
            layers=6,
            dim=384,
            heads=12,
            vocab_size=30_522,
            ffn=Mlp.Config(hidden=1536, activation="gelu_erf", bias=True),
            positions=Learned(length=512),
            head=Classes.Config(classes=2),
            dropout=0.1,
        ),
        data=Data(
            source=("jsonl:.cache/spam/train.jsonl#plain+label",),
            length=256,
            packing="documents",
            holdout=0.0,
            tokenizer=HuggingFace(path=f"{IMPORTED}/tokenizer"),
        ),
        objective=Classification(labels=("ham", "spam"), long="ends"),
        optim=Optim(
            algorithm=AdamW(b2=0.999),
            learning_rate=1e-4,
            schedule=Linear(warmup=50),
            weight_decay=0.01,
        ),
        train=Train(steps=640, batch_size=16, init_from=IMPORTED),
        eval=Eval(
            every=160,
            sets=(
                EvalSet(
                    source=("jsonl:.cache/spam/valid.jsonl#plain+label",),
                    split="train",  # all of that file
                ),
            ),
        ),
        checkpoint=Checkpoint(every=160, keep=1),
        target="cpu:1",
    )
