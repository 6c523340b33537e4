"""Sampling text: prompts are read at once, then each new token costs one step.

Keys and values of earlier tokens stay in a cache. Prompts of different lengths stand
flush right in the slots before the first new token, so that a step writes one slot of
all rows; the slots in front belong to segment 0, which no token of a prompt sees. A
sample depends on its prompt, the seed and its number, not on other rows or the mesh; nor
do the texts that a beam search finds (`lm/beam.py`), of which a prompt is one row.

Where an encoder reads the prompt, the decoder begins a text of its own: its cache has the
keys and values of what was read, too.

Shapes: B rows, T slots of prompts, M new tokens, S >= T + M slots of the cache, V true
vocabulary, K beams; small letters for one device's share.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from lm import beam, sampling, sharding, stacked, trees
from lm.config import ConfigError
from lm.data.tokenizer import Tokenizer
from lm.experiment import Generate
from lm.models import kinds
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.model import Model
from lm.nn.blockwise import Tokens
from lm.nn.layers import Source
from lm.train import Params, Program

SHORTEST = 16  # slots of prompts at least; longer ones take the next power of 2
BLOCK = 128  # the cache has a multiple of these slots: attention takes them in blocks


class Rows(NamedTuple):
    """Prompts to continue, on the host (numpy) or on the devices."""

    tokens: Any  # int32[B, T]: flush right, each from its end-of-text mark on, or to it
    lengths: Any  # int32[B]: tokens of each prompt, the mark included
    limits: Any  # int32[B]: new tokens at most; 0 for a row that only fills the batch
    streams: Any  # uint32[B, 2]: hash of the prompt, number of the sample


Sample: TypeAlias = Callable[
    [Params, Rows, Array], tuple[Int[Array, "B M"], Bool[Array, ""]]
]


def texts(
    prog: Program,
    params: Params,
    coder: Tokenizer,
    prompts: Sequence[str],
    config: Generate,
    report: Callable[[str], None],
) -> list[list[str]]:
    """Returns `config.samples` continuations of each prompt, without it; of beams the best first.

    A text ends before its end-of-text mark, after `config.tokens` tokens, or where the
    context is full: `data.length` tokens, the mark before the prompt included. An empty
    prompt gives documents from their beginning. Equal prompts give equal texts. Of a
    model that reads prompts by an encoder, a text is as long as it likes.

    Args:
        prog: what the weights belong to.
        params: the weights, on its mesh.
        coder: the tokenizer that they were trained with.
        prompts: any number; at most `eval.batch_size` rows are sampled at a time, and
            a beam is a row.
        config: how to sample.
        report: takes a line for the user where the context cuts texts short.

    Raises:
        ConfigError: a prompt that is longer than the context or no text, or weights
            whose logits are not finite.
    """
    if kinds.head(prog.experiment.model) is not None:
        raise ConfigError("a model.head reads whole texts and continues none")
    ids = encode(coder, prompts, prog.experiment.data.length)
    return continued(prog, params, coder, ids, config, report)


def continued(
    prog: Program,
    params: Params,
    coder: Tokenizer,
    ids: Sequence[np.ndarray],
    config: Generate,
    report: Callable[[str], None],
) -> list[list[str]]:
    """Returns what `texts` does, of prompts as `encode` gives them."""
    if not ids:
        return []
    context = prog.experiment.data.length
    longest = max(map(len, ids))
    room = context + 1 - longest  # the last token is not read again
    begins, mark = ids, np.array([coder.eot], np.int32)
    if apart := reads(prog):  # texts begin anew, and what is read ends with its mark
        ids, begins = [np.roll(i, -1) for i in ids], [mark] * len(ids)
        room = config.tokens
    if config.tokens > room:
        report(
            f"generate.tokens={config.tokens}, but the context (data.length={context}) "
            f"has room for {room} after a prompt of {longest} tokens: texts end there"
        )
    sample = make_sample(prog, config, coder.eot, coder.ends)
    key = jax.random.key(config.seed)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    each = 1 if config.beams == 1 else config.samples  # texts that come of a row
    jobs = [(i, number) for i in by_length for number in range(0, config.samples, each)]
    found: dict[tuple[int, int], str] = {}
    size = max(prog.experiment.eval_size() // config.beams, 1)
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        numbered = [(ids[i], number) for i, number in batch]
        devices = prog.layout.size("batch")
        most = longest + config.tokens if apart else context
        rows = make_rows(numbered, config.tokens, most, devices)
        new_BM, finite = jax.device_get(sample(params, rows, key))
        if not finite:
            raise ConfigError(
                "the model's logits are not finite: its weights have diverged; use an "
                "earlier checkpoint"
            )
        new_BNM = np.reshape(new_BM, (-1, each, config.tokens))
        for (i, number), new_NM in zip(batch, new_BNM, strict=False):
            for n, new_M in enumerate(new_NM, number):
                found[i, n] = _decode(coder, begins[i], new_M)
    return [[found[i, n] for n in range(config.samples)] for i in range(len(ids))]


def reads(prog: Program) -> bool:
    """Returns whether prompts are read by an encoder, and no text continues its prompt."""
    return isinstance(prog.experiment.model, EncoderDecoder.Config)


def shown(
    prog: Program, prompts: Sequence[str], found: Sequence[Sequence[str]]
) -> list[str]:
    """Returns what a user sees: prompts with their continuations, or what was read's answers."""
    pairs = zip(prompts, found, strict=True)
    return [t if reads(prog) else p + t for p, some in pairs for t in some]


