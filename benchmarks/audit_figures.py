"""How well an audit and other scores find planted wrong captions in Flickr8k, and the data that the audit leaves.

`python benchmarks/audit_figures.py STUDY --truth FOLDER --jsonl FILE` takes runs, shards and features as `make study`
leaves them: `STUDY/runs`, `STUDY/data`, and the folder of `--frozen-features`. Pairs are judged window by window as
`openclip-otco audit` does it, with the same functions, on features that runs have kept. Only encoding is left out.

It writes a line for each score of each setting: AUROC, average precision (wrong captions are the positives) and, for
probabilities, the expected calibration error with its ten bins: the mean gap between the probability that the audit
says and the share of right pairs. `towers` needs no training; `both` adds a checkpoint's plan. With `--write-clean` the
pairs that the audit leaves of the data with 40 % wrong captions go to `STUDY/data/cleaned-*`, for the study
`configs/flickr8k-cleaned.toml`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lemon import lemon
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision
from tqdm import tqdm

from openclip_otco.audit import table
from openclip_otco.audit.clean import write_clean
from openclip_otco.audit.confidence import judge_by_plan
from openclip_otco.audit.decoys import draw_decoys
from openclip_otco.audit.score import Truth, auroc
from openclip_otco.audit.source import Shards
from openclip_otco.audit.structure import Structure, centred
from openclip_otco.audit.two_groups import WrongShare, overall_share
from openclip_otco.audit.verdict import log_density
from openclip_otco.audit.windows import windows
from openclip_otco.audit.witnesses import FOLDS, TowerJudgement, canonical_cosines, combine_with_model, judge_by_towers
from openclip_otco.frozen.shard_pairs import content_key
from openclip_otco.frozen.table import FeatureTable
from openclip_otco.method.solver import PlanSolver
from openclip_otco.models.folder import home
from openclip_otco.runs import checkpoint

WINDOW = 4096
CLEAN_FROM = "mismatch-40"
# Setting: its shards, and its list of wrong captions.
SETTINGS = {
    "clean": ("flickr8k-mismatch-0", None),
    "mismatch-20": ("flickr8k-mismatch-20", "mismatch-20.csv"),
    "mismatch-40": ("flickr8k-mismatch-40", "mismatch-40.csv"),
    "mismatch-60": ("flickr8k-mismatch-60", "mismatch-60.csv"),
    "mismatch-near-40": ("flickr8k-mismatch-near-40", "mismatch-near-40.csv"),
}


@dataclass
class Window:
    """Pairs that are judged together, and the judgement of the towers.

    `judged` of them, those in front, were in the window before, where they were judged.
    """

    pairs: Tensor
    judged: int
    image: Tensor
    caption: Tensor
    by_towers: TowerJudgement = field(init=False)

    def put(self, into: np.ndarray, values: np.ndarray) -> None:
        """Put the values of the pairs that this window judges to their places among all pairs."""
        into[self.pairs[self.judged :].numpy()] = values[self.judged :]


@dataclass
class Setting:
    """All pairs of a setting: keys, places, features of the frozen towers, and which captions are wrong."""

    name: str
    source: Shards
    keys: list[str]
    places: list[tuple[int, int]]
    image_towers: Tensor
    text_towers: Tensor
    windows: list[Window]
    wrong: np.ndarray
    kept: dict[str, set[str]] = field(default_factory=dict)

    @property
    def wrong_estimated(self) -> WrongShare:
        """The share of wrong pairs in all windows, as the towers estimate it."""
        return overall_share(
            [each.by_towers.wrong for each in self.windows], [len(each.pairs) - each.judged for each in self.windows]
        )


def read(study: Path, truth: Path, name: str, features: Path) -> Setting:
    folder, listed = SETTINGS[name]
    source = Shards(f"{study}/data/{folder}/{{0000..0009}}.tar")
    keys, places, image, caption = [], [], [], []
    for sample in source.samples():
        keys.append(sample.key)
        places.append((sample.shard, sample.number))
        image.append(content_key(sample.files["jpg"]))
        caption.append(content_key(sample.files["txt"]))
    images, captions = torch.tensor(image), torch.tensor(caption)
    known = Truth(truth / listed) if listed else None
    parts = [(torch.tensor(part.items), part.judged) for part in windows([list(range(len(keys)))], WINDOW)]
    return Setting(
        name,
        source,
        keys,
        places,
        rows_of(features, "image", images),
        rows_of(features, "text", captions),
        [
            Window(part, judged, *(each[part].unique(return_inverse=True)[1] for each in (images, captions)))
            for part, judged in parts
        ],
        np.array([known is not None and known.is_wrong(key) for key in keys]),
    )


def rows_of(features: Path, kind: str, keys: Tensor) -> Tensor:
    """The features of the table that holds all of `keys`."""
    for folder in sorted(features.glob(f"{kind}-*/")):
        stored = FeatureTable(folder)
        rows = stored.find(keys)
        if (rows >= 0).all():
            return stored.take(rows).float()
    raise SystemExit(f"{features}: no table holds all {kind} features of these shards; run `make study` first")


def trained_features(run: Path, setting: Setting) -> tuple[Tensor, Tensor]:
    """The features that the heads of a run's checkpoint make of those of the towers."""
    (path,) = (run / "checkpoints").glob("epoch_*.pt")
    model = checkpoint.load(path, device="cpu").model
    with torch.inference_mode():
        sides = [
            F.normalize(torch.cat([encode(part) for part in side.split(4096)]).float(), dim=1)
            for encode, side in (
                (model.encode_image, setting.image_towers),
                (model.encode_text, setting.text_towers),
            )
        ]
    return sides[0], sides[1]


