"""Masks: their files, their classes, how they look and how well they agree."""

import colorsys
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

import dinoreg

IGNORED = 255  # the value of pixels without a class in all masks in memory
GAP = 4  # pixels between the photos of a picture

Classes = dict[str, tuple[int, int, int]]  # the colours of K classes, in the order of their indices
View = tuple[Image.Image, np.ndarray | None]  # a photo and the mask to draw on it


def read_classes(path: Path) -> Classes:
    """The classes of a text file: one name per line, in the order of the indices, with or without a
    colour, #rrggbb.
    """
    try:
        lines = [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file of class names in UTF-8") from None
    parts = [re.fullmatch(r"(.*?)(?:\s+#([0-9a-fA-F]{6}))?", line).groups() for line in lines]
    classes = {
        name: tuple(bytes.fromhex(colour)) if colour else default_colour(i)
        for i, (name, colour) in enumerate(parts)
    }
    if not 2 <= len(classes) <= IGNORED or len(classes) < len(lines):
        raise ValueError(f"{path}: must hold 2 to {IGNORED} different class names, one per line")
    return classes


def default_colour(i: int) -> tuple[int, ...]:
    """A bright colour for class i; the hues advance by the golden ratio, which keeps any number of
    them apart.
    """
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(i * 0.618 % 1, 0.75, 0.95))


def name_classes(count: int, mask: Path) -> Classes:
    """Classes 0 to count - 1, named by their index, with the colours of the mask's palette if it
    has one.
    """
    with open_image(mask) as image:
        palette = iter(image.getpalette() or ())
    colours = list(zip(palette, palette, palette))
    return {str(i): colours[i] if i < len(colours) else default_colour(i) for i in range(count)}


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image of a file. Whatever PIL raises about it becomes a ValueError that names the
    file.
    """
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # PIL's decoders raise many types for broken files
        raise ValueError(f"{path}: {dinoreg.reason(error)}") from None


def read_mask(path: Path, photo: Path, classes: Classes | None, ignore: int) -> np.ndarray:
    """The class index (H, W) of each pixel, uint8, `IGNORED` where the mask has the index `ignore`.

    The file holds indices, or the colours of the classes. Raises a ValueError if a value belongs to
    no class, or if the size is not that of the upright photo.
    """
    with open_image(path) as image:
        mode, pixels = image.mode, np.asarray(image)
    with open_image(photo) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"{path}: the mask is {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"its photo {width} x {height}"
        )
    if mode in ("RGB", "RGBA"):
        if classes is None:
            raise ValueError(
                f"{path}: a mask of colours needs --classes, "
                "a file with a name and a colour on each line"
            )
        known = {int.from_bytes(colour, "big"): i for i, colour in enumerate(classes.values())}
        values, pixels = np.unique(pixels[..., :3] @ [65536, 256, 1], return_inverse=True)
        for value in {*values.tolist()} - {*known}:
            raise ValueError(f"{path}: no class has the colour #{value:06x}")
        pixels = np.array([known[value] for value in values.tolist()])[
            pixels.reshape(height, width)
        ]
    if pixels.ndim != 2 or pixels.dtype.kind == "f":
        raise ValueError(
            f"{path}: a mask holds class indices or RGB colours, not pixels of mode {mode}"
        )
    count = len(classes) if classes else IGNORED
    unknown = pixels[((pixels < 0) | (pixels >= count)) & (pixels != ignore)]
    if unknown.size:
        raise ValueError(
            f"{path}: no class has the index {unknown[0]}; "
            f"there are {count}, and {ignore} is ignored"
        )
    return np.where(pixels == ignore, IGNORED, pixels).astype(np.uint8)


def to_image(mask: np.ndarray, classes: Classes) -> Image.Image:
    """The mask as an image whose palette has the colours of the classes; the rest of it is
    white.
    """
    image = Image.fromarray(mask)
    image.putpalette(
        bytes(value for colour in classes.values() for value in colour).ljust(768, b"\xff")
    )
    return image


def confusion(truth: np.ndarray, predicted: np.ndarray, K: int) -> np.ndarray:
    """Pixels (K, K + 1) of each true class, by predicted class or none; those that the truth
    ignores are left out.
    """
    valid = truth != IGNORED
    pairs = truth[valid].astype(int) * (K + 1) + predicted[valid].clip(max=K)
    return np.bincount(pairs, minlength=K * (K + 1)).reshape(K, K + 1)


def score(confusions: np.ndarray, classes: Classes) -> dict:
    """Mean IoU, pixel accuracy and the IoU of each class (None if it occurs nowhere), from the sum
    of confusions.
    """
    if not confusions.any():
        raise ValueError("the masks to compare with have no labelled pixels")
    right = confusions.diagonal()
    union = confusions.sum(axis=0)[:-1] + confusions.sum(axis=1) - right
    iou = {
        name: r / u if u else None for name, r, u in zip(classes, right.tolist(), union.tolist())
    }
    mean = np.mean([x for x in iou.values() if x is not None]).item()
    return {"mean_iou": mean, "pixel_accuracy": (right.sum() / confusions.sum()).item(), "iou": iou}


def draw(views: list[View], shares: dict[str, float], classes: Classes, width: int) -> Image.Image:
    """Photos side by side, tinted by their masks, above a legend of the classes that occur; at most
    `width` pixels wide.
    """
    gaps, aspect = GAP * (len(views) - 1), sum(photo.width / photo.height for photo, _ in views)
    height = min(max(1, int((width - gaps) / aspect)), *(photo.height for photo, _ in views))
    panels = []
    for photo, mask in views:
        if mask is not None:
            tinted = Image.blend(photo, to_image(mask, classes).convert("RGB"), 0.5)
            photo = Image.composite(tinted, photo, Image.fromarray(mask != IGNORED))
        photo = photo.resize((round(height * photo.width / photo.height), height))
        panels += [np.full((height, GAP, 3), 255, np.uint8), np.asarray(photo)]
    photos = Image.fromarray(np.hstack(panels[1:]))
    picture = ImageOps.expand(photos, (0, 0, 0, 32 + 22 * len(shares)), "white")
    pen, font, x, y = ImageDraw.Draw(picture), ImageFont.load_default(14), 8, height + 8
    for name in filter(shares.get, shares):  # classes that occur
        text = f"{name} {shares[name]:.1%}"
        length = 20 + font.getlength(text)
        if x > 8 and x + length > picture.width:
            x, y = 8, y + 22
        pen.rectangle((x, y, x + 13, y + 13), fill=classes[name], outline="black")
        pen.text((x + 20, y - 2), text, fill="black", font=font)
        x += length + 16
    return picture.crop((0, 0, picture.width, y + 24))
