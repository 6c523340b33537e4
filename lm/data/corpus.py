"""The text embedded in the package, as the TFDS datasets `lm_text` and `lm_bible`.

`lm_text` is English. Configs: `all`; `shakespeare`, 38 plays; `union`, 233 State of the
Union addresses; `moby_dick`, by chapter; `slice`, 1 MB of the three, for tests. A document
is in the same split in every config that has it. `lm_bible` is the verses of the King
James and of the Reina-Valera Bible, split by book. All features are text.

The documents are in `text/*.jsonl.xz`; `text/PROVENANCE.md` says where they come from,
how they were cleaned and why they are split as they are. `prepare` writes them as the
array_record files that `tfds.data_source` reads: no network, no TensorFlow.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import lzma
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from absl import logging
from etils import epath

from lm.config import ConfigError, nearest

VERSION = "1.0.0"  # raise it with any change of the text: prepared data is found by it
SPLITS = ("train", "validation", "test")
TEXT_DIR = pathlib.Path(__file__).parent / "text"
CONFIGS = {
    "all": ("moby_dick", "shakespeare", "union"),
    "shakespeare": ("shakespeare",),
    "union": ("union",),
    "moby_dick": ("moby_dick",),
    "slice": ("moby_dick", "shakespeare", "union"),
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What TFDS is told of a dataset."""

    about: str
    features: tuple[str, ...]
    configs: dict[str, tuple[str, ...]]  # their files; the name alone means the first


DATASETS = {
    "lm_text": Dataset(
        "The English embedded in `lm`.", ("text", "title", "id"), CONFIGS
    ),
    "lm_bible": Dataset(
        "Verses in English (King James) and Spanish (Reina-Valera 1909).",
        ("en", "es", "id"),
        {"verses": ("bible",)},
    ),
}
BUILDERS = tuple(
    builder
    for name, found in DATASETS.items()
    for builder in (name, *(f"{name}/{config}" for config in found.configs))
)
# How the ids of the documents of `slice` begin.
SLICE = (
    "shakespeare/the-comedy-of-errors",
    "shakespeare/macbeth",
    "shakespeare/two-gentlemen-of-verona",
    "shakespeare/twelfth-night",  # validation
    "shakespeare/as-you-like-it",  # test
    "moby_dick/00",
    "moby_dick/01",  # of these, chapter 10 is test
    "moby_dick/020",  # validation
    "moby_dick/030",  # test
    "moby_dick/040",  # validation
    "union/179",
    "union/1990",
    "union/1991",
    "union/1992",
    "union/2002",  # validation
    "union/2017",  # test
)


def prepare(name: str, data_dir: os.PathLike[str] | str) -> None:
    """Writes a dataset of this module under `data_dir`, unless it is there.

    It appears complete or not at all, and any number of processes may do it at once.

    Args:
        name: one of `BUILDERS`, with or without `:1.0.0`.
        data_dir: where TFDS keeps its datasets.

    Raises:
        ConfigError: an unknown name, a damaged file of text, or a directory that
            can't be written.
    """
    dataset, config = _named(name)
    root = epath.Path(data_dir).expanduser()
    done = root / dataset / config / VERSION / "dataset_info.json"
    if done.exists():
        return
    for file in DATASETS[dataset].configs[config]:
        _packed(file)  # a damaged file is reported here, not from within TFDS
    try:
        with _quiet():
            import tensorflow_datasets as tfds

            # TFDS writes into a directory of a random name, which it then renames.
            builder_class(dataset)(config=config, data_dir=root).download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format="array_record",
            )
    except (
        OSError,
        RuntimeError,
    ) as error:  # to array_record a full disk is the latter
        if done.exists():
            return  # another process was faster
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ConfigError(
            f"cannot prepare {name} under {root}: {reason}; choose another place "
            "with data.tfds_dir"
        ) from error


def documents(config: str, dataset: str = "lm_text") -> Iterator[dict[str, str]]:
    """Yields the documents of a config: its features and `split`.

    Raises:
        ConfigError: a file of text is missing or damaged.
    """
    for file in DATASETS[dataset].configs[config]:
        for line in lzma.decompress(_packed(file)).splitlines():
            document = json.loads(line)
            if config != "slice" or document["id"].startswith(SLICE):
                yield document


@functools.cache
def builder_class(dataset: str = "lm_text") -> Any:
    """Returns the `tfds.core.GeneratorBasedBuilder` of a dataset of this module.

    It is made when first asked for: importing TFDS takes most of a second, and a run
    that reads tokens already stored needs none of it.
    """
    import tensorflow_datasets as tfds

    found = DATASETS[dataset]

    class Embedded(tfds.core.GeneratorBasedBuilder):
        name = dataset
        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS: ClassVar = [
            tfds.core.BuilderConfig(name=config) for config in found.configs
        ]

        def _info(self) -> tfds.core.DatasetInfo:
            features = {feature: tfds.features.Text() for feature in found.features}
            return tfds.core.DatasetInfo(
                builder=self,
                description=found.about,
                features=tfds.features.FeaturesDict(features),
                license="public domain",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing to download
            assert self.builder_config is not None
            chosen = list(documents(self.builder_config.name, dataset))
            return {split: self._generate_examples(split, chosen) for split in SPLITS}

        def _generate_examples(
            self, split: str, chosen: list[dict[str, str]]
        ) -> Iterator[tuple[str, dict[str, str]]]:
            for document in chosen:
                if document["split"] == split:
                    yield document["id"], {key: document[key] for key in found.features}

    return Embedded


def _named(name: str) -> tuple[str, str]:
    """Returns the dataset and the config that `name` means."""
    known, _, version = name.partition(":")
    if known not in BUILDERS:
        raise ConfigError(
            f"no dataset {name!r} in the package{nearest(known, BUILDERS)}; "
            f"there is {', '.join(BUILDERS)}"
        )
    if version not in ("", VERSION):
        raise ConfigError(
            f"{name}: this release of lm has version {VERSION} of {known} only"
        )
    dataset, _, config = known.partition("/")
    return dataset, config or next(iter(DATASETS[dataset].configs))


def _packed(file: str) -> bytes:
    """Returns the bytes of a file of text, as packed, after comparing their sha256."""
    path = TEXT_DIR / f"{file}.jsonl.xz"
    fix = "restore it with `git checkout lm/data/text`, or install lm again"
    try:
        sums = (TEXT_DIR / "SHA256SUMS").read_text().split()
        packed = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; {fix}") from error
    expected = dict(zip(sums[1::2], sums[::2], strict=False)).get(path.name)
    found = hashlib.sha256(packed).hexdigest()
    if found != expected:
        raise ConfigError(
            f"{path}: damaged, sha256 {found} where SHA256SUMS has {expected}; {fix}"
        )
    return packed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing its progress bars, greetings and log."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.set_verbosity(verbosity)
