"""English to Spanish by the Transformer of 2017, on Bible verses, minutes on two CPU cores."""

from lm.batches import Seq2Seq
from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Checkpoint, Eval, EvalSet, Experiment, Generate, Train
from lm.matrices import Muon
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Sinusoidal
from lm.optim import InverseSqrt, Optim

DIM = 192


def experiment() -> Experiment:
    """Returns a model of the paper's parts, as large as the time allows (Vaswani et al. 2017)."""
    return Experiment(
        name="translate_en_es",
        about="verses of 54 books; seven more are held out to choose by, and five for the test",
        model=EncoderDecoder.Config(
            encoder_layers=2,
            layers=2,
            dim=DIM,
            heads=3,
            vocab_size=3072,
            norm=LayerNorm.Config(),
            norms="post",
            ffn=Mlp.Config(activation="relu", bias=True),
            positions=Sinusoidal(),
            embed_scale=DIM**0.5,
            dropout=0.1,
            init_std=0.05,
            scan=False,  # two layers unrolled run faster on a CPU
        ),
        data=Data(
            source=("tfds:lm_bible#en+es",),
            length=256,
            packing="documents",
            tokenizer=SentencePiece(model_type="bpe"),  # one for both languages
        ),
        objective=Seq2Seq(target_length=256, label_smoothing=0.1),
        optim=Optim(
            algorithm=Muon(),
            learning_rate=4e-3,
            schedule=InverseSqrt(warmup=300),
            weight_decay=0.0,
            ema=0.995,  # for the paper's average of checkpoints
        ),
        train=Train(steps=2400, batch_size=8),
        eval=Eval(
            every=600,
            batch_size=128,
            sets=(EvalSet(),),
            scores=("bleu", "chrf"),
            texts=100,
        ),
        checkpoint=Checkpoint(every=300),
        generate=Generate(
            tokens=128,
            temperature=0.0,
            beams=4,
            prompts=("And God said, Let there be light: and there was light.",),
        ),
        target="cpu:1",
    )
