"""What touches Orbax: its manager, its handlers, and reading into target shardings.

Orbax takes 0.2 to 0.6 s to import, so it is imported when the first checkpoint is used.
"""

import dataclasses
import functools
import logging
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from lm import trees
from lm.checkpoint import record

_CHUNK_BYTES = 2**26  # of a file; a reader on another mesh reads whole chunks
_SHARED_BYTES = (
    2**20
)  # of an array and a replica, from which replicas share the writing


@functools.cache
def orbax() -> Any:
    """Returns the module `orbax.checkpoint`, kept from writing to the terminal.

    What matters reaches us as exceptions. Of the loggers and the hook, which others use
    too, only what comes from Orbax is dropped.
    """
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(lambda entry: "/orbax/" not in entry.pathname)
    # When one of several reads or writes fails, Orbax closes its event loop and drops the
    # others, each of which would then print a traceback of its own.
    logging.getLogger("asyncio").addFilter(
        lambda entry: not (entry.exc_info and _in_orbax(entry.exc_info[2]))
    )
    print_it = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not late and not _in_orbax(unraisable.exc_traceback):
            print_it(unraisable)

    sys.unraisablehook = hook
    return orbax.checkpoint


def _in_orbax(trace: types.TracebackType | None) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(trace))
    return any("/orbax/" in frame.f_code.co_filename for frame in frames)


def steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints that were published whole, in order."""
    if not directory.exists():
        return []
    found = [path for path in directory.iterdir() if path.name.isdecimal()]
    if not found:  # a new run need not wait for Orbax
        return []
    finalized = orbax().path.step.is_path_finalized
    return sorted(int(path.name) for path in found if finalized(path))


def open_manager(directory: epath.Path, keep: int, keep_period: int | None) -> Any:
    """Returns an Orbax manager that saves; it removes what is half-written."""
    ocp = orbax()
    preserve = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_period:
        preserve.append(ocp.checkpoint_managers.EveryNSteps(keep_period))
    return ocp.CheckpointManager(
        directory,
        # They end in this order: the list of all files comes last. Weights do not
        # compress (7 % smaller, in twice the time).
        item_handlers={
            "arrays": ocp.PyTreeCheckpointHandler(
                use_compression=False, type_handler_registry=_array_types()
            ),
            record.RUN: _files_handler()(),
        },
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            lightweight_initialize=True,  # reads no file that may be damaged
        ),
    )


def start_save(
    manager: Any,
    step: int,
    arrays: Mapping[str, jax.Array],
    contents: Callable[[], dict[str, bytes]],
) -> None:
    """Copies {path: array} to the host and starts to write it, with some small files.

    `contents` is called later and in another thread; it returns {name: content}.
    """
    ocp = orbax()
    nested = trees.nest(arrays)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), nested)
    manager.save(
        step,
        args=ocp.args.Composite(
            **{
                "arrays": ocp.args.PyTreeSave(nested, save_args=chunked),
                record.RUN: _files_handler().Save(contents),
            }
        ),
        force=True,
    )


def read_arrays(
    directory: epath.Path, target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns {path: array}, each process having read the shards of its devices alone.

    Raises:
        Exception: whatever TensorStore and Orbax raise at a damaged file.
    """
    ocp = orbax()
    nested = trees.nest(target)
    # The handler, not the manager: the manager has a barrier at which the others would
    # wait for minutes if one process alone finds its files damaged.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_array_types())
    restored = handler.restore(
        directory,
        args=ocp.args.PyTreeRestore(
            item=nested,
            restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
            partial_restore=True,
        ),
    )
    flat = trees.flatten(restored)
    for path, leaf in target.items():
        found = flat.get(path)
        if not isinstance(found, jax.Array) or found.shape != leaf.shape:
            raise ValueError(f"{path} could not be read")
    return {path: flat[path] for path in target}


def with_real_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the abstract leaf with a sharding over real devices, as Orbax wants it.

    A sharding over an abstract mesh is bound to the mesh in use, a leaf without a
    sharding is put on all of its devices, or without such a mesh on the first device.

    Raises:
        ValueError: the mesh in use has other axes than the sharding.
    """
    sharding, mesh = getattr(leaf, "sharding", None), jax.sharding.get_mesh()
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        if sharding.mesh.shape_tuple != mesh.shape_tuple:
            raise ValueError(
                f"the target is sharded over {dict(sharding.mesh.shape)}, but the mesh"
                f" in use is {dict(mesh.shape)}; restore inside jax.set_mesh(...)"
            )
        sharding = None if mesh.empty else NamedSharding(mesh, sharding.spec)
    if sharding is None and not mesh.empty:
        sharding = NamedSharding(mesh, PartitionSpec())
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _array_types() -> Any:
    """Returns how Orbax writes and reads arrays; no other type is taken."""
    types = orbax().type_handlers
    handler = types.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_SHARED_BYTES,
        enable_write_sharding_file=False,  # a checkpoint knows no mesh
    )
    return types.create_type_handler_registry((jax.Array, handler))


@functools.cache
def _files_handler() -> Any:
    """Returns the Orbax handler of the small files, with its arguments as `.Save`."""
    ocp = orbax()

    class Files(ocp.AsyncCheckpointHandler):
        """Writes the files that a function returns, and at the end a list of all."""

        async def async_save(self, directory: epath.Path, args: Any) -> list[Any]:
            write = self._write(directory, args.contents)
            return [
                ocp.future.CommitFutureAwaitingContractedSignals(write, name="lm_files")
            ]

        async def _write(self, directory: epath.Path, contents: Callable[[], Any]):
            if jax.process_index() == 0:
                for name, data in contents().items():
                    (directory / name).write_bytes(data)

        def finalize(self, directory: epath.Path) -> None:
            record.write_list(directory)  # the arrays are complete by now

        def save(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError("written in the background only")

        def restore(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError("read without Orbax")

    @ocp.args.register_with_handler(Files, for_save=True, for_restore=True)
    @dataclasses.dataclass
    class Save(ocp.args.CheckpointArgs):
        contents: Callable[[], dict[str, bytes]]

    Files.Save = Save
    return Files
