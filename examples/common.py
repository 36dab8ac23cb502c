"""What the examples share.

These are options, reading images in batches, cached features, k-NN votes, principal components and
errors.
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# The examples also run in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dinoreg

BATCH = 16  # images that are read and computed at once
OUTLIER = 3  # times the median norm; outliers have about 10 times the norm of other tokens


def positive(text: str) -> int:
    """The type of options that are positive integers."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    best = dinoreg.best_device()
    parser.add_argument(
        "--device",
        default=best,
        help="cpu, cuda, mps, ... (default: the best available, here %(default)s)",
    )


def add_stride(parser: argparse.ArgumentParser) -> None:
    rule = (
        "distance between patches, a divisor of the patch size: "
        "7 gives a grid twice as dense (default: the patch size)"
    )
    parser.add_argument("--stride", type=int, metavar="PIXELS", help=rule)


def add_resolution(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    rule = "the whole image is resized to as many pixels as a square of this side has"
    shown = f"{rule} (default: {default or 'as in training'})"
    parser.add_argument("--resolution", type=int, default=default, metavar="PIXELS", help=shown)


def add_no_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute all features, and keep none in the cache folder",
    )


def load_backbone(
    source: str, device: str = "cpu", stride: int | None = None
) -> dinoreg.DinoVisionTransformer:
    """The backbone of an official model or of a file, also if that is a classifier, with patches a
    stride apart.
    """
    model = dinoreg.load(source, device=device)
    return set_stride(
        model.backbone if isinstance(model, dinoreg.LinearClassifier) else model, stride
    )


def set_size(backbone: dinoreg.DinoVisionTransformer, size: int | None) -> tuple[int, int]:
    """Change the side of the images that the backbone's transform returns, if size is given; return
    their (H, W).
    """
    if size:
        backbone.transform = backbone.transform.at_size(size)
    if backbone.transform.size is None:
        raise ValueError(
            "the transform of this model keeps the shape of an image: --size is needed"
        )
    return backbone.transform.size


def set_square(backbone: dinoreg.DinoVisionTransformer, size: int | None) -> int:
    """Do what `set_size` does, and return the side. Raises a ValueError unless images are squares
    of whole patches.
    """
    H, W = set_size(backbone, size)
    if H != W:
        raise ValueError(
            f"the transform of this model makes images of {H} x {W} pixels: "
            "--size is needed, for square ones"
        )
    if H % backbone.patch_size:
        raise ValueError(
            f"--size must be a multiple of {backbone.patch_size}, the side of a patch, got {H}"
        )
    return H


def set_resolution(backbone: dinoreg.DinoVisionTransformer, resolution: int | None) -> None:
    """Let the transform resize whole images to as many pixels as a square of this side, or of that
    of training, has.
    """
    if resolution is not None and resolution < backbone.patch_size:
        raise ValueError(
            f"--resolution must be at least {backbone.patch_size}, "
            f"the side of a patch, got {resolution}"
        )
    trained = round(math.sqrt(math.prod(backbone.config.grid)) * backbone.patch_size)
    backbone.transform = backbone.transform.at_size(resolution or trained)


def set_stride(
    backbone: dinoreg.DinoVisionTransformer, stride: int | None
) -> dinoreg.DinoVisionTransformer:
    if stride is not None:
        if stride < 1 or backbone.patch_size % stride:
            raise ValueError(
                f"--stride must be a divisor of the patch size, {backbone.patch_size}, got {stride}"
            )
        backbone.patch_embed.proj.stride = (stride, stride)
    return backbone


def embed(model: dinoreg.DinoVisionTransformer, x: Tensor) -> Tensor:
    """The CLS token (B, D) that `model(x)` returns, with the last block computed for it alone.

    The model must be as `dinoreg.load` returns it: edits of its last block are not seen.
    """
    x = model.prepare_tokens_with_masks(x)
    *blocks, last = model.blocks
    for block in blocks:
        x = block(x)
    q, k, v = last.attn.split_heads(last.attn.qkv(last.norm1(x)))  # each (B, A, N, D / A)
    heads = F.scaled_dot_product_attention(q[:, :, :1], k, v)
    x = x[:, :1] + last.ls1(last.attn.proj(heads.transpose(1, 2).flatten(2)))  # (B, 1, D)
    x = x + last.ls2(last.mlp(last.norm2(x)))
    return model.norm(x)[:, 0]


def read_image(path: Path, *args, **kwargs) -> Tensor | str:
    """The tensor of `dinoreg.preprocess`, or the reason why the image could not be read."""
    try:
        return dinoreg.preprocess(path, *args, **kwargs)
    except (OSError, ValueError) as error:
        return dinoreg.reason(error)


