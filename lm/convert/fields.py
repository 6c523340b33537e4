"""A config.json, read strictly: every value of it is understood, or the file is refused.

Keys that cannot change what a model computes are known by name here; all others a family must ask
for. What nobody asked for is refused by name at the end.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from lm.config import ConfigError

T = TypeVar("T")

# Of files, of other programs, of how text is sampled: none of them changes the logits.
HARMLESS = frozenset(
    (
        *("architectures", "model_type", "_name_or_path", "name_or_path", "dtype"),
        *("torch_dtype", "transformers_version", "use_cache", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
        *("max_position_embeddings", "output_router_logits"),
        *("return_dict", "output_hidden_states", "output_attentions", "id2label"),
        *("label2id", "problem_type", "task_specific_params", "auto_map", "cache_implementation"),
        *("is_encoder_decoder", "chunk_size_feed_forward", "finetuning_task"),
        *("do_sample", "max_length", "temperature", "top_k", "top_p", "prefix"),
        *("_attn_implementation_autoset", "attn_implementation"),
        *("transformers.js_config", "image_token_index", "gradient_checkpointing"),
    )
)  # fmt: skip

# Dropout while training: the experiment's to choose (model.dropout), not the weights'.
DROPOUT = (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"),
    *("resid_dropout", "residual_dropout", "dropout_rate", "classifier_dropout"),
    *(
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "activation_dropout",
    ),
    *("classif_dropout", "encoder_layerdrop", "decoder_layerdrop"),
)


class Fields:
    """Reads the keys of a dict; `done` refuses what was not read."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json"):
        self._data, self._where = data, where
        self._read: set[str] = set()

    @property
    def where(self) -> str:
        """What is read, for messages."""
        return self._where

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def get(self, name: str, kind: type[T], default: Any = ...) -> T:
        """Returns the value of a key, which is of this type; null and absent are the default.

        Raises:
            ConfigError: it is of another type, or absent without a default.
        """
        self._read.add(name)
        value = self._data.get(name)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self._where} has no {name!r}")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(
                f"{self._where}: {name}={value!r}, expected {kind.__name__}"
            )
        return value

    def optional(self, name: str, kind: type[T], absent: T | None) -> T | None:
        """Returns the value of a key that may be null, which says something else than nothing."""
        given = self._data.get(name, ...)
        self._read.add(name)
        return (
            absent if given is ... else None if given is None else self.get(name, kind)
        )

    def only(self, name: str, *known: Any, default: Any = ...) -> Any:
        """Returns the value of a key, which must be one of `known`.

        Raises:
            ConfigError: it is another.
        """
        self._read.add(name)
        value = self._data.get(name)
        value = default if value is None and default is not ... else value
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            some = " or ".join(map(repr, known))
            raise ConfigError(
                f"{self._where}: {name}={value!r} is not supported; lm knows {some}"
            )
        return value

    def types(self, name: str) -> tuple[str, ...] | None:
        """Returns the kinds of all layers' attention, None where it does not say."""
        self._read.add(name)
        kinds = self._data.get(name)
        known = ("sliding_attention", "full_attention")
        for kind in kinds or ():
            if kind not in known:
                raise ConfigError(
                    f"{self._where}: {name} has {kind!r}, which is not supported; lm knows "
                    f"{' and '.join(known)}"
                )
        return None if kinds is None else tuple(kinds)

    def part(self, name: str) -> "Fields | None":
        """Returns the dict at a key, None where it is absent or null."""
        self._read.add(name)
        value = self._data.get(name)
        return None if value is None else Fields(value, f"{self._where}: {name}")

    def skip(self, *names: str) -> None:
        """Counts keys as read whose values say nothing new."""
        self._read.update(names)

    def dropouts(self) -> dict[str, float]:
        """Returns the rates of dropout that are not 0."""
        self._read.update(DROPOUT)
        return {k: self._data[k] for k in DROPOUT if self._data.get(k)}

    def done(self, harmless: frozenset[str] = HARMLESS) -> None:
        """Ends the reading.

        Raises:
            ConfigError: a key was not read; it may change what the model computes.
        """
        self.dropouts()
        left = [k for k in self._data if k not in self._read and k not in harmless]
        if left:
            values = ", ".join(f"{k}={self._data[k]!r}" for k in left)
            raise ConfigError(
                f"{self._where}: lm does not know {values[:300]}: the model may compute "
                "something else than lm would"
            )
