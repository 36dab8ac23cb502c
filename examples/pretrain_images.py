"""The images of pretrain.py: `Files` are their paths, `Crops` what the networks see of them, in
batches from `read_batches`.
"""

import array
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

import common  # noqa: F401 (finds dinoreg)
import dinoreg
from labeled import knn_accuracy
from training_parts import random_mask


class Files(Sequence):
    """The image files below a folder, sorted, without hidden ones; also those with other suffixes.

    The paths are kept in two tensors, which the readers share. A million of them take about 40 MB;
    as `Path` objects they would take 400 MB in every reader.
    """

    def __init__(self, folder: Path, suffixes: Sequence[str] = ()):
        def is_image_suffix(suffix: str) -> bool:
            return suffix in suffixes or dinoreg.is_image_name(f"image{suffix}")

        is_image, folder = functools.cache(is_image_suffix), Path(folder)
        names, ends, seen = bytearray(), array.array("q", [0]), set()
        for here, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:  # a loop of links
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = os.path.relpath(here, folder)
            prefix = os.fsencode("" if inside == "." else inside + os.sep)
            for name in sorted(files):
                if not name.startswith(".") and is_image(os.path.splitext(name)[1].lower()):
                    names += prefix + os.fsencode(name)
                    ends.append(len(names))
        if not names:
            raise ValueError(f"{folder}: no folder with images")
        self.folder = folder
        self.names = torch.frombuffer(names, dtype=torch.uint8)
        self.ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self.ends[i : i + 2].tolist()
        return Path(self.folder, os.fsdecode(self.names[start:end].numpy().tobytes()))

    def digest(self) -> str:
        """A short text that changes with the number, the names or the order of the files."""
        return f"{len(self)} files, {hashlib.sha256(self.names.numpy()).hexdigest()[:16]}"


def read_image(path: Path, channels: int, white: float, least: int) -> Image.Image | Tensor:
    """A file as an RGB image, or for other channels than 3 as a tensor (C, H, W), uint8.

    Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size, as long as both sides have at
    least `least` pixels. white is the level of white, or 0 for that of the file's type. Channels
    are those of a .npy file, (H, W), (H, W, C) or (C, H, W), or the pages of a TIFF file.
    """
    if path.suffix.lower() == ".npy":
        x = np.load(path, allow_pickle=False)
    else:
        image = dinoreg.open_image(path)
        image.draft("RGB", (least, least))
        if channels == 3 and not (white and image.mode[0] in "IF"):
            return dinoreg.to_rgb(image)
        pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        x = np.stack(pages) if len(pages) > 1 else pages[0]
        if channels == 1 and x.ndim == 3:
            x = np.asarray(dinoreg.to_rgb(image).convert("L"))
    x = x[None] if x.ndim == 2 else x
    x = x if len(x) == channels or x.shape[-1] != channels else np.moveaxis(x, -1, 0)
    x = np.repeat(x, 3, axis=0) if channels == 3 and len(x) == 1 else x
    if len(x) != channels or x.ndim != 3:
        raise ValueError(f"an image of shape {x.shape}, not of {channels} channels")
    white = white or (np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1.0)
    return torch.from_numpy((x.clip(0, white) * (255 / white)).round().astype(np.uint8))


@functools.lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


