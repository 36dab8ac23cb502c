"""Patch features of photos as pictures: principal components, foreground, colors."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common  # noqa: F401 (finds dinoreg)
import dinoreg
from features import progress, read_image

OUTLIER = 3  # times the median norm; outliers have about 10 times the norm of other tokens


def to_pixels(x: Tensor, transform: dinoreg.Transform) -> Tensor:
    """The image that `preprocess` normalized: (3, H, W) -> (H, W, 3) in [0, 1]."""
    mean, std = torch.tensor([transform.mean, transform.std])
    return (x.permute(1, 2, 0) * std + mean).clamp(0, 1)


def principal_components(x: Tensor) -> Tensor:
    """The first three principal components of M points: (M, D) -> (M, 3); missing ones are zero."""
    x = x - x.mean(dim=0)
    # (D, 3), the largest variance first
    axes = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(1)[:, :3]
    axes = torch.where(axes.sum(dim=0) < 0, -axes, axes)  # the sign of an axis is arbitrary: fix it
    return F.pad(x @ axes, (0, 3 - axes.shape[1]))


def find_foreground(patches: Tensor, h: int, w: int) -> Tensor:
    """Patch features (h * w, D) -> (h, w), bool: the side of the first component with fewer patches
    at the border.
    """
    foreground = principal_components(patches)[:, 0].unflatten(0, (h, w)) > 0
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return ~foreground if foreground[border].float().mean() > 0.5 else foreground


def color(patches: Tensor, foreground: Tensor) -> Tensor:
    """Patch features (M, D) as colors (M, 3) in [0, 1], from the components of the foreground (M),
    bool; the rest is black.

    The first two components are the hue and saturation, the third is lightness. Colors are
    comparable within a call: those of several photos come from the concatenation of their patches.
    """
    colors = torch.zeros(len(patches), 3)
    if foreground.any():
        components = principal_components(patches[foreground])
        # Components of unit variance, then their normal distribution function, scaled to [-1, 1]:
        # every range of colors is used about equally.
        deviation = components.std(dim=0, correction=0).clamp(min=1e-6)
        first, second, third = torch.erf(components / deviation / 2**0.5).unbind(dim=1)
        # Vivid, of similar lightness, and far from black, which is background.
        colors[foreground] = oklab_to_rgb(0.72 + 0.15 * third, -0.15 * first, -0.15 * second)
    return colors


def oklab_to_rgb(lightness: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Colors in Oklab, each (M,) -> sRGB (M, 3), clipped to [0, 1].

    Oklab is a color space in which equal distances look equally different: a is from green (< 0) to
    red, b from blue to yellow. Source: https://bottosson.github.io/posts/oklab/
    """
    to_cones = torch.tensor(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear_rgb = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    cones = torch.stack([lightness, a, b], dim=1) @ to_cones.T
    rgb = (cones**3 @ to_linear_rgb.T).clamp(0, 1)
    # The transfer function of sRGB, which is linear near black.
    return torch.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


def add_colors(photos: list[dict[str, Tensor]]) -> None:
    """Add the colors (h, w, 3) of features to the maps of photos that `visualize.py` computes; they
    are comparable within these photos.
    """
    parts = [maps["features"].flatten(0, 1) for maps in photos]
    grids = [maps["norms"].shape for maps in photos]
    foreground = [find_foreground(x, *grid).flatten() for x, grid in zip(parts, grids)]
    colors = color(torch.cat(parts), torch.cat(foreground))
    for maps, part, grid in zip(photos, colors.split([len(x) for x in parts]), grids):
        maps["colors"] = part.unflatten(0, grid)


# From files to pictures ---------------------------------------------------------------------------


def read_photos(
    model: dinoreg.DinoVisionTransformer, paths: Sequence[Path], unreadable: dict[Path, str]
) -> Iterator[tuple[Path, Tensor]]:
    """Each image file with the model's input (3, H, W) for the whole image, and a progress bar; the
    reasons why files cannot be read are added to unreadable.
    """
    for path in progress(paths, unit="image"):
        x = read_image(path, None, True, model.patch_size, transform=model.transform)
        if isinstance(x, str):
            unreadable[path] = x
        else:
            yield path, x
