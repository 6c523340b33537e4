"""The mesh, and the one table from logical to mesh axes.

Every array of this project names its dimensions by logical axes ("batch", "embed", "heads", …).
`Rules` maps them to the six mesh axes; no other module names a mesh axis. Meshes are Explicit
(`jax.sharding.AxisType.Explicit`): a sharding is part of an array's type, so a wrong one raises
while tracing, and communication happens only where `reshard` or `out_sharding` ask for it.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.config import ConfigError, nearest

AXES = ("pipe", "data", "fsdp", "seq", "expert", "tensor")  # slowest links first


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices stand along each mesh axis; one axis may be -1, "the rest"."""

    pipe: int = 1  # pipeline stages
    data: int = -1  # replicas of the weights, each with its share of the batch
    fsdp: int = (
        1  # shares of weights and batch: weights are gathered where used (ZeRO-3)
    )
    seq: int = 1  # shares of the sequence (context parallelism)
    expert: int = 1  # shares of the experts
    tensor: int = 1  # shares of heads, feed-forward and vocabulary (Megatron-style)
    zero1: bool = False  # shard the optimizer state over data as well (ZeRO-1)
    sequence_parallel: bool = False  # shard the residual stream's length over tensor
    slices: int = (
        1  # groups of devices that only a slow network joins (TPU slices, GPU hosts)
    )
    slice_axis: Literal["data", "fsdp", "pipe"] = (
        "data"  # the axis that crosses that network
    )

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if sum(n == -1 for n in sizes.values()) > 1:
            raise ConfigError(f"mesh {sizes}: only one axis may be -1 (the rest)")
        for axis, n in sizes.items():
            if n < 1 and n != -1:
                raise ConfigError(
                    f"mesh.{axis}={n}: expected a positive number, or -1 (the rest)"
                )
        n = sizes[self.slice_axis]
        if self.slices < 1 or (n != -1 and n % self.slices):
            raise ConfigError(
                f"mesh.{self.slice_axis}={n} is not divisible by mesh.slices={self.slices}"
            )

    def sizes(self) -> dict[str, int]:
        """Returns {mesh axis: devices along it} in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    def resolve(self, devices: int) -> "MeshConfig":
        """Returns this config with -1 replaced so that the mesh has `devices` devices.

        Raises:
            ConfigError: the other axes do not divide `devices`, or ask for more than there are.
        """
        sizes = self.sizes()
        known = math.prod(n for n in sizes.values() if n != -1)
        text = (
            " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n != 1)
            or "1 device"
        )
        if known > devices:
            raise ConfigError(
                f"the mesh {text} needs {known} devices, there are {devices}; make an axis "
                "smaller, or emulate devices with --cpu_devices"
            )
        for axis, n in sizes.items():
            if n == -1:
                if devices % known:
                    raise ConfigError(
                        f"mesh.{axis}=-1: {devices} devices do not divide by the {known} of the "
                        f"other axes ({text})"
                    )
                return dataclasses.replace(self, **{axis: devices // known})
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The table: the mesh axes over which each logical axis is split."""

    # Activations.
    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("seq",)
    residual: tuple[str, ...] = (
        "seq",
    )  # the length of the residual stream between blocks
    replica: tuple[str, ...] = ("data",)  # a leading axis of one entry per data replica
    dispatched: tuple[str, ...] = ("data", "fsdp", "seq")  # rows of an expert's buffers
    # Weights (and activations of the same name).
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    latent: tuple[str, ...] = ()  # what heads share of their queries, keys and values
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor", "pipe")
    expert: tuple[str, ...] = ("expert",)
    feature: tuple[
        str, ...
    ] = ()  # what the head of an encoder has: hidden units, classes
    gate: tuple[str, ...] = ()  # of a recurrent layer, each a matrix
    choice: tuple[str, ...] = ()  # the experts that a router scores: every token all
    balance: tuple[str, ...] = ()  # biases of that choice, moved by counts, not trained
    layers: tuple[str, ...] = ("pipe",)
    position: tuple[str, ...] = ()
    norm: tuple[
        str, ...
    ] = ()  # scales and biases of the width of the model: small, whole


GATHERED = ("fsdp",)  # mesh axes over which weights are stored, not used, in parts
MOVABLE = (
    "kv_heads",
)  # may have fewer entries than devices: then `embed` takes its mesh axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, real or abstract, with its rules and the platform that will run it."""

    mesh: Mesh | AbstractMesh
    rules: Rules
    platform: str  # "cpu", "gpu" or "tpu"
    mapped: frozenset[str] = frozenset()  # mesh axes that an enclosing vmap stands for
    chip: str = ""  # a name of lm/plan/chips.py, where a plan is made

    def size(self, logical: str) -> int:
        """Returns over how many devices the logical axis is split."""
        return math.prod(self.mesh.shape[a] for a in self.axes(logical))

    def axes(self, logical: str) -> tuple[str, ...]:
        """Returns the mesh axes of a logical axis, those of one device left out."""
        if not hasattr(self.rules, logical):
            known = [f.name for f in dataclasses.fields(Rules)]
            raise ValueError(f"no logical axis {logical!r}{nearest(logical, known)}")
        return tuple(a for a in getattr(self.rules, logical) if self.splits(a))

    def splits(self, axis: str) -> bool:
        """Returns whether the mesh axis has several devices and no enclosing vmap."""
        return self.mesh.shape[axis] > 1 and axis not in self.mapped


_layout: contextvars.ContextVar[Layout] = contextvars.ContextVar("layout")


