"""Fixtures for all tests: paired features with a modality gap, as a half-trained model has them."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hook_fixtures import lab, original, patched  # noqa: F401 (fixtures for all)
from hypothesis import settings
from page_fixtures import browser, visit  # noqa: F401
from study_fixtures import drawn, home  # noqa: F401
from torch import Tensor

# Model hubs may be out of reach, and no test needs them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several workers share the cores; so do the processes that they start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # The user's own cache is neither read nor written. All workers share this one, so that what is in it is made once;
    # the folder goes when the session ends.
    _HOME = tempfile.TemporaryDirectory(prefix="openclip-otco-tests-")
    os.environ["OPENCLIP_OTCO_HOME"] = _HOME.name


# The same examples each time: a suite that draws new ones is red by chance, for changes that did no harm. To search for
# more, as one should now and then: HYPOTHESIS_PROFILE=search.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "not full":
        terminalreporter.write_line(
            "left out: the full cross of test_matrix.py, of which a covering design was run (make test-matrix)"
        )


def paired_features(n: int, d: int = 24, seed: int = 0, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    """`(n, d)` unit-norm image and text features that share a signal; text features lie off to one side."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, d, generator=generator)
    gap = 0.5 * torch.randn(1, d, generator=generator)
    images = signal + noise * torch.randn(n, d, generator=generator)
    texts = signal + noise * torch.randn(n, d, generator=generator) + gap
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    return paired_features(96)
