"""Next-token prediction, and what every objective that scores tokens has."""

import dataclasses

from lm.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """How a predicted token is scored."""

    z_loss: float = (
        0.0  # weight of log(Z)^2, which keeps logits from drifting (Chowdhery 2022)
    )
    label_smoothing: float = (
        0.0  # share of the target spread evenly over the vocabulary
    )
    chunk: int = 1024  # tokens of a device whose logits exist at once

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"objective.label_smoothing={self.label_smoothing}: expected 0 <= value < 1"
            )
        if self.chunk < 1 or self.z_loss < 0:
            raise ConfigError("objective: chunk must be 1 or more and z_loss 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(CrossEntropy):
    """Predict each token from the earlier ones of its document, by cross-entropy."""
