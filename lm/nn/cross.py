"""Cross-attention: queries of one stack's rows, keys and values of another's.

Shapes: B batch, T length, S length of the other rows, D embed, K kv heads, H head dim.
"""

from typing import Any

from jaxtyping import Array, Float

from lm.nn import attend
from lm.nn.attention import Attention
from lm.nn.layers import Side


class Cross(Attention):
    """Attention to `side.source`: segment n of these rows sees all of segment n of those."""

    def __call__(
        self, x_BTD: Float[Array, "B T D"], side: Side, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what each token found, and the cache (`keys` of the source) as it is."""
        assert side.source is not None, "the rows that are looked at"
        k, v = self.keys(side.source.x_BSD) if cache is None else cache
        (q,) = self._project(x_BTD, "query")
        if self.config.qk_norm:
            q = self.query_norm(q)
        y_BTKGH, _ = attend.attend(
            q, k.astype(q.dtype), v.astype(q.dtype), side.tokens, side.source.tokens,
            self.config.mask(self.head_dim, ordered=False),
            self.config.implementation if cache is None else "auto",
            context=self.config.context,
        )  # fmt: skip
        return self._output(y_BTKGH), cache

    def keys(
        self, x_BSD: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns the keys and values of the other stack's rows."""
        k, v = self._project(x_BSD, "key", "value")
        return (self.key_norm(k) if self.config.qk_norm else k), v
