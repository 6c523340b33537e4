"""GPT-2's smallest shape (Radford et al. 2019) on eight GPUs, replicas only."""

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Learned
from lm.optim import AdamW, Cosine, Optim
from lm.sharding import MeshConfig


def experiment() -> Experiment:
    """Returns 124 M parameters, 0.5 M tokens a step, 10 G tokens of lm1b."""
    return Experiment(
        name="gpt2_124m",
        about="GPT-2 small: 12 layers of 768, learned positions, tied head",
        model=Transformer.Config(
            layers=12,
            dim=768,
            heads=12,
            kv_heads=12,
            vocab_size=50257,
            attention=Attention.Config(bias=True, out_bias=True),
            ffn=Mlp.Config(activation="gelu", bias=True),
            norm=LayerNorm.Config(),
            positions=Learned(length=1024),
            tied=True,
            remat="attention",
        ),
        data=Data(
            source=("tfds:lm1b",),
            length=1024,
            isolate=False,
            tokenizer=SentencePiece(model_type="bpe"),
        ),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=6e-4,
            schedule=Cosine(warmup=700),
        ),
        mesh=MeshConfig(data=8),
        train=Train(steps=19_000, batch_size=512, accumulate=2),
        eval=Eval(every=1000, sets=(EvalSet(split="test", batches=20),)),
        checkpoint=Checkpoint(every=1000, keep_period=5000),
        target="h100:8",
    )