class Crops(torch.utils.data.Dataset):
    """Crops of an image, global (2, C, H, W) and local (L, C, H', W'), uint8, and masks (2, h * w)
    of the global ones. An item's key is (batch, place).

    The order of an epoch depends on the seed and the epoch; batch and place are a position in it.
    Crops depend on the seed, the batch and the place. The next image replaces an unreadable
    one; the item's last part names each of these.
    Official: dinov2/data/augmentations.py and collate.py.
    """

    def __init__(self, paths: Sequence[Path], recipe, batch_size: int, grid: int, channels=3):
        from torchvision.transforms import v2

        def crop(size: int, scale: tuple, blur: float, solarize: float = 0.0) -> v2.Transform:
            bicubic = v2.InterpolationMode.BICUBIC
            turn = v2.RandomAffine(recipe.rotate, shear=recipe.rotate, interpolation=bicubic)
            transforms = (
                (float(recipe.rotate > 0), turn),
                (1.0, v2.RandomResizedCrop(size, scale, interpolation=bicubic)),
                (recipe.flip, v2.RandomHorizontalFlip(1.0)),
                (recipe.jitter, v2.ColorJitter(0.4, 0.4, 0.2, 0.1)),
                (recipe.gray, v2.RandomGrayscale(1.0)),
                (blur, v2.GaussianBlur(9, (0.1, 2.0))),
                (solarize, v2.RandomSolarize(128, 1.0)),
            )
            chosen = [v2.RandomApply([x], p) for p, x in transforms if p > 0]
            return v2.Compose([*chosen, v2.PILToTensor()])

        self.paths, self.recipe, self.batch_size, self.grid = paths, recipe, batch_size, grid
        sizes, scales = (
            (recipe.global_size, recipe.local_size),
            (recipe.global_scale, recipe.local_scale),
        )
        first_blur, second_blur, local_blur = recipe.blur
        first = crop(sizes[0], scales[0], first_blur)
        second = crop(sizes[0], scales[0], second_blur, recipe.solarize)
        local = crop(sizes[1], scales[1], local_blur)
        self.crops = [stack for stack in ([first, second], [local] * recipe.local_crops) if stack]
        # The smallest crop has this share of the area, and sides of 3 : 4: nothing is enlarged.
        least = max(size / math.sqrt(low * 3 / 4) for size, (low, _) in zip(sizes, scales))
        self.read = functools.partial(
            read_image, channels=channels, white=recipe.white_level, least=math.ceil(least)
        )
        self.blank = (
            Image.new("RGB", (1, 1))
            if channels == 3
            else torch.zeros(channels, 1, 1, dtype=torch.uint8)
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, str]:
        (batch, place), seed, image, failed = key, self.recipe.seed, self.blank, ""
        epoch, start = divmod(batch * self.batch_size + place, len(self.paths))
        order = permutation(len(self.paths), seed, 0, epoch)
        for i in itertools.chain(order[start:], order[:start]):
            try:
                image = self.read(self.paths[i])
                break
            except Exception as error:  # PIL's decoders raise many types for broken files
                failed += f"{self.paths[i]}: {dinoreg.reason(error)}\n"
        torch.default_generator.manual_seed(hash((seed, 1, batch, place)))
        crops = [torch.stack([crop(image) for crop in stack]) for stack in self.crops]
        masks = [self.mask(batch, i) for i in (place, place + self.batch_size)]
        return crops, torch.stack(masks), failed

    def mask(self, batch: int, i: int) -> Tensor:
        """The mask of global crop i of a batch. Over the batch, the shares of masked patches are
        spread evenly.
        """
        n, count, recipe = 2 * self.batch_size, 0, self.recipe
        masked, rank = int(n * recipe.mask_probability), permutation(n, recipe.seed, 2, batch)[i]
        if rank < masked:
            low, high = np.linspace(*recipe.mask_ratio, masked + 1)[rank : rank + 2]
            count = int(self.grid**2 * (low + (high - low) * torch.rand(()).item()))
        return random_mask(self.grid, self.grid, count).flatten()


def ignore_signals(worker: int) -> None:
    """Let a reader go on until the run has been saved, also if a signal is sent to all processes.

    Launchers send SIGTERM to the whole group. DataLoader sets its own handler when a reader starts,
    which would end it: this comes after that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_batches(
    crops: Crops, steps: range, places: range, transform: dinoreg.Transform, args
) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """For each step the parts of its batch, each (crops, masks), of these places in it: normalized
    crops (2 B, C, H, W) and (L B, C, H', W'), crop by crop, and masks (2 B, h * w).

    Images that cannot be read are printed, and added to args.failed. Closing the iterator ends the
    readers.
    """
    count, device = crops.recipe.accumulate, torch.device(args.device)
    numbers = range((steps.start - 1) * count, (steps.stop - 1) * count)
    loader = torch.utils.data.DataLoader(
        crops,
        batch_sampler=([(number, place) for place in places] for number in numbers),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    parts = []
    for stacks, masks, failed in loader:
        for line in sorted(set("".join(failed).splitlines()) - args.failed):
            dinoreg.complain(line, "pretrain")
            args.failed.add(line)
        if len(args.failed) == len(crops.paths):
            raise ValueError("none of the images can be read")
        tensors = [x.to(device, non_blocking=True) for x in (*stacks, masks)]  # (B, crops, ...)
        *stacks, masks = (x.transpose(0, 1).flatten(0, 1) for x in tensors)
        parts.append(([normalize(stack, transform) for stack in stacks], masks))
        if len(parts) == count:
            yield parts
            parts = []


def normalize(pixels: Tensor, transform: dinoreg.Transform) -> Tensor:
    """Pixels (B, C, H, W), uint8, as the model sees them: for other channels than 3, by the means
    of the transform's three.
    """
    if pixels.shape[1] != 3:
        mean, std = ((sum(x) / 3,) * 3 for x in (transform.mean, transform.std))
        gray = dataclasses.replace(transform, mean=mean, std=std)
        return dinoreg.normalize(pixels.unsqueeze(2).expand(-1, -1, 3, -1, -1), gray)[:, :, 0]
    return dinoreg.normalize(pixels, transform)


def make_probe(run, args) -> Callable | None:
    """A function that measures the k-NN accuracy of a function of images: without --val, of a tenth
    of them. None if they have no classes or are not read as `dinoreg.preprocess` does, or if the
    backbone never changes."""
    files, backbone = run.files, run.student.backbone
    sample = files[:: math.ceil(len(files) / 10000)]
    queries = Files(args.val)[:] if args.val else sample[::10]
    train = sample if args.val else [path for i, path in enumerate(sample) if i % 10]
    special = backbone.config.in_chans != 3 or run.recipe.white_level
    if special or run.ema.is_fixed or len({path.parent for path in sample}) < 2:
        return None
    return functools.partial(
        knn_accuracy,
        transform=backbone.transform,
        device=args.device,
        train=train,
        queries=queries,
    )


def thumbnails(x: Tensor) -> Tensor:
    return F.interpolate(x, (16, 16), mode="bilinear", antialias=True).flatten(1)
