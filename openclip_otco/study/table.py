"""The Markdown table of a study: every loss in every data setting, and each loss against the first."""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy.stats import t as student_t

from openclip_otco.pages.markdown import markdown_table
from openclip_otco.runs.train_log import RECALLS
from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.results import Result, standard
from openclip_otco.study.study import DataSetting, Study

_RECALL_HEADS = [f"{way} R@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)]

_WHOLE = "rsum, all captions"
_WORDS = ("data", "loss")


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


def final_recalls(result: Result, whole: bool) -> list[float]:
    """The six recalls in percent after the last epoch: by standard retrieval if `whole`, else as in training."""
    metrics = result.retrieval if whole and result.retrieval else result.last
    return [100 * metrics[recall] for recall in RECALLS]


def final_rsum(result: Result, whole: bool) -> float:
    """The sum of `final_recalls`, 0 to 600."""
    return sum(final_recalls(result, whole))


def markdown(study: Study, results: Sequence[Result], command: str) -> str:
    """The page: note, how it was made, both tables, and the runs that are missing."""
    missing = len(study.data) * len(study.losses) * len(study.seeds) - len(results)
    blocks = [
        f"# Study {study.name}",
        study.note.strip(),
        f"Made by `{command}` with {_versions(results)}.",
        f"**{missing} of the study's runs are missing: failed, or not run yet.**" if missing else "",
        _explanation(study, results, standard(results)),
        recall_table(study, results),
        against_baseline(study, results),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def recall_table(study: Study, results: Sequence[Result], speed: bool = True) -> str:
    """A row for each loss in each setting: recalls and their sums; with `speed`, seconds per step as well."""
    clean = clean_setting(study)
    whole = standard(results)
    share = [] if clean is None else [f"% of {study.losses[0].name} on {clean.name}"]
    sums = [_WHOLE, *share, "rsum, last epoch"] if whole else ["rsum, last epoch", *share]
    heads = ["data", "loss", "seeds", *_RECALL_HEADS, *sums, "rsum, best epoch", "s/step"]
    rows = [
        _row(data.name, loss.name, runs, whole, _share(study, results, clean, runs, whole))
        for data, loss, runs in _cells(study, results)
        if runs
    ]
    if not speed:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return markdown_table(heads, rows, words=_WORDS)


def against_baseline(study: Study, results: Sequence[Result]) -> str:
    """Each loss against the study's first, with a line that says how; empty where there is nothing to compare."""
    whole = standard(results)
    rows = _against_baseline(study, results, whole)
    if not rows:
        return ""
    columns = ["ratio, last", "difference, last", "difference, best against best"]
    if whole:
        columns = ["ratio, all captions", "difference, all captions", *columns]
    return (
        f"Against `{study.losses[0].name}`: ratio of the mean rsum, and differences of rsum, paired by seed"
        f"{'' if len(study.seeds) == 1 else '; bold where the 95 % interval excludes 0'}.\n\n"
        + markdown_table(["data", "loss", *columns], rows, words=_WORDS)
    )


def _explanation(study: Study, results: Sequence[Result], whole: bool) -> str:
    lines = "Validation after the last epoch: recall in %, rsum the sum of the six (0 to 600); "
    if whole:
        sizes = [result.retrieval for result in results if result.retrieval]
        captions = " or ".join(f"{number:g}" for number in sorted({size["texts"] / size["images"] for size in sizes}))
        lines = (
            f"Recall in % and `{_WHOLE}`: retrieval after the last epoch by `openclip-otco evaluate`, {captions} "
            "captions an image, of which any is a hit and each is a query. `rsum, last epoch` and `rsum, best epoch`: "
            "OpenCLIP's validation during training, one caption an image, which is another scale. An rsum is the sum "
            "of six recalls (0 to 600); "
        )
    return f"{lines}seconds per optimizer step without the first. {_spread(study)}"


def clean_setting(study: Study) -> DataSetting | None:
    """The setting without mismatch, if there are others to compare with it."""
    return next((data for data in study.data if mismatch(data) == 0), None) if len(study.data) > 1 else None


def _share(
    study: Study, results: Sequence[Result], clean: DataSetting | None, runs: Sequence[Result], whole: bool
) -> list[str]:
    """The cell with the mean rsum of `runs` in percent of the baseline's on clean data; none without such a setting."""
    if clean is None:
        return []
    best = [final_rsum(result, whole) for result in cell(results, clean.name, study.losses[0].name)]
    if not any(best):
        return [""]
    return [f"{100 * statistics.fmean(final_rsum(run, whole) for run in runs) / statistics.fmean(best):.1f}"]


def _cells(study: Study, results: Sequence[Result]) -> list[tuple]:
    return [(data, loss, cell(results, data.name, loss.name)) for data in study.data for loss in study.losses]


def _row(data: str, loss: str, runs: Sequence[Result], whole: bool, share: Sequence[str]) -> list[str]:
    recalls = [final_recalls(run, whole) for run in runs]
    first_best, last_best = min(r.epoch_best for r in runs), max(r.epoch_best for r in runs)
    when = f"epoch {first_best}" if first_best == last_best else f"epochs {first_best} to {last_best}"
    speeds = [run.seconds_per_step for run in runs if run.seconds_per_step is not None]
    last = _text([run.rsum_last for run in runs])
    return [
        data,
        loss,
        str(len(runs)),
        *(_text(values) for values in zip(*recalls, strict=True)),
        *([_text([sum(each) for each in recalls]), *share, last] if whole else [last, *share]),
        f"{_text([run.rsum_best for run in runs])} ({when})",
        _text(speeds, ".3f") if speeds else "",
    ]


def _against_baseline(study: Study, results: Sequence[Result], whole: bool) -> list[list[str]]:
    rows = []
    for data in study.data:
        baseline = {run.seed: run for run in cell(results, data.name, study.losses[0].name)}
        for loss in study.losses[1:]:
            pairs = [(run, baseline[run.seed]) for run in cell(results, data.name, loss.name) if run.seed in baseline]
            if not pairs:
                continue
            row = [data.name, loss.name]
            if whole:
                row += [_ratio(pairs, _all_captions), _difference(pairs, _all_captions)]
            rows.append([*row, _ratio(pairs, _last), _difference(pairs, _last), _difference(pairs, _best)])
    return rows


def _all_captions(result: Result) -> float:
    return final_rsum(result, whole=True)


def _last(result: Result) -> float:
    return result.rsum_last


def _best(result: Result) -> float:
    return result.rsum_best


def _ratio(pairs: Sequence[tuple[Result, Result]], of: Callable[[Result], float]) -> str:
    below = sum(of(base) for _, base in pairs)
    return f"{sum(of(run) for run, _ in pairs) / below:.3f}" if below else "no ratio to 0"


def _difference(pairs: Sequence[tuple[Result, Result]], of: Callable[[Result], float]) -> str:
    values = [of(run) - of(base) for run, base in pairs]
    mean, half = interval(values)
    text = _text(values, "+.1f")
    return f"**{text}**" if half is not None and abs(mean) > half else text


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