def make_rows(
    prompts: Sequence[tuple[np.ndarray, int]], tokens: int, context: int, multiple: int
) -> Rows:
    """Returns rows of (prompt's ids, number of the sample), filled to a multiple.

    T is a power of 2, so that few programs are compiled.
    """
    longest = max(len(ids) for ids, _ in prompts)
    T = max(SHORTEST, 1 << (longest - 1).bit_length())
    B = -(-len(prompts) // multiple) * multiple
    tokens_BT = np.zeros((B, T), np.int32)
    lengths_B, limits_B = np.ones(B, np.int32), np.zeros(B, np.int32)
    streams_B2 = np.zeros((B, 2), np.uint32)
    for b, (ids, number) in enumerate(prompts):
        tokens_BT[b, T - len(ids) :] = ids
        lengths_B[b] = len(ids)
        limits_B[b] = min(tokens, context + 1 - len(ids))
        streams_B2[b] = zlib.crc32(np.asarray(ids, "<i4").tobytes()), number
    return Rows(tokens_BT, lengths_B, limits_B, streams_B2)


def make_sample(
    prog: Program, config: Generate, eot: int, ends: Sequence[int] = ()
) -> Sample:
    """Returns the compiled function (params, rows, key) -> (new tokens [B, M], finite).

    M is `config.tokens`; it stops when every row has ended, with `eot` or another of
    `ends`, and a row that has goes on with `eot`. With several beams the tokens are
    [B, samples, M], the best text first. `finite` is False where a logit was not. It is
    compiled for each shape of the rows.
    """
    # A step has one token, which can't be split: the length is whole on every device.
    rules = dataclasses.replace(prog.layout.rules, length=(), residual=())
    layout = dataclasses.replace(prog.layout, rules=rules)
    stops = (eot, *(i for i in ends if i != eot))
    jitted = _jitted(prog, config, stops)

    def sample(params: Params, rows: Rows, key: Array) -> tuple[Array, Array]:
        with sharding.use(layout):
            return jitted(params, rows, key)

    return sample


@functools.lru_cache(maxsize=2)  # a run samples again with every evaluation
def _jitted(prog: Program, config: Generate, stops: tuple[int, ...]) -> Any:
    return jax.jit(functools.partial(_sample, prog, config, stops))


def _sample(
    prog: Program,
    config: Generate,
    stops: tuple[int, ...],
    params: Params,
    batch: Rows,
    key: Array,
) -> tuple[Array, Array]:
    # Under a pipeline, each layer is gathered from the stages' devices when its turn comes.
    model = prog.model(stacked.plain(prog, cast_once(prog, params)))
    split = sharding.spec("batch", None)
    batch = Rows(*(reshard(a, P(*split[: a.ndim])) for a in batch))
    eot, M = stops[0], config.tokens
    first_BT, lengths_B, source = begun(model, batch, eot)
    B, T = first_BT.shape
    S = slots(T, M)
    cached = cache_tokens(lengths_B, T, S)
    zero = jnp.int32(0)
    cache = model.empty_cache(B, S, source)
    logits_BV, cache = advance(model, first_BT, zero, cached, cache, source)
    if config.beams > 1:
        how = config, stops, model, batch.limits
        return _searched(*how, T, logits_BV, cached, cache, source)
    keys_B = jax.vmap(functools.partial(_row_key, key))(batch.streams)

    def more(carry: Any) -> Array:
        m, _, done_B, _, finite, _ = carry
        return (m < M) & ~done_B.all() & finite

    def step(carry: Any) -> Any:
        m, logits_BV, done_B, new_BM, finite, cache = carry
        finite &= jnp.isfinite(logits_BV).all()
        draws_B = jax.vmap(jax.random.fold_in)(keys_B, batch.lengths + m)
        ids_B = jnp.where(done_B, eot, sampling.choose(config, logits_BV, draws_B))
        new_BM = lax.dynamic_update_slice(new_BM, ids_B[:, None], (0, m))
        ended_B = functools.reduce(jnp.logical_or, [ids_B == i for i in stops])
        done_B |= ended_B | (m + 1 >= batch.limits)
        ids_B1 = ids_B[:, None]
        logits_BV, cache = advance(model, ids_B1, T + m, cached, cache, source)
        return m + 1, logits_BV, done_B, new_BM, finite, cache

    new_BM = jnp.full((B, M), eot, jnp.int32, out_sharding=split)
    carry = (zero, logits_BV, batch.limits <= 0, new_BM, jnp.bool(True), cache)
    _, _, _, new_BM, finite, _ = lax.while_loop(more, step, carry)
    # All-gather over the batch's axes: every host reads every row.
    return reshard(new_BM, sharding.spec(None, None)), finite


def _searched(
    config: Generate,
    stops: tuple[int, ...],
    model: Model,
    limits_B: Array,
    T: int,
    logits_BV: Array,
    cached: Tokens,
    cache: Any,
    source: Source | None,
) -> tuple[Array, Array]:
    """Returns what `_sample` does, by a beam search from the logits after T slots."""
    K, fixed = config.beams, None
    cached = beam.repeat(cached, K, 0)
    if source is not None:  # all beams of a prompt look at the same
        source = Source(None, beam.repeat(source.tokens, K, 0))
        cache, fixed = cache[0], beam.repeat(cache[1], K, 1)

    def further(ids_X1: Array, m: Array, cache: Any) -> tuple[Array, Any]:
        whole = cache if source is None else (cache, fixed)
        logits_XV, whole = advance(model, ids_X1, T + m, cached, whole, source)
        return logits_XV, whole if source is None else whole[0]

    new_BKM, _, finite = beam.search(config, stops, limits_B, logits_BV, cache, further)
    best_BNM = new_BKM[:, : config.samples]
    return reshard(best_BNM, sharding.spec(None, None, None)), finite


def begun(
    model: Model, batch: Rows, eot: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Source | None]:
    """Returns the tokens that texts begin with, flush right, how many they are, and what an
    encoder made of the prompts; of a decoder alone the prompts themselves, and None."""
    if not isinstance(model, EncoderDecoder):
        return batch.tokens, batch.lengths, None
    T = batch.tokens.shape[1]
    source = model.encode(batch.tokens, cache_tokens(batch.lengths, T, T))
    one_B = jnp.ones_like(batch.lengths)
    return eot * one_B[:, None], one_B, source


def slots(T: int, M: int) -> int:
    """Returns S: T + M, filled up so that prefill can go through it in blocks."""
    block = min(T, BLOCK)
    return -(-(T + M) // block) * block


def cache_tokens(lengths_B: Int[Array, " B"], T: int, S: int) -> Tokens:
    """Returns positions and segments of all slots: 0 before a prompt, else 1.

    Slots that are not written yet need no mark: their positions are later than any
    query's. A row that has ended runs on beside the others, perhaps to positions beyond
    a learned table, where indexing takes the last one.
    """
    place_BS = jnp.arange(S)[None] - (T - lengths_B)[:, None]
    return Tokens(jnp.maximum(place_BS, 0), (place_BS >= 0).astype(jnp.int32))


def advance(
    model: Model,
    ids_BT: Int[Array, "B T"],
    slot: Int[Array, ""],
    cached: Tokens,
    cache: Any,
    source: Source | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Returns fp32 logits after the last of the tokens, and the cache with them.

    The vocabulary's padding is cut off, so that it can never be sampled.

    Args:
        model: the model.
        ids_BT: tokens for the slots `slot`, `slot + 1`, ….
        slot: where they go.
        cached: positions and segments of all slots.
        cache: from `model.empty_cache`, or the last call.
        source: what an encoder made of the prompts.
    """
    T = ids_BT.shape[1]
    here = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, slot, T, axis=1), cached)
    given = {"cache": cache, "slot": slot, "cached": cached, "source": source}
    x_BTD, _, cache = model(ids_BT, here, **given)
    logits_B1V = model.logits(x_BTD[:, -1:])
    # All-gather over tensor: choosing needs a whole row, and one position's is small.
    logits_BV = reshard(logits_B1V[:, 0], sharding.spec("batch", None))
    return logits_BV[:, : model.config.vocab_size], cache


def _row_key(key: Array, stream_2: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, stream_2[0]), stream_2[1])


def cast_once(prog: Program, params: Params) -> Params:
    """Casts to the dtype of compute what every use casts: no step reads fp32 weights.

    Scales of norms and routers are used in fp32 and stay. Weights split over fsdp stay split: each
    step gathers a layer at a time, and no device holds the whole model.
    """
    dtype = prog.model(params).dtype
    flat = trees.flatten(params)
    for path, axes in prog.axes.items():
        if not {"norm", "choice", "balance"} & set(axes):
            flat[path] = flat[path].astype(dtype)
    return trees.nest(flat)


def encode(coder: Tokenizer, prompts: Sequence[str], context: int) -> list[np.ndarray]:
    """Returns each prompt's ids, after the end-of-text mark.

    Raises:
        ConfigError: a prompt that is no text, or longer than the context (tokens).
    """
    return [_encode(coder, i, prompt, context) for i, prompt in enumerate(prompts)]


def _encode(coder: Tokenizer, i: int, prompt: str, context: int) -> np.ndarray:
    """Returns the end-of-text mark and the prompt's ids."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"prompt {i + 1} is not UTF-8 text: {error.reason} at character "
            f"{error.start} of {prompt[:40]!r}"
        ) from error
    ids = coder.prompt(prompt)
    if len(ids) > context:
        raise ConfigError(
            f"prompt {i + 1} ({prompt[:20]!r}…) has {len(ids)} tokens with its "
            f"end-of-text mark, the context data.length={context}; shorten it by "
            f"{len(ids) - context} or more tokens"
        )
    return ids


def _decode(coder: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """Returns the text of the new ids before eot.

    It is what they add to the prompt's text: on their own, a first space could be taken
    for the one that some tokenizers put in front. Ids that it lacks (sentinels) are numbers.
    """
    ends = np.flatnonzero(np.isin(new, (coder.eot, *coder.ends)))
    new = new[: ends[0]] if len(ends) else new
    before = coder.decode(prompt)

    def plain(ids: np.ndarray) -> str:
        return coder.decode(np.concatenate([prompt, ids]))[len(before) :]

    first, *others = np.split(new, np.flatnonzero(new >= len(coder.pieces)))
    return plain(first) + "".join([f"<{ids[0]}>{plain(ids[1:])}" for ids in others])
