"""Encoders: who sees whom, both heads on meshes, and what does not go together."""

import numpy as np
import pytest
import reference
import runs
import toy

from lm import loop, train

WORDS = [
    *("objective=Masked", "model=Encoder", "model.vocab_size=258"),
    *("model.positions.length=16", "model.heads=4", "model.ffn.hidden=64"),
    *("model.norm.eps=1e-5", "data.packing=documents", "model.attention.causal=false"),
    *("model.attention.bias=true", "model.attention.qk_norm=false"),
    *("model.attention.out_bias=true", "model.ffn.activation=gelu"),
    "model.ffn.bias=true",
]
CLASSES = [
    *WORDS,
    *("objective=Classification", "objective.labels=a,b,c", "model.vocab_size=257"),
    *("model.head=Classes", "model.head.classes=3"),
]
MESHES = {
    "words": [
        "data 2 x fsdp 2 x tensor 2",
        "pipe 2 x data 2 x tensor 2",
        "data 2 x seq 2 x tensor 2",
    ],
    "classes": ["data 2 x fsdp 2 x tensor 2", "data 2 x seq 2 x tensor 2"],
}


def batch(kind):
    host = toy.batch()
    if kind == "words":
        return host
    classes = np.random.default_rng(0).integers(0, 3, toy.ROWS).astype(np.int32)
    host |= {"targets": classes, "weights": np.ones(toy.ROWS, np.float32)}
    del host["bytes"]
    return host


def test_tokens_see_both_sides_and_no_other_document():
    prog = toy.program(*WORDS)
    params, run, host = toy.start(prog, noise=0.3).params, toy.hidden(prog), toy.batch()
    before, _ = run(params, host)
    changed = {**host, "tokens": host["tokens"].copy()}
    last = [np.flatnonzero(row == 1)[-1] for row in host["segments"]]
    rows = np.arange(toy.ROWS)
    changed["tokens"][rows, last] = (changed["tokens"][rows, last] + 1) % 257
    after, _ = run(params, changed)
    moved = (before != after).any(-1)
    np.testing.assert_array_equal(moved, host["segments"] == 1)


def test_padding_is_not_seen_where_rows_are_one_segment():
    prog = toy.program(*WORDS, "data.isolate=false", "data.packing=windows")
    params, run, host = toy.start(prog, noise=0.3).params, toy.hidden(prog), toy.batch()
    host["segments"] = np.minimum(host["segments"], 1)
    other = np.where(host["segments"] > 0, host["tokens"], 7)
    (before, _), (after, _) = run(params, host), run(params, {**host, "tokens": other})
    there = host["segments"] > 0
    assert (~there).sum() > 0
    np.testing.assert_array_equal(before[there], after[there])


@pytest.mark.parametrize("kind", MESHES)
def test_every_mesh_has_the_loss_and_gradient_of_float64(kind):
    for mesh in MESHES[kind]:
        sets = WORDS if kind == "words" else [*CLASSES, "model.head.pool=first"]
        prog = toy.program(*sets, *toy.MESHES[mesh])
        # A key's bias moves all scores of a query alike: its gradient is 0.
        reference.agrees(prog, batch(kind), loss=2e-6, ulps=32, floor=1e-7)


def test_counts_of_classes_are_those_of_the_logits():
    prog = toy.program(*CLASSES, "mesh.data=8")
    host, state = batch("classes"), toy.start(prog, noise=0.5)
    host["weights"][-3:] = 0  # rows that fill the last batch
    sums = train.make_eval_step(prog)(state.params, toy.place(prog, host))
    params = toy.flat(state.params)
    _, z = reference.logits(prog.experiment, params, host)
    want = np.zeros((3, 3))
    np.add.at(want, (host["targets"][:-3], z.argmax(-1)[:-3]), 1)
    np.testing.assert_array_equal(np.asarray(sums["confusion"]), want)
    assert (want.sum(0) > 0).sum() > 1


def test_texts_are_classified_by_a_run(tmp_path):
    """Of two kinds of texts that one letter tells apart."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("mnopq"), 12)) for _ in range(160)]
    lines = [
        f'{{"text": "{t[:6]}{"xy"[i % 2]}{t[6:]}", "label": "{"xy"[i % 2]}"}}\n'
        for i, t in enumerate(texts)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(lines))
    changed = {
        **dict(item.split("=", 1) for item in CLASSES),
        "objective.labels": "x,y",
        "model.head.classes": 2,
        "model.dropout": 0.0,
        "data.source": f"jsonl:{path}#text+label",
        "data.holdout": 0.2,
        "data.store_dir": tmp_path / "stores",
        "data.length": 16,
        "model.init_std": 0.1,
        "optim.learning_rate": 1e-2,
        "train.steps": 60,
        "eval.sets.0.batches": "none",
        "checkpoint.every": 0,
    }
    result = runs.small(tmp_path / "run", changed)
    assert result.code == loop.DONE, result.err
    [score] = runs.records(tmp_path / "run", "eval")
    assert score["accuracy"] == 1 and score["macro_f1"] == 1
    assert score["examples"] > 15


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["objective=Masked"], ["objective=Masked", "model=Transformer", "Encoder"]),
        (
            [*WORDS, "objective=Causal"],
            ["objective=Causal does not go with model=Encoder"],
        ),
        ([*CLASSES[:-1], "model.head.classes=4"], ["model.head.classes=3"]),
        ([*WORDS, "generate.prompts=a"], ["continues none", "generate.prompts=()"]),
        ([*WORDS, "model.attention.causal=true"], ["sees both sides"]),
        (["model.attention.causal=false"], ["would see what it predicts"]),
        ([*WORDS, "model.tied=false"], ["model.tied=true"]),
    ],
)
def test_what_does_not_go_together_is_refused(sets, words):
    with toy.refused(*words):
        toy.experiment(*sets)