def current() -> Layout:
    """Returns the layout in use; raises LookupError outside `use`."""
    return _layout.get()


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[Layout]:
    """Makes `layout` the one that `spec` reads and its mesh the one that jax traces for."""
    token = _layout.set(layout)
    try:
        if isinstance(layout.mesh, Mesh):
            with jax.set_mesh(layout.mesh):
                yield layout
        else:
            with jax.sharding.use_abstract_mesh(layout.mesh):
                yield layout
    finally:
        _layout.reset(token)


@contextlib.contextmanager
def mapped(*logical: str) -> Iterator[None]:
    """Inside, `spec` leaves out the mesh axes of these logical axes: a vmap stands for them."""
    layout = current()
    more = {axis for name in logical for axis in getattr(layout.rules, name)}
    token = _layout.set(dataclasses.replace(layout, mapped=layout.mapped | more))
    try:
        yield
    finally:
        _layout.reset(token)


def spec(*logical: str | None) -> P:
    """Returns the PartitionSpec of an array whose dimensions are these logical axes.

    Raises:
        ValueError: an unknown logical axis, or one mesh axis used for two dimensions.
    """
    return _partition(
        [() if a is None else current().axes(a) for a in logical], logical
    )


def storage(name: str, shape: Sequence[int], axes: Sequence[str]) -> P:
    """Returns how a parameter is kept between steps, every dimension checked to divide.

    A `kv_heads` dimension with fewer heads than devices leaves its mesh axes to `embed`.

    Raises:
        ConfigError: a dimension that its mesh axes do not divide, with the sizes and the fix.
    """
    layout = current()
    split = [layout.axes(a) for a in axes]
    for i, axis in enumerate(axes):
        if axis in MOVABLE and shape[i] % layout.size(axis):
            home = next((j for j, a in enumerate(axes) if a == "embed"), None)
            if home is not None:
                split[home] += split[i]
            split[i] = ()
    for n, axis, over in zip(shape, axes, split, strict=True):
        devices = math.prod(layout.mesh.shape[a] for a in over)
        if n % devices:
            sizes = ", ".join(f"mesh.{a}={layout.mesh.shape[a]}" for a in over)
            raise ConfigError(
                f"{name}: {axis}={n} is not divisible by {devices} ({sizes}); choose mesh sizes "
                f"that divide {n}, or another {axis}"
            )
    return _partition(split, axes)


def gathered(partition: P) -> P:
    """Returns the spec of a stored weight once it is gathered for use (ZeRO-3)."""
    kept = [tuple(a for a in names(entry) if a not in GATHERED) for entry in partition]
    return _partition(kept, kept)


def names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _partition(split: Sequence[tuple[str, ...]], what: Sequence[Any]) -> P:
    used = [axis for axes in split for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(
            f"{tuple(what)}: a mesh axis is used for two dimensions ({used})"
        )
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in split))


def make_rules(config: MeshConfig) -> Rules:
    """Returns the table that `config` asks for."""
    residual = ("seq", "tensor") if config.sequence_parallel else ("seq",)
    return Rules(residual=residual)


def make_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Builds the mesh over `devices` (default: all), nearest devices along the last axes.

    With fewer mesh entries than devices the first ones are used (one process only).

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    found = list(devices if devices is not None else jax.devices())
    config = config.resolve(len(found))
    shape = tuple(config.sizes().values())
    count = math.prod(shape)
    if count < len(found) and jax.process_count() > 1:
        raise ConfigError(
            f"the mesh uses {count} of {len(found)} devices; with several processes it must use "
            "all: set one axis to -1"
        )
    grid = _grid(config, shape, found[:count])
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return Layout(mesh, make_rules(config), platform(found[0]))


def abstract_layout(config: MeshConfig, devices: int, platform: str = "tpu") -> Layout:
    """Returns a layout of `devices` devices that need not exist: shapes and shardings only."""
    sizes = tuple(config.resolve(devices).sizes().values())
    if math.prod(sizes) != devices:
        raise ConfigError(
            f"the mesh {config.sizes()} does not multiply to {devices} devices"
        )
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return Layout(mesh, make_rules(config), platform)


def platform(device: Any) -> str:
    """Returns "cpu", "gpu" or "tpu"."""
    name: str = device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def _grid(config: MeshConfig, shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    from jax.experimental import mesh_utils

    if config.slices > 1:
        outer = [config.slices if a == config.slice_axis else 1 for a in AXES]
        inner = [n // s for n, s in zip(shape, outer, strict=True)]
        by_process = not hasattr(devices[0], "slice_index")
        try:
            return mesh_utils.create_hybrid_device_mesh(
                inner,
                outer,
                devices,
                process_is_granule=by_process,
                allow_split_physical_axes=True,
            )
        except ValueError as error:
            unit = "processes" if by_process else "slices"
            raise ConfigError(
                f"mesh.slices={config.slices}: {error} ({unit})"
            ) from error
    # A mesh axis may take a part of a torus dimension: of 16 x 16 chips, fsdp 64 x tensor 4.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def order(length: int, shards: int) -> np.ndarray:
    """Returns which token of a row of `length` stands at each place of one split over `shards`.

    The row is cut into 2 C chunks, of which device c of C has c and 2 C - 1 - c: under a causal
    mask an early chunk, which sees little, and a late one, which sees much, so that all devices
    have equal work. Ids are put into this order on the host; nothing is ever put back, for sums
    over tokens do not ask.
    """
    if shards == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * shards, -1)
    pairs = [chunks[[c, 2 * shards - 1 - c]] for c in range(shards)]
    return np.concatenate(pairs).ravel()


def everywhere() -> P:
    """Returns the spec of an array with one row for each device."""
    axes = tuple(a for a in AXES if current().splits(a))
    return _partition([axes], ["device"])


def shard(layout: Layout, partition: P) -> NamedSharding:
    """Returns the NamedSharding of `partition` on the layout's mesh."""
    return NamedSharding(layout.mesh, partition)  # type: ignore[arg-type]
