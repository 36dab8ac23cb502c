"""Segment photos with a linear head from train_segmenter.py, or by the example of an annotated photo.

    pip install -e ".[examples]"
    python examples/segment.py PHOTO... --weights mine.safetensors
    python examples/segment.py PHOTO... --like annotated.jpg mask.png --classes classes.txt

For each photo it writes an overlay with a legend (NAME_segments.png) and the mask (NAME_mask.png: class indices, with the
colours as palette), and prints a JSON object, {"image": path, "mask": path, "shares": {class: share of the pixels}}.

--like needs no training: the 20 most similar patches of the annotated photos vote on the class of each patch (k-NN by the
cosine similarity of patch tokens). Photos are resized to --size. If a side is then longer than --tile, the model sees
overlapping tiles and their logits are averaged, so that the memory of a forward pass does not grow with the photo.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import common
import dinoreg
import masks
from masks import Classes

NEIGHBOURS = 20  # patches that vote on the class of a patch

# ---------------------------------------------------------------------------------------------------------------------
# The model


def patch_features(backbone: dinoreg.DinoVisionTransformer, x: Tensor, layers: int) -> Tensor:
    """Normalised patch tokens of the last blocks, concatenated: (B, 3, H, W) -> (B, h, w, layers * D)."""
    tokens = torch.cat(backbone.get_intermediate_layers(x, layers), dim=-1)
    return tokens.unflatten(1, backbone.image_grid(x))


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length, evenly spaced, each overlapping the next by a third or more."""
    count = 1 + math.ceil(max(0, length - tile) / max(1, tile * 2 // 3))
    return torch.linspace(0, max(0, length - tile), count).round().int().tolist()


def run_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, backbone: dinoreg.DinoVisionTransformer) -> Tensor:
    """What a function (B, 3, H, W) -> (B, h, w, K) of a backbone gives for an image (3, H, W), in tiles: (h, w, K).

    Tiles have at most `tile` patches a side, if these do not overlap. Where tiles overlap, the result is their mean.
    """
    P, (h, w) = backbone.patch_size, backbone.to_grid(*x.shape[1:])
    density = P // backbone.patch_embed.proj.stride[0]  # patches that begin within the side of one
    total, count = 0, 0
    for top in tile_starts(x.shape[1] // P, tile):
        for left in tile_starts(x.shape[2] // P, tile):
            output = function(x[None, :, top * P : (top + tile) * P, left * P : (left + tile) * P])[0]
            rows, columns, _ = output.shape
            margins = (0, 0, left * density, w - left * density - columns, top * density, h - top * density - rows)
            total = total + F.pad(output, margins)
            count = count + F.pad(torch.ones_like(output[..., :1]), margins)
    return total / count


class Segmenter(nn.Module):
    """Batch norm and a linear layer on patch tokens: images (B, 3, H, W) -> logits (B, h, w, K).

    This is the linear head of the official evaluation (`BNHead` in dinov2/eval/segmentation), whose 1 x 1 convolution is
    a linear layer on each token.
    """

    def __init__(self, backbone: dinoreg.DinoVisionTransformer, classes: Classes, layers: int = 1):
        super().__init__()
        self.backbone, self.classes, self.layers = backbone, classes, layers
        width = layers * backbone.embed_dim
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, len(classes)))
        nn.init.normal_(self.head[1].weight, std=0.01)
        nn.init.zeros_(self.head[1].bias)

    def classify(self, features: Tensor) -> Tensor:
        """Features (..., layers * D) -> logits (..., K)."""
        return self.head(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(patch_features(self.backbone, x, self.layers))


def save(model: Segmenter, path: Path) -> None:
    metadata = dinoreg.write_metadata(model.backbone.config, model.backbone.transform, None)
    metadata |= {"classes": json.dumps(model.classes), "layers": json.dumps(model.layers)}
    dinoreg.write_tensors(model.state_dict(), path, metadata)


def load(path: Path, device: str) -> Segmenter:
    """The model that `save` wrote, in eval mode. Raises a ValueError for any other file."""
    tensors, metadata = dinoreg.read_tensors(path)
    if "classes" not in metadata:
        raise ValueError(f"{path}: not a segmenter; examples/train_segmenter.py writes one")
    try:
        classes, layers = (json.loads(metadata[key]) for key in ("classes", "layers"))
        config, transform, _ = dinoreg.read_metadata(metadata)
        prefix = "backbone."
        backbone = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        backbone = dinoreg.from_state_dict(backbone, config, transform=transform)
        if layers not in range(1, backbone.n_blocks + 1):
            raise ValueError(f"{layers} layers of {backbone.n_blocks}")
        model = Segmenter(backbone, {name: tuple(bytes(colour)) for name, colour in classes.items()}, layers)
        model.load_state_dict(tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: a damaged segmenter ({common.reason(error)})") from None
    return model.to(device).eval()


def by_example(
    backbone: dinoreg.DinoVisionTransformer, examples: list[tuple[Path, np.ndarray]], size: int, tile: int, K: int
) -> Callable[[Tensor], Tensor]:
    """A function in place of a `Segmenter`: the most similar patches of annotated photos, given with their masks, vote.

    They vote for the classes of their pixels, by share. Patches that are labelled by less than half have no vote.
    """

    def features(x: Tensor) -> Tensor:
        return patch_features(backbone, x, layers=1)

    known, shares, device = [], [], backbone.pos_embed.device
    for photo, mask in examples:
        x = dinoreg.preprocess(photo, size, True, backbone.patch_size, transform=backbone.transform).to(device)
        tokens = run_tiles(features, x, tile, backbone)  # (h, w, D)
        pixels = torch.from_numpy(mask)[None]
        share = [F.adaptive_avg_pool2d((pixels == i).float(), tokens.shape[:2]) for i in range(K)]
        share = torch.cat(share).permute(1, 2, 0).to(device)  # (h, w, K)
        labelled = share.sum(dim=2) > 0.5
        known.append(tokens[labelled])
        shares.append(share[labelled])
    known, shares = torch.cat(known), torch.cat(shares)  # (n, D), (n, K)
    if not len(known):
        raise ValueError(f"{examples[0][0]}: its mask has no labelled pixels")

    def segment(x: Tensor) -> Tensor:
        tokens = features(x)
        return common.vote(known, shares, tokens.flatten(0, 2), NEIGHBOURS).unflatten(0, tokens.shape[:3])

    return segment


# ---------------------------------------------------------------------------------------------------------------------
# From a photo to the class of each pixel


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (h, w, K) -> (1, K, *size), bilinear."""
    return F.interpolate(logits.permute(2, 0, 1)[None], size, mode="bilinear")


def classify_pixels(logits: Tensor, H: int, W: int) -> np.ndarray:
    """The class (H, W) of each pixel, uint8, from the upsampled logits (h, w, K).

    Rows are upsampled first and columns a strip at a time, since (K, H, W) logits of a large photo would fill the memory.
    """
    rows = upsample(logits, (H, logits.shape[1]))  # (1, K, H, w)
    strips = (F.interpolate(strip, (strip.shape[2], W), mode="bilinear") for strip in rows.split(64, dim=2))
    return torch.cat([strip.argmax(dim=1)[0].byte().cpu() for strip in strips]).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    views = []
    if args.weights:
        segment = load(args.weights, args.device)
        backbone, classes = common.set_stride(segment.backbone, args.stride), segment.classes
        size = args.size or common.set_size(backbone, None)[0]
    else:
        backbone, size = common.load_backbone(args.model, args.device, args.stride), args.size or 518
        classes = masks.read_classes(args.classes) if args.classes else None
    P = backbone.patch_size
    tile = args.tile // P
    least = P if args.stride in (None, P) else 2 * P  # tiles of one patch do not overlap
    if min(size, args.tile) < least:
        raise ValueError(f"--size and --tile must be at least {least}, patches have sides of {P}")
    if args.like:
        examples = [(photo, masks.read_mask(mask, photo, classes, args.ignore)) for photo, mask in args.like]
        if classes is None:
            largest = max(int(mask[mask != masks.IGNORED].max(initial=0)) for _, mask in examples)
            classes = masks.name_classes(largest + 1, args.like[0][1])
        segment = by_example(backbone, examples, size, tile, len(classes))
        photo, mask = examples[0]
        with masks.open_image(photo) as image:
            views = [(dinoreg.to_rgb(image), mask)]
    args.output.mkdir(parents=True, exist_ok=True)

    images, failed, confusions = dinoreg.find_images(args.images), 0, 0
    names = (common.name_pictures(images, args.output, kind) for kind in ("segments", "mask"))
    for image, picture_path, mask_path in zip(tqdm(images, unit="image"), *names):
        try:
            x = dinoreg.preprocess(image, size, True, P, transform=backbone.transform)
            photo = dinoreg.to_rgb(Image.open(image))
            truth = masks.read_mask(args.truth / f"{image.stem}.png", image, classes, args.ignore) if args.truth else None
        except (OSError, ValueError) as error:
            tqdm.write(f"segment: {image}: {common.reason(error)}", file=sys.stderr)
            failed += 1
            continue
        logits = run_tiles(segment, x.to(args.device), tile, backbone)
        mask = classify_pixels(logits, photo.height, photo.width)
        if truth is not None:
            confusions = confusions + masks.confusion(truth, mask, len(classes))
        counts = np.bincount(mask.flatten(), minlength=len(classes)) / mask.size
        shares = {name: round(share, 4) for name, share in zip(classes, counts.tolist())}
        with dinoreg.atomic(picture_path) as part:
            masks.draw([*views, (photo, None), (photo, mask)], shares, classes, args.width).save(part, optimize=True)
        masks.write_mask(mask, mask_path, classes)
        record = {"image": str(image), "mask": str(mask_path), "shares": shares}
        tqdm.write(json.dumps(record), file=sys.stdout)
    if args.truth and failed < len(images):
        print(json.dumps(masks.score(confusions, classes)))
    return 1 if failed else 0


def main() -> int:
    """0 if all went well, 1 if some photos could not be segmented, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="PHOTO|FOLDER", help="image files, or folders of them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, metavar="FILE", help="a file written by train_segmenter.py")
    names = ("PHOTO", "MASK")
    source.add_argument(
        "--like", type=Path, nargs=2, action="append", metavar=names, help="an annotated photo (may be repeated)"
    )
    add("--model", default="vits14_reg", help="backbone for --like: an official model or a file (default: %(default)s)")
    add("--classes", type=Path, metavar="FILE", help="class names for --like: one per line, with or without #rrggbb")
    add("--ignore", type=int, default=255, metavar="INDEX", help="index of unlabelled pixels in masks (default: 255)")
    area = "side of a square with as many pixels as the resized photo"
    add("--size", type=int, metavar="PIXELS", help=f"{area} (default: as in training; 518 with --like)")
    add("--tile", type=int, default=1022, metavar="PIXELS", help="largest side of a tile (default: %(default)s)")
    add("--truth", type=Path, metavar="FOLDER", help="true masks, NAME.png: print mean IoU and pixel accuracy at the end")
    add("--width", type=int, default=1000, metavar="PIXELS", help="of the overlays, at most (default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("segments"), metavar="FOLDER", help="default: %(default)s")
    common.add_stride(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
