"""Masks: their files, their classes, how they look and how well they agree."""

import colorsys
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont

import common
import dinoreg

IGNORED = 255  # the value of pixels without a class in all masks in memory

Colour = tuple[int, int, int]
Classes = dict[str, Colour]  # in the order of their indices; there are K


def read_classes(path: Path) -> Classes:
    """The classes of a text file: a name in each line, in the order of the indices, and perhaps a colour, #rrggbb."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    parts = [re.fullmatch(r"(.*?)(?:\s+#([0-9a-fA-F]{6}))?", line).groups() for line in lines]
    names = [name for name, _ in parts]
    if not 1 < len(names) < IGNORED or len(set(names)) < len(names):
        raise ValueError(f"{path}: 2 to {IGNORED - 1} different class names are needed, one in each line")
    colours = [tuple(bytes.fromhex(colour)) if colour else None for _, colour in parts]
    return {name: colour or default_colour(i) for i, (name, colour) in enumerate(zip(names, colours))}


def default_colour(i: int) -> Colour:
    """Distinct hues, however many are needed: neighbours are a golden section of the circle apart."""
    red, green, blue = colorsys.hsv_to_rgb(i * 0.618 % 1, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def name_classes(count: int, mask: Path) -> Classes:
    """Classes 0 to count - 1, named by their index, with the colours of the mask's palette if it has one."""
    with Image.open(mask) as image:
        palette = iter(image.getpalette() or ())
    colours = list(zip(palette, palette, palette))
    return {str(i): colours[i] if i < len(colours) else default_colour(i) for i in range(count)}


def read_mask(path: Path, photo: Path, classes: Classes | None, ignore: int) -> np.ndarray:
    """The class index (H, W) of each pixel, uint8, `IGNORED` where the mask has the index `ignore`.

    The file holds indices, or the colours of the classes. Raises a ValueError for an unknown value and for another size
    than that of the photo.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
        with Image.open(photo) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
    except Exception as error:  # PIL's decoders raise many types for broken files
        raise ValueError(f"{path}: cannot read the mask or its photo: {common.reason(error)}") from None
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"{path}: the mask is {pixels.shape[1]} x {pixels.shape[0]} pixels, its photo {width} x {height}")
    if mode in ("RGB", "RGBA"):
        if classes is None:
            raise ValueError(f"{path}: a mask of colours needs --classes, a file with a name and a colour in each line")
        values, pixels = np.unique(pixels[..., :3] @ [65536, 256, 1], return_inverse=True)
        known = {red * 65536 + green * 256 + blue: i for i, (red, green, blue) in enumerate(classes.values())}
        for value in values.tolist():
            if value not in known:
                raise ValueError(f"{path}: no class has the colour #{value:06x}")
        pixels = np.array([known[value] for value in values.tolist()])[pixels.reshape(height, width)]
    if pixels.ndim != 2:
        raise ValueError(f"{path}: a mask holds class indices or RGB colours; this image has mode {mode}")
    count = len(classes) if classes else IGNORED
    unknown = pixels[(pixels >= count) & (pixels != ignore)]
    if unknown.size:
        raise ValueError(f"{path}: index {unknown[0]} is of no class; there are {count}, and {ignore} is ignored")
    return np.where(pixels == ignore, IGNORED, pixels).astype(np.uint8)


def write_mask(mask: np.ndarray, path: Path, classes: Classes) -> None:
    image = Image.fromarray(mask)
    image.putpalette([value for colour in classes.values() for value in colour])
    with dinoreg.atomic(path) as part:
        image.save(part)


def confusion(truth: np.ndarray, predicted: np.ndarray, K: int) -> np.ndarray:
    """Pixels (K, K) of each true class, by predicted class; ignored ones are left out."""
    valid = truth != IGNORED
    return np.bincount(truth[valid].astype(int) * K + predicted[valid], minlength=K * K).reshape(K, K)


def score(confusions: np.ndarray, classes: Classes) -> dict:
    """Mean IoU, pixel accuracy and the IoU of each class (None if it occurs nowhere), from the sum of confusions."""
    right, union = confusions.diagonal(), confusions.sum(axis=0) + confusions.sum(axis=1) - confusions.diagonal()
    iou = [round(r / u, 4) if u else None for r, u in zip(right.tolist(), union.tolist())]
    mean = float(np.mean([x for x in iou if x is not None])) if union.any() else None
    accuracy = right.sum() / max(1, confusions.sum())
    return {"mean_iou": mean, "pixel_accuracy": float(accuracy), "iou": dict(zip(classes, iou))}


def overlay(photo: Image.Image, mask: np.ndarray, classes: Classes) -> Image.Image:
    """The photo tinted in the colours of its classes; ignored pixels stay as they are."""
    indices = np.asarray(Image.fromarray(mask).resize(photo.size, Image.Resampling.NEAREST))
    colours = np.array([*classes.values()], np.uint8)[indices.clip(max=len(classes) - 1)]
    tinted = Image.blend(photo, Image.fromarray(colours), 0.5)
    return Image.composite(tinted, photo, Image.fromarray(indices != IGNORED))


def draw(
    views: list[tuple[Image.Image, np.ndarray | None]], shares: dict[str, float], classes: Classes, width: int
) -> Image.Image:
    """Photos side by side, under their masks, above a legend of the classes that occur; at most `width` pixels wide."""
    aspects = [photo.width / photo.height for photo, _ in views]
    height = min(views[0][0].height, max(1, int(width / sum(aspects))))
    panels = [photo.resize((round(height * aspect), height)) for (photo, _), aspect in zip(views, aspects)]
    width = sum(panel.width for panel in panels)
    font, places, x, y = ImageFont.load_default(14), [], 8, height + 8
    for name, share in shares.items():
        if share:
            text = f"{name} {share:.1%}"
            length = 20 + font.getlength(text)
            if x > 8 and x + length > width:
                x, y = 8, y + 22
            places.append((x, y, text, classes[name]))
            x += length + 16
    picture = Image.new("RGB", (width, y + 24), "white")
    left, pen = 0, ImageDraw.Draw(picture)
    for panel, (_, mask) in zip(panels, views):
        picture.paste(panel if mask is None else overlay(panel, mask, classes), (left, 0))
        left += panel.width
    for x, y, text, colour in places:
        pen.rectangle((x, y, x + 13, y + 13), fill=colour, outline="black")
        pen.text((x + 20, y - 2), text, fill="black", font=font)
    return picture
