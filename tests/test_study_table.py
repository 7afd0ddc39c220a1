"""Table and pictures of a study, against numpy and scipy."""

from pathlib import Path

import numpy as np
import pytest
from study_fixtures import NOISE, ONE_SEED, STUDY, cells, expected_recalls, ratio_interval, run, with_interval

from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.spread import Spread, interval
from openclip_otco.study.study import DataSetting


def test_table_against_numpy_and_scipy(home):
    assert run(STUDY) == 0
    page = Path("runs/small/table.md").read_text()
    curves = {
        loss: np.array([[expected_recalls(loss, seed, epoch) for epoch in range(3)] for seed in range(3)]) * 100
        for loss in ("clip", "otco")
    }
    sums = {loss: curve.sum(axis=2) for loss, curve in curves.items()}
    for loss, best in (("clip", "epoch 2"), ("otco", "epoch 3")):
        row = cells(page, "clean", loss)[0]
        assert row[0] == "3"
        assert row[1:7] == [with_interval(curves[loss][:, -1, recall]) for recall in range(6)]
        assert row[7] == with_interval(sums[loss][:, -1])
        assert row[8] == f"{with_interval(sums[loss].max(axis=1))} ({best})"
        assert row[9] == "0.731 ± 0.000"
    ratio, last, best = cells(page, "clean", "otco")[1]
    mean, half = ratio_interval(sums["otco"][:, -1], sums["clip"][:, -1])
    assert ratio == f"{mean:.3f} ± {half:.3f}"
    assert last == with_interval(sums["otco"][:, -1] - sums["clip"][:, -1], "+.1f")
    assert best == with_interval(sums["otco"].max(axis=1) - sums["clip"].max(axis=1), "+.1f")
    assert "bold where the 95 % interval excludes 0" in page
    assert len(cells(page, "clean", "clip")) == 1


def test_one_seed_has_no_interval(home):
    assert run(ONE_SEED) == 0
    page = Path("runs/small/table.md").read_text()
    assert "±" not in page
    assert "One seed" in page


def test_pairs_need_the_same_seed(home, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "clean--clip--s1 clean--otco--s2")
    assert run(STUDY) == 1
    against = cells(Path("runs/small/table.md").read_text(), "clean", "otco")[1]
    difference = 100 * (expected_recalls("otco", 0, 2) - expected_recalls("clip", 0, 2)).sum()
    assert against[1] == f"{difference:+.1f}"


def test_baseline_that_failed(home, drawn, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "clean--clip--s0")
    assert run(ONE_SEED) == 1
    page = Path("runs/small/table.md").read_text()
    assert len(cells(page, "clean", "otco")) == 1
    assert Path("runs/small/rsum.png").exists()


def test_interval():
    assert interval([5.0]) == (5.0, None)
    mean, half = interval([1.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(12.706, abs=1e-3))


def test_interval_of_a_ratio():
    assert Spread.of_ratio([(3.0, 2.0)]) == Spread(1.5, None)
    assert Spread.of_ratio([(3.0, 2.0), (6.0, 4.0), (1.5, 1.0)]) == Spread(1.5, 0.0)
    with pytest.raises(ZeroDivisionError):
        Spread.of_ratio([(1.0, 0.0), (2.0, 0.0)])
    # Numbers as those of a study, five seeds: 95 of 100 intervals hold the true ratio.
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(4000):
        luck = draw.normal(0, 3, 5)
        spread = Spread.of_ratio(list(zip(220 + luck + draw.normal(0, 2, 5), 150 + luck, strict=True)))
        held += spread.low <= 220 / 150 <= spread.high
    assert 0.94 < held / 4000 < 0.96


def test_the_same_results_give_the_same_svg(home, drawn):
    assert run(ONE_SEED) == 0
    first = Path("runs/small/rsum.svg").read_bytes()
    assert run(ONE_SEED, "--table-only") == 0
    assert Path("runs/small/rsum.svg").read_bytes() == first


def test_share_of_the_baseline_on_clean_data(home, monkeypatch):
    assert run(NOISE) == 0
    page = Path("runs/small/table.md").read_text()
    assert "% of clip on clean" in page
    clip, otco = ([expected_recalls(loss, seed, 2).sum() for seed in range(3)] for loss in ("clip", "otco"))
    share, half = ratio_interval(otco, clip)
    for data in ("clean", "mismatch-40", "mismatch-60"):
        assert cells(page, data, "clip")[0][8] == "100.0"
        assert cells(page, data, "otco")[0][8] == f"{100 * share:.1f} ± {100 * half:.1f}"


def test_pictures_are_drawn_where_results_have_their_numbers(home, drawn):
    def pictures():
        return {path.stem for path in Path("runs/small").glob("*.svg")}

    assert run(NOISE) == 0
    assert pictures() == {"rsum", "recalls", "noise", "cost"}
    noise = Path("runs/small/noise.svg").read_text()
    assert Path("runs/small/noise.png").is_file()
    assert run(STUDY) == 0
    assert pictures() == {"rsum", "recalls", "cost"}
    assert run(STUDY.replace('[loss.otco]\nloss = "otco"\notco-confidence = 1.0\n', "")) == 0
    assert pictures() == {"rsum", "recalls"}
    assert run(NOISE) == 0
    assert Path("runs/small/noise.svg").read_text() == noise


@pytest.mark.parametrize(
    ("setting", "share"),
    [
        (DataSetting("any", {"mismatch": 0.4}, {}), 0.4),
        (DataSetting("mismatch-20", {"seed": 1}, {}), 0),
        (DataSetting("clean", None, {}), 0),
        (DataSetting("mismatch-20", None, {}), 0.2),
        (DataSetting("mismatch-200", None, {}), None),
        (DataSetting("clean-small", None, {}), None),
    ],
)
def test_mismatch(setting, share):
    assert mismatch(setting) == share
