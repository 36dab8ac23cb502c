"""Find the main object of a photo, without any labels, from the similarity of its patches (LOST).

    pip install -e ".[examples]"
    python examples/find_objects.py examples/images/*.jpg --output pictures

It was tried on 22 photos with a ViT-S/14 fine-tuned for saliency, for which its default bias was
chosen by hand. It was not tried on the official weights or on the paper's datasets. It finds one
object per photo; similar objects next to each other are merged, of a person it may find only the
face, and thin objects are often missed.

For each image it writes the photo, darkened outside the object, with the bounding box, and prints
the box in pixels of the upright photo; with --json as {"image": path, "box": [left, top, right,
bottom], "picture": path}, where box is null if nothing is found.

The method is LOST (Siméoni et al., 2021: "Localizing Objects with Self-Supervised Transformers and
no Labels"), on the keys, queries or values of the last attention layer, as in Darcet et al.,
"Vision Transformers Need Registers", table 3. One step is added: LOST assumes that the object is
smaller than its background, so if it selects most of the border of the photo, the object is what
remains.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import common
import dinoreg
import outputs
import patches
import registers_at_test_time
from features import NOT_FINITE, write_line

CANDIDATES = 100  # k of the paper: the patches of lowest degree, which may join the seed
# Added to the similarities, in units of their mean: patches have a common component, above all in
# their keys, that makes nearly all similarities positive. Darcet et al. choose a bias by hand for
# each model and kind of features, and so were these: another model needs its own.
BIAS = {"keys": -0.88, "queries": -0.45, "values": -0.15}


@torch.inference_mode()
def last_attention(model: dinoreg.DinoVisionTransformer, x: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values of the patches of an image (3, H, W) in the last block, each
    (h * w, D).
    """
    tokens = model.prepare_tokens_with_masks(x[None].to(model.pos_embed.device))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    parts = last.attn.split_heads(last.attn.qkv(last.norm1(tokens)))  # each (1, A, N, D / A)
    special = 1 + model.num_register_tokens
    parts = [x[0, :, special:].transpose(0, 1).flatten(1) for x in parts]  # each (h * w, D)
    return dict(zip(("queries", "keys", "values"), parts))


def lost(similarity: Tensor, h: int, w: int) -> np.ndarray:
    """The similarities of all pairs of patches (h * w, h * w) -> the patches of the object (h, w),
    bool, maybe none.
    """
    from scipy.ndimage import label

    degrees = (similarity > 0).sum(dim=1)
    candidates = degrees.argsort(stable=True)[:CANDIDATES]
    # The object is smaller than its background, so its patches are similar to fewer others.
    seed = candidates[0].item()
    seeds = candidates[similarity[seed, candidates] > 0]
    alike = similarity[seeds].sum(dim=0) > 0
    parts, _ = label(alike.unflatten(0, (h, w)).numpy())  # connected components, numbered from 1
    part = parts.flat[seed]
    return (parts == part) & (part > 0)


def exclude_border(mask: np.ndarray) -> np.ndarray:
    """The mask (h, w); if it covers most of the border of the photo, the largest connected part
    outside it instead.
    """
    from scipy.ndimage import label

    border = np.ones_like(mask)
    border[1:-1, 1:-1] = False
    parts, count = label(~mask)
    if count == 0 or mask[border].mean() <= 0.5:
        return mask
    return parts == np.bincount(parts.flat)[1:].argmax() + 1


def find_box(mask: np.ndarray, width: int, height: int) -> list[int] | None:
    """The bounding box [left, top, right, bottom] of a mask (h, w), in pixels of a photo of width x
    height.
    """
    if not mask.any():
        return None
    h, w = mask.shape
    y, x = mask.nonzero()
    left, right = (round(edge * width / w) for edge in (int(x.min()), int(x.max()) + 1))
    top, bottom = (round(edge * height / h) for edge in (int(y.min()), int(y.max()) + 1))
    return [left, top, right, bottom]


def draw(photo: Image.Image, mask: np.ndarray, box: list[int] | None) -> Image.Image:
    """The photo, darkened outside the mask (h, w) with a soft edge, and the box."""
    light = Image.fromarray(np.where(mask, 255, 90).astype(np.uint8)).resize(
        photo.size, Image.Resampling.BILINEAR
    )
    picture = Image.composite(photo, Image.new("RGB", photo.size), light)
    if box:
        left, top, right, bottom = box
        line = max(2, round(max(photo.size) / 150))
        ImageDraw.Draw(picture).rectangle(
            (left, top, right - 1, bottom - 1), outline="yellow", width=line
        )
    return picture


def describe(record: dict) -> str:
    """Where the object of a photo is, in words."""
    if record["box"] is None:
        return f"{record['picture']}: no object found"
    left, top, right, bottom = record["box"]
    return f"{record['picture']}: left {left}, top {top}, right {right}, bottom {bottom}"


def run(args: argparse.Namespace) -> int:
    images, unreadable = dinoreg.find_images(args.images), dict[Path, str]()
    pictures = dict(zip(images, common.name_pictures(images, args.output, "object")))
    outputs.check_outputs(pictures.values(), images)
    options = dict(size=args.resolution, whole=True, stride=args.stride)
    model = common.load_backbone(args.model, args.device, **options)
    bias = BIAS[args.features] if args.bias is None else args.bias
    if args.add_register:
        registers_at_test_time.move_outliers(model, images, args.add_register)
    args.output.mkdir(parents=True, exist_ok=True)
    for image, x in patches.read_photos(model, images, unreadable):
        features = last_attention(model, x)[args.features].cpu()
        if not features.isfinite().all():
            unreadable[image] = NOT_FINITE
            continue
        similarity = features @ features.T
        h, w = model.to_grid(*x.shape[1:])
        mask = exclude_border(lost(similarity + bias * similarity.mean(), h, w))
        photo = dinoreg.to_rgb(dinoreg.open_image(image))
        box = find_box(mask, *photo.size)
        with dinoreg.atomic(pictures[image]) as part:
            draw(photo, mask, box).save(part)
        record = {"image": str(image), "box": box, "picture": str(pictures[image])}
        write_line(json.dumps(record) if args.json else describe(record))
    return common.report("find_objects", unreadable)


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_images(parser)
    common.add_model(parser)
    add = parser.add_argument
    text = "of the last attention layer (default: %(default)s)"
    add("--features", choices=BIAS, default="keys", help=text)
    text = "added to the similarities, in units of their mean; lower values tend to select smaller "
    defaults = ", ".join(f"{bias:g} for {features}" for features, bias in BIAS.items())
    add("--bias", type=float, help=f"{text}objects (default: {defaults})")
    add("--json", action="store_true", help="print a JSON object for each image")
    common.add_output(parser, "pictures", "FOLDER")
    common.add_resolution(parser)
    common.add_stride(parser)
    registers_at_test_time.add_option(parser)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
