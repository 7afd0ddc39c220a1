"""Second views of a batch of images, made on the device that trains.

The augmentations and their strengths are SLIP's (Mu et al., ECCV 2022): crop of 8 to 100 % of the area, flip, colour
jitter, grayscale, blur. torchvision's transforms draw once for a whole batch. Here each image has its own draw, and
each augmentation is one batched operation: the crop a grid sample, the colours a linear map, the blur two convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openclip_otco.train.model_call import images_and_texts

# ITU-R BT.601: luma and chroma of red, green and blue. A rotation of the chroma is a change of hue.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)
# SLIP's range of the blur's sigma, in pixels of a picture of 224 pixels. It is scaled to the size of the picture.
_SIGMA = (0.1, 2.0)
_SIGMA_SIZE = 224


class RandomViews:
    """Draws a view of each image of a batch, from torch's global generator.

    Args:
        mean, std: of the normalization that the images went through, per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Views of `(B, 3, H, W)` normalized images, of the same shape, type and normalization."""
        n, device = len(images), images.device

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(n, device=device).uniform_(low, high)

        def chosen(share: float) -> Tensor:
            return torch.rand(n, device=device) < share

        mean, std = self.mean.to(device), self.std.to(device)
        with torch.autocast(device.type, enabled=False):
            x = images.float() * std + mean
            area, ratio = uniform(0.08, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
            x = crop(x, (area / ratio).sqrt(), (area * ratio).sqrt(), uniform(0, 1), uniform(0, 1), chosen(0.5))
            jitter, gray = chosen(0.8), chosen(0.2)
            brightness, contrast, saturation = (torch.where(jitter, uniform(0.6, 1.4), 1.0) for _ in range(3))
            hue = torch.where(jitter, uniform(-0.1, 0.1), 0.0)
            x = recolour(x, brightness, contrast, torch.where(gray, 0.0, saturation), hue)
            scale = min(images.shape[-2:]) / _SIGMA_SIZE
            sigma = torch.where(chosen(0.5), uniform(*_SIGMA), 0.0) * scale
            x = blur(x, sigma, radius=math.ceil(3 * _SIGMA[1] * scale))
            return ((x - mean) / std).to(images.dtype)


class SecondView:
    """Adds `view_features`, `(B, d)` unit norm, of a second view of the images to the model's output in training.

    They have a gradient. The loss gets them together with the features.

    Args:
        model: the model as OpenCLIP made it.
        views: makes the second views.
    """

    def __init__(self, model: nn.Module, views: RandomViews) -> None:
        self.views = views
        model.register_forward_hook(self._add_view, with_kwargs=True)

    @torch.compiler.disable
    def _add_view(
        self, model: Any, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], output: dict[str, Tensor]
    ) -> Any:
        if not model.training:
            return None
        images, _ = images_and_texts(inputs, named)
        return {**output, "view_features": model.encode_image(self.views(images), normalize=True)}


def crop(images: Tensor, height: Tensor, width: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """A box of each of `(B, 3, H, W)` images, resized to the whole, bilinear.

    Args:
        height, width: `(B,)`, size of the box as shares of the image's height and width; a share above 1 counts as 1.
        top, left: `(B,)`, in `[0, 1]`: where the box lies, from one border to the other.
        flip: `(B,)` bool, whether left and right change places.
    """
    height, width = height.clamp(max=1), width.clamp(max=1)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * left - 1) * (1 - width)
    theta[:, 1, 2] = (2 * top - 1) * (1 - height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recolour(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Changes the colours of `(B, 3, H, W)` images in `[0, 1]`, in this order, and cuts off what leaves `[0, 1]`.

    Brightness, contrast and saturation, `(B,)`, are torchvision's factors: 1 changes nothing, saturation 0 is gray.
    `hue`, `(B,)`, is a turn of the chroma about the gray axis, in turns; torchvision turns in HSV.
    """
    yiq, rgb = _YIQ.to(images), _RGB.to(images)
    luma = yiq[0]
    cos, sin = (2 * math.pi * hue).cos(), (2 * math.pi * hue).sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).reshape(-1, 3, 3)
    to_gray = luma.expand(3, 3)
    saturate = (
        saturation[:, None, None] * torch.eye(3, device=images.device) + (1 - saturation)[:, None, None] * to_gray
    )
    colours = rgb @ turn @ yiq @ saturate
    images = (images * brightness[:, None, None, None]).clamp(0, 1)
    mean = torch.einsum("c,bchw->b", luma, images) / (images.shape[-2] * images.shape[-1])
    images = contrast[:, None, None, None] * images + ((1 - contrast) * mean)[:, None, None, None]
    return torch.einsum("bdc,bchw->bdhw", colours, images.clamp(0, 1)).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of `(B, C, H, W)` images, each with its own `sigma`, `(B,)`, in pixels; 0 changes nothing.

    The kernel is cut off `radius` pixels from its middle.
    """
    b, c, h, w = images.shape
    radius = min(radius, h - 1, w - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-offsets.square() / (2 * sigma[:, None].square()).clamp(min=1e-6), dim=1)
    kernel = kernel.repeat_interleave(c, dim=0)
    # One group for each channel of each image: its own kernel.
    x = F.pad(images.reshape(1, b * c, h, w), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c)
    return F.conv2d(x, kernel[:, None, None, :], groups=b * c).reshape(images.shape)
