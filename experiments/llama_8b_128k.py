"""Llama 3's 8B shape with rows of 128k tokens, on 128 TPU v5p chips: seq 8 x fsdp 16."""

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
    """Returns 8.0 G parameters, 4 M tokens a step, 20 G tokens of C4."""
    return Experiment(
        name="llama_8b_128k",
        about="Llama 3 8B with a context of 128k tokens, split over devices",
        model=Transformer.Config(
            layers=32,
            dim=4096,
            heads=32,
            kv_heads=8,
            vocab_size=128_256,
            ffn=Mlp.Config(hidden=14_336, activation="swiglu"),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=8_000_000.0),
            tied=False,
            remat="full",
        ),
        data=Data(
            source=("tfds:c4/en",),
            length=131_072,
            packing="documents",
            tokenizer=SentencePiece(model_type="bpe"),
        ),
        objective=Causal(z_loss=1e-4),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=1e-4,
            schedule=Cosine(warmup=200),
        ),
        mesh=MeshConfig(data=1, fsdp=16, seq=8),
        train=Train(steps=5000, batch_size=32, accumulate=2),
        eval=Eval(every=1000, sets=(EvalSet(batches=2),)),
        checkpoint=Checkpoint(every=1000, keep_period=10_000),
        target="v5p:4x4x8",
    )