def by_window(setting: Setting, ask: Callable[[Window], np.ndarray]) -> np.ndarray:
    found = np.empty(len(setting.keys))
    for window in tqdm(setting.windows, desc=setting.name, disable=None):
        window.put(found, ask(window))
    return found


def without_training(setting: Setting) -> Iterator[dict[str, Any]]:
    """The lines of the witnesses that need no training, alone and together."""

    def towers_of(window: Window) -> tuple[Tensor, Tensor]:
        return centred(setting.image_towers[window.pairs]), centred(setting.text_towers[window.pairs])

    def structure(window: Window) -> np.ndarray:
        found = Structure(*towers_of(window), window.image, window.caption)
        every = torch.arange(len(window.pairs))
        return found.correlation(every, every, torch.ones(len(every))).numpy()

    def canonical(window: Window) -> np.ndarray:
        images, texts = towers_of(window)
        decoys = draw_decoys(window.image, window.caption, FOLDS, 1)
        return canonical_cosines(images, texts, torch.ones(len(images)), decoys)[0].numpy()

    def towers(window: Window) -> np.ndarray:
        sides = setting.image_towers[window.pairs], setting.text_towers[window.pairs]
        window.by_towers = judge_by_towers(*sides, window.image, window.caption)
        return window.by_towers.probability

    yield line(setting, "untrained", None, "structure", by_window(setting, structure))
    yield line(setting, "untrained", None, "canonical", by_window(setting, canonical))
    probability = by_window(setting, towers)
    score = by_window(setting, lambda window: window.by_towers.score / window.by_towers.decoy_scale)
    share = setting.wrong_estimated
    said = dict(zip(("wrong_low", "wrong_high"), share.interval(), strict=True), wrong_estimated=share.value)
    yield line(setting, "untrained", None, "towers", score, probability) | said
    if setting.name == CLEAN_FROM:
        setting.kept["towers"] = kept(setting, probability, score, share.value)


def trained(setting: Setting, run: Path, loss: str, seed: int) -> Iterator[dict[str, Any]]:
    """The lines of a checkpoint's witnesses, and of its plan together with the towers."""
    v, t = trained_features(run, setting)

    def density(window: Window) -> np.ndarray:
        plan = PlanSolver().solve(v[window.pairs], t[window.pairs])
        return log_density(judge_by_plan(plan, window.image.tolist(), window.caption.tolist()))

    cosine = (v * t).sum(dim=1).numpy()
    plan, probability, order = (np.empty(len(cosine)) for _ in range(3))
    for window in setting.windows:
        by_plan = density(window)
        for into, values in zip(
            (plan, probability, order), (by_plan, *combine_with_model(window.by_towers, by_plan)), strict=True
        ):
            window.put(into, values)
    neighbours = by_window(setting, lambda each: -lemon(v[each.pairs], t[each.pairs], each.image, each.caption).numpy())
    rank = np.empty(len(cosine))
    rank[np.lexsort((order, probability))] = np.arange(len(cosine))
    yield line(setting, loss, seed, "cosine", cosine)
    yield line(setting, loss, seed, "plan", plan)
    yield line(setting, loss, seed, "lemon", neighbours)
    yield line(setting, loss, seed, "both", rank, probability)
    if (setting.name, loss, seed) == (CLEAN_FROM, "otco", 0):
        share = setting.wrong_estimated.value
        setting.kept["both"] = kept(setting, probability, order, share)
        setting.kept["cosine"] = kept(setting, cosine, cosine, share)


