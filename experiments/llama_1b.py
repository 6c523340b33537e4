"""Llama 3.2's 1B shape on eight GPUs, weights sharded (ZeRO-3)."""

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.nn.layers import RmsNorm
from lm.nn.rope import Rope
from lm.objectives import Causal
from lm.optim import AdamW, Cosine, Optim
from lm.sharding import MeshConfig


def experiment() -> Experiment:
    """Returns 1.2 G parameters, 1 M tokens a step, 25 G tokens of C4."""
    return Experiment(
        name="llama_1b",
        about="Llama 3.2 1B: 16 layers of 2048, 8 kv heads, tied head",
        model=Transformer.Config(
            layers=16,
            dim=2048,
            heads=32,
            kv_heads=8,
            vocab_size=128_256,
            ffn=Mlp.Config(hidden=8192, activation="swiglu"),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=500_000.0),
            tied=True,
            remat="attention",
        ),
        data=Data(
            source=("tfds:c4/en",),
            length=4096,
            isolate=False,
            tokenizer=SentencePiece(model_type="bpe"),
        ),
        objective=Causal(z_loss=1e-4),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=4e-4,
            schedule=Cosine(warmup=1000),
        ),
        mesh=MeshConfig(data=1, fsdp=8),
        train=Train(steps=24_000, batch_size=256, accumulate=4),
        eval=Eval(every=1000, sets=(EvalSet(batches=20),)),
        checkpoint=Checkpoint(every=1000, keep_period=5000),
        target="h100:8",
    )
