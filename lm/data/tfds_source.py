"""TFDS data sets by name: array_record files, read without TensorFlow.

Only what lies prepared on disk is opened; nothing here downloads or asks the network.
What a data set holds is read from its JSON files, so that TFDS itself, which is slow to
import, is needed only where examples are read.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from lm.config import ConfigError, nearest
from lm.data import corpus, sources

_PART = 4 << 20  # bytes of records in a part


def find(spec: str, name: str, fields: tuple[str, ...], tfds_dir: str) -> "Tfds":
    """Returns the prepared data set; one of this package is prepared on the spot.

    Args:
        spec: what the user wrote, for messages.
        name: NAME or NAME/CONFIG.
        fields: the features that hold the texts; () finds the one there is.
        tfds_dir: where TFDS keeps prepared data sets; "" for its default.
    """
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = epath.Path(tfds_dir or default).expanduser()
    base, _, config = name.partition("/")
    if base in corpus.DATASETS:
        corpus.prepare(name, data_dir)
        config = config or next(iter(corpus.DATASETS[base].configs))
    directory = _prepared(data_dir, base, config)
    if directory is None:
        import tensorflow_datasets as tfds

        known = [*corpus.DATASETS, *tfds.list_builders(with_community_datasets=False)]
        if base not in known:
            near = nearest(base, known)
            raise ConfigError(
                f"data.source={spec}: TFDS has no data set {base!r}{near}"
            )
        raise ConfigError(
            f"data.source={spec}: not prepared under {data_dir}; prepare it with "
            f"`tfds build {name} --file_format=array_record --data_dir={data_dir}`"
        )
    info = json.loads((directory / "dataset_info.json").read_text())
    if info.get("fileFormat") != "array_record":
        raise ConfigError(
            f"data.source={spec}: {directory} is {info.get('fileFormat')}, not "
            "array_record; prepare it again with --file_format=array_record"
        )
    features = json.loads((directory / "features.json").read_text())
    fields = _text_features(spec, features["featuresDict"]["features"], fields)
    splits = tuple(
        Split(s["name"], sum(map(int, s["shardLengths"])), int(s["numBytes"]))
        for s in info["splits"]
    )
    names = tuple(_class_names(directory, field) for field in fields)
    return Tfds(spec, str(directory), fields, names, splits)


def _prepared(data_dir: Any, base: str, config: str) -> Any | None:
    """The directory of the newest prepared version, None if there is none."""
    root = data_dir / base / config if config else data_dir / base
    if version := _newest(root):
        return version
    if config or not root.exists():
        return None
    found = {p.name: v for p in sorted(root.iterdir()) if (v := _newest(p))}
    if len(found) > 1:
        raise ConfigError(
            f"{root} holds several configs; name one: "
            + ", ".join(f"tfds:{base}/{name}" for name in found)
        )
    return next(iter(found.values()), None)


def _newest(root: Any) -> Any | None:
    versions = [
        (tuple(map(int, path.name.split("."))), path)
        for path in (root.iterdir() if root.exists() else ())
        if path.name.replace(".", "").isdecimal() and (path / "features.json").exists()
    ]
    return max(versions)[1] if versions else None


def _text_features(
    spec: str, features: dict[str, Any], fields: tuple[str, ...]
) -> tuple[str, ...]:
    texts = [k for k, f in features.items() if f["pythonClassName"].endswith(".Text")]
    for field in fields:
        if field not in features:
            raise ConfigError(
                f"data.source={spec}: no feature {field!r}{nearest(field, features)} "
                f"(features: {', '.join(features)})"
            )
    if fields:
        return fields
    if "text" in texts or len(texts) == 1:
        return ("text",) if "text" in texts else (texts[0],)
    raise ConfigError(
        f"data.source={spec}: which feature is the text? Write {spec}#NAME with one of "
        f"{', '.join(texts or features)}"
    )


def _class_names(directory: Any, field: str) -> tuple[str, ...]:
    """The names of a `ClassLabel`, which its records hold as numbers; () of other features."""
    path = directory / f"{field}.labels.txt"
    return tuple(path.read_text().splitlines()) if path.exists() else ()


@dataclasses.dataclass(frozen=True)
class Split:
    name: str
    examples: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared data set; a split may be a slice such as `train[:10%]`."""

    spec: str
    directory: str
    fields: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]  # of the classes of each field, () of text
    splits: tuple[Split, ...]
    own_splits = True

    def parts(self, split: str) -> list["TfdsPart"]:
        whole = self._whole(split)
        each = whole.bytes / max(whole.examples, 1)  # bytes of an example
        step = max(1, int(_PART / max(each, 1)))
        try:
            count = len(_records(self.directory, split))
        except ValueError as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"data.split={split}: no slice of {self.spec} ({why})"
            ) from error
        return [
            TfdsPart(self, split, i, stop, int((stop - i) * each))
            for i in range(0, count, step)
            for stop in [min(i + step, count)]
        ]

    def fingerprint(self, split: str) -> str:
        name = self._whole(split).name
        directory = epath.Path(self.directory)
        paths = sorted(directory.glob(f"*-{name}.array_record*"), key=str)
        # TFDS writes its files wherever a data set is prepared: their times tell
        # nothing.
        files = [
            dataclasses.replace(file, mtime=0.0)
            for p in paths
            if (file := sources.stat(p))
        ]
        info = (directory / "dataset_info.json").read_text()
        return sources.identity(files, split, *self.fields, info)

    def _whole(self, split: str) -> Split:
        """The split that `split` is, or is a slice of."""
        name = split.partition("[")[0]
        names = [s.name for s in self.splits]
        if name not in names:
            raise ConfigError(
                f"data.split={split}: {self.spec} has no such split"
                f"{nearest(name, names)} (splits: {', '.join(names)})"
            )
        return self.splits[names.index(name)]


@functools.lru_cache(maxsize=8)
def _records(directory: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    return builder.as_data_source(split)


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """Examples [start, stop) of a split."""

    source: Tfds
    split: str
    start: int
    stop: int
    size: int  # bytes, about

    def documents(self) -> Iterator[tuple[str, ...]]:
        records = _records(self.source.directory, self.split)
        kinds = list(zip(self.source.fields, self.source.names, strict=True))
        for i in range(self.start, self.stop):
            record = records[i]
            yield tuple(self._text(record[field], field, n, i) for field, n in kinds)

    def _text(self, value: Any, field: str, names: tuple[str, ...], i: int) -> str:
        directory = self.source.directory
        if isinstance(value, bytes):
            value = sources.decode(value, f"{directory} ({self.split}, example {i})")
        elif hasattr(value, "__index__") and field != self.source.fields[0]:  # a label
            number = int(value)
            value = names[number] if 0 <= number < len(names) else str(number)
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(f"{directory}: feature {field!r} is {kind}, not text")
        return value
