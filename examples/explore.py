"""Explore the patch features of DINOv2 for several photos, in one HTML page.

    pip install -e ".[examples]"
    python examples/explore.py examples/images/*.jpg --model vits14 vits14_reg -o explore.html

The page needs no server and no network. It compares the patch under the pointer with all patches of
all photos, and shows principal components, attention and token norms as `visualize.py` does. To
keep the page small, patch features are projected onto the fewest principal axes that keep errors of
cosines below 0.02, and stored in int8. `--stride 7` (half the patch size)
makes the maps smoother and the page about four times as large.
"""

import argparse
import base64
import bisect
import io
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import common
import dinoreg
import outputs
import patches
from visualize import add_shared_options, load_models, map_photos

TEMPLATE = Path(__file__).with_suffix(".html")
TOLERANCE = 0.02  # of a cosine
CHECKED = 256  # patches whose cosines with all others are checked


def encode(x: Tensor) -> str:
    return base64.b64encode(x.cpu().contiguous().numpy().tobytes()).decode()


def encode_image(pixels: Tensor) -> str:
    """An image (H, W, 3) in [0, 1] as a data: URL."""
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().numpy()).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def compress(features: Tensor) -> tuple[Tensor, float]:
    """Features (M, D) -> int8 (M, K) with the same cosines within TOLERANCE, and the largest error
    of a cosine.

    The K columns are the coordinates along the first principal axes of the normalized features,
    which are not centered. K is the smallest number that keeps the error below TOLERANCE. The error
    is the largest among the cosines of the `CHECKED` patches that lose most with all M: those of
    all pairs would take hours for a thousand photos.
    """
    unit = F.normalize(features, dim=1)
    # (M, D), the largest variance first
    coordinates = unit @ torch.linalg.eigh(unit.mT @ unit).eigenvectors.flip(1)

    def quantize(K: int) -> Tensor:
        x = coordinates[:, :K]
        return (x / x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) * 127).round()

    def error(K: int) -> float:
        kept = F.normalize(quantize(K), dim=1)
        # The worst by the cosine to what is kept of them.
        worst = (kept * coordinates[:, :K]).sum(dim=1).argsort()[:CHECKED]
        return (unit[worst] @ unit.mT - kept[worst] @ kept.mT).abs().max().item()

    K = 1 + bisect.bisect_left(range(1, features.shape[1]), -TOLERANCE, key=lambda K: -error(K))
    return quantize(K).char(), error(K)


def encode_maps(maps: dict[str, Tensor], codes: Tensor) -> dict:
    """The JSON data of a model's maps of a photo; codes are its compressed features."""
    h, w = maps["norms"].shape
    attention = maps["attention"].flatten(3)  # (L, A, 1 + R, h * w)
    peaks = attention.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return {
        "h": h,
        "w": w,
        "features": encode(codes),
        "colors": encode((maps["colors"] * 255).round().byte()),
        "norms": encode(maps["norms"]),
        # The square root keeps precision for small values: most are far below the peak.
        "attention": encode(((attention / peaks).sqrt() * 255).round().byte()),
        "peaks": encode(peaks),
    }


def describe(
    model: dinoreg.DinoVisionTransformer,
    name: str,
    photos: list[dict[str, Tensor]],
    layers: list[int],
) -> dict:
    """The JSON data of a model and its maps of each photo; prints how exact they are."""
    patches.add_colors(photos)
    codes, error = compress(torch.cat([maps["features"].flatten(0, 1) for maps in photos]))
    axes, D = codes.shape[1], model.embed_dim
    print(
        f"{dinoreg.printable(name)}: the page keeps {axes} of {D} dimensions of the features; "
        f"its cosine similarities are within {error:.3f} of the exact ones"
    )
    norms = torch.cat([maps["norms"].flatten() for maps in photos])
    parts = codes.split([maps["norms"].numel() for maps in photos])
    return {
        "name": name,
        "axes": axes,
        "blocks": model.n_blocks,
        "layers": [layer % model.n_blocks for layer in layers],
        "heads": model.num_heads,
        "registers": model.num_register_tokens,
        "outlier": patches.OUTLIER * norms.median().item(),
        "photos": [encode_maps(maps, part) for maps, part in zip(photos, parts)],
    }


def run(args: argparse.Namespace) -> int:
    images = dinoreg.find_images(args.images)
    outputs.check_outputs([args.output], images)
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    models = load_models(args)
    for source, model in models.items():
        if not set(args.layers) <= set(range(-model.n_blocks, model.n_blocks)):
            depth = f"the {model.n_blocks} blocks of {source}"
            raise ValueError(f"--layers must be among {depth}, got {args.layers}")

    unreadable: dict[Path, str] = {}
    photos = list(map_photos(models, images, unreadable, args.layers))
    if not photos:
        return common.report("explore", unreadable)
    described = [
        describe(model, Path(source).stem, [photo.maps[source] for photo in photos], args.layers)
        for source, model in models.items()
    ]
    listed = []
    for photo in photos:
        H, W, _ = photo.pixels.shape
        image = encode_image(photo.pixels)
        listed.append({"name": photo.path.name, "width": W, "height": H, "image": image})
    # A file name may contain "</script>".
    data = json.dumps({"photos": listed, "models": described}).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)
    with dinoreg.atomic(args.output) as part:
        part.write_text(page, encoding="utf-8")
    count = "1 photo" if len(photos) == 1 else f"{len(photos)} photos"
    size = f"{args.output.stat().st_size / 1e6:.1f} MB"
    print(f"{dinoreg.printable(str(args.output))}: {count}, {size}; open it in a browser")
    return common.report("explore", unreadable)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shared_options(parser)
    common.add_stride(parser)
    text = "blocks whose attention is shown, from 0 (default: -1, the last)"
    parser.add_argument("--layers", nargs="+", type=int, default=[-1], metavar="BLOCK", help=text)
    common.add_output(parser, "explore.html", "PAGE")


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
