"""The Markdown tables of a study: each loss in each data setting, and each loss compared with the first."""

from collections.abc import Callable, Sequence

from openclip_otco.pages.markdown import markdown_table
from openclip_otco.runs.train_log import RECALLS
from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.results import Result, have_standard_retrieval
from openclip_otco.study.spread import Spread, interval
from openclip_otco.study.study import DataSetting, Study

_RECALL_HEADS = [f"{way} R@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)]
_ALL_CAPTIONS = "rsum, all captions"

_WORDS = ("data", "loss")
Recalls = Callable[[Result], list[float]]
# A column of the table: its head, and its text for the runs of one loss in one data setting.
_Column = tuple[str, Callable[[Sequence[Result]], str]]
# A run, and the baseline's run with the same seed and data.
_Pairs = Sequence[tuple[Result, Result]]


def cell(results: Sequence[Result], data: str, loss: str) -> list[Result]:
    """The runs of one loss in one data setting, by seed."""
    return sorted((run for run in results if (run.data, run.loss) == (data, loss)), key=lambda run: run.seed)


def validation_recalls(result: Result) -> list[float]:
    """The six recalls in percent of OpenCLIP's validation after the last epoch, with one caption an image."""
    return [100 * result.last[recall] for recall in RECALLS]


def evaluated_recalls(result: Result) -> list[float]:
    """The six recalls in percent of `openclip-otco evaluate` after the last epoch, with all captions of an image.

    Raises:
        ValueError: the run was not evaluated.
    """
    if result.retrieval is None:
        raise ValueError(f"{result.run}: was not evaluated on all captions")
    return [100 * result.retrieval[recall] for recall in RECALLS]


def final_recalls(results: Sequence[Result]) -> Recalls:
    """The recalls that `results` are compared by: those of all captions where all runs have them, else validation's."""
    return evaluated_recalls if have_standard_retrieval(results) else validation_recalls


def markdown(study: Study, results: Sequence[Result], command: str) -> str:
    """The page: note, how it was made, both tables, and the runs that are missing."""
    missing = len(study.data) * len(study.losses) * len(study.seeds) - len(results)
    blocks = [
        f"# Study {study.name}",
        study.note.strip(),
        f"Made by `{command}` with {_versions(results)}.",
        f"**{missing} of the study's runs are missing: failed, or not run yet.**" if missing else "",
        f"{_explanation(results)}; seconds per optimizer step without the first. {_interval_note(study)}",
        recall_table(study, results),
        against_baseline(study, results),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def recall_table(study: Study, results: Sequence[Result], speed: bool = True) -> str:
    """A row for each loss in each setting: recalls and their sums; with `speed`, seconds per step as well."""
    columns: list[_Column] = [
        ("data", lambda runs: runs[0].data),
        ("loss", lambda runs: runs[0].loss),
        ("seeds", lambda runs: str(len(runs))),
        *_recall_columns(final_recalls(results)),
        *_final_rsum_columns(study, results),
        ("rsum, best epoch", _best_rsum),
    ]
    if speed:
        columns.append(("s/step", _seconds_per_step))
    cells = [cell(results, data.name, loss.name) for data in study.data for loss in study.losses]
    rows = [[text(runs) for _, text in columns] for runs in cells if runs]
    return markdown_table([head for head, _ in columns], rows, words=_WORDS)


def against_baseline(study: Study, results: Sequence[Result]) -> str:
    """The table of each loss against the study's first, with a line that explains it; empty without runs to compare."""
    columns: list[tuple[str, Callable[[_Pairs], str]]] = [
        ("ratio, last", lambda pairs: _ratio(pairs, _last_rsum)),
        ("difference, last", lambda pairs: _difference(pairs, _last_rsum)),
        ("difference, best against best", lambda pairs: _difference(pairs, lambda run: run.rsum_best)),
    ]
    if have_standard_retrieval(results):
        columns = [
            ("ratio, all captions", lambda pairs: _ratio(pairs, _evaluated_rsum)),
            ("difference, all captions", lambda pairs: _difference(pairs, _evaluated_rsum)),
            *columns,
        ]
    rows = [
        [data, loss, *(text(pairs) for _, text in columns)] for data, loss, pairs in _baseline_pairs(study, results)
    ]
    if not rows:
        return ""
    return (
        f"Against `{study.losses[0].name}`: ratio of the mean rsum, and differences of rsum, paired by seed"
        f"{'' if len(study.seeds) == 1 else '; bold where the 95 % interval excludes 0'}.\n\n"
        + markdown_table(["data", "loss", *(head for head, _ in columns)], rows, words=_WORDS)
    )


def _explanation(results: Sequence[Result]) -> str:
    """What the recalls and sums of the table are."""
    if not have_standard_retrieval(results):
        return "Validation after the last epoch: recall in %, rsum the sum of the six (0 to 600)"
    sizes = [result.retrieval for result in results if result.retrieval]
    captions = " or ".join(f"{number:g}" for number in sorted({size["texts"] / size["images"] for size in sizes}))
    return (
        f"Recall in % and `{_ALL_CAPTIONS}`: retrieval after the last epoch by `openclip-otco evaluate`, {captions} "
        "captions an image, of which any is a hit and each is a query. `rsum, last epoch` and `rsum, best epoch`: "
        "OpenCLIP's validation during training, one caption an image, which is another scale. An rsum is the sum "
        "of six recalls (0 to 600)"
    )


def clean_setting(study: Study) -> DataSetting | None:
    """The setting without mismatch, if there are others to compare with it."""
    return next((data for data in study.data if mismatch(data) == 0), None) if len(study.data) > 1 else None


def _recall_columns(recalls: Recalls) -> list[_Column]:
    def column(place: int) -> Callable[[Sequence[Result]], str]:
        return lambda runs: _text([recalls(run)[place] for run in runs])

    return [(head, column(place)) for place, head in enumerate(_RECALL_HEADS)]


def _final_rsum_columns(study: Study, results: Sequence[Result]) -> list[_Column]:
    """The sums of recalls after the last epoch, and what share they are of the baseline's on clean data."""
    last: _Column = ("rsum, last epoch", lambda runs: _text([run.rsum_last for run in runs]))
    share = _share_of_clean(study, results)
    if not have_standard_retrieval(results):
        return [last, *share]
    return [(_ALL_CAPTIONS, lambda runs: _text([_evaluated_rsum(run) for run in runs])), *share, last]


def _share_of_clean(study: Study, results: Sequence[Result]) -> list[_Column]:
    """The column with the rsum in percent of the baseline's on clean data, by seed; none without such a setting."""
    clean = clean_setting(study)
    if clean is None:
        return []
    recalls = final_recalls(results)
    baseline = {run.seed: sum(recalls(run)) for run in cell(results, clean.name, study.losses[0].name)}

    def percent(runs: Sequence[Result]) -> str:
        pairs = [(sum(recalls(run)), baseline[run.seed]) for run in runs if run.seed in baseline]
        if not any(base for _, base in pairs):
            return ""
        # The baseline beside itself is 100 whatever the seeds: an interval would say nothing.
        return "100.0" if all(own == base for own, base in pairs) else Spread.of_ratio(pairs).to(1, factor=100)

    return [(f"% of {study.losses[0].name} on {clean.name}", percent)]


def _best_rsum(runs: Sequence[Result]) -> str:
    """The mean rsum of the best epochs, and which epochs these are."""
    first, last = min(run.epoch_best for run in runs), max(run.epoch_best for run in runs)
    epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
    return f"{_text([run.rsum_best for run in runs])} ({epochs})"


def _seconds_per_step(runs: Sequence[Result]) -> str:
    seconds = [run.seconds_per_step for run in runs if run.seconds_per_step is not None]
    return _text(seconds, ".3f") if seconds else ""


def _baseline_pairs(study: Study, results: Sequence[Result]) -> list[tuple[str, str, _Pairs]]:
    """For each setting and each loss but the first: the runs whose seed the baseline has as well, with the baseline's.

    A loss without such a run is left out.
    """
    found: list[tuple[str, str, _Pairs]] = []
    for data in study.data:
        baseline = {run.seed: run for run in cell(results, data.name, study.losses[0].name)}
        for loss in study.losses[1:]:
            runs = cell(results, data.name, loss.name)
            if pairs := [(run, baseline[run.seed]) for run in runs if run.seed in baseline]:
                found.append((data.name, loss.name, pairs))
    return found


def _evaluated_rsum(result: Result) -> float:
    return sum(evaluated_recalls(result))


def _last_rsum(result: Result) -> float:
    return result.rsum_last


def _ratio(pairs: _Pairs, rsum: Callable[[Result], float]) -> str:
    values = [(rsum(run), rsum(base)) for run, base in pairs]
    return Spread.of_ratio(values).to(3) if any(base for _, base in values) else "no ratio to 0"


def _difference(pairs: _Pairs, rsum: Callable[[Result], float]) -> str:
    values = [rsum(run) - rsum(base) for run, base in pairs]
    mean, half = interval(values)
    text = _text(values, "+.1f")
    return f"**{text}**" if half is not None and abs(mean) > half else text


def _text(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and half-width of the interval, in the format `form`."""
    mean, half = interval(values)
    return f"{mean:{form}}" if half is None else f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def _interval_note(study: Study) -> str:
    if len(study.seeds) == 1:
        return "One seed: no intervals."
    return "Mean ± half-width of the 95 % Student-t interval over seeds."


def _versions(results: Sequence[Result]) -> str:
    """The versions and devices that the runs were made with, in words."""
    texts = {", ".join(f"{name} {number}" for name, number in result.versions.items()) for result in results}
    devices = sorted({result.device for result in results if result.device})
    return "; or ".join(sorted(texts)) + (f", on {' and '.join(devices)}" if devices else "")
