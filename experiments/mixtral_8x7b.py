"""Mixtral's 8x7B shape on a TPU v6e pod of 256 chips: expert 8 x fsdp 32."""

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.layers import RmsNorm
from lm.nn.moe import Dropless, Moe
from lm.nn.rope import Rope
from lm.optim import AdamW, Cosine, Optim
from lm.sharding import MeshConfig


def experiment() -> Experiment:
    """Returns 46.7 G parameters, of which a token meets 12.9 G; 2 M tokens of C4 a step."""
    return Experiment(
        name="mixtral_8x7b",
        about="Mixtral 8x7B: 32 layers of 4096, 8 experts of 14336, two a token",
        model=Transformer.Config(
            layers=32,
            dim=4096,
            heads=32,
            kv_heads=8,
            vocab_size=32_000,
            ffn=Moe.Config(
                experts=8, top_k=2, hidden=14_336, dispatch=Dropless(), balance=0.02
            ),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=1_000_000.0),
            tied=False,
            remat="full",
        ),
        data=Data(
            source=("tfds:c4/en",),
            length=4096,
            packing="documents",
            tokenizer=SentencePiece(model_type="bpe"),
        ),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=3e-4,
            schedule=Cosine(warmup=2000),
        ),
        mesh=MeshConfig(data=1, fsdp=32, expert=8),
        train=Train(steps=40_000, batch_size=512),
        eval=Eval(every=1000, sets=(EvalSet(batches=20),)),
        checkpoint=Checkpoint(every=1000, keep_period=10_000),
        target="v6e:16x16",
    )
