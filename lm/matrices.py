"""Optimizers that look at a whole matrix, one layer's at a time: Adafactor and Muon.

Parameters are stacked over layers (and experts), and a projection to heads has more than two axes.
Both are layout, not maths: here a parameter's logical axes say which of its axes stack independent
matrices, which are inputs (rows) and which are outputs (columns), and a statistic or an
orthogonalisation is taken over rows and columns of one matrix. Fed a stacked `[L, D, F]` as it is,
optax's Adafactor factors the wrong axes and Muon orthogonalises across layers.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lm import trees
from lm.config import ConfigError

STACKED = (
    "layers",
    "expert",
    "gate",
)  # leading axes that only stack independent parameters
TABLES = ("vocab", "position")  # a parameter with such an axis is a table of vectors
FUSED = ("head_dim",)  # together with the axis before it, one side of a matrix
# Quintic Newton-Schulz coefficients, https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class Block:
    """Which axes of a parameter stack independent blocks, and what a block is.

    A vector (norm, bias) has all its axes in `rows`, a scalar none; a matrix has inputs in `rows`
    and outputs in `cols`.
    """

    stack: int  # number of leading axes that stack blocks
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    table: bool  # rows are looked up, not multiplied (or the transpose: a head)

    @property
    def inner(self) -> tuple[int, ...]:
        """All axes of one block."""
        return self.rows + self.cols


Blocks = Mapping[str, Block]


def block(name: str, axes: Sequence[str | None]) -> Block:
    """Returns how the parameter `name` with the logical axes `axes` splits into blocks.

    `("layers", "embed", "heads", "head_dim")` is a stack of matrices embed x (heads * head_dim),
    `("layers", "heads", "head_dim")` a stack of vectors, `("layers", "embed", "expert")` a stack of
    matrices too: experts stack only where something of their own follows.

    Raises:
        ValueError: more than two sides, none of which is "embed" at the start or the end.
    """
    axes, stack = tuple(axes), 0
    while stack < len(axes) and axes[stack] in STACKED:
        stack += 1
    if stack and stack == len(axes) and axes[-1] != STACKED[0]:
        stack -= 1  # a vector over the experts
    sides: list[tuple[int, ...]] = []
    for i in range(stack, len(axes)):
        if axes[i] in FUSED and sides:
            sides[-1] += (i,)
        else:
            sides.append((i,))
    if len(sides) > 2 and "embed" not in (axes[stack], axes[-1]):
        raise ValueError(
            f"{name}: which of the axes {axes} are inputs and which outputs? "
            'put "embed" first or last'
        )
    split = 1 if len(sides) == 2 or axes[stack:][:1] == ("embed",) else len(sides) - 1
    rows, cols = (sides, []) if len(sides) < 2 else (sides[:split], sides[split:])
    table = any(a in TABLES for a in axes)
    return Block(stack, sum(rows, ()), sum(cols, ()), table)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name `a/b/c` of a path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Second moments of a matrix as row and column means (https://arxiv.org/abs/1804.04235).

    Like `optax.adafactor` on each layer's matrix. The parameter scale makes `learning_rate`
    relative to the size of the weights: 1e-2 to 1e-3 where Adam takes 1e-3 to 1e-4.
    """

    decay_power: float = 0.8  # second moments decay by 1 - t**-decay_power at step t
    factor_from: int = 128  # entries of the smaller side of a matrix that is factored
    clip_rms: float | None = 1.0  # bound on an update's root mean square; None: none
    scale_by_parameter: bool = True  # times the root mean square of the weights
    smallest_scale: float = 1e-3  # least root mean square taken for that
    momentum: float | None = None  # decay of an average of updates; None: none is kept
    eps: float = 1e-30  # added to the squared gradient

    def __post_init__(self):
        check_fields(
            self, unit=("momentum",), positive=("decay_power", "clip_rms", "eps")
        )

    def transform(
        self, blocks: Blocks, dtype: jax.typing.DTypeLike
    ) -> optax.GradientTransformation:
        """Returns the transformation; `dtype` is that of the momentum."""

        def init(params: optax.Params) -> Any:
            treedef = jax.tree.structure(params)
            flat = trees.flatten(params).items()
            state = [self._init(blocks[name], p) for name, p in flat]
            row, col, full = (treedef.unflatten(x) for x in zip(*state, strict=True))
            mu = optax.tree.zeros_like(params, dtype=dtype) if self.momentum else None
            return AdafactorState(jnp.zeros([], jnp.int32), row, col, full, mu)

        def update(updates, state, params=None) -> Any:
            treedef = jax.tree.structure(updates)
            decay = 1 - (state.steps + 1.0) ** -self.decay_power
            columns = [treedef.flatten_up_to(x) for x in (updates, params, *state[1:4])]
            results = [
                self._update(blocks[name], decay, *leaves)
                for name, *leaves in zip(trees.flatten(updates), *columns, strict=True)
            ]
            updates, row, col, full = (
                treedef.unflatten(x) for x in zip(*results, strict=True)
            )
            mu = state.mu
            if self.momentum:
                updates = optax.tree.update_moment(updates, mu, self.momentum, 1)
                mu = optax.tree.cast(updates, dtype)
            return updates, AdafactorState(state.steps + 1, row, col, full, mu)

        return optax.GradientTransformation(init, update)

    def _init(self, axes: Block, p: Array) -> tuple[Any, Any, Any]:
        none = optax.MaskedNode()
        zeros = functools.partial(
            jnp.sum, jnp.zeros_like(p, jnp.float32), keepdims=True
        )
        if self._factored(axes, p):
            return zeros(axis=axes.cols), zeros(axis=axes.rows), none
        return none, none, zeros(axis=())

    def _update(self, axes: Block, decay: Float[Array, ""], g, p, row, col, full):
        """One parameter's direction and new second moments, all of p's rank (1 where averaged)."""
        mean = functools.partial(jnp.mean, keepdims=True)
        square = jnp.square(g) + self.eps
        if self._factored(axes, p):
            row = decay * row + (1 - decay) * mean(square, axis=axes.cols)
            col = decay * col + (1 - decay) * mean(square, axis=axes.rows)
            u = g * (row / mean(row, axis=axes.rows)) ** -0.5 * col**-0.5
        else:
            full = decay * full + (1 - decay) * square
            u = g * full**-0.5
        if self.clip_rms is not None:
            rms = jnp.sqrt(mean(jnp.square(u), axis=axes.inner))
            u = u / jnp.maximum(1, rms / self.clip_rms)
        if self.scale_by_parameter:
            rms = jnp.sqrt(mean(jnp.square(p), axis=axes.inner))
            u = u * jnp.maximum(rms, self.smallest_scale)
        return u, row, col, full

    def _factored(self, axes: Block, p: Array) -> bool:
        sides = (math.prod(p.shape[i] for i in side) for side in (axes.rows, axes.cols))
        return bool(axes.cols) and min(sides) >= self.factor_from


