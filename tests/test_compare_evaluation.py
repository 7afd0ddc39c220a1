"""`compare` where images have several captions: each run is evaluated after its training."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from study_fixtures import (
    ONE_SEED,
    calls,
    cells,
    finished,
    run,
)

from openclip_otco.data.samples import several_captions
from openclip_otco.study import results
from openclip_otco.study import run as study_run

CAPTIONED = ONE_SEED.replace('train-data = "train.csv"', 'train-data = "train.csv"\nval-data = "val.tar"')
FAKE_EVALUATE = """
import json, os, sys
from pathlib import Path

checkpoint, data, out, *frozen = sys.argv[1:]
with open("evaluate-calls.txt", "a") as calls:
    print(checkpoint, data, *frozen, file=calls)
if os.environ.get("FAKE_NO_EVALUATION"):
    sys.exit("no evaluation today")
assert Path(checkpoint).is_file()
quality = 0.5 if "otco" in checkpoint else 0.25
recalls = {f"{way}_R@{k}": quality + 0.01 * k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
Path(out).write_text(json.dumps({"retrieval": {**recalls, "images": 2, "texts": 10}}))
"""


def write_captions(path, captions):
    with tarfile.open(path, "w") as tar:
        for key in ("a", "b"):
            for kind, content in (("jpg", b""), ("json", json.dumps({"captions": captions}).encode())):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def captioned(home, monkeypatch):
    Path("evaluate.py").write_text(FAKE_EVALUATE)
    write_captions("val.tar", ["one"] * 5)
    several_captions.cache_clear()
    command = [sys.executable, "evaluate.py"]
    monkeypatch.setattr(
        study_run, "evaluate_command", lambda checkpoint, data, out: [*command, str(checkpoint), data, str(out)]
    )
    yield Path("evaluate-calls.txt")
    several_captions.cache_clear()


def test_evaluate_command(home):
    words = study_run.evaluate_command(Path("a/epoch_3.pt"), "val.tar", Path("a/found.json"))
    assert words[1:] == [
        "-m",
        "openclip_otco.cli",
        "evaluate",
        "a/epoch_3.pt",
        "--data",
        "val.tar",
        "--out",
        "a/found.json",
    ]


@pytest.mark.parametrize("folder", [True, "features"])
def test_the_evaluation_reads_the_features_that_the_training_kept(captioned, folder):
    flag = f"frozen-features = {json.dumps(folder)}\n"
    assert run(CAPTIONED.replace("[flags]\n", f"[flags]\n{flag}", 1)) == 0
    words = "--frozen-features" if folder is True else f"--frozen-features {folder}"
    assert [line.partition("val.tar ")[2] for line in captioned.read_text().splitlines()] == [words] * 2


def test_images_with_several_captions_are_evaluated(captioned):
    assert run(CAPTIONED) == 0
    folder = "runs/small/runs/clean--{}--s0/checkpoints/epoch_3.pt val.tar"
    assert captioned.read_text().splitlines() == [folder.format(loss) for loss in ("clip", "otco")]
    kept = results.read(Path("runs/small/results.jsonl"))
    assert [result.retrieval["image_to_text_R@5"] for result in kept] == [0.3, 0.55]
    page = Path("runs/small/table.md").read_text()
    assert "`openclip-otco evaluate`, 5 captions an image" in page
    row, against = cells(page, "clean", "otco")
    assert row[1:8] == ["51.0", "55.0", "60.0", "51.0", "55.0", "60.0", "332.0"]
    assert row[8] == f"{kept[1].rsum_last:.1f}"
    assert against[:2] == [f"{332 / 182:.3f}", "+150.0"]
    assert against[2:4] == [
        f"{kept[1].rsum_last / kept[0].rsum_last:.3f}",
        f"{kept[1].rsum_last - kept[0].rsum_last:+.1f}",
    ]
    assert run(CAPTIONED) == 0
    assert len(captioned.read_text().splitlines()) == 2


def test_a_failed_evaluation_keeps_the_training(captioned, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_NO_EVALUATION", "1")
    assert run(CAPTIONED) == 1
    assert "clean--clip--s0 failed: evaluate: exit code 1; its output ends with\n  no evaluation today" in (
        capsys.readouterr().err
    )
    monkeypatch.delenv("FAKE_NO_EVALUATION")
    assert run(CAPTIONED) == 0
    assert len(calls()) == 2
    assert all(result.retrieval for result in results.read(Path("runs/small/results.jsonl")))


def test_results_without_evaluation_are_readable_and_completed(captioned):
    assert run(CAPTIONED) == 0
    for marker in map(finished, ("clean--clip--s0", "clean--otco--s0")):
        old = json.loads(marker.read_text())
        del old["retrieval"]  # as before there was an evaluation
        marker.write_text(json.dumps(old))
    checkpoint = Path("runs/small/runs/clean--otco--s0/checkpoints/epoch_3.pt")
    checkpoint.unlink()
    assert run(CAPTIONED) == 0
    assert len(calls()) == 2
    kept = results.read(Path("runs/small/results.jsonl"))
    # What has lost its checkpoint stays as it is, and then the table compares what all runs have.
    assert [result.retrieval is None for result in kept] == [False, True]
    assert "all captions" not in Path("runs/small/table.md").read_text()


def test_one_caption_an_image_is_not_evaluated(captioned):
    write_captions("val.tar", ["one"])
    assert run(CAPTIONED) == 0
    assert not captioned.exists()
    assert "all captions" not in Path("runs/small/table.md").read_text()
