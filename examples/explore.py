"""Explore the patch features of DINOv2 for several photos, in one HTML page that needs no server and no network.

    pip install -e ".[examples]"
    python examples/explore.py examples/images/*.jpg --model vits14 vits14_reg -o explore.html

The page compares the patch under the pointer with all patches of all photos, and shows principal components, attention
and token norms as `visualize.py` does. To keep the page small, patch features are projected onto their first principal axes
and stored in int8, with as many axes as keep the error of every cosine below 0.02. The script prints the largest error for
each model, and the size of the page.
"""

import argparse
import base64
import bisect
import io
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import dinoreg

TEMPLATE = Path(__file__).with_suffix(".html")
TOLERANCE = 0.02  # of a cosine


def encode(x: Tensor) -> str:
    return base64.b64encode(x.cpu().contiguous().numpy().tobytes()).decode()


def encode_image(x: Tensor, transform: dinoreg.Transform) -> str:
    """A normalised image (3, H, W) as a data: URL."""
    buffer = io.BytesIO()
    pixels = (common.to_pixels(x, transform) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def cosine_error(x: Tensor, y: Tensor) -> float:
    """The largest difference between the cosine of two rows of x (M, D) and that of the same two rows of y (M, K)."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    parts = zip(x.split(1024), y.split(1024))  # M x M may be larger than memory
    return max((a @ x.T - b @ y.T).abs().max().item() for a, b in parts)


def compress(features: Tensor) -> tuple[Tensor, float]:
    """Features (M, D) -> int8 (M, K) with the same cosines within TOLERANCE, and the largest error of a cosine.

    The K columns are the coordinates along the first principal axes of the normalised features, which are not centred. K is
    the smallest number that keeps the error below TOLERANCE.
    """
    unit = F.normalize(features, dim=1)
    coordinates = unit @ torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)  # (M, D), the largest variance first

    def quantize(K: int) -> Tensor:
        x = coordinates[:, :K]
        return (x / x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) * 127).round()

    candidates = range(1, features.shape[1])
    index = bisect.bisect_left(candidates, -TOLERANCE, key=lambda K: -cosine_error(features, quantize(K)))
    compressed = quantize(index + 1)
    return compressed.char(), cosine_error(features, compressed)


@torch.inference_mode()
def see(model: dinoreg.DinoVisionTransformer, x: Tensor, layers: list[int]) -> dict[str, Tensor]:
    """The data of an image (3, H, W) that the page shows.

    These are features (h * w, D) after the final norm, norms (h * w) before it, attention (layers, A, 1 + R, h * w), and
    foreground (h, w), bool.
    """
    batch = x[None].to(model.pos_embed.device)
    features = model.forward_features(batch)
    _, _, (tokens,) = model.split_tokens(features["x_prenorm"].cpu())
    patches = features["x_norm_patchtokens"][0].cpu()
    attention = torch.cat(model.attention_maps(batch, layers)).cpu()  # (layers, A, 1 + R, h, w)
    return {
        "features": patches,
        "norms": tokens.norm(dim=1),
        "attention": attention.flatten(3),
        "foreground": common.find_foreground(patches, *attention.shape[3:]),
    }


def describe(model: dinoreg.DinoVisionTransformer, name: str, seen: list[dict[str, Tensor]], layers: list[int]) -> dict:
    """The JSON data of a model and of its features of each photo."""
    features = torch.cat([maps["features"] for maps in seen])
    compressed, error = compress(features)
    print(f"{name}: {compressed.shape[1]} of {model.embed_dim} axes, largest cosine error {error:.4f}")
    colours = common.colour(features, torch.cat([maps["foreground"].flatten() for maps in seen]))  # (M, 3)
    lengths = [len(maps["features"]) for maps in seen]
    photos = []
    for maps, codes, rgb in zip(seen, compressed.split(lengths), colours.split(lengths)):
        h, w = maps["foreground"].shape
        peaks = maps["attention"].amax(dim=-1, keepdim=True).clamp(min=1e-12)
        photos.append(
            {
                "h": h,
                "w": w,
                "features": encode(codes),
                "colours": encode((rgb * 255).round().byte()),
                "norms": encode(maps["norms"]),
                # The square root keeps precision for small values: most are far below the peak.
                "attention": encode(((maps["attention"] / peaks).sqrt() * 255).round().byte()),
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
        "outlier": common.OUTLIER * torch.cat([maps["norms"] for maps in seen]).median().item(),
        "photos": photos,
    }


def run(args: argparse.Namespace) -> int:
    models = {source: common.load_backbone(source, args.device, args.stride) for source in args.model}
    seen: dict[str, list[dict[str, Tensor]]] = {source: [] for source in models}
    photos, failed = [], 0
    for path in tqdm(dinoreg.find_images(args.images), unit="image"):
        inputs = []
        for model in models.values():
            size = args.size or round(math.sqrt(math.prod(model.config.grid)) * model.patch_size)
            inputs.append(common.read_image(path, size, True, model.patch_size, transform=model.transform))
        if isinstance(inputs[0], str):
            tqdm.write(f"explore: {path}: {inputs[0]}", file=sys.stderr)
            failed += 1
            continue
        for (source, model), x in zip(models.items(), inputs):
            seen[source].append(see(model, x, args.layers))
        _, H, W = inputs[0].shape
        photos.append(
            {
                "name": path.name,
                "width": W,
                "height": H,
                "image": encode_image(inputs[0], next(iter(models.values())).transform),
            }
        )
    if not photos:
        return 1

    described = [describe(model, Path(source).stem, seen[source], args.layers) for source, model in models.items()]
    data = json.dumps({"photos": photos, "models": described}).replace("<", "\\u003c")  # a file name may contain "</script>"
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)
    with dinoreg.atomic(args.output) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    return 1 if failed else 0


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add("--model", nargs="+", default=["vits14_reg"], help="official models or files of weights (default: vits14_reg)")
    add("--layers", nargs="+", type=int, default=[-1], help="blocks to show the attention of (default: -1, the last)")
    training = "the size of the position embedding, 518 for official models"
    area = "side of a square with as many pixels as the resized image"
    add("--size", type=int, metavar="PIXELS", help=f"{area} (default: {training})")
    add("-o", "--output", type=Path, default=Path("explore.html"), metavar="PAGE", help="default: %(default)s")
    common.add_stride(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
