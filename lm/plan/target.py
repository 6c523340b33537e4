"""What a plan is made for: `v5p:4x4x4`, `2*v5e:16x16`, `h100:8x8`, `cpu:8`, `here`.

Of TPUs the numbers are the shape of a slice, and `2*` says how many slices; of GPUs they are hosts
and the GPUs of each.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import jax

from lm import sharding
from lm.config import ConfigError, nearest
from lm.plan import chips, cpu
from lm.plan.chips import Chip

FORMS = "v5p:4x4x4, 2*v5e:16x16, h100:8x8 (hosts x GPUs), cpu:8 or here"
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # parts of a cube of 4x4x4
HOSTS = (1, 2, 4, 8)  # GPUs of one that are used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices that need not be here."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # of a slice; of GPUs hosts, GPUs a host
    slices: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines that they are in."""
        if self.chip.platform == "gpu":
            return self.shape[0]
        return max(1, self.devices // min(self.chip.host_chips, math.prod(self.shape)))

    def layout(self, config: sharding.MeshConfig) -> sharding.Layout:
        """Returns the layout of a mesh over these devices: shapes and shardings only.

        Raises:
            ConfigError: the mesh does not multiply to the devices, or its slices are others.
        """
        if self.slices > 1 and config.slices != self.slices:
            raise ConfigError(
                f"--target={self.name}: {self.slices} slices, but mesh.slices={config.slices}; "
                f"set mesh.slices={self.slices} and an axis for them, mesh.slice_axis"
            )
        sizes = config.sizes()
        known = math.prod(n for n in sizes.values() if n != -1)
        if known > self.devices or (known < self.devices and -1 not in sizes.values()):
            text = " x ".join(f"{a} {n}" for a, n in sizes.items() if n != 1)
            raise ConfigError(
                f"the mesh {text or 'of one device'} needs {known} devices, --target={self.name} "
                f"has {self.devices}; change an axis, or set one to -1, the rest"
            )
        try:
            config.resolve(self.devices)
        except ConfigError as error:
            raise ConfigError(f"--target={self.name}: {error}") from error
        made = sharding.abstract_layout(config, self.devices, self.chip.platform)
        return dataclasses.replace(made, chip=self.chip.name)

    def ways(self, sizes: Mapping[str, int]) -> dict[str, tuple[float, str]]:
        """Returns what joins the devices along each mesh axis: bytes a second and the link's name.

        Of mesh axes the last stand nearest (`sharding.AXES`). On a torus an axis has the links of
        the dimensions that it fills, both ways round where they close a ring; what fills only a
        part of a dimension has one link, in one direction. Between hosts or slices there is the
        network.
        """
        near = self._torus(sizes) if self.chip.torus else self._switch(sizes)
        if self.slices == 1:
            return near
        far = (self.chip.network, self.chip.far)
        outer = math.prod(self.shape)
        inside = 1
        for axis in reversed(sharding.AXES):
            inside *= sizes.get(axis, 1)
            if inside > outer and sizes.get(axis, 1) > 1:
                near[axis] = far
        return near

    def _switch(self, sizes: Mapping[str, int]) -> dict[str, tuple[float, str]]:
        """GPUs of a host are joined by a switch, hosts by a network, each GPU with its share."""
        found, inside = {}, 1
        for axis in reversed(sharding.AXES):
            inside *= sizes.get(axis, 1)
            far = inside > self.shape[-1]
            found[axis] = (
                (self.chip.network, self.chip.far)
                if far
                else (self.chip.links, self.chip.link)
            )
        return found

    def _torus(self, sizes: Mapping[str, int]) -> dict[str, tuple[float, str]]:
        one = self.chip.links / self.chip.link_ways
        free = list(self.shape)
        found = {}
        for axis in reversed(sharding.AXES):
            n, rate = sizes.get(axis, 1), one
            for dims in _subsets(free):
                if n > 1 and math.prod(dims) == n:
                    for d in dims:
                        free.remove(d)
                    rate = sum(one * (2 if self._closed(d) else 1) for d in dims)
                    break
            found[axis] = rate, self.chip.link
        return found

    def _closed(self, dimension: int) -> bool:
        """Whether so many chips in a row are a ring: 16 on a flat torus, else a cube's 4s."""
        return dimension >= 16 if self.chip.torus == 2 else dimension % 4 == 0


def _subsets(dims: list[int]) -> list[tuple[int, ...]]:
    sizes = range(len(dims), 0, -1)
    return [c for k in sizes for c in itertools.combinations(dims, k)]


def names(several: str) -> list[str]:
    """Returns the names in 'v5p:8x8x8, h100:64x8', the first of which counts if one is asked for.

    Raises:
        ConfigError: there is none.
    """
    found = re.split(r"[,\s]+", several.strip(", "))
    if not all(found):
        raise ConfigError(f"target={several!r}: expected {FORMS}, or several of them")
    return found


def read(name: str) -> Target:
    """Returns the target of that name.

    Raises:
        ConfigError: no such chip, with the nearest; or not in that shape, with some that are.
    """
    if name == "here":
        return _here()
    parts = re.fullmatch(r"(?:(\d+)\*)?([\w-]+):(\d+(?:x\d+)*)", name.lower())
    if not parts:
        raise ConfigError(f"--target={name}: expected {FORMS}")
    slices, kind = int(parts[1] or 1), parts[2]
    shape = tuple(int(n) for n in parts[3].split("x"))
    if kind == "cpu":
        count = math.prod(shape)
        if slices > 1 or len(shape) > 1 or not 1 <= count <= 1024:
            raise ConfigError(f"--target={name}: expected cpu and devices, like cpu:8")
        return Target(name=name, chip=cpu.chip(count), shape=shape)
    if kind not in chips.CHIPS:
        known = ", ".join([*chips.CHIPS, "cpu"])
        raise ConfigError(
            f"--target={name}: no chip {kind!r}{nearest(kind, [*chips.CHIPS])} (there are: {known})"
        )
    chip = chips.CHIPS[kind]
    if chip.platform == "gpu":
        return _gpus(name, chip, slices, shape)
    return _tpus(name, chip, slices, shape)


def _gpus(name: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> Target:
    shape = (1, *shape) if len(shape) == 1 else shape
    wrong = len(shape) != 2 or shape[0] < 1 or shape[1] not in HOSTS
    if wrong or slices > 1 or (shape[0] > 1 and shape[1] != chip.host_chips):
        raise ConfigError(
            f"--target={name}: expected hosts x GPUs of each like {chip.name}:4x8, or "
            f"{', '.join(map(str, HOSTS))} of one host like {chip.name}:8"
        )
    return Target(name=name, chip=chip, shape=shape)


def _tpus(name: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> Target:
    text, count = "x".join(map(str, shape)), math.prod(shape)
    if chip.torus == 2:
        exists, like = text in FLAT, ", ".join(FLAT)
    else:
        cubes = len(shape) == 3 and all(n > 0 and n % 4 == 0 for n in shape)
        exists = text in SMALL or (cubes and list(shape) == sorted(shape))
        like = f"{', '.join(SMALL)}, or rising multiples of 4 like 4x4x8"
    if not exists or count > chip.largest or slices < 1:
        most = f", at most {chip.largest} chips" if chip.torus == 3 else ""
        raise ConfigError(
            f"--target={name}: {chip.name} has no slice of {text}; there are {like}{most}"
        )
    return Target(name=name, chip=chip, shape=shape, slices=slices)


def _here() -> Target:
    """The devices of this process, all of one kind, measured; its name is what others know them by:
    a compiler in a process of its own has other devices here."""
    devices = jax.devices()
    platform = sharding.platform(devices[0])
    if platform == "cpu":
        return read(f"cpu:{len(devices)}")
    chip = chips.known(devices[0].device_kind)
    if chip is None:
        raise ConfigError(
            f"--target=here: {devices[0].device_kind} has no row in lm/plan/chips.py; there are "
            f"{', '.join(chips.CHIPS)}"
        )
    chip = chips.measured(chip, jax.local_devices()[0])
    if platform == "gpu":
        hosts = jax.process_count()
        return _named(chip, (hosts, len(devices) // hosts))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    places = [d.coords for d in devices]
    shape = tuple(max(p[i] for p in places) + 1 for i in range(chip.torus))
    found = _named(chip, shape, slices)
    if found.devices != len(devices):
        raise ConfigError(
            f"--target=here: {len(devices)} devices are {found.devices} chips, not one each; name "
            f"them, --target={found.name}"
        )
    return found


def _named(chip: Chip, shape: tuple[int, ...], slices: int = 1) -> Target:
    many = f"{slices}*" if slices > 1 else ""
    name = f"{many}{chip.name}:{'x'.join(map(str, shape))}"
    return Target(name=name, chip=chip, shape=shape, slices=slices)
