"""The Markdown table of a study: every loss in every data setting, and each loss against the first."""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy.stats import t as student_t

from openclip_otco.study.log import RECALLS
from openclip_otco.study.results import Result
from openclip_otco.study.study import Study

_RECALL_HEADS = [f"{way} R@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half-width of its 95 % Student-t interval: None for a single value.

    Raises:
        ValueError: no values.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def cell(results: Sequence[Result], data: str, loss: str) -> list[Result]:
    """The runs of one loss in one data setting, by seed."""
    return sorted((r for r in results if (r.data, r.loss) == (data, loss)), key=lambda result: result.seed)


def markdown(study: Study, results: Sequence[Result], command: str) -> str:
    """The page: note, how it was made, both tables, and the runs that are missing."""
    missing = len(study.data) * len(study.losses) * len(study.seeds) - len(results)
    blocks = [
        f"# Study {study.name}",
        study.note.strip(),
        f"Made by `{command}` with {_versions(results)}.",
        f"**{missing} of the study's runs are missing: failed, or not run yet.**" if missing else "",
        "Validation after the last epoch: recall in %, rsum the sum of the six (0 to 600); "
        f"seconds per optimizer step without the first. {_spread(study)}",
        _table(
            ["data", "loss", "seeds", *_RECALL_HEADS, "rsum, last epoch", "rsum, best epoch", "s/step"],
            [_row(data.name, loss.name, runs) for data, loss, runs in _cells(study, results) if runs],
        ),
    ]
    if against := _against_baseline(study, results):
        blocks += [
            f"Against `{study.losses[0].name}`: ratio of the mean rsum after the last epoch, and differences of rsum, "
            "paired by seed.",
            _table(["data", "loss", "ratio, last", "difference, last", "difference, best against best"], against),
        ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cells(study: Study, results: Sequence[Result]) -> list[tuple]:
    return [(data, loss, cell(results, data.name, loss.name)) for data in study.data for loss in study.losses]


def _row(data: str, loss: str, runs: Sequence[Result]) -> list[str]:
    last = [next(e for e in run.epochs if e["epoch"] == run.epoch_last) for run in runs]
    first_best, last_best = min(r.epoch_best for r in runs), max(r.epoch_best for r in runs)
    when = f"epoch {first_best}" if first_best == last_best else f"epochs {first_best} to {last_best}"
    speeds = [run.seconds_per_step for run in runs if run.seconds_per_step is not None]
    return [
        data,
        loss,
        str(len(runs)),
        *(_text([100 * metrics[recall] for metrics in last]) for recall in RECALLS),
        _text([run.rsum_last for run in runs]),
        f"{_text([run.rsum_best for run in runs])} ({when})",
        _text(speeds, ".3f") if speeds else "",
    ]


def _against_baseline(study: Study, results: Sequence[Result]) -> list[list[str]]:
    rows = []
    for data in study.data:
        baseline = {run.seed: run for run in cell(results, data.name, study.losses[0].name)}
        for loss in study.losses[1:]:
            pairs = [(run, baseline[run.seed]) for run in cell(results, data.name, loss.name) if run.seed in baseline]
            if pairs:
                rows.append([data.name, loss.name, _ratio(pairs), *(_difference(pairs, of) for of in (_last, _best))])
    return rows


def _last(result: Result) -> float:
    return result.rsum_last


def _best(result: Result) -> float:
    return result.rsum_best


def _ratio(pairs: Sequence[tuple[Result, Result]]) -> str:
    below = sum(base.rsum_last for _, base in pairs)
    return f"{sum(run.rsum_last for run, _ in pairs) / below:.3f}" if below else "no ratio to 0"


def _difference(pairs: Sequence[tuple[Result, Result]], of: Callable[[Result], float]) -> str:
    return _text([of(run) - of(base) for run, base in pairs], "+.1f")


def _text(values: Sequence[float], form: str = ".1f") -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" if half is None else f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def _spread(study: Study) -> str:
    if len(study.seeds) == 1:
        return "One seed: no intervals."
    return "Mean ± half-width of the 95 % Student-t interval over seeds."


def _versions(results: Sequence[Result]) -> str:
    texts = {", ".join(f"{name} {number}" for name, number in result.versions.items()) for result in results}
    devices = sorted({result.device for result in results if result.device})
    return "; or ".join(sorted(texts)) + (f", on {' and '.join(devices)}" if devices else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Numbers are easier to compare when they end at the same place.
    rule = ["---" if head in ("data", "loss") else "---:" for head in heads]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *rows))
