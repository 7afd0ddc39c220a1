"""Features for benchmarks: read from the tables of `--frozen-features`, never from a table of other towers."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from page_fixtures import jpeg
from tower_features import model_features, tower_features

from openclip_otco.frozen.shard_pairs import content_key
from openclip_otco.frozen.table import FeatureTable

WIDTH = {"image": 5, "text": 3}


def tower(kind: str, content: bytes, factor: float = 1.0) -> torch.Tensor:
    """Any features that differ from file to file."""
    generator = torch.Generator().manual_seed(abs(content_key(content)) % 2**31)
    return factor * torch.randn(1, WIDTH[kind], generator=generator)


CONTENTS = {
    "image": [jpeg((red, 80, 40)) for red in (10, 120, 250)],
    "text": [f"caption {number}".encode() for number in range(3)],
}


class Encoder(SimpleNamespace):
    """The towers of a checkpoint, for pictures that are known by their first pixel."""

    def images_and_tower(self, images: list[Any]) -> tuple[None, torch.Tensor]:
        first = {content_key(content): content for content in CONTENTS["image"]}
        (image,) = images
        return None, tower("image", first[image])

    def texts_and_tower(self, texts: list[str]) -> tuple[None, torch.Tensor]:
        return None, tower("text", texts[0].encode())


@pytest.fixture
def encoder() -> Any:
    known = {picture(content).tobytes(): content_key(content) for content in CONTENTS["image"]}
    heads = {kind: torch.randn(WIDTH[kind], 4, generator=torch.Generator().manual_seed(1)) for kind in WIDTH}
    model = SimpleNamespace(encode_image=lambda x: x @ heads["image"], encode_text=lambda x: x @ heads["text"])
    return Encoder(
        model=model,
        device="cpu",
        autocast=contextlib.nullcontext,
        preprocess=lambda image: known[image.tobytes()],
        heads=heads,
    )


def picture(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Four pairs, of which the last has the image of the first."""
    path = tmp_path / "0000.tar"
    with tarfile.open(path, "w") as tar:
        for number, (image, text) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1))):
            for kind, content in (("jpg", CONTENTS["image"][image]), ("txt", CONTENTS["text"][text])):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def fill(folder: Path, name: str, kind: str, factor: float, count: int = 3) -> None:
    contents = CONTENTS[kind][:count]
    keys = torch.tensor([content_key(content) for content in contents])
    FeatureTable(folder / f"{kind}-{name}").add(keys, torch.cat([tower(kind, content, factor) for content in contents]))


def test_rows_come_from_the_table_of_the_checkpoint(tmp_path: Path, shard: str, encoder: Any) -> None:
    for kind in WIDTH:
        fill(tmp_path, "a", kind, 1.0, count=2)  # lacks a pair
        fill(tmp_path, "b", kind, 2.0)  # of another tower
        fill(tmp_path, "c", kind, 1.0)
    found = tower_features(encoder, tmp_path, shard)
    assert found.names == ["0", "1", "2", "3"]
    for side, kind, order in ((found.images, "image", (0, 1, 2, 0)), (found.texts, "text", (0, 1, 2, 1))):
        assert torch.equal(side, torch.cat([tower(kind, CONTENTS[kind][number]) for number in order]))
    assert tower_features(encoder, tmp_path, shard, 2).names == ["0", "1"]
    expected = F.normalize(found.texts @ encoder.heads["text"], dim=1)
    torch.testing.assert_close(model_features(encoder, "text", found.texts), expected)


def test_no_table_of_the_checkpoint(tmp_path: Path, shard: str, encoder: Any) -> None:
    for kind in WIDTH:
        fill(tmp_path, "b", kind, 2.0)
    with pytest.raises(SystemExit, match="no table of the checkpoint's image tower holds all pairs"):
        tower_features(encoder, tmp_path, shard)
