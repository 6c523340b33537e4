"""BERT's files in and out: bytes that stay, a head that is new, names that fit."""

import families_hf
import jax
import numpy as np
import pytest
import runs
import toy
from etils import epath
from flax import nnx

from lm import config, sharding, trees
from lm.convert import families, files, weights
from lm.models import kinds

pytest.importorskip("safetensors", reason="export needs the extra hf: safetensors")
pytest.importorskip(
    "tokenizers", reason="tokenizer.json needs the extra hf: tokenizers"
)


def main(mode, workdir, *more):
    return runs.here(f"--mode={mode}", f"--workdir={workdir}", *more)


def sets(*assignments):
    return [f"--set={a}" for a in assignments]


def bare_bert(folder, **more):
    """Writes a bare encoder as old files have them, with its pooler and numbers of positions.

    Returns its tensors by today's names.
    """
    model = config.override(
        families.read({**families_hf.BERT, "vocab_size": 10})[1], ["layers=2"]
    )
    family, data = families.write(model)
    rng, tensors = np.random.default_rng(0), {}
    table = family.table(model)
    with sharding.use(toy.layout(toy.BASE.mesh)):
        abstract = jax.eval_shape(lambda: kinds.build(model, nnx.Rngs(0)))
    ours = {
        p: x.shape
        for p, x in trees.flatten(nnx.to_pure_dict(nnx.state(abstract))).items()
    }
    for place in weights.places(model, table):
        shapes = [weights._plain(ours[p], p, place, 10) for p in place.paths]
        tensors[place.row.theirs] = rng.standard_normal(
            place.row.shape(shapes), np.float32
        )
    tensors["embeddings.position_ids"] = np.arange(64)[None]
    folder.mkdir()
    stored = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): a
        for name, a in (tensors | more).items()
    }
    files.save(stored, folder / files.SINGLE)
    families_hf.write_json(folder / "config.json", data)
    families_hf.write_word_pieces(folder)
    return tensors


def test_a_bare_encoder_keeps_its_bytes_and_gets_a_head(tmp_path):
    folder = epath.Path(tmp_path / "bert")
    tensors = bare_bert(folder)
    result = main("import", tmp_path / "w", f"--from={folder}", *sets("mesh.data=1"))
    assert result.code == 0, result.err
    for line in ("1 tensor that the model does not use", "no bits per byte"):
        assert line in result.err
    result = main("export", tmp_path / "w", f"--to={tmp_path}/same")
    assert result.code == 0, result.err
    after = files.Safetensors(epath.Path(tmp_path / "same"))
    assert after.shapes.keys() == tensors.keys() - {"embeddings.position_ids"}
    for name in after.shapes:
        assert after.tensor(name).tobytes() == tensors[name].tobytes(), name
    result = main("train", tmp_path / "w")
    assert result.code == 2
    assert "model.head=Pooler predicts nothing" in result.err
    line = '{"text": "hello", "label": "ham"}\n{"text": "world", "label": "!"}\n'
    (tmp_path / "mail.jsonl").write_text(line)
    head = {
        "model.head": "Classes", "model.head.pool": "first", "objective": "Classification",
        "objective.labels": "!,ham", "data.source": f"jsonl:{tmp_path}/mail.jsonl#text+label",
        "data.holdout": 0, "data.store_dir": tmp_path, "eval.sets.0.split": "train",
        "train.steps": 2, "train.batch_size": 2,
    }  # fmt: skip
    result = main(
        "train", tmp_path / "w", *sets(*(f"{k}={v}" for k, v in head.items()))
    )
    assert result.code == 0, result.err
    assert "new, as they have none: end/class_bias_c, end/class_dc\n" in result.err
    result = main("export", tmp_path / "w", f"--to={tmp_path}/out")
    assert result.code == 0, result.err
    data = files.read_json(epath.Path(tmp_path / "out/config.json"))
    assert data["architectures"] == ["BertForSequenceClassification"]
    assert data["id2label"] == {"0": "!", "1": "ham"}
    shapes = files.Safetensors(epath.Path(tmp_path / "out")).shapes
    assert shapes["classifier.weight"] == (2, 32) and "bert.pooler.dense.bias" in shapes


def test_an_encoder_of_whole_numbers_is_refused(tmp_path):
    folder = epath.Path(tmp_path / "bert")
    bare_bert(folder, **{"pooler.dense.bias": np.arange(32)})
    result = main("import", tmp_path / "w", f"--from={folder}", *sets("mesh.data=1"))
    assert result.code == 2
    assert "pooler.dense.bias is I64; lm reads F32" in result.err
