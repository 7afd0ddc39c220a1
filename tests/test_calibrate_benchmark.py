"""The benchmark of calibrated retrieval: its control, and that a second start goes on where the first one ended."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrate import Cell, cells, drop_replaced, kept_cells, with_zero_potentials
from conftest import paired_features
from scipy.special import logsumexp

from openclip_otco.evaluate.retriever import CalibratedRetriever
from openclip_otco.study.run import Run

EPSILON = 0.1


@pytest.mark.parametrize("way", ["image_to_text", "text_to_image"])
def test_zero_potentials_are_the_inverted_softmax(way: str) -> None:
    images, texts = paired_features(96)
    retriever = with_zero_potentials(CalibratedRetriever.from_features(images[:64], texts[:64], EPSILON))
    support, candidates = (images[:64], texts[64:]) if way == "image_to_text" else (texts[:64], images[64:])
    near = logsumexp((candidates @ support.T).double().numpy() / EPSILON, axis=1)
    found = retriever.potentials(candidates, way).double().numpy()
    # The inverted softmax divides by the sum; a constant changes no order.
    assert found - found.mean() == pytest.approx(-EPSILON * (near - near.mean()), abs=1e-5)
    assert np.ptp(found) > 0.01


@pytest.fixture
def run() -> Run:
    return Run("clean", "otco", 1, Path("runs"), (), None, 4, None)


def test_all_cells_of_a_run(run: Run) -> None:
    found = cells(run, "ab", [0.1, 0.2], [1024], has_plans=True)
    assert len(found) == len(set(found)) == 1 + 2 * 2 * (2 + 1)
    assert {cell.source for cell in cells(run, "ab", [0.1], [1024], has_plans=False)} == {"none", "shards"}


def test_what_is_kept_is_not_done_again_unless_the_checkpoint_is_another(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert kept_cells(path) == set()
    wanted = cells(run, "ab", [0.1], [1024], has_plans=True)

    def line(cell: Cell) -> dict[str, Any]:
        # A line says how large a plan is that the checkpoint holds; nobody knows before it is read.
        pairs = None if cell.source == "none" else 512 if cell.pairs is None else cell.pairs
        return {**asdict(cell), "pairs": pairs, "rsum": 200.0}

    path.write_text("".join(f"{json.dumps(line(cell))}\n" for cell in wanted[:-1]))
    assert [cell for cell in wanted if cell not in kept_cells(path)] == wanted[-1:]
    assert not {replace(cell, checkpoint="cd") for cell in wanted} & kept_cells(path)

    # A run that was trained anew keeps no line of its old checkpoint; a run that is not here keeps all.
    before = path.read_text()
    drop_replaced(path, {run.name: "ab"})
    drop_replaced(path, {"another": "ef"})
    assert path.read_text() == before
    drop_replaced(path, {run.name: "cd"})
    assert path.read_text() == ""
