"""Progress over the runs of a study, on a terminal and elsewhere."""

import io
import re
from pathlib import Path

import pytest
from study_fixtures import HEAD, ONE_SEED, STUDY, TAIL

from openclip_otco.runs import train_log
from openclip_otco.study import progress
from openclip_otco.study.run import runs
from openclip_otco.study.study_file import load


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "plain"])
def test_progress_shows_run_share_time_left_and_rsum(home, monkeypatch, stream):
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    Path("study.toml").write_text(ONE_SEED)
    first, second = runs(load("study.toml"), Path("out"))
    shown = progress.Progress([first, second], stream)
    shown.start(first)
    shown.watch(first, f"{HEAD}Train Epoch: 2 [1280/1280 (100%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}")
    recalls = "\t".join(f"{recall}: 0.5000" for recall in train_log.RECALLS)
    shown.watch(first, f"{HEAD}Eval Epoch: 3 {recalls}")
    text = stream.getvalue()
    # The second run's size is unknown and taken for that of the first: 3 of 6 epochs are done.
    assert "50%" in text
    assert "7.68k" in text
    assert "rsum 300.0" in text
    assert "clean--clip--s0" in text
    assert re.search(r"\d\d:\d\d left|<\d\d:\d\d", text)
    shown.end(first, "the first is done")
    shown.start(second)
    shown.close()
    assert "the first is done" in stream.getvalue()


def test_progress_of_several_runs(home, monkeypatch):
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    Path("study.toml").write_text(STUDY)
    cross, stream = runs(load("study.toml"), Path("out"))[:4], io.StringIO()
    shown = progress.Progress(cross, stream)
    for each in cross[:3]:
        shown.start(each)
    line = f"{HEAD}Train Epoch: {{}} [1280/1280 (100%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}"
    shown.watch(cross[0], line.format(1))
    assert "17% of 15.4k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--clip--s0 and 2 more" in last
    shown.watch(cross[1], line.format(2))
    assert "42% of 15.4k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--otco--s0 and 2 more" in last
    # What has failed leaves nothing more to do, and what had been done of it stays done.
    shown.end(cross[0], "failed")
    assert "45% of 14.1k" in stream.getvalue().splitlines()[-2]
    shown.watch(cross[2], line.format(2))
    assert "73% of 14.1k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--clip--s1 and 1 more" in last


def test_plain_progress_is_rare(home):
    Path("study.toml").write_text(ONE_SEED)
    stream = io.StringIO()
    cross = runs(load("study.toml"), Path("out"))
    shown = progress.Progress(cross, stream)
    shown.start(cross[0])
    for samples in range(128, 1281, 128):
        line = f"{HEAD}Train Epoch: 0 [{samples}/1280 (10%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}"
        shown.watch(cross[0], line)
    assert stream.getvalue() == ""
