"""Lines of OpenCLIP's training log."""

import pytest
from study_fixtures import HEAD, TAIL

from openclip_otco.runs import train_log


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{HEAD}Train Epoch: 0 [ 512/5120 (10%)] Data (t): 0.093 Batch (t): 0.463, 276.3/s, 276.3/s/gpu {TAIL}",
            train_log.TrainLine(0, 512, 5120, 0.463),
        ),
        (
            f"{HEAD}Train Epoch: 11 [5120/5120 (100%)] Data (t): 0.001 Batch (t): 12.004, 10.66/s, 10.66/s/gpu {TAIL}",
            train_log.TrainLine(11, 5120, 5120, 12.004),
        ),
        # Accumulation of 4 batches of 128 that do not divide the epoch.
        (
            f"{HEAD}Train Epoch: 2 [ 4608/5000 (100%)] Data (t): 0.010 Batch (t): 1.852, 276.4/s, 276.4/s/gpu {TAIL}",
            train_log.TrainLine(2, 4608, 5000, 1.852),
        ),
        (f"{HEAD}Eval Epoch: 1 [128 / 1000]\tClip Loss: 4.851234\t", None),
        (f"{HEAD}Start epoch 3", None),
        ("", None),
    ],
)
def test_train_line(line, expected):
    assert train_log.train_line(line) == expected


def test_eval_line():
    line = (
        f"{HEAD}Eval Epoch: 1 image_to_text_mean_rank: 51.2000\timage_to_text_median_rank: 20.0000\t"
        "image_to_text_R@1: 0.1000\timage_to_text_R@5: 0.2500\timage_to_text_R@10: 0.3600\t"
        "text_to_image_mean_rank: 50.1000\ttext_to_image_median_rank: 19.0000\ttext_to_image_R@1: 0.1100\t"
        "text_to_image_R@5: 0.2600\ttext_to_image_R@10: 0.3700\tclip_val_loss: 3.1000\tepoch: 1.0000\t"
    )
    assert train_log.eval_rsum(line) == pytest.approx(145.0)
    assert train_log.eval_rsum(line.replace("text_to_image_R@5", "other")) is None


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("Running with a single process. Device cuda:0.", "cuda:0"),
        (
            "Running in distributed mode with multiple processes. Device: cpu.Process (global: 0, local 0), total 2.",
            "cpu",
        ),
        ("Running late", None),
    ],
)
def test_device(line, device):
    assert train_log.device(HEAD + line) == device


def test_timer_of_a_run_that_logs_once():
    timer = train_log.StepTimer()
    timer.add(train_log.TrainLine(0, 128, 128, 0.9))
    assert timer.seconds_per_step is None
