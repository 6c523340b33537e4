"""What families with experts have in common: rows for the router, the experts and shared ones.

Letters: D width of the model, F hidden, E experts.
"""

from typing import Any

from lm.convert import decoder
from lm.convert.decoder import T
from lm.convert.family import UNTRAINED, Table
from lm.convert.fields import Fields
from lm.convert.steps import Row, row
from lm.models.transformer import Transformer
from lm.nn.moe import Moe


def losses(f: Fields) -> dict[str, Any]:
    """Returns what training adds: no choice is dropped, the load is evened as the file says."""
    f.skip("aux_loss_alpha", "seq_aux")
    weight = f.get("router_aux_loss_coef", float, 0.001)
    return {**UNTRAINED, "balance": weight}


def expert_rows(
    model: Transformer.Config, at: str, names: tuple[str, str, str]
) -> list[Row]:
    """Returns the rows of experts that are a file's tensors each.

    Args:
        model: the model.
        at: prefix, up to the experts' numbers.
        names: of gate, up and down.
    """
    assert isinstance(model.ffn, Moe.Config)
    E, ours = model.ffn.experts, ("gate_edf", "up_edf", "down_efd")
    return [
        row(f"ffn/{mine}", f"{at}{{e}}.{name}.weight", T, experts=E)
        for mine, name in zip(ours, names, strict=True)
    ]


def table(
    model: Transformer.Config, of_layer: Any, attention: Any = decoder.attention_rows
) -> Table:
    """Returns a table of layers with the usual norms.

    Args:
        model: the model.
        of_layer: from a layer's number to its feed-forward's rows.
        attention: from the model and a prefix to the attention's rows.
    """

    def layer(i: int) -> tuple[Row, ...]:
        at = f"model.layers.{i}."
        return (
            row("norm1/scale_d", f"{at}input_layernorm.weight"),
            *attention(model, f"{at}self_attn."),
            row("norm2/scale_d", f"{at}post_attention_layernorm.weight"),
            *of_layer(i),
        )

    return Table(decoder.whole(model), tuple(layer(i) for i in range(model.layers)))


def moe(model: Transformer.Config) -> Moe.Config:
    """Returns the model's experts."""
    assert isinstance(model.ffn, Moe.Config)
    return model.ffn
