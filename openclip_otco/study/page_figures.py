"""The pictures on the page of results that need runs of several studies.

An rsum is `StudyResults.rsum`; whiskers are 95 % Student-t intervals over seeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.spread import Spread
from openclip_otco.study.style import COLOURS, line_style, pyplot

if TYPE_CHECKING:
    from openclip_otco.study.study_results import StudyResults

_RSUM = "rsum (sum of six recalls, %)"
_SHARE = "training captions that belong to another image, %"


def noise_figure(main: StudyResults, oracle: StudyResults) -> Any:
    """Rsum over the share of wrong captions, for the losses of `main` and for the baseline on the right pairs alone.

    Args:
        main: has data without wrong captions, and data with random ones.
        oracle: has the baseline on the same data without the mismatched images. Where no image is mismatched, it is the
            baseline of `main`.
    """
    shares = {data.name: 100 * share for data in main.study.data if (share := mismatch(data)) is not None}
    baseline = main.study.losses[0].name
    oracle_shares = {
        data.name: float(data.flickr8k.mismatch)
        for data in oracle.study.data
        if data.flickr8k is not None and data.flickr8k.matched_only and not data.flickr8k.near
    }
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    oracle_points = [(share, main.rsum(name, baseline)) for name, share in shares.items() if share == 0]
    oracle_points += [(share, oracle.rsum(name, baseline)) for name, share in oracle_shares.items()]
    label = f"oracle: {baseline} on the right pairs alone"
    _line(axis, oracle_points, label=label, linestyle="--", **line_style(len(main.study.losses)))
    for index, loss in enumerate(main.study.losses):
        _line(axis, [(share, main.rsum(name, loss.name)) for name, share in shares.items()], label=loss.name,
              **line_style(index))  # fmt: skip
    axis.set_xticks(sorted(shares.values()))
    axis.set_xlabel(_SHARE)
    axis.set_ylabel(_RSUM)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    return figure


def waterfall_figure(losses: StudyResults, parts: StudyResults, settings: tuple[str, ...]) -> Any:
    """What weighted negatives and trust add to the baseline, as a waterfall for each of `settings`.

    The first bar is the gain of weighted negatives, the second what trust adds to that, the third both. The last one is
    the gain of trust without weighted negatives. All are differences paired by seed, over the seeds that all have.

    Args:
        losses: has the baseline.
        parts: has `gamma-0` (no trust), `negatives-none` (no weighted negatives), and its first loss, with both.
    """
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(1.5 + 3.5 * len(settings), 4), layout="constrained", squeeze=False
    )
    both = parts.study.losses[0].name
    heads = ("weighted\nnegatives", "then\ntrust", f"both:\n{both}", "trust\nalone")
    for axis, setting in zip(axes[0], settings, strict=True):
        _waterfall(axis, _gains(losses, parts, setting))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(4), heads)
        axis.set_title(_title(parts, setting))
        axis.margins(y=0.12)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel(f"rsum, difference to {losses.study.losses[0].name}")
    return figure


def _gains(losses: StudyResults, parts: StudyResults, setting: str) -> list[Spread]:
    """The four bars of `waterfall_figure` for one setting."""
    runs = [
        losses.by_seed(setting, losses.study.losses[0].name),
        *(parts.by_seed(setting, name) for name in ("gamma-0", "negatives-none", parts.study.losses[0].name)),
    ]
    shared = set.intersection(*map(set, runs))
    baseline, negatives, trust, both = ({seed: rsum[seed] for seed in shared} for rsum in runs)
    pairs = ((negatives, baseline), (both, negatives), (both, baseline), (trust, baseline))
    return [Spread.of_difference(own, other) for own, other in pairs]


def _waterfall(axis: Any, gains: list[Spread]) -> None:
    """Draws the four bars; the second one stands on the first one."""
    starts = (0.0, gains[0].mean, 0.0, 0.0)
    ends = [start + gain.mean for start, gain in zip(starts, gains, strict=True)]
    axis.bar(
        range(4),
        [gain.mean for gain in gains],
        bottom=starts,
        yerr=[gain.half or 0 for gain in gains],
        color=(COLOURS[4], COLOURS[5], COLOURS[1], COLOURS[5]),
        hatch=("", "", "", "//"),
        edgecolor="white",
        error_kw={"elinewidth": 1, "capsize": 3},
    )
    axis.plot([-0.4, 1.4], [ends[0]] * 2, color="grey", linewidth=0.8)
    for place, (gain, end, start) in enumerate(zip(gains, ends, starts, strict=True)):
        top = max(end, start) + (gain.half or 0)
        axis.annotate(f"{gain.mean:+.1f}", (place, top), (0, 3), textcoords="offset points", ha="center")


def cost_figure(losses: StudyResults, setting: str) -> Any:
    """Rsum over the time of a step, as a multiple of the baseline's, paired by seed."""
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for index, loss in enumerate(losses.study.losses):
        time, quality = losses.step_ratio(setting, loss.name), losses.rsum(setting, loss.name)
        style = {"linestyle": "none", "capsize": 3, "label": loss.name, **line_style(index)}
        axis.errorbar(time.mean, quality.mean, quality.half, time.half, markersize=7, **style)
    axis.set_xlabel(f"time of a step, times that of {losses.study.losses[0].name}")
    axis.set_ylabel(_RSUM)
    axis.set_title(_title(losses, setting))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(ncols=2, loc="lower right")
    return figure


def _title(results: StudyResults, setting: str) -> str:
    share = next(mismatch(data) for data in results.study.data if data.name == setting)
    return f"{100 * share:.0f} % wrong captions" if share else setting


def _line(axis: Any, points: list[tuple[float, Spread]], **style: Any) -> None:
    points = sorted(points, key=lambda point: point[0])
    means, halves = [spread.mean for _, spread in points], [spread.half or 0 for _, spread in points]
    axis.errorbar([share for share, _ in points], means, halves, capsize=3, markersize=5, linewidth=1.8, **style)
