"""Import: a work directory made of a model; export: a model made of a work directory.

WORKDIR/config.json         the experiment
WORKDIR/checkpoints/0       the weights, as any run has them
WORKDIR/tokenizer/          its files
WORKDIR/origin/config.json  as it was read
WORKDIR/origin/tensors.json name → dtype of every tensor that was read
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lm import batches, checkpoint, config, sharding, train
from lm.config import ConfigError
from lm.convert import families, files, pieces, weights
from lm.convert.family import Family, essence
from lm.convert.family import Model as Known
from lm.data import pretrained
from lm.data import tokenizer as tokenizers
from lm.data.loader import Data
from lm.data.pretrained import HuggingFace
from lm.data.tokenizer import SentencePiece
from lm.experiment import Experiment, Train
from lm.models import kinds
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn.heads import Classes
from lm.optim import Optim

ORIGIN, TOKENIZER = "origin", "tokenizer"
PIECES = ("tokenizer.model", "spiece.model")  # files of SentencePiece
LONGEST = 2048  # tokens of an example, unless data.length says otherwise


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is not read yet."""

    config: dict[str, Any]  # its config.json
    family: Family
    model: Known
    tokenizer: dict[str, bytes]  # files
    tensors: Callable[[], files.Source]


def opened(path: str) -> Model:
    """Returns the model of a Hugging Face directory, or of a GGUF file.

    Raises:
        ConfigError: there is none, or one that is not supported.
    """
    place = epath.Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"--from={path}: there is no such directory or file")
    if place.suffix == ".gguf":
        from lm.convert import gguf

        data, coder, source = gguf.read(place)
        family, model = families.read(data, place.name)
        return Model(data, family, model, coder, source)
    folder = place if place.is_dir() else place.parent
    if not (folder / "config.json").exists():
        raise ConfigError(f"--from={path}: {folder} has no config.json")
    data = files.read_json(folder / "config.json")
    family, model = families.read(data, str(folder / "config.json"))
    names = (pretrained.MAIN, *pretrained.BESIDE)
    coder = {n: (folder / n).read_bytes() for n in names if (folder / n).exists()}
    return Model(data, family, model, coder, lambda: files.Safetensors(place))


def experiment(path: str, workdir: str) -> Experiment:
    """Returns an experiment with the model at `path`, to be overridden and imported.

    Raises:
        ConfigError: a model that is not supported, or one without a tokenizer.
    """
    found = opened(path)
    name = re.sub(r"\W+", "_", epath.Path(path).expanduser().resolve().stem).strip("_")
    where = str(epath.Path(workdir).expanduser().resolve() / TOKENIZER)
    if pretrained.MAIN in found.tokenizer:
        coder: Any = HuggingFace(path=where)
    elif there := [name for name in PIECES if name in found.tokenizer]:
        special = json.loads(found.tokenizer.get("tokenizer_config.json", b"{}"))
        begins = special.get("add_bos_token", True)
        coder = SentencePiece(
            path=f"{where}/{there[0]}", begin="bos" if begins else "eos"
        )
    else:
        hint = ""
        if (epath.Path(path).expanduser() / "source.spm").exists():
            hint = "; source.spm and target.spm are two, of which lm has one for both texts"
        raise ConfigError(
            f"--from={path}: there is no {pretrained.MAIN}, {' or '.join(PIECES)}{hint}"
        )
    length = int(found.config.get("max_position_embeddings") or LONGEST)
    length = int(found.config.get("n_positions") or length)
    objective, kept = _objective(found), {}
    if not isinstance(objective, batches.Causal):
        kept = {"packing": "documents", "isolate": True}
    return Experiment(
        name=name,
        about=f"{_architecture(found)}, imported",
        model=found.model,
        data=Data(
            source=("tfds:lm_text/shakespeare",),
            length=min(length, LONGEST),
            tokenizer=coder,
            **kept,
        ),
        objective=objective,
        optim=Optim(learning_rate=2e-5),
        train=Train(batch_size=8),
    )


def _architecture(found: Model) -> str:
    """Returns the class of transformers that a model is stored as."""
    family = found.family
    return family.write(found.model).get("architectures", [family.architecture])[0]


def _objective(found: Model) -> batches.Objective:
    """Returns what a model that was imported can be trained by."""
    head = kinds.head(found.model)
    if isinstance(found.model, EncoderDecoder.Config):
        return batches.Seq2Seq()
    if head is None:
        return batches.Causal()
    if isinstance(head, Classes.Config):
        return batches.Classification(labels=_labels(found.config, head.classes))
    mask = None
    if pretrained.MAIN in found.tokenizer:
        mask = tokenizers.from_files(found.tokenizer).mask
    return batches.Masked(mask_id=mask)


def _labels(data: dict[str, Any], classes: int) -> tuple[str, ...]:
    """Returns the names of the classes, as transformers has them where config.json has none."""
    names = data.get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(classes))