def line(
    setting: Setting, loss: str, seed: int | None, score: str, values: np.ndarray, probability: np.ndarray | None = None
) -> dict[str, Any]:
    wrong = setting.wrong
    found: dict[str, Any] = {"data": setting.name, "trained": loss, "seed": seed, "score": score, "pairs": len(wrong)}
    found["wrong"] = float(wrong.mean())
    if wrong.any():
        found["auroc"] = auroc(values, wrong)
        found["average_precision"] = _average_precision(values, wrong)
    if probability is not None:
        bins = np.clip((10 * probability).astype(int), 0, 9)
        there = [bins == number for number in range(10) if (bins == number).any()]
        found["bins"] = [
            [round(float(probability[each].mean()), 4), round(float(1 - wrong[each].mean()), 4), int(each.sum())]
            for each in there
        ]
        found["calibration_error"] = sum(abs(said - true) * n for said, true, n in found["bins"]) / len(wrong)
        found["wrong_by_mean"] = float(1 - probability.mean())
    print(json.dumps({name: value for name, value in found.items() if name != "bins"}), flush=True)
    return found


def _average_precision(values: np.ndarray, wrong: np.ndarray) -> float:
    # Of ranks, the highest for the lowest value, as torchmetrics takes other numbers for logits and rounds them.
    ranks = torch.from_numpy(rankdata(-values) / len(values))
    return float(binary_average_precision(ranks, torch.from_numpy(wrong.astype(int))))


def kept(setting: Setting, probability: np.ndarray, order: np.ndarray, wrong: float) -> set[str]:
    """The keys that `--drop auto` keeps."""
    ranked = np.lexsort((order, probability))[round(wrong * len(order)) :]
    return {setting.keys[index] for index in ranked}


def write(setting: Setting, study: Path, choices: dict[str, set[str]]) -> Iterator[dict[str, Any]]:
    """The shards that each choice leaves, and how many of its pairs are right."""
    choices |= {"oracle": {key for key, wrong in zip(setting.keys, setting.wrong, strict=True) if not wrong}}
    right = choices["oracle"]
    for name, keys in choices.items():
        folder = study / "data" / f"cleaned-{name}"
        if folder.exists():
            if set((folder / "clean-keys.txt").read_text().split()) != keys:
                raise SystemExit(f"{folder}: was cut by another audit; remove it, and the runs on it")
        else:
            part = folder.with_name(f"{folder.name}.parquet")
            table.write(part, _rows(setting), table.PART)
            write_clean(setting.source, [part], lambda row, keys=keys: row["key"] in keys, folder)  # type: ignore[misc]
            part.unlink()
        yield {"data": setting.name, "kept_by": name, "pairs": len(keys), "right": len(keys & right) / len(keys)}


def _rows(setting: Setting) -> Iterator[table.Row]:
    for key, (shard, sample) in zip(setting.keys, setting.places, strict=True):
        row: table.Row = dict.fromkeys(table.PART.names)
        yield row | {
            "key": key, "probability": 0.0, "evidence": 0.0, "shard_number": shard, "sample": sample, "line": 0
        }  # fmt: skip


def seeds_of(setting: str, seeds: Sequence[int], most: int) -> Sequence[int]:
    return seeds if setting == CLEAN_FROM else seeds[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY", type=Path)
    parser.add_argument("--truth", metavar="FOLDER", type=Path, required=True, help="holds mismatch-*.csv")
    parser.add_argument("--jsonl", metavar="FILE", type=Path, required=True)
    parser.add_argument("--features", metavar="FOLDER", type=Path, default=home() / "features")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--write-clean", action="store_true")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for name in args.settings:
        setting = read(args.study, args.truth, name, args.features)
        lines += without_training(setting)
        for loss in ("otco", "clip"):
            for seed in seeds_of(name, args.seeds, 3):
                lines += trained(setting, args.study / "runs" / f"{name}--{loss}--s{seed}", loss, seed)
        if args.write_clean and name == CLEAN_FROM:
            lines += write(setting, args.study, setting.kept)
        # After each setting, so that a crash loses only one.
        args.jsonl.write_text("".join(f"{json.dumps(each)}\n" for each in lines))


if __name__ == "__main__":
    main()
