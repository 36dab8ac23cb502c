"""What the segmentation scripts share: masks, their classes and scores, and a linear head."""

import colorsys
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

import common  # noqa: F401 (finds dinoreg)
import dinoreg
from features import NOT_FINITE

IGNORED = 255  # the value of pixels without a class in all masks in memory
GAP = 4  # pixels between the photos of a picture

Classes = dict[str, tuple[int, ...]]  # the RGB colors of K classes, in the order of their indices
View = tuple[Image.Image, np.ndarray | None]  # a photo and the mask to draw on it

# Masks and their classes --------------------------------------------------------------------------


def read_classes(path: Path) -> Classes:
    """The classes of a text file: one name per line, in the order of the indices, with or without a
    color, #rrggbb.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file of class names in UTF-8") from None
    lines = [line.strip() for line in lines if line.strip()]
    parts = [re.fullmatch(r"(.*?)(?:\s+#([0-9a-fA-F]{6}))?", line).groups() for line in lines]
    classes = {
        name: tuple(bytes.fromhex(color)) if color else default_color(i)
        for i, (name, color) in enumerate(parts)
    }
    if not 2 <= len(classes) <= IGNORED or len(classes) < len(lines):
        raise ValueError(f"{path}: must hold 2 to {IGNORED} different class names, one per line")
    return classes


def default_color(i: int) -> tuple[int, ...]:
    """A bright color for class i. The hues advance by the golden ratio, which keeps any number of
    them apart.
    """
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(i * 0.618 % 1, 0.75, 0.95))


def name_classes(count: int, mask: Path) -> Classes:
    """Classes 0 to count - 1, named by their index, in the colors of the mask's palette if it has
    one.
    """
    with open_image(mask) as image:
        palette = iter(image.getpalette() or ())
    colors = list(zip(palette, palette, palette))
    return {str(i): colors[i] if i < len(colors) else default_color(i) for i in range(count)}


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image of a file. Any exception becomes a ValueError that names the file."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise ValueError("no such image file")
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise many types for broken files
        raise ValueError(f"{path}: {dinoreg.reason(error)}") from None


def read_mask(path: Path, photo: Path, classes: Classes | None, ignore: int) -> np.ndarray:
    """The class index (H, W) of each pixel, uint8, `IGNORED` where the mask has the index `ignore`.

    The file holds indices, or the colors of the classes. Raises a ValueError if a value belongs to
    no class, or if the size is not that of the upright photo.
    """
    with open_image(path) as image:
        mode, pixels = image.mode, np.asarray(image)
    with open_image(photo) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        W, H = image.size[::-1] if turned else image.size
    if pixels.shape[:2] != (H, W):
        h, w = pixels.shape[:2]
        raise ValueError(f"{path}: the mask is {w} x {h} pixels, its photo {W} x {H}")
    if mode in ("RGB", "RGBA"):
        if classes is None:
            advice = "a file with a name and a color on each line"
            raise ValueError(f"{path}: a mask of colors needs --classes, {advice}")
        known = {int.from_bytes(color, "big"): i for i, color in enumerate(classes.values())}
        values, pixels = np.unique(pixels[..., :3] @ [65536, 256, 1], return_inverse=True)
        for value in {*values.tolist()} - {*known}:
            raise ValueError(f"{path}: no class has the color #{value:06x}")
        pixels = np.array([known[value] for value in values.tolist()])[pixels.reshape(H, W)]
    if pixels.ndim != 2 or pixels.dtype.kind == "f":
        problem = f"a mask holds class indices or RGB colors, not pixels of mode {mode}"
        raise ValueError(f"{path}: {problem}")
    count = len(classes) if classes else IGNORED
    unknown = pixels[((pixels < 0) | (pixels >= count)) & (pixels != ignore)]
    if unknown.size:
        problem = f"no class has the index {unknown[0]}"
        raise ValueError(f"{path}: {problem}; there are {count}, and {ignore} is ignored")
    return np.where(pixels == ignore, IGNORED, pixels).astype(np.uint8)


def to_image(mask: np.ndarray, classes: Classes) -> Image.Image:
    """The mask as an image whose palette has the colors of the classes and is white elsewhere."""
    image = Image.fromarray(mask)
    image.putpalette(b"".join(map(bytes, classes.values())).ljust(768, b"\xff"))
    return image


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
        photo = photo.resize((max(1, round(height * photo.width / photo.height)), height))
        panels += [np.full((height, GAP, 3), 255, np.uint8), np.asarray(photo)]
    photos = Image.fromarray(np.hstack(panels[1:]))
    picture = ImageOps.expand(photos, (0, 0, 0, 32 + 22 * len(shares)), "white")
    pen, font, x, y = ImageDraw.Draw(picture), ImageFont.load_default(14), 8, height + 8
    for name in filter(shares.get, shares):  # classes that occur
        text = f"{dinoreg.printable(name)} {shares[name]:.1%}"
        length = 20 + font.getlength(text)
        if x > 8 and x + length > picture.width:
            x, y = 8, y + 22
        pen.rectangle((x, y, x + 13, y + 13), fill=classes[name], outline="black")
        pen.text((x + 20, y - 2), text, fill="black", font=font)
        x += length + 16
    return picture.crop((0, 0, picture.width, y + 24))


# Scores -------------------------------------------------------------------------------------------


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
        raise ValueError("the masks to compare with have no labeled pixels")
    right = confusions.diagonal()
    union = confusions.sum(axis=0)[:-1] + confusions.sum(axis=1) - right
    iou = {
        name: r / u if u else None for name, r, u in zip(classes, right.tolist(), union.tolist())
    }
    mean = np.mean([x for x in iou.values() if x is not None]).item()
    return {"mean_iou": mean, "pixel_accuracy": (right.sum() / confusions.sum()).item(), "iou": iou}


def describe_scores(scores: dict, photos: str) -> str:
    """What `score` returns for these photos as text, with a line for each class."""
    mean, accuracy = scores["mean_iou"], scores["pixel_accuracy"]
    lines = [f"mean IoU {mean:.1%}, pixel accuracy {accuracy:.1%} on {photos}"]
    for name, iou in scores["iou"].items():
        text = "does not occur" if iou is None else f"{iou:.1%}"
        lines.append(f"{text:>8}  {dinoreg.printable(name)}")
    return "\n".join(lines)


# The linear head ----------------------------------------------------------------------------------


def patch_features(backbone: dinoreg.DinoVisionTransformer, x: Tensor, layers: int = 1) -> Tensor:
    """Normalized patch tokens of the last blocks, concatenated: (B, 3, H, W) ->
    (B, layers * D, h, w).
    """
    return torch.cat(backbone.get_intermediate_layers(x, layers, reshape=True), dim=1)


class Segmenter(nn.Module):
    """A linear head on patch tokens: images (B, 3, H, W) -> logits (B, K, h, w).

    Official code: dinov2/eval/segmentation, `BNHead`, batch norm and a convolution of 1 x 1.
    """

    def __init__(self, backbone: dinoreg.DinoVisionTransformer, classes: Classes, layers: int = 1):
        super().__init__()
        self.backbone, self.classes, self.layers = backbone, classes, layers
        width = layers * backbone.embed_dim
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, len(classes), 1))
        nn.init.normal_(self.head[1].weight, std=0.01)
        nn.init.zeros_(self.head[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(patch_features(self.backbone, x, self.layers))


def save(model: Segmenter, path: Path) -> None:
    metadata = dinoreg.write_metadata(model.backbone.config, model.backbone.transform, None)
    metadata |= {"classes": json.dumps(model.classes), "layers": json.dumps(model.layers)}
    dinoreg.write_tensors(model.state_dict(), path, metadata)


def load(path: Path, device: str) -> Segmenter:
    """The model that `save` wrote, in eval mode. Raises a ValueError for any other file."""
    with dinoreg.naming(path):
        tensors, metadata = dinoreg.read_tensors(path)
        if "classes" not in metadata:
            raise ValueError("not a segmenter; examples/train_segmenter.py writes one")
        config, transform, _ = dinoreg.read_metadata(metadata)
        parts = {k.removeprefix("backbone."): x for k, x in tensors.items() if k[:5] != "head."}
        backbone = dinoreg.from_state_dict(parts, config, transform=transform)
        colors = json.loads(metadata["classes"])
        classes = {name: tuple(bytes(color)) for name, color in colors.items()}
        if len(classes) > IGNORED or any(len(color) != 3 for color in classes.values()):
            raise ValueError(f"expected at most {IGNORED} classes, each with an RGB color")
        layers = json.loads(metadata["layers"])
        if layers not in range(1, backbone.n_blocks + 1):
            raise ValueError(f"damaged: {layers} layers of {backbone.n_blocks}")
        model = Segmenter(backbone, classes, layers)
        model.load_state_dict(tensors)
    return model.to(device).eval()


def classify_pixels(logits: Tensor, H: int, W: int) -> np.ndarray:
    """The class (H, W) of each pixel, uint8, from logits (K, h, w), upsampled bilinearly. Raises a
    ValueError if they are not finite.
    """
    if not logits.isfinite().all():
        raise ValueError(NOT_FINITE)
    rows = F.interpolate(logits[None], (H, logits.shape[2]), mode="bilinear")  # (1, K, H, w)
    # Columns follow in strips: (K, H, W) logits of a large photo would fill the memory.
    strips = [
        F.interpolate(strip, (strip.shape[2], W), mode="bilinear").argmax(dim=1)[0].byte().cpu()
        for strip in rows.split(64, dim=2)
    ]
    return torch.cat(strips).numpy()
