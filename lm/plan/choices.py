"""What a search may choose: meshes, how a batch flows through them, and what is computed again."""

import contextlib
import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Iterator

from lm import config, sharding
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.models import kinds, stack
from lm.models.recurrent import Recurrent
from lm.models.timetable import Pipeline
from lm.nn.moe import Moe
from lm.plan.target import Target
from lm.sharding import MeshConfig

REMATS = tuple(r for r in typing.get_args(stack.Remat) if r != "offload")
POWERS = tuple(2**k for k in range(12))
ROUNDS = (2, 4, 8)  # of interleaved schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate: what it has in place of the experiment's own."""

    mesh: MeshConfig
    pipeline: Pipeline
    accumulate: int
    remat: stack.Remat

    def of(self, e: Experiment) -> Experiment:
        """Returns the experiment with this choice."""
        return dataclasses.replace(
            e,
            mesh=self.mesh,
            pipeline=self.pipeline,
            train=dataclasses.replace(e.train, accumulate=self.accumulate),
            model=_model(e.model, self.remat),
        )

    def sets(self, e: Experiment) -> tuple[str, ...]:
        """Returns what to give to --set, where it is not as in the experiment."""
        with contextlib.suppress(ConfigError):  # -1 devices are the rest
            count = math.prod(self.mesh.sizes().values())
            e = dataclasses.replace(e, mesh=e.mesh.resolve(count))
        found = config.diff(e, self.of(e))
        return tuple(f"{path}={str(new).lower()}" for path, _, new in found)


def chains(e: Experiment, wanted: Target) -> Iterator[list[Choice]]:
    """Yields choices in lists, without remat: of one mesh, with smaller and smaller microbatches.

    gpipe is left out where there is 1f1b, which takes as long and holds less. So is accumulation
    under a pipeline, whose microbatches do the same with fewer bubbles.
    """
    for mesh in meshes(e, wanted):
        rows = e.train.batch_size // (mesh.data * mesh.fsdp * mesh.expert)
        if mesh.pipe == 1:
            flows = [(e.pipeline, A) for A in POWERS if rows >= A and rows % A == 0]
            yield [_choice(mesh, *flow) for flow in flows]
            continue
        M = [n for k in POWERS if (n := k * mesh.pipe) <= rows and rows % n == 0]
        for how in _schedules(e, mesh):
            flows = [(dataclasses.replace(how, microbatches=n), 1) for n in M]
            yield [_choice(mesh, *flow) for flow in flows]


def _choice(mesh: MeshConfig, how: Pipeline, accumulate: int) -> Choice:
    return Choice(mesh=mesh, pipeline=how, accumulate=accumulate, remat="none")


def _schedules(e: Experiment, mesh: MeshConfig) -> Iterator[Pipeline]:
    two = len(e.model.stacks) > 1  # they have no other schedule
    for gather in ("tick", "step") if mesh.fsdp > 1 else ("tick",):
        yield Pipeline(schedule="gpipe" if two else "1f1b", gather=gather)
        for rounds in () if two else ROUNDS:
            if e.model.layers >= mesh.pipe * rounds:
                yield Pipeline(schedule="interleaved", rounds=rounds, gather=gather)


def meshes(e: Experiment, wanted: Target) -> Iterator[MeshConfig]:
    """Yields the meshes that the model and the batch allow, every size a divisor of the devices.

    Tensor stays within the near links, and pipelines come where there are layers enough.
    """
    n, model = wanted.devices, e.model
    experts = model.ffn.experts if isinstance(model.ffn, Moe.Config) else 1
    seqs = 1 if isinstance(model, Recurrent.Config) else e.data.length
    near = wanted.shape[-1] if wanted.chip.platform == "gpu" else 16
    layers = min(len(blocks) for blocks in model.stacks.values())
    for tensor in _divisors(n, min(near, _parts(model))):
        for pipe in _divisors(n // tensor, layers):
            left = n // tensor // pipe
            for expert in _divisors(left, experts):
                for seq in _divisors(left // expert, min(seqs // 4096, 64)):
                    rest = left // expert // seq
                    for fsdp in _divisors(rest, rest):
                        data = rest // fsdp
                        if e.train.batch_size % (data * fsdp * expert):
                            continue
                        sizes = (pipe, data, fsdp, seq, expert, tensor)
                        yield from _variants(e, sizes)


def _parts(model: kinds.Config) -> int:
    """Returns into how many parts tensor may cut a layer: its heads, or entries of its state."""
    if isinstance(model, Recurrent.Config):
        return model.mixer.width(model.dim)
    return getattr(model, "heads", 1)  # a bag of words has no layers


def _variants(e: Experiment, sizes: tuple[int, ...]) -> Iterator[MeshConfig]:
    chosen = dict(zip(sharding.AXES, sizes, strict=True))
    split = (False, True) if chosen["tensor"] > 1 else (False,)
    once = (False, True) if chosen["data"] > 1 else (e.mesh.zero1,)
    for sequence_parallel, zero1 in itertools.product(split, once):
        more = {"sequence_parallel": sequence_parallel, "zero1": zero1}
        try:
            yield dataclasses.replace(e.mesh, **chosen, **more)
        except ConfigError:  # slices that do not divide
            return


@functools.lru_cache(maxsize=64)
def _model(model: kinds.Config, remat: stack.Remat) -> kinds.Config:
    return dataclasses.replace(model, remat=remat)


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0]
