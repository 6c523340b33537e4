"""Llama 3's 70B shape on 512 TPU v5p chips or H100s: fsdp 64 x tensor 8."""

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
    """Returns 70.6 G parameters, 4 M tokens a step, 1.4 T tokens of C4."""
    return Experiment(
        name="llama_70b",
        about="Llama 3 70B: 80 layers of 8192, 8 kv heads, head of its own",
        model=Transformer.Config(
            layers=80,
            dim=8192,
            heads=64,
            kv_heads=8,
            vocab_size=128_256,
            ffn=Mlp.Config(hidden=28_672, activation="swiglu"),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=500_000.0),
            tied=False,
            remat="full",
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
            learning_rate=1.5e-4,
            schedule=Cosine(warmup=2000),
        ),
        mesh=MeshConfig(data=1, fsdp=64, tensor=8, sequence_parallel=True),
        train=Train(steps=335_000, batch_size=512),
        eval=Eval(every=1000, sets=(EvalSet(batches=20),)),
        checkpoint=Checkpoint(every=1000, keep_period=10_000),
        target="v5p:8x8x8",  # or h100:64x8
    )