def _labelled(data: dict[str, Any], objective: batches.Objective) -> dict[str, Any]:
    """Returns a config.json that names the classes as the objective does."""
    labels = getattr(objective, "labels", ())
    if labels == _labels(data, len(labels)):
        return data
    names = {str(i): name for i, name in enumerate(labels)}
    numbers = {name: i for i, name in enumerate(labels)}
    return {**data, "id2label": names, "label2id": numbers}


def bring_in(
    experiment: Experiment, path: str, workdir: str, say: Callable[[str], None]
) -> None:
    """Imports the model at `path`: leaves a work directory that can be used like a run's.

    Raises:
        ConfigError: tensors or tokenizer that do not fit, or a work directory in use.
    """
    found, place = opened(path), epath.Path(workdir).expanduser()
    if (place / checkpoint.FOLDER).exists() and any(
        (place / checkpoint.FOLDER).iterdir()
    ):
        raise ConfigError(
            f"--workdir={workdir} has checkpoints already; choose another"
        )
    if (changed := config.diff(essence(found.model), essence(experiment.model))) != []:
        path, old, new = changed[0]
        raise ConfigError(f"--set model.{path}={new!r}: the model has {old!r}")
    prog = train.program(experiment, sharding.make_layout(experiment.mesh))
    model: Any = experiment.model
    table = found.family.table(model)
    every = weights.places(model, table)
    source = _named(found, table.names())
    vocab = experiment.model.vocab_size
    shapes = {path: x.shape for path, x in prog.shapes.items()}
    left = weights.check(found.family, table, source, shapes, every, vocab)
    for name in table.copies:
        if name in left:
            _same(source, name, table.embedding)
    coder = _coder(found, experiment)
    say(_summary(found, source, prog, left, coder))
    tokenizers.sizes_agree(coder, vocab)
    params = weights.read(prog, source, every)
    kept = checkpoint.Checkpoints(str(place / checkpoint.FOLDER), report=say)
    meta = {
        "config": config.to_json(experiment),
        "imported": True,
        "step": 0,
        "examples": 0,
        "tokens": 0,
        "tokenizer": coder.fingerprint,
        "jax": jax.__version__,
    }
    kept.save(0, train.saved(prog, {"params": params}), meta, coder.files())
    kept.close()
    if jax.process_index() == 0:
        (place / TOKENIZER).mkdir(parents=True, exist_ok=True)
        for name, content in found.tokenizer.items():
            (place / TOKENIZER / name).write_bytes(content)
        _write_json(place / ORIGIN / "config.json", found.config)
        _write_json(place / ORIGIN / "tensors.json", source.dtypes)
        _write_json(place / "config.json", config.to_json(experiment))


def _coder(found: Model, experiment: Experiment) -> tokenizers.Tokenizer:
    """Returns the tokenizer of the files that were read."""
    chosen = experiment.data.tokenizer
    if isinstance(chosen, SentencePiece):
        model = found.tokenizer[epath.Path(chosen.path).name]
        return tokenizers.SentencePieceTokenizer(model, begin=chosen.begin)
    return tokenizers.from_files(found.tokenizer)


