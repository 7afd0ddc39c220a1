"""`openclip-otco results`: a page says what the runs say, and cannot be made of runs that are not there."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from study_fixtures import ratio_interval

from openclip_otco import cli
from openclip_otco.errors import UserError
from openclip_otco.runs.train_log import RECALLS
from openclip_otco.study import page_figures, results, table
from openclip_otco.study.page import TEMPLATE, page
from openclip_otco.study.reliability import reliability_figure
from openclip_otco.study.results import Result
from openclip_otco.study.run import runs
from openclip_otco.study.spread import Spread
from openclip_otco.study.study_file import load, shipped_studies
from openclip_otco.study.study_results import StudyResults

STUDY = "flickr8k-frozen"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def result(data: str, loss: str, seed: int, recall: float, all_captions: bool = True) -> Result:
    recalls = {name: recall + 0.01 * index for index, name in enumerate(RECALLS)}
    trained: Any = {"epoch": 4, **{name: value - 0.05 for name, value in recalls.items()}}
    # After the second of four epochs every recall was halved.
    young = {"epoch": 2, **{name: value / 2 for name, value in trained.items() if name != "epoch"}}
    last = 100 * sum(value for name, value in trained.items() if name != "epoch")
    return Result(
        run=f"{data}--{loss}--s{seed}",
        data=data,
        loss=loss,
        seed=seed,
        flags=[],
        scenes=None,
        epochs=[young, trained],
        rsum_last=last,
        rsum_best=last + seed,
        epoch_last=4,
        epoch_best=4,
        seconds_per_step=0.1,
        seconds=20.0 + seed,
        device="cpu",
        versions={"torch": "2"},
        retrieval={**recalls, "texts": 5000, "images": 1000} if all_captions else None,
    )


RECALL = {
    ("clean", "clip"): [0.40, 0.43, 0.41],
    ("clean", "otco"): [0.42, 0.44, 0.45],
    ("mismatch-40", "clip"): [0.25, 0.20, 0.24],
    ("mismatch-40", "otco"): [0.35, 0.39, 0.36],
}


def rsum(recall: float) -> float:
    return 100 * (6 * recall + 0.15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = [result(*cell, seed, recall) for cell, recalls in RECALL.items() for seed, recall in enumerate(recalls)]
    (tmp_path / "found").mkdir()
    results.write(tmp_path / "found" / f"{STUDY}.jsonl", kept)
    return tmp_path / "found"


def made(folder: Path, template: str, *words: str) -> tuple[int, str]:
    (folder / TEMPLATE).write_text(template)
    code = cli.main(["results", str(folder), *words])
    written = folder.with_suffix(".md")
    return code, written.read_text() if written.is_file() else ""


def test_numbers_are_those_of_the_runs(folder: Path) -> None:
    found = StudyResults.read(folder, STUDY)
    for (data, loss), recalls in RECALL.items():
        own, base = (np.array([rsum(r) for r in each]) for each in (recalls, RECALL[data, "clip"]))
        spread = found.rsum(data, loss)
        low, high = scipy.stats.t.interval(0.95, 2, own.mean(), scipy.stats.sem(own))
        assert (spread.mean, spread.low, spread.high) == pytest.approx((own.mean(), low, high))
        ratio, clean = found.ratio(data, loss), found.of_clean(data, loss)
        assert (ratio.mean, ratio.half) == pytest.approx(ratio_interval(own, base), abs=1e-7)
        assert found.difference(data, loss).mean == pytest.approx((own - base).mean(), abs=1e-9)
        on_clean = [rsum(r) for r in RECALL["clean", "clip"]]
        assert (clean.mean, clean.half) == pytest.approx(ratio_interval(own, on_clean), abs=1e-7)
        assert found.best(data, loss).mean == pytest.approx(own.mean() - 30 + 1)
        assert found.seeds(data, loss) == 3
    difference = found.difference("mismatch-40", "otco", "clip")
    paired = scipy.stats.ttest_rel([rsum(r) for r in RECALL["mismatch-40", "otco"]],
                                   [rsum(r) for r in RECALL["mismatch-40", "clip"]])  # fmt: skip
    assert difference.low == pytest.approx(paired.confidence_interval(0.95).low)
    assert difference.above_0
    for epoch, part in ((2, 0.5), (4, 1.0)):
        after = found.difference_after(epoch, "mismatch-40", "otco")
        assert (after.mean, after.half) == pytest.approx((part * difference.mean, part * difference.half))
    with pytest.raises(UserError, match="has no validation after epoch 3"):
        found.difference_after(3, "mismatch-40", "otco")
    assert found.missing == 40 - 12


def test_runs_of_other_flags_are_counted(folder: Path) -> None:
    study = load(STUDY)
    now = {run.name: list(run.flags) for run in runs(study, folder)}
    kept = [replace(result("clean", "clip", seed, 0.4), flags=now[f"clean--clip--s{seed}"]) for seed in range(5)]
    # Where the shards lie, and how many there are, is no matter.
    kept[0] = replace(kept[0], flags=[*kept[0].flags, "--train-data", "a.tar", "--val-data", "b.tar"])
    kept[1] = replace(kept[1], flags=[*kept[1].flags, "--lr", "0.1"])
    kept[2] = replace(kept[2], flags=[*kept[2].flags, "--grad-checkpointing"])
    kept[3] = replace(kept[3], flags=kept[3].flags[2:])
    results.write(folder / f"{STUDY}.jsonl", kept)
    assert StudyResults.read(folder, STUDY).outdated == 3


def test_a_line_twice_is_one_run_and_strangers_are_none(folder: Path) -> None:
    once = [result("clean", "clip", seed, 0.4 + seed / 100) for seed in range(3)]
    results.write(folder / f"{STUDY}.jsonl", once)
    expected = StudyResults.read(folder, STUDY)
    results.write(folder / f"{STUDY}.jsonl", [*once, *once, replace(once[0], run="clean--nobody--s0", loss="nobody")])
    found = StudyResults.read(folder, STUDY)
    assert found.rsum("clean", "clip") == expected.rsum("clean", "clip")
    assert (found.seeds("clean", "clip"), found.missing) == (3, expected.missing)
    results.write(folder / f"{STUDY}.jsonl", [*once, replace(once[0], seconds=-1.0)])
    with pytest.raises(UserError, match="has two different lines of clean--clip--s0; remove one"):
        StudyResults.read(folder, STUDY)


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_write_the_defaults_out(name: str) -> None:
    """Else runs with the default of an earlier version would count as those of today."""
    study = load(name)
    for loss in study.losses:
        if loss.loss == "otco":
            assert {"otco-negatives", "otco-negative-power", "otco-trust", "otco-epsilon"} <= loss.flags.keys()


def test_a_spread_as_text() -> None:
    assert [str(Spread(2.04, 1.0)), Spread(2.04, 1.0).signed, Spread(-2.0, None).signed] == [
        "2.0 ± 1.0",
        "+2.0 ± 1.0",
        "-2.0",
    ]
    assert not Spread(2.0, None).above_0
    assert not Spread(2.0, 3.0).above_0


def test_whether_an_interval_holds_0() -> None:
    held = [Spread(2.0, 3.0), Spread(-2.0, 3.0), Spread(0.0, 0.0), Spread(2.0, 2.0)]
    assert all(spread.holds_0 and spread.low <= 0 <= spread.high for spread in held)
    assert not any(spread.holds_0 for spread in (Spread(2.0, 1.0), Spread(-2.0, 1.0), Spread(0.0, None)))


def test_a_page(folder: Path) -> None:
    code, text = made(folder, '{% set main = study("flickr8k-frozen") %}{{ main.rsum("clean", "clip") }}, '
                      '{{ main.ratio("mismatch-40", "otco").to(2) }} ×\n\n{{ main.table() }}\n\n'
                      '{{ main.against() }}\n\n![]({{ main.figure("noise") }})\n', "--figures")  # fmt: skip
    assert code == 0
    mean = np.mean([rsum(r) for r in RECALL["clean", "clip"]])
    assert f"\n{mean:.1f} ± " in text
    otco, clip = ([rsum(r) for r in RECALL["mismatch-40", loss]] for loss in ("otco", "clip"))
    assert "{:.2f} ± {:.2f} ×".format(*ratio_interval(otco, clip)) in text
    assert "| clean | clip | 3 |" in text
    assert "s/step" not in text
    assert f"![](found/{STUDY}-noise.png)" in text
    assert sorted(path.name for path in folder.iterdir()) == [f"{STUDY}-noise.png", f"{STUDY}.jsonl", TEMPLATE]
    # The same page again, and nothing drawn.
    assert made(folder, (folder / TEMPLATE).read_text()) == (0, text)


def test_recalls_of_all_captions_count_where_all_runs_have_them() -> None:
    evaluated, trained = result("clean", "clip", 0, 0.4), result("clean", "otco", 0, 0.5, all_captions=False)
    on_all_captions = [40 + step for step in range(6)]
    assert table.final_recalls([evaluated])(evaluated) == pytest.approx(on_all_captions)
    assert table.final_recalls([evaluated, trained])(evaluated) == pytest.approx([each - 5 for each in on_all_captions])
    with pytest.raises(ValueError, match="clean--otco--s0: was not evaluated"):
        table.evaluated_recalls(trained)


def test_without_all_captions_the_last_epoch_counts(folder: Path) -> None:
    kept = [result("clean", "clip", seed, 0.4, all_captions=False) for seed in range(2)]
    results.write(folder / f"{STUDY}.jsonl", kept)
    assert StudyResults.read(folder, STUDY).rsum("clean", "clip").mean == pytest.approx(rsum(0.4) - 30)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ nobody }}", "page.md.jinja: 'nobody' is undefined"),
        ("one\n{{ two", "page.md.jinja, line 2: "),
        ('{{ study("no-study") }}', "no-study"),
        ('{{ study("flickr8k-frozen").rsum("clean", "moco") }}', "flickr8k-frozen.jsonl has no run of moco on clean"),
        ('{{ study("flickr8k-near").rsum("mismatch-near-40", "clip") }}', "flickr8k-near.jsonl has no run"),
        ('{{ study("flickr8k-frozen").figure("noise") }}', "give --figures"),
        ('{{ study("flickr8k-frozen").rsum("clean") }}', "page.md.jinja: TypeError: "),
        ('{{ "%.1f" | format(study("flickr8k-frozen")) }}', "page.md.jinja: TypeError: "),
        ('{{ cost(study("flickr8k-frozen"), "clean") }}', "flickr8k-frozen-cost.png is missing; give --figures"),
    ],
)
def test_a_page_that_cannot_be_made(folder: Path, template: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert made(folder, template) == (2, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("openclip-otco results: ")
    assert told in line


def test_no_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(tmp_path)]) == 2
    assert f"{tmp_path / TEMPLATE} is missing" in capsys.readouterr().err


BINS: list[dict[str, Any]] = [
    {"data": "clean", "wrong": 0.0, "bins": [[0.9, 1.0, 40]]},
    {"data": "planted", "wrong": 0.4, "bins": [[0.1, 0.05, 10], [0.95, 0.9, 30]]},
]


def bars_with_errors(axis: Any) -> list[tuple[Any, Any]]:
    """Middles `(n, 2)` and whisker ends, `(n, 2, 2)`, of each `errorbar` of `axis` whose whiskers are vertical."""
    return [(each.lines[0].get_xydata(), np.array(each.lines[2][-1].get_segments())) for each in axis.containers]


ORACLE = {("mismatch-40-matched", "clip"): [0.36, 0.37, 0.39]}
PARTS = {
    ("clean", "density"): [0.42, 0.44, 0.45],
    ("clean", "gamma-0"): [0.41, 0.45, 0.44],
    ("clean", "negatives-none"): [0.39, 0.42, 0.43],
}


def studied(folder: Path, name: str, recall: dict[tuple[str, str], list[float]], *seconds: float) -> StudyResults:
    """The study of that name, whose runs have such recalls; `seconds` of a step by seed."""
    kept = [result(*cell, seed, value) for cell, values in recall.items() for seed, value in enumerate(values)]
    if seconds:
        kept = [replace(run, seconds_per_step=seconds[run.seed] * (2 if run.loss == "otco" else 1)) for run in kept]
    study = load(name)
    names = {*(loss for _, loss in recall)}, {*(data for data, _ in recall)}
    study = replace(study, losses=tuple(loss for loss in study.losses if loss.name in names[0]),
                    data=tuple(data for data in study.data if data.name in names[1]))  # fmt: skip
    return StudyResults(study, kept, folder)


def test_the_oracle_begins_where_the_baseline_is_without_noise(folder: Path) -> None:
    main, oracle = studied(folder, STUDY, RECALL), studied(folder, "flickr8k-oracle", ORACLE)
    (axis,) = page_figures.noise_figure(main, oracle).axes
    curves = {text.get_text(): curve for text, curve in zip(axis.get_legend().get_texts(), bars_with_errors(axis),
                                                            strict=True)}  # fmt: skip
    for loss in ("clip", "otco"):
        middles, whiskers = curves[loss]
        for point, whisker, data in zip(middles, whiskers, ("clean", "mismatch-40"), strict=True):
            own = [rsum(each) for each in RECALL[data, loss]]
            interval = scipy.stats.t.interval(0.95, 2, np.mean(own), scipy.stats.sem(own))
            assert point == pytest.approx([0 if data == "clean" else 40, np.mean(own)])
            assert whisker[:, 1] == pytest.approx(interval)
    middles, _ = curves["oracle: clip on the right pairs alone"]
    expected = [[0, rsum(np.mean(RECALL["clean", "clip"]))], [40, rsum(np.mean(ORACLE["mismatch-40-matched", "clip"]))]]
    assert middles == pytest.approx(np.array(expected))


@pytest.mark.parametrize("seeds", [2, 4], ids=["a seed without a baseline", "a seed with a baseline alone"])
def test_the_waterfall_adds_up_over_shared_seeds(folder: Path, seeds: int) -> None:
    base = [*RECALL["clean", "clip"], 0.9][:seeds]
    shared = min(seeds, 3)
    losses = studied(folder, "flickr8k-baselines", {("clean", "clip"): base})
    (axis,) = page_figures.waterfall_figure(losses, studied(folder, "flickr8k-ablations", PARTS), ("clean",)).axes
    bars = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axis.patches]
    clip, both, negatives, trust = (np.mean([rsum(r) for r in each[:shared]]) for each in (base, *PARTS.values()))
    expected = [(0, negatives - clip), (negatives - clip, both - clip), (0, both - clip), (0, trust - clip)]
    assert np.array(bars) == pytest.approx(np.array(expected), abs=1e-6)
    paired = scipy.stats.ttest_rel(*([rsum(r) for r in each[:shared]] for each in (PARTS["clean", "density"], base)))
    (whiskers,) = (np.array(each.get_segments()) for each in axis.collections)
    assert whiskers[2][:, 1] == pytest.approx(tuple(paired.confidence_interval(0.95)))


def test_cost_is_a_ratio_paired_by_seed(folder: Path) -> None:
    losses = studied(folder, "flickr8k-baselines", RECALL, 0.1, 0.3, 0.7)
    (axis,) = page_figures.cost_figure(losses, "mismatch-40").axes
    assert axis.get_title() == "40 % wrong captions"
    points = np.array([each.lines[0].get_xydata()[0] for each in axis.containers])
    expected = [[factor, rsum(np.mean(RECALL["mismatch-40", loss]))] for factor, loss in ((1, "clip"), (2, "otco"))]
    assert points == pytest.approx(np.array(expected))
    assert losses.step_ratio("mismatch-40", "otco").half == pytest.approx(0, abs=1e-9)


@pytest.fixture
def scores(folder: Path) -> Path:
    values = {"cosine": (0.9, 0.92, 0.91), "both": (0.95, 0.96, 0.97)}
    lines: list[dict[str, Any]] = [
        {"score": score, "seed": seed, "auroc": auroc} for score in values for seed, auroc in enumerate(values[score])
    ]
    lines += [{"score": "towers", "seed": None, "auroc": 0.94}, {"score": "towers", "share": 0.4}]
    lines += [{"score": "inner", "seed": seed, "found": {"auroc": 0.8 + seed / 100}} for seed in range(3)]
    lines += [{"score": "other inner", "seed": seed, "found": {"auroc": 0.7}} for seed in (1, 2, 0)]
    lines += [{"score": "inner", "seed": 3, "found": None}]
    (folder / "scores.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_lines_of_another_list(scores: Path) -> None:
    (scores / "other.md.jinja").write_text(
        '{% set all = lines("scores") %}{{ all.where(score="both").spread("auroc").to(3) }}, '
        '{{ all.where(score="both").ahead(all.where(score="cosine"), "auroc").to(2, 100) }}, '
        '{{ all.where(score="towers", seed=none).one("auroc") }}, {{ all.where(score="towers").one("share") }}, '
        '{{ all.where(score="inner").spread("found.auroc").to(3) }}, '
        '{{ all.where(score="inner").ahead(all.where(score="other inner"), "found.auroc").to(3) }}'
    )
    out = scores / "other.md"
    assert cli.main(["results", str(scores), "--template", "other.md.jinja", "--out", str(out)]) == 0
    note, said = out.read_text().split("-->\n")
    assert "from found/other.md.jinja" in note
    # Of 0.95, 0.96, 0.97, and of 0.05, 0.04, 0.06: the t quantile of two degrees, 4.303, by the root of 3.
    assert said == "0.960 ± 0.025, 5.00 ± 2.48, 0.94, 0.4, 0.810 ± 0.025, 0.110 ± 0.025"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ('{{ lines("nothing") }}', "nothing.jsonl: cannot be read"),
        ('{{ lines("broken") }}', "broken.jsonl: cannot be read"),
        ('{{ lines("scores").where(score="none").spread("auroc") }}', "none of the lines asked for has auroc"),
        ('{{ reliability(lines("scores")) }}', "scores.jsonl: a reliability diagram needs lines with bins"),
        ('{{ reliability(lines("bins")) }}', "bins-reliability.png is missing; give --figures"),
        ('{% set all = lines("scores") %}{{ all.ahead(all.where(score="cosine"), "auroc") }}',
         "of the lines to compare have the same seed as another"),
        ('{{ lines("scores").one("auroc") }}', "7 of the lines asked for have auroc, and not one"),
    ],
)  # fmt: skip
def test_lines_that_are_not_there(scores: Path, template: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (scores / "broken.jsonl").write_text("{")
    (scores / "bins.jsonl").write_text(f"{json.dumps(BINS[1])}\n")
    assert made(scores, template) == (2, "")
    assert told in capsys.readouterr().err


def test_a_reliability_diagram(folder: Path) -> None:
    (folder / "bins.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in BINS))
    template = '![]({{ reliability(lines("bins")) }})'
    code, text = made(folder, template, "--figures")
    assert code == 0
    assert text.endswith("![](found/bins-reliability.png)")
    picture = folder / "bins-reliability.png"
    before = picture.stat().st_mtime_ns
    assert made(folder, template) == (0, text)
    assert picture.stat().st_mtime_ns == before
    (axis,) = reliability_figure(BINS).axes
    diagonal, curve = (np.array(line.get_xydata()) for line in axis.lines)
    assert (diagonal[:, 0] == diagonal[:, 1]).all()
    assert curve == pytest.approx(np.array([[10, 5], [95, 90]]))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["said = right", "planted"]


@pytest.mark.parametrize(
    ("page_of", "template"),
    [
        ("results.md", TEMPLATE),
        ("audit.md", "audit.md.jinja"),
        ("calibrate.md", "calibrate.md.jinja"),
        ("compatibility.md", "compatibility.md.jinja"),
    ],
)
def test_the_committed_pages_are_those_that_the_runs_give(page_of: str, template: str) -> None:
    found = page(RESULTS, template=template)
    assert (ROOT / "docs" / page_of).read_text(encoding="utf-8") == found


@pytest.mark.parametrize("name", [name for name in shipped_studies() if (RESULTS / f"{name}.jsonl").is_file()])
def test_committed_runs_are_those_of_their_studies(name: str) -> None:
    found = StudyResults.read(RESULTS, name)
    cross = {
        f"{data.name}--{loss.name}--s{seed}"
        for data in found.study.data
        for loss in found.study.losses
        for seed in found.study.seeds
    }
    assert sorted(run.run for run in found.kept) == sorted(cross)
    assert found.outdated == 0


def test_the_committed_runs_have_finite_numbers() -> None:
    for path in RESULTS.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            assert all(math.isfinite(kept[name]) for name in ("rsum_last", "rsum_best") if name in kept), path
