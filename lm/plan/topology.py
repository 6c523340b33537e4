"""Devices that are not here, as XLA's plugins describe them: programs compile, and cannot run.

TPUs need the extra `plan-tpu`, NVIDIA GPUs `plan-gpu`: the plugins are libraries, no machine.
"""

import importlib.resources
import importlib.util
import os
from typing import Any

import jax

from lm import sharding
from lm.config import ConfigError
from lm.plan import target
from lm.plan.target import Target

# Set before jax looks for devices the first time, by `devices` at the latest. JAX_PLATFORMS must
# be cpu by then too, as an environment variable or in jax.config: else jax looks for real ones.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of a driver and libraries that run nothing
    "TPU_SKIP_MDS_QUERY": "1",  # of a cloud's metadata server, which is not there either
    "TPU_WORKER_HOSTNAMES": "localhost",  # nor are these
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: nothing is shared
}
CARDS = importlib.resources.files("lm.plan").joinpath("cards")  # GPUs as XLA knows them
APART = ("7x",)  # chips whose two cores cannot be one device
PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}


def devices(name: str) -> list[Any]:
    """Returns the devices of a target.

    Raises:
        ConfigError: no such target, none that is compiled for, or no plugin that does it.
    """
    return described(target.read(name))


def described(wanted: Target) -> list[Any]:
    """Returns the devices of a target that is read already; see `devices`."""
    platform = wanted.chip.platform
    check(wanted)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if platform == "gpu":
        hosts, gpus = wanted.shape
        text = _card(wanted.chip.name).read_text(encoding="utf-8")
        options = {"topology": f"1x{hosts}x{gpus}", "target_config": text}
        return _described(wanted.name, "cuda", options)
    shape = "x".join(map(str, wanted.shape))
    options = {"topology_name": f"{wanted.chip.name}:{shape}"}
    more: dict[str, Any] = {}
    if wanted.slices > 1:
        more["num_slices"] = wanted.slices
    if wanted.chip.name == "v4":
        more["chip_config_name"] = "megacore"  # both cores one device, as JAX runs them
    if wanted.devices == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    return _described(wanted.name, "tpu", {**options, **more})


def check(wanted: Target) -> None:
    """Refuses targets that nothing here compiles for.

    Raises:
        ConfigError: why, and what to install.
    """
    chip = wanted.chip
    if chip.platform == "cpu":
        raise ConfigError(
            f"--target={wanted.name}: a CPU is compiled for by training on it; "
            "--depth=model plans it"
        )
    if chip.platform == "gpu" and not _card(chip.name).is_file():
        raise ConfigError(
            f"--target={wanted.name}: compiling for a GPU needs its description, and there is no "
            f"lm/plan/cards/{chip.name}.txtpb; use --depth=model"
        )
    if chip.name in APART:
        raise ConfigError(
            f"--target={wanted.name}: to its compiler a chip is two devices, and the plan counts "
            "chips; use --depth=model"
        )
    if not any(importlib.util.find_spec(p) for p in PLUGINS[chip.platform]):
        extra = {"tpu": "plan-tpu", "gpu": "plan-gpu"}[chip.platform]
        raise ConfigError(
            f"--target={wanted.name}: {' or '.join(PLUGINS[chip.platform])} is not installed, "
            f"which compiles for it; pip install 'lm[{extra}]', or use --depth=model"
        )


def _card(name: str) -> Any:
    return CARDS.joinpath(f"{name}.txtpb")


def _described(name: str, platform: str, options: dict[str, Any]) -> list[Any]:
    from jax.experimental import topologies

    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"--target={name}: {why}") from error


def layout(config: sharding.MeshConfig, name: str) -> sharding.Layout:
    """Returns the layout of a mesh over a target's devices, the first ones if it needs fewer."""
    return sharding.make_layout(config, devices(name))