def _write_json(path: epath.Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


class _Renamed:
    """A source whose names are not quite the table's."""

    def __init__(self, source: files.Source, names: dict[str, str]):
        self._source, self._names = source, names  # the table's: the file's
        self.dtypes = source.dtypes
        self.shapes = {ours: source.shapes[name] for ours, name in names.items()}

    def tensor(self, name: str) -> Any:
        return self._source.tensor(self._names[name])


def _named(found: Model, names: list[str]) -> files.Source:
    """Returns the tensors by the table's names."""
    source, prefix = found.tensors(), found.family.prefix
    if prefix and not any(n.startswith(prefix) for n in source.shapes):
        # Files of a bare base model.
        renamed = _Renamed(source, {prefix + n: n for n in source.shapes})
        if set(names) & renamed.shapes.keys():
            return renamed
    if found.family.renamed:
        return _Renamed(source, {found.family.renamed(n): n for n in source.shapes})
    return source


def _same(source: files.Source, name: str, embedding: str) -> None:
    """Checks that what is the embedding once more has its values."""
    if not (source.tensor(name) == source.tensor(embedding)).all():
        raise ConfigError(
            f"{name} is not {embedding}, but config.json has tie_word_embeddings=true"
        )


def _summary(
    found: Model,
    source: files.Source,
    prog: Any,
    left: list[str],
    coder: tokenizers.Tokenizer,
) -> str:
    count = sum(x.size for x in prog.shapes.values())
    kinds = ", ".join(f"{n} in {d}" for d, n in Counter(source.dtypes.values()).items())
    lines = [
        f"{_architecture(found)}: {count / 1e6:.1f} M parameters; tensors: {kinds}"
    ]
    if left:
        some = f"{len(left)} tensors" if len(left) > 1 else "1 tensor"
        lines.append(f"left out: {some} that the model does not use, as {left[0]}")
    if not coder.token_bytes.any():
        lines.append("the tokenizer does not keep text as it is: no bits per byte")
    rates = families.Fields(found.config).dropouts()
    if rates:
        some = ", ".join(f"{k}={v}" for k, v in rates.items())
        lines.append(
            f"not taken over: {some}; model.dropout is the experiment's to set"
        )
    return "\n".join(lines)


def send_out(
    experiment: Experiment, params: Any, coder: tokenizers.Tokenizer, to: str,
    workdir: str, prog: train.Program, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Writes safetensors, config.json and tokenizer files into the directory `to`.

    Tensors keep the dtypes that they had where the model was imported (float32 where it was not),
    and config.json what it said, as far as it still describes the model.

    Raises:
        ConfigError: a model that no family can express, or a directory that is not empty.
    """
    if jax.process_count() > 1:
        raise ConfigError("--mode=export runs as one process")
    place = epath.Path(to).expanduser()
    if place.exists() and any(place.iterdir()):
        raise ConfigError(f"--to={to} is not empty; choose another directory")
    model: Any = experiment.model
    family, data, dtypes = _described(experiment, coder, workdir)
    place.mkdir(parents=True, exist_ok=True)
    table = family.table(model)
    every = weights.places(model, table)
    names = table.names()
    bare = bool(dtypes) and not set(names) & dtypes.keys()
    if bare:
        dtypes = {family.prefix + name: dtype for name, dtype in dtypes.items()}
    usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else "float32"
    sizes = weights.sizes(prog, every, dtypes, usual)
    copies = [name for name in table.copies if name in dtypes and name not in names]
    sizes |= dict.fromkeys(copies, sizes[table.embedding])
    cut = len(family.prefix) if bare else 0
    writer = files.Writer(place, {n[cut:]: size for n, size in sizes.items()})
    for name, array in weights.write(params, every, model.vocab_size, dtypes, usual):
        writer.add(name[cut:], array)
        for copy in copies if name == table.embedding else ():
            writer.add(copy[cut:], array.astype(jnp.dtype(dtypes[copy])))
    writer.close()
    _write_json(place / "config.json", {"architectures": [family.architecture], **data,
                                        "dtype": usual})  # fmt: skip
    beside = _tokenizer_files(experiment, coder, workdir)
    for name, content in beside.items():
        (place / name).write_bytes(content)
    (kind,) = data.get("architectures", [family.architecture])[:1]
    say(f"wrote {len(sizes)} tensors as {kind} to {to}")
    if not {pretrained.MAIN, *PIECES} & beside.keys():
        say("there is no tokenizer among the files: transformers has none of this kind")


def _tokenizer_files(
    experiment: Experiment, coder: tokenizers.Tokenizer, workdir: str
) -> dict[str, bytes]:
    """Returns the tokenizer's files, and those that stood beside it where it was imported."""
    names, found = (pretrained.MAIN, *pretrained.BESIDE), {}
    for folder in (workdir, experiment.train.init_from):
        beside = epath.Path(folder or ".") / TOKENIZER
        if folder and not found and beside.exists():
            found = {p.name: p.read_bytes() for p in beside.iterdir()}
    found |= coder.files()
    if PIECES[1] in found:
        found.pop(PIECES[0], None)  # the same under another name
    if isinstance(coder, tokenizers.SentencePieceTokenizer) and not coder.spare:
        ends = isinstance(experiment.model, EncoderDecoder.Config)
        found |= pieces.files(coder, ends)
    return {name: content for name, content in found.items() if name in names}


def _described(
    experiment: Experiment, coder: tokenizers.Tokenizer, workdir: str
) -> tuple[Family, dict[str, Any], dict[str, str]]:
    """Returns the family, config.json and the dtypes by name: those of its origin, if any."""
    for folder in (workdir, experiment.train.init_from):
        origin = epath.Path(folder).expanduser() / ORIGIN
        if not folder or not (origin / "config.json").exists():
            continue
        data = files.read_json(origin / "config.json")
        family, model = families.read(data, str(origin / "config.json"))
        if essence(model) == essence(experiment.model):
            data.pop("torch_dtype", None)
            data = _labelled(data, experiment.objective)
            return family, data, files.read_json(origin / "tensors.json")
    family, data = families.write(experiment.model)
    data = _labelled(data, experiment.objective)
    marks = {"bos_token_id": coder.eot, "eos_token_id": (*coder.ends, coder.eot)[0]}
    if kinds.head(experiment.model) is not None:
        marks = {}
    length = experiment.data.length
    for name in ("decoder_start_token_id", "pad_token_id"):
        if data.get(name, 0) is None:
            data[name] = coder.eot  # as rows have it
    return family, {"max_position_embeddings": length, **marks, **data}, {}
