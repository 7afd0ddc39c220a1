"""`openclip-otco evaluate`: what a checkpoint does on a set of images with several captions each, or with classes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from openclip_otco.data import samples
from openclip_otco.errors import UserError
from openclip_otco.pages.markdown import markdown_table
from openclip_otco.runs.arguments import add_caption_lines, add_frozen_features, count, positive, positive_number

if TYPE_CHECKING:
    from torch import Tensor

    from openclip_otco.data.samples import Sample
    from openclip_otco.evaluate.retriever import CalibratedRetriever
    from openclip_otco.runs.encoder import Encoder

OK = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` to `parser`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="runs/NAME/checkpoints/epoch_N.pt")
    parser.add_argument(
        "--data", metavar="SHARDS", required=True, help="webdataset shards: images, and captions or classes (.cls)"
    )
    parser.add_argument("--model", help="model of the checkpoint (default: that of its run, from params.txt)")
    parser.add_argument("--precision", help="as in training (default: that of the run, else fp32)")
    add_frozen_features(parser)
    add_caption_lines(parser)
    parser.add_argument("--classes", metavar="FILE", type=Path, help="class names, one a line, for .cls 0, 1 and so on")
    parser.add_argument(
        "--templates",
        metavar="FILE",
        type=Path,
        help="prompts, one a line, with {c} for the class name (default: 7 of OpenCLIP's)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="also retrieval calibrated by plans over training features (default: those that the checkpoint caches)",
    )
    parser.add_argument(
        "--calibrate-data",
        metavar="SHARDS",
        help="training shards, whose first pairs are coupled instead; for checkpoints that hold no plans",
    )
    parser.add_argument(
        "--calibrate-pairs",
        type=positive,
        default=4096,
        metavar="N",
        help="pairs of --calibrate-data to couple (%(default)s)",
    )
    parser.add_argument(
        "--calibrate-epsilon",
        type=positive_number,
        metavar="EPSILON",
        help="regularization of the plans, in units of the cosine (default: 0.1)",
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--device", help="device to use (default: the run's, if this machine has it)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the metrics here as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what `args` ask for, and return 0.

    Raises:
        UserError: something that was given cannot be used.
    """
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: cannot be written: there is no folder {args.out.parent}; make it first")
    found = evaluate(args)
    print(page(found))
    if args.out is not None:
        from openclip_otco.files import write_text

        try:
            write_text(args.out, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from error
    return OK


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of `args.checkpoint` on `args.data`: `retrieval` where there are captions, `classification`.

    Raises:
        UserError: something that was given cannot be used.
    """
    # Not at the top: it loads torch, which `--help` does without.
    from openclip_otco.runs import checkpoint

    total = samples.images(args.data)
    if total == 0:
        raise UserError(f"--data {args.data}: no images ({', '.join(samples.IMAGE_TYPES)})")
    names, templates = _prompts(args)
    _check_calibration(args)
    encoder = checkpoint.load(args.checkpoint, args.model, args.precision, args.device, args.frozen_features)
    retriever = _retriever(encoder, args) if args.calibrate else None
    images = _encode_images(encoder, args, total)
    if args.calibrate and not images.have_captions:
        raise UserError(f"--calibrate: --data {args.data} holds no captions (.txt, .json) to retrieve")
    found: dict[str, Any] = {
        "checkpoint": args.checkpoint.name,
        "data": args.data,
        "model": encoder.name,
        "precision": encoder.precision,
    }
    if images.have_captions:
        found |= _retrieval(encoder, images, args, retriever)
    encoder.save_frozen()
    if names:
        found["classification"] = _classification(encoder, images, args, names, templates)
    elif images.labels:
        print("the shards hold classes (.cls): name them by --classes for zero-shot classification", file=sys.stderr)
    return found


def page(found: dict[str, Any]) -> str:
    """The metrics as Markdown tables, recalls and accuracies in percent."""
    lines = [f"{found['checkpoint']}: {found['model']}, {found['precision']}"]
    if metrics := found.get("retrieval"):
        lines += ["", f"Retrieval: {metrics['images']} images, {metrics['texts']} texts, rsum {metrics['rsum']:.1f}"]
        rows = _retrieval_rows(metrics)
        if calibrated := found.get("calibrated_retrieval"):
            gain = calibrated["rsum"] - metrics["rsum"]
            lines += [f"Calibrated by {_plans(found['calibration'])}: rsum {calibrated['rsum']:.1f} ({gain:+.1f})"]
            rows += _retrieval_rows(calibrated, ", calibrated")
            rows = rows[::2] + rows[1::2]  # each way next to its calibrated one
        lines += ["", markdown_table(["", "R@1", "R@5", "R@10", "mean rank", "median rank"], rows, words=[""])]
    if metrics := found.get("classification"):
        lines += ["", f"Zero-shot classification: {metrics['images']} images, {metrics['classes']} classes", ""]
        shares = [name for name in metrics if name not in ("images", "classes")]
        lines.append(markdown_table(shares, [[f"{100 * metrics[name]:.1f}" for name in shares]]))
    return "\n".join(lines)


class _Images(NamedTuple):
    """The images of the shards, all of them with captions or none, and all of them with a label or none."""

    features: Tensor
    """`(n, d)`, unit norm."""
    captions: list[list[str]]
    """Of each image."""
    labels: list[int]
    """Of each image; empty without labels."""

    @property
    def have_captions(self) -> bool:
        return bool(self.captions[0])


def _prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The names of the classes, none without `--classes`, and the templates of their prompts."""
    from openclip_otco.evaluate import zero_shot

    if args.templates and not args.classes:
        raise UserError("--templates: needs --classes")
    names = zero_shot.read_lines("--classes", args.classes) if args.classes else []
    return names, zero_shot.read_templates(args.templates) if args.templates else _default_templates()


def _check_calibration(args: argparse.Namespace) -> None:
    """Looks at the flags of calibration before anything is encoded."""
    from openclip_otco.evaluate import calibration_sources

    for flag, value in (("data", args.calibrate_data), ("epsilon", args.calibrate_epsilon)):
        if value and not args.calibrate:
            raise UserError(f"--calibrate-{flag}: needs --calibrate")
    if args.calibrate_data:
        calibration_sources.check_disjoint(args.data, args.calibrate_data)


def _retrieval(
    encoder: Encoder, images: _Images, args: argparse.Namespace, retriever: CalibratedRetriever | None
) -> dict[str, Any]:
    """The metrics of retrieval; with a `retriever` also those that it calibrates, and its plans."""
    import torch

    from openclip_otco.evaluate.metrics import retrieval

    text_image = torch.tensor([image for image, texts in enumerate(images.captions) for _ in texts])
    text_features = _encode_texts(encoder, images.captions, args.batch_size)
    found: dict[str, Any] = {"retrieval": retrieval(images.features, text_features, text_image)}
    if retriever is not None:
        found["calibrated_retrieval"] = retrieval(
            images.features,
            text_features,
            text_image,
            retriever.potentials(images.features, "text_to_image"),
            retriever.potentials(text_features, "image_to_text"),
        )
        found["calibration"] = {
            "data": args.calibrate_data,
            "plans": [{"step": plan.step, "pairs": len(plan), "epsilon": plan.epsilon} for plan in retriever.plans],
        }
    return found


def _classification(
    encoder: Encoder, images: _Images, args: argparse.Namespace, names: list[str], templates: list[str]
) -> dict[str, float]:
    import torch

    from openclip_otco.evaluate import zero_shot

    if not images.labels:
        raise UserError(f"--classes {args.classes}: the shards hold no classes (.cls) to compare with")
    lowest, highest = min(images.labels), max(images.labels)
    if lowest < 0 or highest >= len(names):
        raise UserError(f"--classes {args.classes}: has {len(names)} names, for labels of {lowest} to {highest}")
    classes = zero_shot.class_features(encoder, names, templates)
    return zero_shot.classification(images.features, torch.tensor(images.labels), classes)


def _retriever(encoder: Encoder, args: argparse.Namespace) -> CalibratedRetriever:
    from openclip_otco.evaluate import calibration_sources
    from openclip_otco.evaluate.retriever import EPSILON

    epsilon = args.calibrate_epsilon or EPSILON
    if not args.calibrate_data:
        return calibration_sources.retriever_of_checkpoint(args.checkpoint, epsilon, encoder.device)
    return calibration_sources.retriever_of_shards(
        encoder,
        args.calibrate_data,
        args.calibrate_pairs,
        epsilon,
        args.batch_size,
        args.workers,
        args.caption_lines,
    )


def _retrieval_rows(metrics: dict[str, float], suffix: str = "") -> list[list[str]]:
    return [
        [
            way.replace("_", " ") + suffix,
            *(f"{100 * metrics[f'{way}_R@{k}']:.1f}" for k in (1, 5, 10)),
            f"{metrics[f'{way}_mean_rank']:.1f}",
            f"{metrics[f'{way}_median_rank']:.0f}",
        ]
        for way in ("image_to_text", "text_to_image")
    ]


def _plans(calibration: dict[str, Any]) -> str:
    """The plans of a calibration, in words."""
    first, *others = calibration["plans"]
    if calibration["data"]:
        what = f"{first['pairs']} training pairs"
    else:
        what = f"{1 + len(others)} cached plans of {first['pairs']} pairs"
    return f"{what}, epsilon {first['epsilon']:g}"


def _encode_images(encoder: Encoder, args: argparse.Namespace, total: int | None) -> _Images:
    """All images of `--data`.

    Raises:
        UserError: they have neither captions nor labels, or only some of them have.
    """
    import torch

    features: list[Tensor] = []
    kept: list[Sample] = []
    with tqdm(total=total, desc="images", unit="image", disable=None) as bar:
        for batch in samples.batches(args.data, encoder.preprocess, args.batch_size, args.workers, args.caption_lines):
            features.append(encoder.images([sample.image for sample in batch]))
            # Without the pixels: memory must not grow with them.
            kept += [samples.Sample(sample.key, None, sample.captions, sample.label) for sample in batch]
            bar.update(len(batch))
    if not args.caption_lines:
        _warn_of_caption_lines(kept)
    labels = [sample.label for sample in kept if sample.label is not None]
    captioned = sum(bool(sample.captions) for sample in kept)
    if not captioned and not labels:
        raise UserError(f"--data {args.data}: neither captions (.txt, .json) nor classes (.cls) beside the images")
    for what, found in (("caption", captioned), ("class", len(labels))):
        if found not in (0, len(kept)):
            raise UserError(f"--data {args.data}: {len(kept) - found} of {len(kept)} images have no {what}")
    return _Images(torch.cat(features), [sample.captions for sample in kept], labels)


def _warn_of_caption_lines(kept: Sequence[Sample]) -> None:
    if several := sum("\n" in caption for sample in kept for caption in sample.captions):
        print(
            f"{several} captions have several lines; if each line is a caption, give --caption-lines", file=sys.stderr
        )


def _encode_texts(encoder: Encoder, captions: Sequence[Sequence[str]], batch_size: int) -> Tensor:
    """Features of all captions, `(m, d)`, image after image."""
    import torch

    texts = [text for of_image in captions for text in of_image]
    features = []
    with tqdm(total=len(texts), desc="texts", unit="text", disable=None) as bar:
        for start in range(0, len(texts), batch_size):
            features.append(encoder.texts(texts[start : start + batch_size]))
            bar.update(len(features[-1]))
    return torch.cat(features)


def _default_templates() -> list[str]:
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]
