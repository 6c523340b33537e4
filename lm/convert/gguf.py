"""GGUF files (llama.cpp): a config.json, a tokenizer and tensors made of what they hold.

The package `gguf` maps the file and dequantizes; what comes out is float32. Names and the order of
rotary pairs become those of Hugging Face, so that the families' own tables read the rest.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from lm.config import ConfigError
from lm.convert.files import Source, needed
from lm.data import pretrained

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Regular expressions by which byte-level tokenizers cut a text, by llama.cpp's names for them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": None,
    "default": None,
    "smollm": "digits",
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
}
CONTROL, USER = 3, 4  # kinds of tokens


def read(
    place: epath.Path,
) -> tuple[dict[str, Any], dict[str, bytes], Callable[[], Source]]:
    """Returns config.json, the tokenizer's files, and where the tensors come from.

    Raises:
        ConfigError: no GGUF file, or a kind of model or tokenizer that is not supported.
    """
    package = needed("gguf")
    try:
        reader = package.GGUFReader(str(place))
    except (ValueError, IndexError, OSError) as error:
        raise ConfigError(f"{place} is not a GGUF file ({error})") from error
    about = _About(place.name, reader)
    data = _config(about, {t.name for t in reader.tensors})
    beside = place.parent / pretrained.MAIN
    coder = pretrained.read(str(place.parent)) if beside.exists() else _tokenizer(about)
    permuted = data["model_type"] == "llama"
    heads = data["num_attention_heads"], data["num_key_value_heads"]
    return data, coder, lambda: Tensors(reader, package, heads if permuted else None)


class _About:
    """The fields of a file."""

    def __init__(self, name: str, reader: Any):
        self.name, self._fields = name, reader.fields
        self.kind = self("general.architecture")
        if self.kind not in ARCHITECTURES:
            raise ConfigError(
                f"{name}: general.architecture={self.kind!r} is not supported; of GGUF files lm "
                f"reads {', '.join(ARCHITECTURES)}"
            )

    def __call__(self, name: str, default: Any = ...) -> Any:
        field = self._fields.get(name.replace("*", getattr(self, "kind", "")))
        if field is None:
            if default is ...:
                raise ConfigError(f"{self.name} has no field {name}")
            return default
        value = field.contents()
        # Numbers were rounded to fp32: the shortest decimal is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(about: _About, names: set[str]) -> dict[str, Any]:
    for name in ("*.expert_count", "*.rope.scaling.type", "*.attention.sliding_window"):
        if about(name, 0) not in (0, "none"):
            raise ConfigError(
                f"{about.name}: {name.replace('*', about.kind)}={about(name)!r} is not supported "
                "in a GGUF file; import the model from its Hugging Face directory"
            )
    if "rope_freqs.weight" in names:
        raise ConfigError(
            f"{about.name}: rope_freqs.weight (Llama 3's scaled positions) is not supported in a "
            "GGUF file; import the model from its Hugging Face directory"
        )
    heads = about("*.attention.head_count")
    dim = about("*.embedding_length")
    head_dim = about("*.attention.key_length", dim // heads)
    if about("*.rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(
            f"{about.name}: rotary positions of a part of each head are not supported"
        )
    return {
        "model_type": about.kind,
        "hidden_size": dim,
        "intermediate_size": about("*.feed_forward_length"),
        "num_hidden_layers": about("*.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": about("*.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": about("*.attention.layer_norm_rms_epsilon"),
        "rope_theta": about("*.rope.freq_base", 10_000.0),
        "max_position_embeddings": about("*.context_length"),
        "vocab_size": len(about("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": about("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": about("tokenizer.ggml.eos_token_id", None),
    }


class Tensors:
    """The tensors of a file by Hugging Face's names, dequantized when they are asked for."""

    def __init__(self, reader: Any, package: Any, heads: tuple[int, int] | None):
        self._package, self._heads = package, heads
        self._tensors = {_name(t.name): t for t in reader.tensors}
        self.dtypes = {
            name: FLOATS.get(t.tensor_type.name, "float32")
            for name, t in self._tensors.items()
        }
        self.shapes = {
            name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()
        }
        self.tensor = functools.lru_cache(maxsize=4)(self._tensor)

    def _tensor(self, name: str) -> np.ndarray:
        t = self._tensors[name]
        values = self._package.quants.dequantize(t.data, t.tensor_type)
        values = values.reshape(self.shapes[name])
        for part, heads in zip(("q_proj", "k_proj"), self._heads or (), strict=False):
            if f"{part}." in name:  # llama.cpp has rotary pairs side by side
                pairs = values.reshape(heads, -1, 2, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values


def _name(name: str) -> str:
    *path, kind = name.split(".")
    if len(path) == 3 and path[0] == "blk" and path[2] in NAMES:
        return f"model.layers.{path[1]}.{NAMES[path[2]]}.{kind}"
    return f"{NAMES[path[0]]}.{kind}" if len(path) == 1 and path[0] in NAMES else name


def _tokenizer(about: _About) -> dict[str, bytes]:
    """Returns the files of a byte-level tokenizer, made of the fields."""
    kind, cut = about("tokenizer.ggml.model"), about("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or cut not in CUTS:
        raise ConfigError(
            f"{about.name}: the tokenizer {kind!r} (pre {cut!r}) is not supported; put the "
            "model's tokenizer.json beside the file"
        )
    names, kinds = about("tokenizer.ggml.tokens"), about("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in about("tokenizer.ggml.merges")]
    special = {"bos": None, "eos": None, "unknown": None, "padding": None}
    special = {k: about(f"tokenizer.ggml.{k}_token_id", None) for k in special}
    begins = about("tokenizer.ggml.add_bos_token", False)
    data = _json(names, kinds, merges, CUTS[cut])
    if begins and special["bos"] is not None:
        data["post_processor"] = _begin(names[special["bos"]], special["bos"])
    short = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config = {
        f"{short[k]}_token": names[i] for k, i in special.items() if i is not None
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": begins}
    config["clean_up_tokenization_spaces"] = False
    if (template := about("tokenizer.chat_template", None)) is not None:
        config["chat_template"] = template
    return {
        pretrained.MAIN: json.dumps(data, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _json(names: list[str], kinds: list[int], merges: Any, cut: str | None) -> Any:
    """Returns a tokenizer.json."""
    package: Any = needed("tokenizers")
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = package.Tokenizer(package.models.BPE(vocab=vocab, merges=merges))
    before = package.pre_tokenizers
    level = before.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))
    parts = [level]
    if cut == "digits":
        parts = [before.Digits(individual_digits=True), level]
    elif cut is not None:
        pattern = package.Regex(cut)
        parts = [before.Split(pattern, behavior="isolated"), level]
    tokenizer.pre_tokenizer = before.Sequence(parts)
    tokenizer.decoder = package.decoders.ByteLevel()
    marks = [
        package.AddedToken(name, special=kind == CONTROL, normalized=False)
        for name, kind in zip(names, kinds, strict=True)
        if kind in (CONTROL, USER)
    ]
    tokenizer.add_special_tokens([m for m in marks if m.special])
    tokenizer.add_tokens([m for m in marks if not m.special])
    return json.loads(tokenizer.to_str())


def _begin(name: str, i: int) -> Any:
    package: Any = needed("tokenizers")
    single, pair = f"{name} $A", f"{name} $A {name} $B"
    post = package.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, i)]
    )
    return json.loads(post.__getstate__())
