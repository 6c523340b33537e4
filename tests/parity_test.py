"""Every family against transformers: logits, loss, gradients, greedy text and padding, in fp32.

Small models of random weights, made here; nothing is downloaded. Run with -m parity.
"""

import contextlib
import dataclasses
import functools
import logging
import tempfile
import types
from typing import Any

import families_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from etils import epath

from lm import config, generate, gradients, train
from lm.batches import Causal, Classification, Masked, Seq2Seq
from lm.convert import families, files, weights
from lm.data import tokenizer as tokenizers
from lm.experiment import Generate
from lm.models import kinds
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.blockwise import Tokens
from lm.nn.heads import Classes

torch = pytest.importorskip("torch", reason="parity needs the extra parity: torch")
transformers = pytest.importorskip(
    "transformers", reason="parity needs the extra parity: transformers"
)
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # those of other people's packages
]

ROWS, LENGTH, NEW = 3, 40, 12
REAL = np.array([40, 27, 9])  # tokens of each row, the rest is padding
NAMES = [*families_hf.CONFIGS, *families_hf.ENCODERS]
LABELS = ("a", "b", "c")
TOLERANCE = 1e-4  # of logits around 1, of the loss, and of a gradient's norm


@functools.cache
def made(name):
    """Returns a model of transformers, its files, and the same in ours."""
    torch.manual_seed(0)
    values = families_hf.EVERY[name]
    chosen = transformers.AutoConfig.for_model(**values)
    chosen._attn_implementation = "eager"
    model = kind_of(values)._from_config(chosen)
    if values.get("tie_word_embeddings") is False and name in families_hf.READERS:
        head = 0.1 * model.lm_head.weight.detach()  # it is made for logits around 10
        model.lm_head.weight = torch.nn.Parameter(head)
    model = model.to(torch.float32).eval()
    everything = [*model.named_parameters(), *model.named_buffers()]
    for part in model.modules():  # theirs learns nothing of the id that padding has
        if isinstance(part, torch.nn.Embedding):
            part.padding_idx = None
    with torch.no_grad():
        for path, p in everything:
            if "final_logits_bias" in path:  # ours is learned
                p.requires_grad_(True)
            computed = "inv_freq" in path or "embed_positions" in path
            if not computed and p.is_floating_point() and p.ndim:
                big = 0.3 if "bias" in path or "sink" in path else 0.15
                big = 0.5 if "fc2" in path else big
                if ".decoder.layers." in path and path.endswith("norm.weight"):
                    p *= torch.randn_like(
                        p
                    ).sign()  # or each word would be the last again
                if not path.endswith("embed_scale"):
                    p += big * torch.randn_like(p)
    folder = epath.Path(tempfile.mkdtemp())
    model.save_pretrained(str(folder))
    read = files.read_json(folder / "config.json")
    family, ours = families.read(read)
    ours = config.override(ours, families_hf.SETS.get(name, []))
    prog = program(ours)
    params = loaded(prog, family, folder)
    return types.SimpleNamespace(
        model=model, folder=folder, family=family, prog=prog, params=params, json=read
    )


def kind_of(values):
    """Returns the class of transformers that makes such models."""
    if "architectures" in values:
        return getattr(transformers, values["architectures"][0])
    chosen = transformers.CONFIG_MAPPING[values["model_type"]]
    if values["model_type"] in ("t5", "marian"):
        return transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[chosen]
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[chosen]


def objective_of(model):
    """Returns what a model is trained by."""
    if isinstance(model, EncoderDecoder.Config):
        return Seq2Seq(target_length=32)
    if isinstance(kinds.head(model), Classes.Config):
        return Classification(labels=LABELS)
    return Causal() if kinds.head(model) is None else Masked(mask_id=3)


def program(model) -> train.Program:
    data = dataclasses.replace(
        toy.BASE.data,
        length=64,
        tokenizer=tokenizers.SentencePiece(),
    )
    more: Any = {"objective": objective_of(model)}
    if not isinstance(more["objective"], Causal):
        data = dataclasses.replace(data, packing="documents")
    chosen = dataclasses.replace(toy.BASE, model=model, data=data, **more)
    return train.program(chosen, toy.layout(chosen.mesh))


