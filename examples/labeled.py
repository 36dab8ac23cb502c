"""Folders of labeled images, one subfolder per class, and k-NN classification."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common  # noqa: F401 (finds dinoreg)
import dinoreg
import features


def find_classes(folder: Path) -> list[Path]:
    """The subfolders of a folder, sorted, without hidden ones: one for each class."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def find_labeled(folder: Path, labels: Sequence[str]) -> list[tuple[Path, int]]:
    """The image files in a folder's subfolders, each with the index of its class. Subfolders are
    matched with labels by name, or else by order. Raises a ValueError if they are not the classes.
    """
    folders = find_classes(folder)
    if len(folders) != len(labels):
        raise ValueError(
            f"{folder}: {len(folders)} subfolders, "
            f"but the model has {len(labels)} classes; make one for each"
        )
    unknown = [path.name for path in folders if path.name not in labels]
    if unknown and len(unknown) < len(labels):
        raise ValueError(
            f"{folder}: some subfolders are named like classes of the model, "
            f"but {unknown[0]!r} is not"
        )
    order = range(len(labels)) if unknown else [labels.index(path.name) for path in folders]
    return [
        (path, i)
        for one, i in zip(folders, order)
        for path in dinoreg.find_images([one])
        if path != one
    ]


def vote(
    train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07
) -> Tensor:
    """Votes (m, K) for queries (m, D), by the k rows of train (n, D) of the highest cosine
    similarity.

    Each neighbor votes for its labels (n, K), weighted by the softmax of the similarities, as in
    the official k-NN evaluation (dinov2/eval/knn.py).
    """
    train, queries, votes = F.normalize(train, dim=1), F.normalize(queries, dim=1), []
    for part in queries.split(1024):
        cosines, nearest = (part @ train.mT).topk(min(k, len(train)))  # (1024, k)
        weights = (cosines / temperature).softmax(dim=1)
        votes.append(torch.einsum("mk,mkc->mc", weights, labels[nearest]))
    return torch.cat(votes)


def knn_accuracy(
    function: Callable[[Tensor], Tensor],
    transform: dinoreg.Transform,
    device: str,
    train: list[Path],
    queries: list[Path],
) -> float:
    """The share of queries whose class, the name of their folder, is the vote of the 20 images in
    train of the most similar features, which a function computes from images (B, 3, H, W). Images
    that cannot be read are left out."""

    def compute(paths: list[Path]) -> tuple[Tensor, np.ndarray]:
        results = zip(paths, features.apply(function, paths, transform, device))
        found = [(x.float(), path.parent.name) for path, x in results if isinstance(x, Tensor)]
        if not found:
            raise ValueError("none of the images for the k-NN accuracy can be read")
        rows, names = zip(*found)
        return torch.stack(rows), np.array(names)

    (x, names), (y, truth) = compute(train), compute(queries)
    classes = np.unique(names)
    labels = torch.from_numpy(names[:, None] == classes).float()
    return float((classes[vote(x, labels, y, k=20).argmax(dim=1)] == truth).mean())
