"""Draws a run (losses over steps and tokens, the speed below them) and a confusion matrix."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

TRAIN = "#7b8794"
EVALS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#66a182", "#2e4057")  # by set
SPEED = "#30638e"
INK = "#333333"
CELLS = 30  # classes of a confusion matrix up to which cells have room for a count
PLAIN: Any = {"parse_math": False}  # of text that may hold a $
SMOOTH = 50  # a curve of more points gets its running mean over 1/SMOOTH of it


def draw(
    records: Sequence[Mapping[str, Any]], path: os.PathLike | str, title: str = ""
) -> bool:
    """Writes a PNG of the records of a `metrics.jsonl`; `path` may be `gs://…`.

    Above: the training loss and the loss of each evaluation set over steps, with the
    tokens seen on the upper axis. Below: tokens a second.

    Returns:
      False, and writes nothing, if no record holds a loss.
    """
    from matplotlib import figure  # slow to import, needed once a run

    train = [r for r in records if r.get("kind") == "train"]
    evals = [r for r in records if r.get("kind") == "eval"]
    if not any(r.get("loss") is not None for r in (*train, *evals)):
        return False
    picture = figure.Figure(figsize=(8, 6), dpi=150, layout="constrained")
    loss, speed = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _losses(loss, train, evals)
    _speed(speed, train)
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9)
    loss.set_title(title, loc="left", color=INK, fontsize=12)
    if ends := [(r["step"], r["tokens"]) for r in train if r.get("tokens")]:
        _token_axis(loss, *ends[-1])
    _write(picture, path)
    return True


def confusion(
    counts: Sequence[Sequence[float]],
    names: Sequence[str],
    path: os.PathLike | str,
    title: str = "",
) -> None:
    """Writes a PNG of how many examples of each class (rows) were taken for which (columns).

    A cell's colour is its share of its row, its text (of up to `CELLS` classes) the count.
    """
    from matplotlib import figure  # slow to import, needed once a run

    size = 2.5 + 0.6 * min(len(names), CELLS)
    picture = figure.Figure(figsize=(size, size), dpi=150, layout="constrained")
    axes = picture.subplots()
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts if len(names) <= CELLS else ()):
        for x, n in enumerate(row):
            color = "white" if shares[y][x] > 0.5 else INK
            axes.text(x, y, f"{n:,.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", **PLAIN)
    axes.set_yticks(range(len(names)), names, **PLAIN)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", color=INK, fontsize=12, **PLAIN)
    _write(picture, path)


def _write(picture: Any, path: os.PathLike | str) -> None:
    png = io.BytesIO()
    picture.savefig(png, format="png")
    epath.Path(path).write_bytes(png.getvalue())


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list, list]:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _losses(axes: Any, train: Sequence[Mapping], evals: Sequence[Mapping]) -> None:
    steps, losses = _curve(train, "loss")
    if losses:
        last = f"train  {losses[-1]:.3f}"
        if len(losses) > SMOOTH:
            axes.plot(steps, losses, color=TRAIN, linewidth=0.8, alpha=0.5)
            losses = _running_mean(losses, len(losses) // SMOOTH)
        axes.plot(steps, losses, color=TRAIN, linewidth=1.6, label=last)
    sets = list(dict.fromkeys(str(r.get("set", "eval")) for r in evals))
    for i, name in enumerate(sets):
        of_set = [r for r in evals if str(r.get("set", "eval")) == name]
        steps, losses = _curve(of_set, "loss")
        if not losses:
            continue
        label = f"{name}  {losses[-1]:.3f}"
        if of_set[-1].get("bits_per_byte") is not None:
            label += f"  ({of_set[-1]['bits_per_byte']:.3f} bits/byte)"
        color = EVALS[i % len(EVALS)]
        axes.plot(
            steps, losses, color=color, linewidth=1.6, marker="o", ms=4, label=label
        )
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _speed(axes: Any, train: Sequence[Mapping]) -> None:
    from matplotlib import ticker

    steps, speeds = _curve(train, "tokens_per_second")
    axes.plot(steps, speeds, color=SPEED, linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(speeds, default=1))
    axes.set_ylabel("tokens/s", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _token_axis(axes: Any, step: int, tokens: int) -> None:
    """Adds tokens above, at the mean number of tokens a step."""
    from matplotlib import ticker

    a_step = tokens / max(step, 1)
    above = axes.secondary_xaxis(
        "top", functions=(lambda x: x * a_step, lambda x: x / a_step)
    )
    above.set_xlabel("tokens", color=INK, fontsize=9)
    above.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    above.tick_params(colors=INK, labelsize=9)
    above.spines["top"].set_visible(False)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Returns the mean of each value and up to `width` on either side, as many on both."""
    last = len(values) - 1
    means = []
    for i in range(len(values)):
        half = min(width, i, last - i)  # so that the ends of a slope stay on it
        means.append(sum(values[i - half : i + half + 1]) / (2 * half + 1))
    return means
