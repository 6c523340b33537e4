"""Classifiers of every kind: on meshes, what they read, and a new head beside weights."""

import json

import numpy as np
import pytest
import reference
import runs
import toy

from lm import batches, loop, train
from lm.data import tokenizer as tokenizers
from lm.data.loader import Data

CLASSES = [
    *("objective=Classification", "objective.labels=a,b,c", "data.packing=documents"),
    *("model.head=Classes", "model.head.classes=3"),
]
KINDS = {
    "bag": ["model=Bag", "model.layers=0", "model.head.hidden=24"],
    "lstm": ["model=Recurrent", "model.mixer.hidden=24", "model.head.pool=last"],
}
MESHES = {
    "bag": ["data 2 x fsdp 2 x tensor 2", "data 2 x seq 2 x tensor 2"],
    "lstm": ["data 2 x fsdp 2 x tensor 2", "pipe 2 x data 2 x tensor 2"],
}


def sets(kind):
    model, *more = KINDS[kind]
    return [model, *CLASSES, *more]


def batch():
    """One text a row, of several lengths."""
    host = toy.batch()
    there = (host["segments"] > 0).astype(np.int32)
    classes = np.random.default_rng(0).integers(0, 3, toy.ROWS).astype(np.int32)
    host |= {"segments": there, "positions": toy.restart(there) * there}
    host |= {"targets": classes, "weights": np.ones(toy.ROWS, np.float32)}
    del host["bytes"]
    assert len(set(there.sum(1))) > 5
    return host


@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_has_the_loss_and_gradient_of_float64(kind):
    for mesh in MESHES[kind]:
        prog = toy.program(*sets(kind), *toy.MESHES[mesh])
        host, state = batch(), toy.start(prog, noise=0.3)
        params = toy.flat(train.saved(prog, state).params)
        exact = {k: v.astype(np.float64) for k, v in params.items()}
        loss, gradient = reference.gradient(prog.experiment, exact, host)
        run = toy.run(prog, [host], state)
        assert abs(run.losses[0] / loss - 1) < 2e-6, mesh
        for path, want in gradient.items():
            assert np.abs(want).max() > 1e-6, path
            floor = 32 * toy.EPS * np.linalg.norm(want) + 1e-7
            assert toy.distance(run.gradient[path], want) < floor, (mesh, path)


def mails(folder):
    """Texts whose last letter tells two kinds apart; returns what names them."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("mnopq"), 12)) + "xy"[i % 2] for i in range(160)]
    lines = [json.dumps({"text": t, "label": t[-1]}) + "\n" for t in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    return {
        "objective": "Classification", "objective.labels": "x,y",
        "data.packing": "documents", "data.source": f"jsonl:{folder}/texts.jsonl#text+label",
        "data.holdout": 0.2, "data.store_dir": folder / "stores", "data.length": 16,
        "model.vocab_size": 257, "model.dropout": 0.0, "model.init_std": 0.1,
        "optim.learning_rate": 1e-2, "train.steps": 40, "checkpoint.every": 0,
        "eval.sets.0.batches": "none", "optim.schedule.warmup": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_classified_by_a_run(kind, tmp_path):
    changed = dict(item.split("=", 1) for item in sets(kind)) | mails(tmp_path)
    changed |= {"model.head.classes": 2, "model.dim": 32}
    result = runs.small(tmp_path / "run", changed)
    assert result.code == loop.DONE, result.err
    [score] = runs.records(tmp_path / "run", "eval")
    assert score["accuracy"] == 1 and score["examples"] > 15
    picture = tmp_path / "run" / "confusion" / f"{score['set']}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


ENCODER = {
    "model": "Encoder", "model.layers": 1, "model.dim": 32, "model.heads": 4,
    "model.positions.length": 16, "model.attention.causal": "false",
    "model.attention.bias": "true", "model.attention.out_bias": "true",
    "model.ffn.activation": "gelu_erf", "model.ffn.bias": "true",
}  # fmt: skip


def test_a_head_is_new_beside_weights_that_have_another(tmp_path):
    """Of words first, then of classes: what is taken, what is new and what is not used is told."""
    texts = mails(tmp_path)
    words = {
        **ENCODER, **texts, "objective": "Masked", "model.vocab_size": 258,
        "data.source": f"jsonl:{tmp_path}/texts.jsonl#text", "train.steps": 1,
    }  # fmt: skip
    del words["objective.labels"]
    assert runs.small(tmp_path / "words", words).code == loop.DONE
    first = {
        **ENCODER, **texts, "model.vocab_size": 257, "model.head": "Classes",
        "model.head.classes": 2, "train.init_from": tmp_path / "words",
    }  # fmt: skip
    result = runs.small(tmp_path / "classes", first | {"train.steps": 1})
    assert result.code == loop.DONE, result.err
    assert "new, as they have none: end/class_bias_c, end/class_dc, end/pool" in (
        result.err
    )
    assert "not used: end/after/bias_d" in result.err
    more = {"train.init_from": tmp_path / "classes", "objective.labels": "x,y,z"}
    result = runs.small(tmp_path / "z", first | more | {"model.head.classes": 3})
    assert result.code == 2
    assert "end/class_dc is float32[32, 2] there and float32[32, 3]" in result.err
    result = runs.small(tmp_path / "z", first | {"model.layers": 2, "train.steps": 1})
    assert result.code == 2
    assert "layers/" in result.err and "[1, 32" in result.err


def test_of_a_long_text_both_ends_stay_between_the_tokenizers_marks(tmp_path):
    coder = tokenizers.ByteTokenizer()
    coder.close = (65,)
    texts = [("abcdefghijklmnopqrstuvwxyz", "ham"), ("ab", "spam")]
    lines = [json.dumps({"text": t, "label": label}) + "\n" for t, label in texts]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    data = Data(
        source=(f"jsonl:{tmp_path}/texts.jsonl#text+label",), holdout=0.0, length=11,
        packing="documents", tokenizer=tokenizers.Bytes(), store_dir=str(tmp_path),
    )  # fmt: skip
    objective = batches.Classification(labels=("ham", "spam"), long="ends")
    [part] = batches.stores(objective, data, coder)
    rows = batches.evaluation(objective, data, part, coder)
    found = [row["tokens"][row["segments"] > 0].tolist() for row in (rows[0], rows[1])]
    assert found == [[256, *b"abcd", *b"vwxyz", 65], [256, *b"ab", 65]]
    same = batches.Classification(labels=("ham", "spam", "\x1bham"))
    with toy.refused("'ham'", "'\\x1bham'", "the same tokens"):
        batches.evaluation(same, data, part, coder)


@pytest.mark.parametrize(
    ("some", "words"),
    [
        (["model=Bag", *CLASSES], ["model.layers=2", "model.layers=0"]),
        ([*sets("bag"), "model.head.pool=last"], ["takes the mean"]),
        ([*sets("bag"), "model.head.hidden=0"], ["model.head.hidden=0"]),
        ([*sets("lstm"), "model.head.pool=first"], ["has read one token"]),
        (["model=Bag", "model.layers=0"], ["Causal", "model=Bag", "Classification"]),
        ([*sets("lstm"), "generate.prompts=a"], ["model=Recurrent reads whole texts"]),
        (["model=Recurrent", *CLASSES[:3]], ["Classification", "model.head=Classes"]),
    ],
)
def test_what_does_not_go_together_is_refused(some, words):
    with toy.refused(*words):
        toy.experiment(*some)
