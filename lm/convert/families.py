"""Every family there is, found by `model_type`, or by what a model's config can be written as."""

from typing import Any

from lm.config import ConfigError, diff, nearest
from lm.convert import (
    bert,
    deepseek,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    marian,
    mixtral,
    qwen,
    qwen_moe,
    t5,
)
from lm.convert.family import Family, Model, essence
from lm.convert.fields import Fields
from lm.models import kinds

FAMILIES = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        gpt2.GPT2,
        gemma.GEMMA,
        mixtral.MIXTRAL,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        gpt_oss.GPT_OSS,
        deepseek.V2,
        deepseek.V3,
        gemma.GEMMA2,
        gemma.GEMMA3,
        bert.BERT,
        t5.T5,
        marian.MARIAN,
    )
}


def read(data: dict[str, Any], where: str = "config.json") -> tuple[Family, Model]:
    """Returns the family and the model that a config.json describes.

    Raises:
        ConfigError: a family or a value that is not supported, by name.
    """
    name = data.get("model_type")
    if name not in FAMILIES:
        hint = nearest(str(name), FAMILIES)
        raise ConfigError(
            f"{where}: model_type={name!r} is not supported{hint} (lm knows {', '.join(FAMILIES)})"
        )
    family = FAMILIES[name]
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method")
        raise ConfigError(
            f"{where}: quantization_config ({method}) is not supported; lm reads float32, "
            "bfloat16 and float16 weights, and GGUF files"
        )
    fields = Fields(data, where)
    fields.skip("quantization_config")
    model = family.read(fields)
    fields.done()
    return family, model


def write(model: kinds.Config) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that can express a model, and the config.json that says it.

    Raises:
        ConfigError: there is none; the one that misses least is named.
    """
    wanted, misses = essence(model), []
    for family in FAMILIES.values():
        if family.model is not type(model):
            continue
        try:
            data = {"model_type": family.model_type, **family.write(model)}
            _, found = read(data, family.model_type)
        except (AssertionError, ConfigError, KeyError, StopIteration):
            continue
        missing = diff(essence(found), wanted)
        if not missing:
            return family, data
        misses.append((len(missing), family.model_type, missing))
    if not misses:
        raise ConfigError("no family of lm/convert has this kind of model")
    _, nearest_one, missing = min(misses, key=lambda m: m[:2])
    some = ", ".join(f"model.{path}={new!r}" for path, _, new in missing[:5])
    raise ConfigError(
        f"no family can express this model; {nearest_one}, the nearest, has no {some}"
    )
