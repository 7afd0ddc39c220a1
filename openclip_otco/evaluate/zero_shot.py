"""Zero-shot classification: images against the prompts of their class names (Radford et al., CLIP, 2021)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openclip_otco.errors import UserError
from openclip_otco.evaluate.ranks import ranks
from openclip_otco.runs.encoder import Encoder


def read_lines(flag: str, path: Path) -> list[str]:
    """The lines of the text file `path` that are not empty.

    Raises:
        UserError: names `flag`; the file cannot be read, or all lines are empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read: {error}") from error
    if not lines:
        raise UserError(f"{flag} {path}: is empty; give one entry a line")
    return lines


def read_templates(path: Path) -> list[str]:
    """The prompts in the file `path`. Each has one place for the class name.

    In the file that is `{c}`, as in clip-benchmark, or `{}`; in the result it is `{}`.

    Raises:
        UserError: the file cannot be read, or a line has no place for the class name.
    """
    templates = [line.replace("{c}", "{}") for line in read_lines("--templates", path)]
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"--templates {path}: {template!r} needs one {{c}} where the class name goes")
    return templates


def class_features(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """`(C, d)`, unit norm: the mean feature of each class over its prompts, computed by OpenCLIP.

    Args:
        encoder: the model.
        names: of the `C` classes.
        templates: prompts with `{}` where the name goes.
    """
    from open_clip import build_zero_shot_classifier

    # Functions instead of `format`, as a template may hold other braces.
    fill = [lambda name, template=template: template.replace("{}", name) for template in templates]
    with torch.inference_mode(), encoder.autocast():
        columns = build_zero_shot_classifier(encoder.model, encoder.tokenizer, names, fill, device=encoder.device)
    return torch.nn.functional.normalize(columns.float().cpu().T, dim=1)


def classification(image_features: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float]:
    """Accuracy under clip-benchmark's names; ties count against the model, as in retrieval.

    Args:
        image_features: `(n, d)`, unit norm.
        labels: `(n,)`, 0 to C - 1.
        classes: `(C, d)`, unit norm.

    Returns:
        `acc1`, `acc5` where there are more than 5 classes, and `mean_per_class_recall` over the classes that have
        images, each in 0 to 1; `images` n and `classes` C.
    """
    rank = ranks(image_features, classes, labels, torch.arange(len(classes)))
    metrics = {f"acc{k}": (rank < k).double().mean().item() for k in (1, 5) if k == 1 or len(classes) > k}
    recalls = [(rank[labels == label] == 0).double().mean() for label in labels.unique()]
    metrics["mean_per_class_recall"] = torch.stack(recalls).mean().item()
    return {**metrics, "images": len(image_features), "classes": len(classes)}
