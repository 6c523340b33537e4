"""Llama 3's 8B shape on a TPU v5p slice of 64 chips: fsdp 16 x tensor 4."""

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
    """Returns 8.0 G parameters, 4 M tokens a step, 160 G tokens of C4."""
    return Experiment(
        name="llama_8b",
        about="Llama 3 8B: 32 layers of 4096, 8 kv heads, head of its own",
        model=Transformer.Config(
            layers=32,
            dim=4096,
            heads=32,
            kv_heads=8,
            vocab_size=128_256,
            ffn=Mlp.Config(hidden=14_336, activation="swiglu"),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=500_000.0),
            tied=False,
            remat="attention",
        ),
        data=Data(
            source=("tfds:c4/en",),
            length=8192,
            packing="documents",
            tokenizer=SentencePiece(model_type="bpe"),
        ),
        objective=Causal(z_loss=1e-4),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=3e-4,
            schedule=Cosine(warmup=2000),
        ),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4, sequence_parallel=True),
        train=Train(steps=40_000, batch_size=512, accumulate=2),
        eval=Eval(every=1000, sets=(EvalSet(batches=20),)),
        checkpoint=Checkpoint(every=1000, keep_period=10_000),
        target="v5p:4x4x4",
    )
