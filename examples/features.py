"""Features of many image files: read in threads, computed in batches, kept in a cache."""

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import common  # noqa: F401 (finds dinoreg)
import dinoreg

BATCH = 16  # images that are read and computed at once
NOT_FINITE = "the model returns NaN or infinity"  # why an image has no features


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


# From files to features ---------------------------------------------------------------------------


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
    """For each image file in order: its features, or the reason why there are none.

    `read` returns the uint8 pixels of a file, or the reason, as `read_image` does with
    normalized=False. `function` takes the normalized images of a batch and returns the features of
    each. Features that are not finite are an error of that image.
    """
    for images in read_ahead(read, split_batches(paths, BATCH)):
        tensors = [dinoreg.normalize(x, transform) for x in images if isinstance(x, Tensor)]
        results = iter(function(tensors) if tensors else ())
        for image in images:
            if isinstance(image, str):
                yield image
            elif (x := next(results)).isfinite().all():
                yield x
            else:
                yield NOT_FINITE


def apply(
    function: Callable[[Tensor], Tensor],
    paths: Sequence[Path],
    transform: dinoreg.Transform,
    device: str,
) -> Iterator[Tensor | str]:
    """`compute` for images of one size, with a function of their batch (B, 3, H, W) on the device;
    the features are on the CPU.
    """
    read = functools.partial(read_image, normalized=False, transform=transform)
    return compute(lambda x: function(torch.stack(x).to(device)).cpu(), read, paths, transform)


def progress(items: Iterable | None, **options):
    """The items, with a progress bar of tqdm on standard error if that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, disable=None, **options)


def write_line(text: str) -> None:
    """Print a line of text above a progress bar."""
    from tqdm import tqdm

    tqdm.write(dinoreg.printable(text))


# A cache of features ------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/dinoreg, by default ~/.cache/dinoreg."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dinoreg")


def fingerprint(model: dinoreg.DinoVisionTransformer, *settings) -> str:
    """A hash of all that determines a model's features: weights, config, transform and settings,
    such as options of a script.
    """
    described = [model.config, model.transform, model.patch_embed.proj.stride, *settings]
    digest = hashlib.sha256(json.dumps([*map(repr, described)]).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Cache:
    """Features of image files, by path, in a database in the user's cache folder.

    There is one for each script, version, image folder and fingerprint, so no run meets the
    features of another model. An interrupted run keeps what it has computed. With enabled=False the
    database is a temporary file.
    """

    def __init__(self, script: str, folder: Path, fingerprint: str, enabled: bool = True):
        place = hashlib.sha256(key(folder.resolve())).hexdigest()[:16]
        name = f"{script}-{dinoreg.__version__}-{place}"
        self.folder = cache_folder() / name / fingerprint[:16] if enabled else None
        with self.naming_errors():
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "features.sqlite" if self.folder else ""
            self.database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self.database.execute("PRAGMA synchronous = OFF")  # survives a kill, not a power cut
            columns = "path BLOB PRIMARY KEY, stamp TEXT, features BLOB"
            self.database.execute(f"CREATE TABLE IF NOT EXISTS images ({columns})")

    def naming_errors(self) -> contextlib.AbstractContextManager:
        return dinoreg.naming(self.folder or "temporary file of features")

    def __getitem__(self, path: Path) -> Tensor:
        """The features of a file that `fill` has computed, now or in an earlier run."""
        query = "SELECT features FROM images WHERE path = ?"
        with self.naming_errors():
            (data,) = self.database.execute(query, (key(path),)).fetchone()
            return safetensors.torch.load(data)["features"]

    def fill(
        self, function: Callable[[Sequence[Path]], Iterable[Tensor | str]], paths: Sequence[Path]
    ) -> dict[Path, str]:
        """Compute the features that are missing, or those of files that have changed, with a
        function of paths such as `apply`. Returns why files could not be read.
        """
        with self.naming_errors():
            known = dict(self.database.execute("SELECT path, stamp FROM images"))
        stamps = {path: stamp(path) for path in paths}  # before the files are read
        missing = [path for path in paths if known.get(key(path)) != stamps[path]]
        unreadable = {}
        for path, x in zip(progress(missing, unit="image"), function(missing)):
            if isinstance(x, str):
                unreadable[path] = x
                continue
            row = key(path), stamps[path], safetensors.torch.save({"features": x})
            with self.naming_errors():
                self.database.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", row)
        kept = f"{len(paths) - len(missing)} from the cache ({self.folder or 'no cache'})"
        dinoreg.complain(f"{len(paths)} images: {len(missing)} computed, {kept}", "features")
        return unreadable


def key(path: Path) -> bytes:
    return os.fsencode(path.absolute())


def stamp(path: Path) -> str:
    """The size and modification time of a file, which change with its contents; empty if there is
    no such file.
    """
    with contextlib.suppress(OSError):
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return ""
