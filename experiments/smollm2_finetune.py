"""SmolLM2 135M taught Moby-Dick for a few steps: what fine-tuning an imported model looks like.

make real-weights
python -m lm.main --mode=import --from=.cache/real-weights/SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
python -m lm.main --experiment=smollm2_finetune
python -m lm.main --mode=export --workdir=runs/smollm2_finetune --to=exported
"""  # noqa: E501

from lm.data.loader import Data
from lm.data.pretrained import HuggingFace
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Generate, Train
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.layers import RmsNorm
from lm.nn.rope import Rope
from lm.optim import AdamW, Cosine, Optim
from lm.sharding import MeshConfig

IMPORTED = "runs/smollm2"  # the work directory that --mode=import left


def experiment() -> Experiment:
    """Returns 134.5 M parameters on eight shares (ZeRO-3), 8 steps of 8 x 128 tokens."""
    return Experiment(
        name="smollm2_finetune",
        about="SmolLM2 135M, imported, fine-tuned on the embedded prose; eight devices",
        model=Transformer.Config(
            layers=30,
            dim=576,
            heads=9,
            kv_heads=3,
            vocab_size=49_152,
            attention=Attention.Config(head_dim=64),
            ffn=Mlp.Config(hidden=1536, activation="swiglu"),
            norm=RmsNorm.Config(eps=1e-5),
            positions=Rope(base=100_000.0),
            tied=True,
            remat="attention",
        ),
        data=Data(
            source=("tfds:lm_text/moby_dick",),
            length=128,
            tokenizer=HuggingFace(path=f"{IMPORTED}/tokenizer"),
        ),
        optim=Optim(
            algorithm=AdamW(b1=0.9, b2=0.95),
            learning_rate=5e-5,
            schedule=Cosine(warmup=2),
        ),
        mesh=MeshConfig(data=1, fsdp=8),
        train=Train(steps=8, batch_size=8, log_every=1, init_from=IMPORTED),
        eval=Eval(every=0, sets=(EvalSet(batches=2),)),
        checkpoint=Checkpoint(every=0, keep=1),
        generate=Generate(tokens=20, prompts=("Call me",)),
        target="cpu:8",
    )