def loaded(prog, family, folder):
    table = family.table(prog.experiment.model)
    every = weights.places(prog.experiment.model, table)
    source = files.Safetensors(epath.Path(folder))
    shapes = {path: x.shape for path, x in prog.shapes.items()}
    vocab = prog.experiment.model.vocab_size
    weights.check(family, table, source, shapes, every, vocab)
    return weights.read(prog, source, every)


@functools.cache
def tokens(name):
    vocab = made(name).prog.experiment.model.vocab_size
    return np.random.default_rng(1).integers(3, vocab, (ROWS, LENGTH)).astype(np.int32)


def batch(ids, there):
    """A batch of one document a row; `there` [B, T] is where it is."""
    segments = there.astype(np.int32)
    scored = there & np.roll(there, -1, 1)
    scored[:, -1] = False
    return {
        "tokens": ids,
        "targets": np.roll(ids, -1, 1),
        "segments": segments,
        "positions": np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32),
        "weights": scored.astype(np.float32),
        "bytes": np.ones(len(ids), np.int32),
        "index": np.arange(len(ids), dtype=np.uint32),
    }


def padded(side):
    """Returns where the tokens are when each row has its own length."""
    places = np.arange(LENGTH)[None]
    if side == "right":
        return places < REAL[:, None]
    return places >= LENGTH - REAL[:, None]


def theirs(one, host, **more):
    mask = torch.tensor(host["segments"], dtype=torch.long)
    positions = torch.tensor(host["positions"], dtype=torch.long)
    ids = torch.tensor(host["tokens"], dtype=torch.long)
    return one.model(input_ids=ids, attention_mask=mask, position_ids=positions, **more)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side)
        for name in NAMES
        for side in ("right", "left")
        # Theirs takes the first place of a row for its first token, also where it is padding.
        if (name, side) != ("bert, classes", "left")
    ],
)
def test_logits_are_the_same_beside_padding(name, side):
    """Of ids or of classes; without a head the hidden states."""
    one = made(name)
    host = batch(tokens(name), padded(side))
    there = host["segments"] > 0
    with torch.no_grad():
        expected = theirs(one, host)
    if name == "bert, classes":
        expected, there = expected.logits.numpy(), np.arange(ROWS)
        found = _classes(one.prog)(one.params, toy.place(one.prog, host))
    else:
        bare = "logits" not in expected
        expected = expected["last_hidden_state" if bare else "logits"].numpy()
        found = _hidden(one.prog)(one.params, host)[0 if bare else 1]
    found = np.asarray(found)[..., : expected.shape[-1]]
    assert np.abs(expected[there]).max() > 0.3
    np.testing.assert_allclose(
        found[there], expected[there], atol=TOLERANCE, rtol=TOLERANCE
    )


@functools.cache
def _hidden(prog):
    return toy.hidden(prog)


@functools.cache
def _classes(prog):
    def run(params, batch):
        where = Tokens(batch["positions"], batch["segments"])
        model = prog.model(params)
        x_BTD, _, _ = model(batch["tokens"], where, None)
        return model.classes(x_BTD, where)

    return prog.compiled(run)


def scored(name):
    """Returns a batch, and the labels by which transformers scores the same."""
    host = batch(tokens(name), padded("right"))
    if name == "bert, classes":
        labels = np.arange(ROWS, dtype=np.int32)
        return host | {"targets": labels, "weights": np.ones(ROWS, np.float32)}, labels
    there = host["segments"] > 0
    if name not in families_hf.ENCODERS:
        return host, np.where(there, host["tokens"], -100)
    chosen = there & (np.random.default_rng(2).random(there.shape) < 0.3)
    other = np.random.default_rng(3).integers(3, 300, there.shape).astype(np.int32)
    host |= {"targets": other, "weights": chosen.astype(np.float32)}
    return host, np.where(chosen, other, -100)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bert"])
def test_loss_and_every_gradient_are_the_same(name):
    one = made(name)
    host, labels = scored(name)
    labels = torch.tensor(labels, dtype=torch.long)
    one.model.zero_grad()
    loss = theirs(one, host, labels=labels).loss
    loss.backward()

    def of(params, batch):
        count = batch["weights"].sum()
        return gradients.of(one.prog, params, batch, jnp.int32(0), count)

    sums, grads = one.prog.compiled(of)(one.params, toy.place(one.prog, host))
    assert abs(float(sums["loss"]) / loss.item() - 1) < TOLERANCE

    same_gradients(one, grads)


