"""Patch features as pictures: principal components, foreground, colors."""

import torch
import torch.nn.functional as F
from torch import Tensor

import common  # noqa: F401 (finds dinoreg)
import dinoreg

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

    Colors are comparable within a call: those of several photos come from the concatenation of
    their patches.
    """
    colors = torch.zeros(len(patches), 3)
    if foreground.any():
        components = principal_components(patches[foreground])
        # The range of most patches, so that these have vivid colors.
        low, high = components.quantile(torch.tensor([0.1, 0.9]), dim=0)
        scaled = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        # Gray rather than black, as black is background.
        colors[foreground] = scaled + (0.6 - scaled.amax(dim=1, keepdim=True)).clamp(min=0)
    return colors
