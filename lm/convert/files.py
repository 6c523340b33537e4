"""Tensors in files: safetensors, one file or several with an index, mapped and never read whole.

A file is a length (uint64), so many bytes of JSON (name → dtype, shape, offsets), and the bytes of
the tensors.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from etils import epath

from lm.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = 5 * 1000**3  # bytes of a file, as Hugging Face cuts them
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@runtime_checkable
class Source(Protocol):
    """Where tensors come from."""

    dtypes: dict[str, str]  # of every tensor, by its name
    shapes: dict[str, tuple[int, ...]]

    def tensor(self, name: str) -> np.ndarray: ...


class Safetensors:
    """The tensors of a directory, or of one file."""

    def __init__(self, path: epath.Path):
        self.dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[np.memmap, int, int]] = {}
        for file in _files(path):
            self._add(file)

    def _add(self, file: epath.Path) -> None:
        try:
            data = np.memmap(str(file), np.uint8, "r")
            start = 8 + int(data[:8].view("<u8")[0])
            header = json.loads(bytes(data[8:start]))
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} is not a safetensors file ({error})") from error
        header.pop("__metadata__", None)
        for name, facts in header.items():
            first, last = (start + i for i in facts["data_offsets"])
            dtype, shape = facts["dtype"], tuple(facts["shape"])
            if dtype not in DTYPES:  # of no weight, or `tensor` refuses it
                self.dtypes[name], self.shapes[name] = dtype, shape
                continue
            dtype = DTYPES[dtype]
            size = math.prod(shape) * jnp.dtype(dtype).itemsize
            if last - first != size or last > data.size:
                raise ConfigError(f"{file} is cut off or damaged at {name}")
            self.dtypes[name], self.shapes[name] = dtype, shape
            self._places[name] = data, first, last

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor, its bytes still in the file.

        Raises:
            ConfigError: it is of another type than weights have.
        """
        if name not in self._places:
            raise ConfigError(
                f"{name} is {self.dtypes[name]}; lm reads {', '.join(DTYPES)}"
            )
        data, first, last = self._places[name]
        # The file says nothing of alignment: numpy views any.
        flat = np.frombuffer(data[first:last], jnp.dtype(self.dtypes[name]))
        return flat.reshape(self.shapes[name])


def _files(path: epath.Path) -> list[epath.Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise ConfigError(f"{index} has no weight_map, which names the files")
        names = sorted(set(named.values()))
        files = [path / name for name in names]
        for file in files:
            if not file.exists():
                raise ConfigError(f"{index} names {file.name}, which is not there")
        return files
    if (path / SINGLE).exists():
        return [path / SINGLE]
    others = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".pt")]
    hint = f" (of {others[0]} make safetensors first)" if others else ""
    raise ConfigError(f"{path} has neither {SINGLE} nor {INDEX}{hint}")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        ConfigError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # also text that is not UTF-8
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object, but {str(found)[:40]!r}")
    return found


@dataclasses.dataclass
class Writer:
    """Writes tensors into files of at most so many bytes, and their index."""

    directory: epath.Path
    sizes: Mapping[str, int]  # bytes of every tensor, in the order in which they come
    most: int = SHARD

    def __post_init__(self) -> None:
        files, room = [[]], self.most
        for name, size in self.sizes.items():
            if size > room and files[-1]:
                files.append([])
                room = self.most
            files[-1].append(name)
            room -= size
        self._files = files
        self._held: dict[str, np.ndarray] = {}
        self._names = [self._name(i) for i in range(len(files))]

    def _name(self, i: int) -> str:
        if len(self._files) == 1:
            return SINGLE
        return f"model-{i + 1:05}-of-{len(self._files):05}.safetensors"

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes a tensor; a file is written when all of its tensors are there."""
        self._held[name] = np.ascontiguousarray(array)
        for i, names in enumerate(self._files):
            if name in names and all(n in self._held for n in names):
                save(
                    {n: self._held.pop(n) for n in names},
                    self.directory / self._names[i],
                )

    def close(self) -> None:
        """Writes the index, if there are several files."""
        assert not self._held, sorted(self._held)
        if len(self._files) == 1:
            return
        where = {
            n: self._names[i] for i, names in enumerate(self._files) for n in names
        }
        index = {
            "metadata": {"total_size": sum(self.sizes.values())},
            "weight_map": where,
        }
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save(tensors: dict[str, np.ndarray], path: epath.Path) -> None:
    """Writes a safetensors file.

    Raises:
        ConfigError: the package is not there.
    """
    safetensors: Any = needed("safetensors")
    specs = {
        name: safetensors.TensorSpec(
            dtype=a.dtype.name,
            shape=list(a.shape),
            data_ptr=a.ctypes.data,
            data_len=a.nbytes,
        )
        for name, a in tensors.items()
    }
    safetensors.serialize_file(specs, str(path), {"format": "pt"})


def needed(package: str, load: Callable[[str], Any] | None = None) -> Any:
    """Returns a module of the optional extra `hf`.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return (load or importlib.import_module)(package)
    except ImportError as error:
        raise ConfigError(
            f"this needs the package {package}: pip install 'lm[hf]' (or {package})"
        ) from error