def same_gradients(one, grads):
    """Checks gradients against those that the model of transformers holds."""
    values = {k: p.data.clone() for k, p in one.model.named_parameters()}
    buffers = {k: p.data.clone() for k, p in one.model.named_buffers()}
    try:  # the gradient, saved as a model is
        for p in (*one.model.parameters(), *one.model.buffers()):
            p.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        folder = tempfile.mkdtemp()
        one.model.save_pretrained(folder)
    finally:
        for k, p in one.model.named_parameters():
            p.data = values[k]
        for k, p in one.model.named_buffers():
            p.data = buffers[k]
    expected = toy.flat(loaded(one.prog, one.family, folder))
    found = toy.flat(grads)
    for path, want in expected.items():
        if path.endswith("balance_e"):  # moved by counts, not trained
            continue
        size = np.linalg.norm(want.astype(np.float64).ravel())
        assert size > 0 or "bias_kh" in path, path
        assert toy.distance(found[path], want) < TOLERANCE * size + 1e-6, path


@pytest.mark.parametrize("name", families_hf.CONFIGS)
def test_greedy_text_is_the_same_token_for_token(name):
    """From prompts of several lengths, on past the window, each step by the cache."""
    one = made(name)
    prompts = [tokens(name)[b, :n] for b, n in enumerate((14, 5, 9))]
    there = np.arange(14)[None] >= 14 - np.array([[14], [5], [9]])
    ids = np.zeros((3, 14), np.int64)
    for b, prompt in enumerate(prompts):
        ids[b, 14 - len(prompt) :] = prompt
    expected = one.model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(there.astype(np.int64)),
        do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None,
    )[:, 14:].numpy()  # fmt: skip
    chosen = Generate(tokens=NEW, temperature=0.0)
    sample = generate.make_sample(one.prog, chosen, -1)
    rows = generate.make_rows([(p, 0) for p in prompts], NEW, 64, 1)
    found, finite = sample(one.params, rows, jax.random.key(0))
    assert finite
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(np.asarray(found)[:3], expected)


def exported(name):
    """Writes a model out again and checks its bytes; returns what transformers reads."""
    one = made(name)
    with toy.refused("config.json", "a_new_key=1"):
        families.read({**one.json, "a_new_key": 1})
    model = one.prog.experiment.model
    family, data = families.write(model)
    every = weights.places(model, family.table(model))
    dtypes = files.Safetensors(one.folder).dtypes
    folder = epath.Path(tempfile.mkdtemp())
    sizes = weights.sizes(one.prog, every, dtypes, "float32")
    writer = files.Writer(folder, sizes, most=60_000)  # several files
    rows = weights.write(one.params, every, model.vocab_size, dtypes, "float32")
    for path, array in rows:
        writer.add(path, array)
    writer.close()
    before, after = files.Safetensors(one.folder), files.Safetensors(folder)
    if family is one.family:
        assert before.shapes == after.shapes
        for path in before.shapes:
            assert before.tensor(path).tobytes() == after.tensor(path).tobytes(), path
    families_hf.write_json(
        folder / "config.json",
        {"architectures": [family.architecture], **families_hf.MARKS, **data},
    )
    with listening() as warned:
        again, info = kind_of(families_hf.EVERY[name]).from_pretrained(
            str(folder), output_loading_info=True, attn_implementation="eager"
        )
    assert not any(info.values()), info
    return again, warned


@contextlib.contextmanager
def listening():
    """What transformers logs meanwhile."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_what_transformers_reads(name):
    """Every tensor has its bytes again, and config.json, written anew, says the same."""
    one, (again, warned) = made(name), exported(name)
    assert not warned
    host = batch(tokens(name), padded("right"))
    with torch.no_grad():
        one_logits = theirs(one, host)[0]
        same = theirs(types.SimpleNamespace(model=again), host)[0]
    np.testing.assert_allclose(same.numpy(), one_logits.numpy(), atol=1e-5)


def test_there_is_a_case_for_every_family():
    every = families_hf.EVERY.values()
    assert {values["model_type"] for values in every} == set(families.FAMILIES)