class AdafactorState(NamedTuple):
    """Second moments: `row` and `col` of factored matrices, `full` of all else.

    Each mirrors the parameters' tree, without the leaves that it does not have; a leaf has its
    parameter's rank, with 1 where the moment is a mean over that axis.
    """

    steps: Int[Array, ""]
    row: optax.Params
    col: optax.Params
    full: optax.Params
    mu: optax.Params | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/); Adam for the rest.

    Like `optax.contrib.muon` on each layer's matrix. Adam takes what is no matrix (norms, biases)
    or a table (embeddings, head). With `rms` about Adam's own, 0.2 to 0.4, both want the same
    learning rate (https://arxiv.org/abs/2502.16982).
    """

    momentum: float = 0.95  # decay of the gradient's average
    nesterov: bool = True  # look one step ahead
    iterations: int = 5  # of Newton-Schulz
    rms: float | None = 0.2  # of an update; None: sqrt(max(1, out / in)) orthogonal
    b1: float = 0.9  # Adam: decay of the first moment
    b2: float = 0.95  # Adam: decay of the second moment
    eps: float = 1e-8  # added to denominators

    def __post_init__(self):
        check_fields(
            self, unit=("momentum", "b1", "b2"), positive=("rms", "eps", "iterations")
        )

    def transform(
        self, blocks: Blocks, dtype: jax.typing.DTypeLike
    ) -> optax.GradientTransformation:
        """Returns the transformation; `dtype` is that of the first moments."""

        def label(path, _):
            axes = blocks[path_name(path)]
            return "muon" if axes.cols and not axes.table else "adam"

        return optax.partition(
            {
                "muon": self._orthogonal_momentum(blocks, dtype),
                "adam": optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=dtype),
            },
            functools.partial(jax.tree_util.tree_map_with_path, label),
        )

    def _orthogonal_momentum(
        self, blocks: Blocks, dtype
    ) -> optax.GradientTransformation:
        beta = self.momentum

        def init(params: optax.Params) -> Any:
            return MuonState(
                jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype)
            )

        def update(updates, state, params=None) -> Any:
            del params
            count = state.steps + 1
            mu = optax.tree.update_moment(updates, state.mu, beta, 1)
            ahead = optax.tree.bias_correction(mu, beta, count + self.nesterov)
            if self.nesterov:
                now = optax.tree.bias_correction(updates, beta, count)
                ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)

            def direction(path, m):
                axes = blocks[path_name(path)]
                return self._scale(axes, m.shape) * self._orthogonal(axes, m)

            directions = jax.tree_util.tree_map_with_path(direction, ahead)
            return directions, MuonState(count, optax.tree.cast(mu, dtype))

        return optax.GradientTransformation(init, update)

    def _scale(self, axes: Block, shape: tuple[int, ...]) -> float:
        inputs, outputs = (
            math.prod(shape[i] for i in s) for s in (axes.rows, axes.cols)
        )
        if self.rms is None:
            return math.sqrt(max(1, outputs / inputs))
        return math.sqrt(max(inputs, outputs)) * self.rms

    def _orthogonal(self, axes: Block, x: Array) -> Array:
        def each(x_bio):
            shape = x_bio.shape[1:]
            rows = math.prod(shape[: len(axes.rows)])
            y_bmn = newton_schulz(
                x_bio.reshape(len(x_bio), rows, -1), self.iterations, self.eps
            )
            return y_bmn.reshape(x_bio.shape)

        return whole_blocks(each, axes.stack, x)


class MuonState(NamedTuple):
    """Steps taken and the momentum of each matrix, a tree like the parameters'."""

    steps: Int[Array, ""]
    mu: optax.Params


def newton_schulz(
    x_bmn: Float[Array, "b m n"], iterations: int, eps: float
) -> Float[Array, "b m n"]:
    """Returns matrices with x's singular vectors and singular values near 1 (0.7 to 1.2)."""
    if x_bmn.shape[1] > x_bmn.shape[2]:  # the square of the smaller side is cheaper
        return newton_schulz(x_bmn.mT, iterations, eps).mT
    a, b, c = NEWTON_SCHULZ
    norm = jnp.sqrt(jnp.sum(jnp.square(x_bmn), axis=(1, 2), keepdims=True))

    def iterate(_, x_bmn):
        square = x_bmn @ x_bmn.mT
        return a * x_bmn + (b * square + c * (square @ square)) @ x_bmn

    return jax.lax.fori_loop(0, iterations, iterate, x_bmn / (norm + eps))


def whole_blocks(f, stack: int, x: Array) -> Array:
    """Returns f of x's blocks, each computed on one device, the blocks spread over all devices.

    Where a mesh shards the axes of a block, all-to-alls trade them for the stack: of a layer's
    share each device gets its share of whole layers, and the way back restores x's sharding.
    Devices that hold copies of x take different blocks, and an all-reduce joins the results. So
    a device moves twice its shard of x, plus the all-reduce where x has copies, and works on
    ceil(blocks / devices) blocks; it never holds more than that, or one block.

    Args:
        f: a function of `[b, ...]`, b blocks, to the same shape, that treats each alone and maps
            zeros to zeros (a stack that does not divide is padded).
        stack: the number of leading axes of x that stack blocks.
        x: any shape, any sharding on an Explicit mesh, or no mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f(x.reshape(-1, *x.shape[stack:])).reshape(x.shape)
    spec = jax.typeof(x).sharding.spec
    names = [(s,) if isinstance(s, str) else tuple(s or ()) for s in spec]
    traded = [(i, axes) for i, axes in enumerate(names[stack:], 1) if axes]

    def size(groups: Sequence[Sequence[str]]) -> int:
        return math.prod(mesh.shape[axis] for axes in groups for axis in axes)

    parts = size(names[stack:])  # devices that hold one block
    blocks = math.prod(x.shape[:stack]) // size(
        names[:stack]
    )  # of which a device has a part
    share = math.ceil(blocks / parts)  # whole blocks a device works on
    copies: tuple[str, ...] = ()  # mesh axes of copies, where they make that fewer
    for axis in mesh.axis_names:
        if axis not in sum(names, ()) and mesh.shape[axis] > 1 and share > 1:
            copies, share = (*copies, axis), math.ceil(share / mesh.shape[axis])

    def region(x):
        shape, x = x.shape, x.reshape(blocks, *x.shape[stack:])
        copy = jax.lax.axis_index(copies) if copies else 0
        index = jnp.arange(parts * share) + copy * parts * share
        x = jnp.take(x, index, axis=0, mode="fill", fill_value=0)
        for i, axes in traded:
            x = jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=i, tiled=True)
        x = f(x)
        for i, axes in reversed(traded):
            x = jax.lax.all_to_all(x, axes, split_axis=i, concat_axis=0, tiled=True)
        out = jnp.zeros((blocks, *x.shape[1:]), x.dtype).at[index].set(x, mode="drop")
        return (jax.lax.psum(out, copies) if copies else out).reshape(shape)

    return jax.shard_map(region, in_specs=spec, out_specs=spec)(x)


def check_fields(
    self: Any, unit: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Raises ConfigError unless the fields `unit` are in [0, 1) and `positive` above 0, or None."""
    for name in (*unit, *positive):
        value = getattr(self, name)
        if value is None:
            continue
        what = f"optim.algorithm ({type(self).__name__}): {name}={value}"
        if name in unit and not 0 <= value < 1:
            raise ConfigError(f"{what} is not in [0, 1); 0.9 is usual")
        if name in positive and not value > 0:
            raise ConfigError(f"{what} is not above 0")
