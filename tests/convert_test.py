"""Import and export: every tensor keeps its bytes; what is not understood is refused by name."""

import json
import shutil

import families_hf
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toy
from etils import epath

from lm import config
from lm.convert import families, files, gguf, steps, weights, work
from lm.convert.family import essence
from lm.data import chat, pretrained
from lm.data import tokenizer as tokenizers
from lm.experiment import Experiment
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.ffn import Mlp
from lm.nn.rope import Llama3, Rope

pytest.importorskip("safetensors", reason="export needs the extra hf: safetensors")
pytest.importorskip(
    "tokenizers", reason="tokenizer.json needs the extra hf: tokenizers"
)

VOCAB = 261  # three tokens, 256 bytes, and two that only the model has
MODEL = Transformer.Config(
    layers=3, dim=32, heads=4, kv_heads=2, vocab_size=VOCAB, tied=True,
    attention=Attention.Config(head_dim=8),
    ffn=Mlp.Config(hidden=48), positions=Rope(scaling=Llama3(length=16)),
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama of random bfloat16 (its norms float32) in several files, its head there twice."""
    folder = epath.Path(tmp_path_factory.mktemp("source"))
    family, data = families.write(MODEL)
    data |= {
        "architectures": ["X"],
        "max_position_embeddings": 32,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(data))
    rng, tensors = np.random.default_rng(0), {}
    for row, shape in shapes(family):
        dtype = np.float32 if "norm" in row else jnp.bfloat16
        tensors[row] = (0.2 * rng.standard_normal(shape) + ("norm" in row)).astype(
            dtype
        )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    writer = files.Writer(
        folder, {k: v.nbytes for k, v in tensors.items()}, most=20_000
    )
    for name, value in tensors.items():
        writer.add(name, value)
    writer.close()
    assert (folder / files.INDEX).exists()
    families_hf.write_tokenizer(folder)
    return folder


def shapes(family, model=MODEL):
    """Yields the name and shape of every tensor."""
    D, H, K, F = MODEL.dim, MODEL.head_dim, MODEL.kv_heads, 48
    kinds = {
        "embed_tokens": (VOCAB, D), "q_proj": (MODEL.heads * H, D), "k_proj": (K * H, D),
        "v_proj": (K * H, D), "o_proj": (D, MODEL.heads * H), "gate_proj": (F, D),
        "up_proj": (F, D), "down_proj": (D, F), "q_norm": (H,), "k_norm": (H,),
    }  # fmt: skip
    for name in family.table(model).names():
        kind = name.split(".")[-2]
        yield name, kinds.get(kind, (D,))


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    """A work directory, imported onto a mesh."""
    workdir = tmp_path_factory.mktemp("work") / "run"
    mesh = ["mesh.pipe=2", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"]
    more = ["pipeline.microbatches=2", "train.batch_size=4"]
    result = main("import", workdir, f"--from={source}", *sets(*mesh, *more))
    assert result.code == 0, result.err
    assert "LlamaForCausalLM" in result.err
    return workdir


def main(mode, workdir, *more):
    return runs.here(f"--mode={mode}", f"--workdir={workdir}", *more)


def sets(*assignments):
    return [f"--set={a}" for a in assignments]


def test_what_was_imported_is_exported_byte_for_byte(source, imported, tmp_path):
    """On a mesh, from several files into one: names, dtypes, the second head, config.json."""
    out = tmp_path / "out"
    result = main("export", imported, f"--to={out}")
    assert result.code == 0, result.err
    assert f"tensors as X to {out}" in result.err
    assert "no tokenizer" not in result.err
    before, after = files.Safetensors(source), files.Safetensors(epath.Path(out))
    assert before.shapes == after.shapes
    assert before.dtypes == after.dtypes
    for name in before.shapes:
        assert before.tensor(name).tobytes() == after.tensor(name).tobytes(), name
    was, now = (files.read_json(epath.Path(d) / "config.json") for d in (source, out))
    was.pop("torch_dtype")
    assert {**was, "dtype": "bfloat16"} == {**now, "architectures": ["X"]}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    result = main("export", imported, f"--to={out}")
    assert result.code == 2
    assert "not empty" in result.err


def test_a_bare_gpt2_keeps_its_names_and_leaves_its_masks_out(source, tmp_path):
    """The weights that OpenAI's GPT-2 is stored by have no prefix, and masks among them."""
    family, model = families.read(
        {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32,
         "vocab_size": VOCAB}
    )  # fmt: skip
    _, data = families.write(model)
    rng, tensors = np.random.default_rng(0), {}
    widths = {
        "c_attn": (32, 96),
        "c_fc": (32, 128),
        "wte": (VOCAB, 32),
        "wpe": (32, 32),
    }
    for name in family.table(model).names():
        stem, kind = name.removeprefix("transformer.").rsplit(".", 1)
        shape = widths.get(stem.split(".")[-1], (32, 32))
        shape = (128, 32) if stem.endswith("mlp.c_proj") else shape
        shape = shape[-1:] if kind == "bias" or "ln_" in stem else shape
        tensors[f"{stem}.{kind}"] = rng.standard_normal(shape).astype(np.float16)
    folder = epath.Path(tmp_path / "gpt2")
    folder.mkdir()
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    files.save({**tensors, **masks}, folder / files.SINGLE)
    (folder / "config.json").write_text(json.dumps(data))
    families_hf.write_tokenizer(folder)
    result = main("import", tmp_path / "w", f"--from={folder}", *sets("mesh.data=1"))
    assert result.code == 0, result.err
    assert "left out: 2 tensors" in result.err
    result = main("export", tmp_path / "w", f"--to={tmp_path}/out")
    assert result.code == 0, result.err
    after = files.Safetensors(epath.Path(tmp_path / "out"))
    assert after.shapes.keys() == tensors.keys()
    for name, value in tensors.items():
        assert after.tensor(name).tobytes() == value.tobytes(), name


ONE = sets("mesh.pipe=1", "mesh.fsdp=1", "mesh.tensor=1", "generate.tokens=4")


def test_an_imported_model_writes_answers_and_learns(imported, tmp_path):
    result = main("generate", imported, "--prompt=cab", "--prompt=dab", *ONE)
    assert result.code == 0, result.err
    assert "cab" in result.out
    answer = main("generate", imported, "--chat", "--prompt=cab", *ONE)
    assert answer.code == 0, answer.err
    assert answer.out != result.out
    (tmp_path / "text.txt").write_text("abc def " * 200)
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    mesh = sets(
        *("mesh.data=2", "train.steps=2", f"data.source=text:{tmp_path}/text.txt#1k"),
        *("eval.sets.0.split=train", "data.holdout=0", "data.length=16"),
        f"data.store_dir={tmp_path}",
    )
    result = main("train", workdir, *ONE, *mesh)
    assert result.code == 0, result.err
    assert "weights that were imported" in result.err
    result = main("eval", workdir, *ONE, *mesh)
    assert result.code == 0, result.err
    assert json.loads(result.out)["step"] == 2


def changed(source, tmp_path, **values):
    """A copy of the directory with other values in config.json."""
    folder = epath.Path(tmp_path / "changed")
    shutil.copytree(source, folder)
    data = files.read_json(folder / "config.json") | values
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "lama"}, ["model_type='lama'", "did you mean 'llama'"]),
        ({"model_type": "mamba"}, ["model_type='mamba'"]),
        ({"hidden_act": "relu"}, ["hidden_act='relu'", "silu"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type='longrope'"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "x": 1}}, ["x=1"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"clip_qkv": 8}, ["does not know clip_qkv=8"]),
        ({"pretraining_tp": 2}, ["pretraining_tp=2"]),
        ({"hidden_size": "32"}, ["hidden_size='32'", "int"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization", "fp8"]),
        ({"num_hidden_layers": 4}, ["no tensor model.layers.3."]),
        ({"num_hidden_layers": 2}, ["unknown tensor model.layers.2."]),
        ({"intermediate_size": 40}, ["gate_proj", "[48, 32], expected [40, 32]"]),
        ({"vocab_size": 200}, ["embed_tokens", "[261, 32], expected [200, 32]"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(source, tmp_path, values, words):
    folder = changed(source, tmp_path, **values)
    result = main("import", tmp_path / "w", f"--from={folder}", *sets("mesh.data=1"))
    assert result.code == 2
    assert result.err.count("\n") <= 2
    for word in words:
        assert word in result.err, result.err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode=import", "--workdir=x"], ["--mode=import needs --from"]),
        (["--mode=export", "--workdir=x"], ["--mode=export needs --to"]),
        (["--mode=import", "--from=x"], ["needs --workdir"]),
        (["--mode=import", "--from=nowhere", "--workdir=x"], ["nowhere", "no such"]),
        (["--mode=train", "--chat", "--experiment=tiny"], ["--chat is for"]),
    ],
)
def test_flags_that_lack_something_say_what(flags, words):
    result = runs.here(*flags)
    assert result.code == 2
    for word in words:
        assert word in result.err


def test_two_tokenizers_of_one_model_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "marian", "d_model": 32}')
    (tmp_path / "source.spm").write_bytes(b"")
    with toy.refused("no tokenizer.json", "source.spm and target.spm"):
        work.experiment(str(tmp_path), str(tmp_path / "run"))


def test_a_file_that_is_cut_off_is_found(source, tmp_path):
    folder = epath.Path(tmp_path / "cut")
    shutil.copytree(source, folder)
    one = sorted(folder.glob("model-*.safetensors"))[-1]
    one.write_bytes(one.read_bytes()[:-10])
    with toy.refused("cut off or damaged"):
        files.Safetensors(folder)


def test_json_that_says_something_else_is_named(tmp_path):
    place = epath.Path(tmp_path)
    for text in ("[1]", "{", b"\xff"):
        text = text if isinstance(text, bytes) else text.encode()
        (place / "config.json").write_bytes(text)
        with toy.refused("config.json", "JSON object" if text == b"[1]" else "be read"):
            files.read_json(place / "config.json")
    (place / files.INDEX).write_text("{}")
    with toy.refused(files.INDEX, "no weight_map"):
        files.Safetensors(place)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_gguf_file_has_the_same_tensors_and_tokens(kind, source, tmp_path):
    package = pytest.importorskip("gguf", reason="GGUF files need the extra hf: gguf")
    model = config.override(
        MODEL, ["positions.scaling=none", f"attention.qk_norm={kind == 'qwen3'}"]
    )
    family = families.FAMILIES[kind]
    coder = tokenizers.load(pretrained.HuggingFace(path=str(source)))
    data = json.loads(coder.files()["tokenizer.json"])
    names = [*data["model"]["vocab"], "<spare 1>", "<spare 2>"]
    writer = package.GGUFWriter(str(tmp_path / "model.gguf"), kind)
    for add, value in {
        "block_count": 3, "context_length": 32, "embedding_length": 32, "head_count": 4,
        "feed_forward_length": 48, "head_count_kv": 2, "key_length": 8,
        "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e4, "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2", "token_list": names, "token_merges": ["a b"],
        "token_types": [3, 3, *[1] * (len(names) - 4), 1, 1], "eos_token_id": 1,
        "bos_token_id": 0, "chat_template": families_hf.TEMPLATE,
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    rng, tensors = np.random.default_rng(0), {}
    short = {long: own for own, long in gguf.NAMES.items()}
    for name, shape in shapes(family, model):
        tensors[name] = value = rng.standard_normal(shape).astype(np.float32)
        stem, layer = name.removesuffix(".weight"), name.split(".")[2]
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = value.reshape(-1, 2, 4, 32)  # of heads of 8
            value = halves.swapaxes(1, 2).reshape(value.shape)
        inner = stem.removeprefix(f"model.layers.{layer}.")
        own = short[inner] if inner == stem else f"blk.{layer}.{short[inner]}"
        writer.add_tensor(f"{own}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = work.opened(str(tmp_path / "model.gguf"))
    assert essence(found.model) == essence(model)
    read = found.tensors()
    assert read.shapes == {k: v.shape for k, v in tensors.items()}
    for name, value in tensors.items():
        np.testing.assert_array_equal(read.tensor(name), value)
    again = tokenizers.from_files(found.tokenizer)
    for text in families_hf.TEXTS:
        np.testing.assert_array_equal(again.encode(text), coder.encode(text))
        assert again.decode(again.encode(text)) == text
    assert chat.template(again) == families_hf.TEMPLATE


def test_a_model_that_no_family_can_express_names_what_is_missing():
    model = config.override(MODEL, ["attention.softcap=3"])
    with toy.refused("no family", "attention.softcap"):
        families.write(model)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (steps.Transpose(), (2, 6, 4)),
        (steps.Fold(1, (3, 2)), (4, 6, 5)),
        (steps.Fold(0, ()), (1, 7)),
        (steps.Cut(-1, (2, 1, 3)), (5, 6)),
        (steps.Deal(-1), (3, 6)),
        (steps.Deal(-2, 3), (2, 6, 4)),
        (steps.Halves(-1, 4), (3, 6)),
        (steps.Halves(-2, 6), (6, 2)),
    ],
    ids=str,
)
def test_a_step_back_is_its_inverse(step, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    (back,) = step.theirs(step.ours((x,)))
    np.testing.assert_array_equal(back, x)


def test_pairs_that_take_turns_lie_in_halves():
    (found,) = steps.Halves(-1, 4).ours((np.array([9, 8, 0, 1, 2, 3]),))
    np.testing.assert_array_equal(found, [9, 8, 0, 2, 1, 3])


def test_the_config_of_an_import_can_be_read_again(imported):
    stored = json.loads((imported / "config.json").read_text())
    chosen = config.from_json(Experiment, stored)
    assert isinstance(chosen.data.tokenizer, pretrained.HuggingFace)
    assert chosen.model.vocab_size == VOCAB
    assert weights.places(
        chosen.model, families.write(chosen.model)[0].table(chosen.model)
    )
