"""What the examples share: loading a backbone, reading images, principal components, error messages."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples also run in a clone that is not installed
import dinoreg

OUTLIER = 3  # medians: outliers have about 10 times the norm of other tokens; on a scale of factors this is half way


def add_device(parser: argparse.ArgumentParser) -> None:
    best = dinoreg.best_device()
    parser.add_argument("--device", default=best, help="cpu, cuda, mps, ... (default: the best available, here %(default)s)")


def load_backbone(source: str, device: str = "cpu") -> dinoreg.DinoVisionTransformer:
    """The backbone of an official name or a file; of a classifier, its backbone alone."""
    model = dinoreg.load(source, device=device)
    return model.backbone if isinstance(model, dinoreg.LinearClassifier) else model


def reason(error: Exception) -> str:
    """An exception as one line for the user."""
    return (getattr(error, "strerror", None) or str(error) or repr(error)).partition("\n")[0]


def read_image(path: Path, *args, **kwargs) -> Tensor | str:
    """The tensor of `dinoreg.preprocess`, or the reason why the image could not be read."""
    try:
        return dinoreg.preprocess(path, *args, **kwargs)
    except (OSError, ValueError) as error:
        return reason(error)


def read_ahead(read: Callable, batches: Iterable[Sequence]) -> Iterator[list]:
    """What `read` returns for the items of each batch; threads read the next batch while the caller works on this one."""
    with ThreadPoolExecutor() as pool:
        ahead = None
        for batch in batches:
            now, ahead = ahead, pool.map(read, batch)
            if now is not None:
                yield list(now)
        if ahead is not None:
            yield list(ahead)


def split_batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive parts of a sequence, of `size` items each; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def to_pixels(x: Tensor) -> Tensor:
    """The image that `preprocess` normalised: (3, H, W) -> (H, W, 3) in [0, 1]."""
    mean, std = torch.tensor([dinoreg.IMAGENET_MEAN, dinoreg.IMAGENET_STD])
    return (x.permute(1, 2, 0) * std + mean).clamp(0, 1)


def principal_components(x: Tensor) -> Tensor:
    """The first three principal components of M points: (M, D) -> (M, 3); zeros in place of those that are missing."""
    x = x - x.mean(dim=0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:3]  # (3, D)
    axes = axes * axes.sum(dim=1, keepdim=True).sign()  # either way along an axis is right: always take the same
    return F.pad(x @ axes.T, (0, 3 - len(axes)))


def find_foreground(patches: Tensor, h: int, w: int) -> Tensor:
    """Patch features (h * w, D) -> (h, w), bool: the side of the first component that has less of the border."""
    foreground = principal_components(patches)[:, 0].unflatten(0, (h, w)) > 0
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return ~foreground if foreground[border].float().mean() > 0.5 else foreground


def colour(patches: Tensor, foreground: Tensor) -> Tensor:
    """Patch features (h * w, D) as colours (h, w, 3) in [0, 1]: black, but for the foreground (h, w)."""
    colours = torch.zeros(*foreground.shape, 3)
    if foreground.any():
        components = principal_components(patches[foreground.flatten()])
        low, high = components.quantile(torch.tensor([0.02, 0.98]), dim=0)  # a few extremes shall not dull all others
        colours[foreground] = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colours


def run(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit status of an example: what `function(args)` returns (0, or 1 if some inputs failed); 2 if it could not run."""
    try:
        return function(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:  # a file, the network, a device
        print(f"{Path(sys.argv[0]).stem}:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
