"""The metrics of training steps: fetched one step late, averaged, written when due."""

import math
from typing import Any

import jax
import numpy as np

from lm import batches, metrics
from lm.plan import chips, flops
from lm.terminal import Terminal
from lm.train import Program


class RunError(RuntimeError):
    """The run can't go on, told in one line."""


def due(step: int, every: int) -> bool:
    """Returns whether what is done every so many steps (0: never) is due after `step`."""
    return bool(every) and step % every == 0


def experts(load_LE: Any, layers: list[int], dropped: float) -> dict[str, Any]:
    """Returns what is written of the experts' load in one step.

    `moe_dropped`: share of the choices without a slot · `moe_load_max`: the busiest expert's load
    over the mean of its layer · `moe_load_layer`: which layer · `moe_load`: all of that layer.

    Args:
        load_LE: choices by layer and expert.
        layers: those that have experts.
        dropped: choices without a slot.
    """
    load_SE = np.asarray(load_LE, np.float64)[layers]
    ratio_SE = load_SE / np.maximum(load_SE.mean(1, keepdims=True), 1e-9)
    worst = int(ratio_SE.max(1).argmax())
    return {
        "moe_dropped": dropped / max(load_SE.sum(), 1),
        "moe_load_max": float(ratio_SE[worst].max()),
        "moe_load_layer": layers[worst],
        "moe_load": [round(float(x), 3) for x in ratio_SE[worst]],
    }


class Log:
    """Takes the metrics of each step as it is dispatched; the device never waits."""

    def __init__(
        self, prog: Program, writer: metrics.Writer, terminal: Terminal, tokens: int
    ):
        self.tokens = tokens  # scored so far, in the whole run
        self._prog, self._writer, self._terminal = prog, writer, terminal
        self._pending: tuple[int, Any] | None = None
        runs_on = jax.config.values["jax_cpu_enable_async_dispatch"]
        self._done = prog.layout.platform == "cpu" and not runs_on
        self._means, self._speed = metrics.Means(), metrics.Throughput()
        experiment = prog.experiment
        model, length = experiment.model, experiment.data.length
        written = batches.written(experiment.objective, experiment.data)
        self._cost = {  # operations a token
            "mfu": flops.train(model, length, causal=False, written=written),
            "mfu_causal": flops.train(model, length, causal=True, written=written),
        }
        self._peak: float | None = None  # operations a second of the whole mesh

    def measure(self) -> None:
        """Looks the peak of the devices up, or measures that of a CPU (a tenth of a second)."""
        devices = self._prog.layout.mesh.size
        peak = chips.peak_flops(jax.devices()[0], devices)
        self._peak = peak * devices if peak else None

    def add(self, step: int, result: Any) -> None:
        """Takes what the step after `step - 1` returned; fetches the one before, or this one where
        a step returns only when it is done."""
        self.arrive()
        self._pending = step, result
        if self._done:
            self.arrive()

    def restart(self) -> None:
        """Leaves what was done since the last step out of the speed."""
        self._speed.restart()

    def arrive(self) -> None:
        """Waits for the last step taken, and writes a record where one is due.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        if self._pending is None:
            return
        (step, result), self._pending = self._pending, None
        fetched = jax.device_get(result)
        load_LE = fetched.pop("moe_load_LE", None)
        values = {k: float(v) for k, v in fetched.items()}
        tokens = values["tokens"]
        self._speed.arrived(values.get("read", tokens))
        self.tokens += int(tokens)
        self._refuse_to_go_on(step, values)
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            shown = {k: values[k] for k in ("loss", "grad_norm")}
            nll = values["nll"] / max(tokens, 1)
            bits = metrics.bits_per_byte(nll, tokens, values["bytes"])
            self._means.add(shown if bits is None else {**shown, "bits_per_byte": bits})
        self._terminal.tick(step, values["loss"], self._speed.tokens_per_second)
        if due(step, self._prog.experiment.train.log_every) or values["consecutive"]:
            self._write(step, values, load_LE)

    def _refuse_to_go_on(self, step: int, values: dict[str, float]) -> None:
        most = self._prog.experiment.optim.guard.max_consecutive
        if values["consecutive"] >= most:
            raise RunError(
                f"step {step}: {most} steps in a row were skipped (loss {values['loss']:.4g}, "
                f"gradient norm {values['grad_norm']:.4g}); lower optim.learning_rate or look at "
                "the data of these steps; the checkpoints hold the state before them"
            )

    def _write(self, step: int, values: dict[str, float], load_LE: Any) -> None:
        speed = self._speed.take()
        rate = speed["tokens_per_second"]
        record: dict[str, Any] = {
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            **self._means.take(),
            "learning_rate": values["learning_rate"],
            "tokens": self.tokens,
            **speed,
            "skipped": int(values["skipped"]),
        }
        if load_LE is not None:
            layers = list(self._prog.experiment.model.sparse)
            record["moe_loss"] = values["moe_loss"] / max(values["tokens"], 1)
            record |= experts(load_LE, layers, values["moe_dropped"])
        for name, cost in self._cost.items():
            record[name] = rate * cost / self._peak if rate and self._peak else None
        if memory := jax.local_devices()[0].memory_stats():
            record["memory_bytes"] = memory.get("bytes_in_use")
            record["memory_peak_bytes"] = memory.get("peak_bytes_in_use")
        self._writer.write("train", step, record)
