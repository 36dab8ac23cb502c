"""Explore the patch features of DINOv2 for several photos, in one HTML page.

    pip install -e ".[examples]"
    python examples/explore.py examples/images/*.jpg --model vits14 vits14_reg -o explore.html

The page needs no server and no network. It compares the patch under the pointer with all patches of
all photos, and shows principal components, attention and token norms as `visualize.py` does. To
keep the page small, patch features are projected onto their first principal axes and stored in
int8, with as many axes as keep the errors of cosines below 0.02. The script prints the largest
error for each model, and the size of the page.
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
from visualize import add_colours, add_options, load_models, see_photos

TEMPLATE = Path(__file__).with_suffix(".html")
TOLERANCE = 0.02  # of a cosine
CHECKED = 256  # patches whose cosines with all others are checked


def encode(x: Tensor) -> str:
    return base64.b64encode(x.cpu().contiguous().numpy().tobytes()).decode()


def encode_image(x: Tensor, transform: dinoreg.Transform) -> str:
    """A normalised image (3, H, W) as a data: URL."""
    buffer = io.BytesIO()
    pixels = (common.to_pixels(x, transform) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def compress(features: Tensor) -> tuple[Tensor, float]:
    """Features (M, D) -> int8 (M, K) with the same cosines within TOLERANCE, and the largest error
    of a cosine.

    The K columns are the coordinates along the first principal axes of the normalised features,
    which are not centred. K is the smallest number that keeps the error below TOLERANCE. The error
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


def describe(
    model: dinoreg.DinoVisionTransformer,
    name: str,
    seen: list[dict[str, Tensor]],
    layers: list[int],
) -> dict:
    """The JSON data of a model and of what it sees in each photo."""
    add_colours(seen)
    compressed, error = compress(torch.cat([maps["features"].flatten(0, 1) for maps in seen]))
    print(
        f"{name}: {compressed.shape[1]} of {model.embed_dim} axes, largest cosine error {error:.4f}"
    )
    photos = []
    for maps, codes in zip(seen, compressed.split([maps["norms"].numel() for maps in seen])):
        h, w = maps["norms"].shape
        attention = maps["attention"].flatten(3)  # (L, A, 1 + R, h * w)
        peaks = attention.amax(dim=-1, keepdim=True).clamp(min=1e-12)
        photos.append(
            {
                "h": h,
                "w": w,
                "features": encode(codes),
                "colours": encode((maps["colours"] * 255).round().byte()),
                "norms": encode(maps["norms"]),
                # The square root keeps precision for small values: most are far below the peak.
                "attention": encode(((attention / peaks).sqrt() * 255).round().byte()),
                "peaks": encode(peaks),
            }
        )
    return {
        "name": name,
        "axes": compressed.shape[1],
        "blocks": model.n_blocks,
        "layers": [layer % model.n_blocks for layer in layers],
        "heads": model.num_heads,
        "registers": model.num_register_tokens,
        "outlier": common.OUTLIER
        * torch.cat([maps["norms"].flatten() for maps in seen]).median().item(),
        "photos": photos,
    }


def run(args: argparse.Namespace) -> int:
    models, images = load_models(args), dinoreg.find_images(args.images)
    for source, model in models.items():
        if not set(args.layers) <= set(range(-model.n_blocks, model.n_blocks)):
            raise ValueError(
                f"--layers must be among the {model.n_blocks} blocks of {source}, got {args.layers}"
            )
    transform = next(iter(models.values())).transform
    photos: list[dict] = []
    seen: dict[str, list[dict[str, Tensor]]] = {source: [] for source in models}
    for path, x, maps in see_photos("explore", models, images, args.layers):
        _, H, W = x.shape
        photos.append(
            {"name": path.name, "width": W, "height": H, "image": encode_image(x, transform)}
        )
        for source in models:
            seen[source].append(maps[source])
    if not photos:
        return 1

    described = [
        describe(model, Path(source).stem, seen[source], args.layers)
        for source, model in models.items()
    ]
    # A file name may contain "</script>".
    data = json.dumps({"photos": photos, "models": described}).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)
    with dinoreg.atomic(args.output) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    return 1 if len(photos) < len(images) else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    add = parser.add_argument
    add(
        "--layers",
        nargs="+",
        type=int,
        default=[-1],
        help="blocks to show the attention of (default: -1, the last)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("explore.html"),
        metavar="PAGE",
        help="default: %(default)s",
    )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