def read_ahead(read: Callable, batches: Iterable[Sequence]) -> Iterator[list]:
    """What `read` returns for the items of each batch; threads read the next batch while the caller
    works on this one.
    """
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


@torch.inference_mode()
def compute(
    function: Callable[[list[Tensor]], Iterable[Tensor]],
    read: Callable[[Path], Tensor | str],
    paths: Sequence[Path],
    transform: dinoreg.Transform,
) -> Iterator[Tensor | str]:
    """For each image file in turn: its result, or the reason why it could not be read.

    `read` returns the uint8 pixels of a file or that reason, as `read_image` does with
    normalized=False; `function` takes the normalised images of a batch and returns a result for
    each.
    """
    for images in read_ahead(read, split_batches(paths, BATCH)):
        tensors = [
            dinoreg.normalize(image, transform) for image in images if isinstance(image, Tensor)
        ]
        results = iter(function(tensors) if tensors else ())
        for image in images:
            yield next(results) if isinstance(image, Tensor) else image


def apply(
    function: Callable[[Tensor], Tensor],
    paths: Sequence[Path],
    transform: dinoreg.Transform,
    device: str,
) -> Iterator[Tensor | str]:
    """For each image file in turn: the row that a function of images (B, 3, H, W) returns for it,
    on the CPU; or the reason why it could not be read."""
    read = functools.partial(read_image, normalized=False, transform=transform)
    return compute(
        lambda images: function(torch.stack(images).to(device)).cpu(), read, paths, transform
    )


def report(script: str, unreadable: dict[Path, str]) -> int:
    """Print why files could not be read; return the exit status: 1 if there are such files, else
    0.
    """
    for path, why in unreadable.items():
        print(f"{script}: {path}: {why}", file=sys.stderr)
    return 1 if unreadable else 0


# --------------------------------------------------------------------------------------------------
# Cached features

HEIC = (".heic", ".heif", ".hif")
SHARD = 1 << 28  # bytes of features in a file of the cache; then another one is begun

# The features of an image file, of any shape; or why it could not be read.
Features = dict[Path, Tensor | str]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dinoreg")


def cached_features(
    function: Callable[[Sequence[Path]], Iterable[Tensor | str]],
    paths: Sequence[Path],
    folder: Path,
    script: str,
    model: str,
    options: Sequence = (),
    use_cache: bool = True,
) -> tuple[Features, list[Path]]:
    """The features of image files in a folder, and the files that were read now since the cache did
    not have them.

    `function` computes features from paths, as `apply` and `compute` do. The cache is a folder in
    the user's cache folder (XDG_CACHE_HOME, by default ~/.cache) for this script, image folder,
    model file and options; it replaces those of other models and options. Unreadable files are
    remembered as well, until they change. An interrupted run keeps what it has.
    """
    from tqdm import tqdm

    caches = cache_folder() / f"{script}-{folder.resolve().name}-{digest(str(folder.resolve()))}"
    cache = caches / digest([Path(model).name, stamp(Path(model)), dinoreg.__version__, *options])
    names = {str(path.absolute()): path for path in paths}
    stamps = {name: stamp(path) for name, path in names.items()}
    features: Features = {}
    if use_cache:
        cache.mkdir(parents=True, exist_ok=True)  # fails early if that is not possible
    for shard in sorted(cache.glob("*.safetensors")) if use_cache else ():
        entries = read_shard(shard)
        features |= {
            names[name]: x
            for name, (when, x) in entries.items()
            if name in names and when == stamps[name]
        }
        if all(stamp(Path(name)) != when for name, (when, _) in entries.items()):
            # Its images are gone or have changed.
            shard.unlink()
    new, unsaved, size = [path for path in paths if path not in features], {}, 0

    def save() -> None:
        """Write the unsaved features to a shard, and take the memory-mapped ones of the shard
        instead.
        """
        shard = cache / f"{time.time_ns()}.safetensors"
        write_shard({name: (stamps[name], x) for name, x in unsaved.items()}, shard)
        features.update({names[name]: x for name, (_, x) in read_shard(shard).items()})
        unsaved.clear()

    try:
        for path, x in zip(
            new, tqdm(function(new), total=len(new), unit="image", disable=not new or None)
        ):
            features[path] = x
            # A HEIC image may be readable once pillow-heif is installed.
            if use_cache and (isinstance(x, Tensor) or path.suffix.lower() not in HEIC):
                unsaved[str(path.absolute())] = x
            size += x.nbytes if isinstance(x, Tensor) else 0
            if size > SHARD and unsaved:
                save()
                size = 0
    finally:
        if unsaved:
            save()
    where = "no cache"
    if use_cache:
        for old in set(caches.glob("*")) - {cache}:
            shutil.rmtree(old, ignore_errors=True)
        where = f"{cache}, {sum(file.stat().st_size for file in cache.glob('*')) / 1e6:.1f} MB"
    kept = len(paths) - len(new)
    print(
        f"features of {len(paths)} images: {len(new)} computed, {kept} from the cache ({where})",
        file=sys.stderr,
    )
    return {path: features[path] for path in paths}, new


