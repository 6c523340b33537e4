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


def find(spec: str, name: str, field: str, tfds_dir: str) -> "Tfds":
    """Returns the prepared data set; one of this package is prepared on the spot.

    Args:
        spec: what the user wrote, for messages.
        name: NAME or NAME/CONFIG.
        field: the feature that holds the text; "" finds it.
        tfds_dir: where TFDS keeps prepared data sets; "" for its default.
    """
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = epath.Path(tfds_dir or default).expanduser()
    base, _, config = name.partition("/")
    if base == corpus.NAME:
        corpus.prepare(name, data_dir)
        config = config or next(iter(corpus.CONFIGS))
    directory = _prepared(data_dir, base, config)
    if directory is None:
        import tensorflow_datasets as tfds

        known = [corpus.NAME, *tfds.list_builders(with_community_datasets=False)]
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
    field = _text_feature(spec, features["featuresDict"]["features"], field)
    splits = tuple(
        Split(s["name"], sum(map(int, s["shardLengths"])), int(s["numBytes"]))
        for s in info["splits"]
    )
    return Tfds(spec, str(directory), field, splits)


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


def _text_feature(spec: str, features: dict[str, Any], field: str) -> str:
    texts = [k for k, f in features.items() if f["pythonClassName"].endswith(".Text")]
    if field:
        if field in features:
            return field
        raise ConfigError(
            f"data.source={spec}: no feature {field!r}{nearest(field, features)} "
            f"(features: {', '.join(features)})"
        )
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise ConfigError(
        f"data.source={spec}: which feature is the text? Write {spec}#NAME with one of "
        f"{', '.join(texts or features)}"
    )


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
    field: str
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
            TfdsPart(self.directory, split, self.field, i, stop, int((stop - i) * each))
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
        return sources.identity(files, split, self.field, info)

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

    directory: str
    split: str
    field: str
    start: int
    stop: int
    size: int  # bytes, about

    def documents(self) -> Iterator[str]:
        records = _records(self.directory, self.split)
        for i in range(self.start, self.stop):
            text = records[i][self.field]
            if isinstance(text, bytes):
                text = sources.decode(
                    text, f"{self.directory} ({self.split}, example {i})"
                )
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ConfigError(
                    f"{self.directory}: feature {self.field!r} is {kind}, not text"
                )
            yield text
