"""Devices that are not here, by name: what XLA needs to compile for them is a plugin, no machine.

`v5e:2x4` is a TPU slice of that shape, `v5e:2x4*2` two of them, which a slow network joins;
`h100:8` is a host of eight H100s and `h100:8*2` two such hosts. A program compiled for them states
its memory and what it sends, and can't be run. TPUs need the extra `tpu`; H100s the packages
`jax-cuda13-plugin` and `jax-cuda13-pjrt` (or cuda12) of jax's version and NVIDIA's cuDNN, which
the extra `cuda` brings along.
"""

import importlib.resources
import importlib.util
import os
import re
from typing import Any

import jax

from lm import sharding
from lm.config import ConfigError

# Set before jax looks for devices the first time, by `devices` at the latest. JAX_PLATFORMS must
# be cpu by then too, as an environment variable or in jax.config: else jax looks for real ones.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of a driver and libraries that run nothing
    "TPU_SKIP_MDS_QUERY": "1",  # of a cloud's metadata server, which is not there either
    "TPU_WORKER_HOSTNAMES": "localhost",  # nor are these
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: nothing is shared
}
TARGETS = {"h100": "h100.txtpb"}  # GPUs by what XLA knows of them
PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}


def devices(name: str) -> list[Any]:
    """Returns the devices of a topology.

    Raises:
        ConfigError: no such topology, or no plugin that compiles for it.
    """
    parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not parts:
        raise ConfigError(
            f"topology {name!r}: expected TPUs like v5e:2x4, or GPUs like h100:8; *2 after it for "
            "two of them"
        )
    kind, shape, count = parts[1], parts[2], int(parts[3] or 1)
    platform = "cuda" if kind in TARGETS else "tpu"
    if not any(importlib.util.find_spec(p) for p in PLUGINS[platform]):
        raise ConfigError(
            f"topology {name!r}: {' or '.join(PLUGINS[platform])} is not installed, which compiles "
            f"for it; pip install 'jax[{'cuda13' if platform == 'cuda' else 'tpu'}]'"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if platform == "cuda":
        if not shape.isdecimal():
            raise ConfigError(
                f"topology {name!r}: expected the GPUs of a host, and their hosts, like "
                f"{kind}:8*2"
            )
        target = importlib.resources.files("lm.plan").joinpath(TARGETS[kind])
        text = target.read_text(encoding="utf-8")
        wanted = {"topology": f"1x{count}x{shape}", "target_config": text}
    else:
        wanted = {"topology_name": f"{kind}:{shape}", "num_slices": count}
    return _described(name, platform, wanted)


def _described(name: str, platform: str, wanted: dict[str, Any]) -> list[Any]:
    from jax.experimental import topologies

    if platform == "tpu" and wanted["num_slices"] == 1:
        del wanted["num_slices"]
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform=platform, **wanted).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"topology {name!r}: {why}") from error


def layout(config: sharding.MeshConfig, name: str) -> sharding.Layout:
    """Returns the layout of a mesh over a topology's devices, the first ones if it needs fewer."""
    return sharding.make_layout(config, devices(name))