def stamp(path: Path) -> list[int] | None:
    """The size and modification time of a file, which change with its contents; None if there is no
    such file.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def digest(key: str | Sequence) -> str:
    """A file name for a key of JSON."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def write_shard(entries: dict[str, tuple[list[int] | None, Tensor | str]], path: Path) -> None:
    """Write the stamps and features of files; features are joined to one tensor, as each may have
    another shape.
    """
    files = [
        (name, when, x if isinstance(x, str) else list(x.shape))
        for name, (when, x) in entries.items()
    ]
    tensors = [x.flatten() for _, x in entries.values() if isinstance(x, Tensor)]
    joined = torch.cat(tensors) if tensors else torch.empty(0)
    dinoreg.write_tensors({"features": joined}, path, {"files": json.dumps(files)})


def read_shard(path: Path) -> dict[str, tuple[list[int] | None, Tensor | str]]:
    with dinoreg.naming(path):
        tensors, metadata = dinoreg.read_tensors(path, mmap=True)
    files = json.loads(metadata["files"])
    parts = iter(
        tensors["features"].split([math.prod(x) for *_, x in files if not isinstance(x, str)])
    )
    return {
        name: (when, x if isinstance(x, str) else next(parts).view(x)) for name, when, x in files
    }


def name_pictures(images: Sequence[Path], folder: Path, kind: str) -> list[Path]:
    """A file in folder for the picture of each image, numbered if images of several folders share a
    name.
    """
    pictures: list[Path] = []
    for image in images:
        picture, number = folder / f"{image.stem}_{kind}.png", 1
        while picture in pictures:
            number += 1
            picture = folder / f"{image.stem}_{number}_{kind}.png"
        pictures.append(picture)
    return pictures


def vote(
    train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07
) -> Tensor:
    """Votes (m, K) for queries (m, D), by the k rows of train (n, D) of the highest cosine
    similarity.

    Each neighbour votes for its labels (n, K), weighted by the softmax of the similarities, as in
    the official k-NN evaluation (dinov2/eval/knn.py).
    """
    train, queries, votes = F.normalize(train, dim=1), F.normalize(queries, dim=1), []
    for part in queries.split(1024):
        cosines, nearest = (part @ train.mT).topk(min(k, len(train)))  # (1024, k)
        weights = (cosines / temperature).softmax(dim=1)
        votes.append(torch.einsum("mk,mkc->mc", weights, labels[nearest]))
    return torch.cat(votes)


def to_pixels(x: Tensor, transform: dinoreg.Transform) -> Tensor:
    """The image that `preprocess` normalised: (3, H, W) -> (H, W, 3) in [0, 1]."""
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


def colour(patches: Tensor, foreground: Tensor) -> Tensor:
    """Patch features (M, D) as colours (M, 3) in [0, 1], from the components of the foreground (M),
    bool; the rest is black.

    Colours are comparable within a call: those of several photos come from the concatenation of
    their patches.
    """
    colours = torch.zeros(len(patches), 3)
    if foreground.any():
        components = principal_components(patches[foreground])
        # The range of most patches, so that these have vivid colours.
        low, high = components.quantile(torch.tensor([0.1, 0.9]), dim=0)
        scaled = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        # Grey rather than black, as black is background.
        colours[foreground] = scaled + (0.6 - scaled.amax(dim=1, keepdim=True)).clamp(min=0)
    return colours


def run(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit status of an example: what `function(args)` returns (0, or 1 if some inputs failed); 2
    if it could not run.
    """
    script = Path(inspect.getfile(inspect.unwrap(function)))
    try:
        return function(args)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:  # packages are imported where they are used
        print(
            f"{script.stem}: {error}: see the head of {script.name} for what to install",
            file=sys.stderr,
        )
    except (OSError, ValueError, RuntimeError) as error:  # a file, the network, a device
        print(f"{script.stem}:", str(error).partition("\n")[0], file=sys.stderr)
    return 2
