"""Draw the patch features of DINOv2: principal components, norms and attention maps.

    pip install -e ".[examples]"
    python examples/visualize.py examples/images/*.jpg --model vitl14 vitl14_reg --output pictures

For each image it writes a picture that shows, for each model:
  - the image;
  - the patch features as colors (Oquab et al., 2023, figure 1): the first principal component of a
    photo separates its foreground from its background, which is black; the first three components
    of the foreground of all photos are hue, saturation and lightness, so the same color is a
    similar feature in all of them;
  - the norms of the patch tokens before the final norm, on one scale for all photos;
  - the attention of the CLS token and of each register to the patches in the last block, the mean
    of its heads; with --heads also that of CLS in each head. Each map has its own scale.
Without registers, large models have outlier tokens of very high norm, which are visible as
artifacts in these maps (Darcet et al., "Vision Transformers Need Registers", section 2). The script
prints the share of such patch tokens.

By default patches overlap by half, for smooth maps; `--stride 14` (the patch size) has a quarter of
the patches and is several times as fast.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
import dinoreg
import features
import outputs
import patches
import registers_at_test_time

Models = dict[str, dinoreg.DinoVisionTransformer]  # by the argument that names them


@dataclasses.dataclass
class Photo:
    """An image, and what each model computes from it."""

    path: Path
    pixels: Tensor  # (H, W, 3) in [0, 1], as the first model gets them
    maps: dict[str, dict[str, Tensor]]  # of each model: see `compute_maps`, `patches.add_colors`


@torch.inference_mode()
def compute_maps(
    model: dinoreg.DinoVisionTransformer, x: Tensor, layers: Sequence[int] = (-1,)
) -> dict[str, Tensor]:
    """The maps of an image (3, H, W), on the CPU, from one forward pass.

    These are features (h, w, D) after the final norm, norms (h, w) before it, and the attention
    (L, A, 1 + R, h, w) of CLS and registers to the patches in each of L layers.
    """
    grid, depth = model.to_grid(*x.shape[1:]), model.n_blocks
    special = 1 + model.num_register_tokens
    tokens = model.prepare_tokens_with_masks(x[None].to(model.pos_embed.device))
    layers = [i % depth for i in layers]
    # The attention of a block is computed from the tokens after the one before it.
    wanted = sorted({depth - 1, *(i - 1 for i in layers if i > 0)})
    after = {-1: tokens} | dict(zip(wanted, model.run_blocks(tokens, wanted)))
    attention = []
    for i in layers:
        block = model.blocks[i]
        rows = block.attn.attention_rows(block.norm1(after[i - 1]), special)  # (1, A, 1 + R, N)
        attention.append(rows[0, ..., special:])
    last = after[depth - 1]
    return {
        "features": model.norm(last)[0, special:].unflatten(0, grid).cpu(),
        "norms": last[0, special:].norm(dim=1).unflatten(0, grid).cpu(),
        "attention": torch.stack(attention).unflatten(-1, grid).cpu(),
    }


def map_photos(
    models: Models, paths: Sequence[Path], unreadable: dict[Path, str], layers: Sequence[int]
) -> Iterator[Photo]:
    """The maps of each image that can be read; why others cannot is added to unreadable."""
    for path in features.progress(paths, unit="image"):
        maps, inputs = {}, []
        for name, model in models.items():
            x = features.read_image(path, None, True, model.patch_size, transform=model.transform)
            if isinstance(x, str):
                unreadable[path] = x
                break
            inputs.append(patches.to_pixels(x, model.transform))
            maps[name] = compute_maps(model, x, layers)
            if not all(values.isfinite().all() for values in maps[name].values()):
                unreadable[path] = f"the model {name} returns NaN or infinity"
                break
        else:
            yield Photo(path, inputs[0], maps)


# A picture ----------------------------------------------------------------------------------------

TILE, GAP, BAR, LINE = 2.2, 0.08, 0.45, 0.28  # inches: a map, between maps, color bar, text


def list_tiles(pixels: Tensor, maps: dict[str, Tensor], heads: bool) -> list[tuple[str, Tensor]]:
    """The title and contents of each map that is drawn for one model."""
    attention = maps["attention"][-1]  # (A, 1 + R, h, w)
    tokens = ["CLS", *(f"register {i}" for i in range(1, attention.shape[1]))]
    tiles = [("image", pixels), ("principal components", maps["colors"]), ("norm", maps["norms"])]
    tiles += [(f"attention of {x}", map) for x, map in zip(tokens, attention.mean(dim=0))]
    of_heads = [(f"CLS, head {i}", map) for i, map in enumerate(attention[:, 0], 1)]
    return tiles + of_heads if heads else tiles


def draw(photo: Photo, limits: dict[str, tuple[float, float]], heads: bool, path: Path) -> None:
    """Write a picture of a photo's maps; limits are the range of each model's norms."""
    from matplotlib.figure import Figure

    tiles = {name: list_tiles(photo.pixels, maps, heads) for name, maps in photo.maps.items()}
    # As many columns as leave the fewest places empty: 4 for the usual 4 registers or none.
    columns = min((4, 5, 6), key=lambda n: sum(-len(x) % n for x in tiles.values()))
    rows = {name: -(-len(x) // columns) for name, x in tiles.items()}
    H, W, _ = photo.pixels.shape
    width, height = TILE * (W / H) ** 0.5, TILE * (H / W) ** 0.5  # the same area for all photos
    total_width = columns * (width + GAP) + BAR + GAP
    total_height = sum(rows.values()) * (height + LINE) + len(rows) * LINE + GAP
    figure = Figure(figsize=(total_width, total_height))

    def add_axes(left: float, top: float, width: float):
        place = left / total_width, 1 - (top + height) / total_height
        return figure.add_axes((*place, width / total_width, height / total_height))

    top = LINE  # of the tiles of a model, below its name
    for name, contents in tiles.items():
        place = GAP / total_width, 1 - (top - 0.2 * LINE) / total_height
        label = dinoreg.printable(Path(name).stem)
        figure.text(*place, label, fontsize=10, weight="bold", parse_math=False)
        for i, (title, values) in enumerate(contents):
            row, column = divmod(i, columns)
            left = GAP + column * (width + GAP) + (BAR if column > 2 else 0)
            under = top + row * (height + LINE) + LINE
            ax = add_axes(left, under, width)
            ax.set_title(title, fontsize=9, pad=4)
            ax.set_axis_off()
            if values.ndim == 3:  # colors
                ax.imshow(values.numpy(), aspect="auto")
            elif title == "norm":  # in the third column, with its color bar to the right of it
                low, high = limits[name]
                image = ax.imshow(values.numpy(), vmin=low, vmax=high, aspect="auto")
                bar = figure.colorbar(image, cax=add_axes(left + width + GAP, under, 0.1))
                bar.ax.tick_params(labelsize=7, pad=2, length=2)
            else:
                high = values.quantile(0.995).item()  # a single peak would darken the rest
                ax.imshow(values.numpy(), vmin=0, vmax=high, aspect="auto", cmap="inferno")
        top += rows[name] * (height + LINE) + LINE
    with dinoreg.atomic(path) as part:
        figure.savefig(part, dpi=150)


def save_arrays(photo: Photo, folder: Path, stem: str) -> None:
    """Write the maps of each model as STEM_MODEL_KIND.npy."""
    for name, maps in photo.maps.items():
        for kind, array in maps.items():
            with dinoreg.atomic(folder / f"{stem}_{Path(name).stem}_{kind}.npy") as part:
                np.save(part, array.numpy())


def outlier_share(norms: Tensor, cutoff: float | None) -> str:
    """A sentence on the share of norms above a cutoff, by default OUTLIER times the median."""
    if cutoff is None:
        cutoff = patches.OUTLIER * norms.median().item()
    share = (norms > cutoff).float().mean().item()
    return f"{share:.2%} of {len(norms):,} patches are outliers, with norms above {cutoff:.1f}"


# The script ---------------------------------------------------------------------------------------


def load_models(args: argparse.Namespace, overlapping: bool = False) -> Models:
    """The models of --model; overlapping makes half the patch size the default of --stride, where
    the patch size is even.
    """
    options = dict(size=args.resolution, whole=True, stride=args.stride)
    models = {x: common.load_backbone(x, args.device, **options) for x in args.model}
    for model in models.values():
        if overlapping and args.stride is None and model.patch_size % 2 == 0:
            common.set_input(model, stride=model.patch_size // 2)
    return models


def run(args: argparse.Namespace) -> int:
    models, images = load_models(args, overlapping=True), dinoreg.find_images(args.images)
    if args.npy and len({Path(name).stem for name in models}) < len(models):
        raise ValueError("--npy names files by model: give models of different names")
    pictures = dict(zip(images, common.name_pictures(images, args.output, "features")))
    outputs.check_outputs(pictures.values(), images)
    if args.add_register:
        for model in models.values():
            registers_at_test_time.move_outliers(model, images, args.add_register)
    args.output.mkdir(parents=True, exist_ok=True)

    unreadable: dict[Path, str] = {}
    norms: dict[str, list[Tensor]] = {name: [] for name in models}
    photos = map_photos(models, images, unreadable, layers=[-1])
    # Colors are comparable, and norms have one scale, within a group.
    for group in ([photo] for photo in photos) if args.per_photo else [list(photos)]:
        if not group:
            break
        limits = {}
        for name in models:
            patches.add_colors([photo.maps[name] for photo in group])
            every = torch.cat([photo.maps[name]["norms"].flatten() for photo in group])
            limits[name] = every.min().item(), every.max().item()
            norms[name].append(every)
        for photo in group:
            picture = pictures[photo.path]
            draw(photo, limits, args.heads, picture)
            features.write_line(str(picture))
            if args.npy:
                save_arrays(photo, args.output, picture.stem.removesuffix("_features"))

    for name, parts in norms.items():
        if parts:
            print(f"{dinoreg.printable(name)}: {outlier_share(torch.cat(parts), args.cutoff)}")
    return common.report("visualize", unreadable)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose images and models, for this script and for explore.py."""
    common.add_images(parser)
    text = "official models, or files of weights (default: vits14_reg)"
    parser.add_argument("--model", nargs="+", default=["vits14_reg"], help=text)
    common.add_resolution(parser)
    common.add_device(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shared_options(parser)
    add = parser.add_argument
    text = "distance between patches, a divisor of the patch size (default: half of it, if even)"
    add("--stride", type=common.positive, metavar="PIXELS", help=text)
    add("--heads", action="store_true", help="also draw the attention of the CLS token per head")
    text = "fit colors and the scale of norms to each photo alone, for many photos: only one is in "
    add("--per-photo", action="store_true", help=text + "memory at a time")
    registers_at_test_time.add_option(parser)
    text = f"norm above which tokens are outliers (default: {patches.OUTLIER} times the median)"
    add("--cutoff", type=float, metavar="NORM", help=text)
    text = "also write features, norms, attention and colors as NAME_MODEL_*.npy"
    add("--npy", action="store_true", help=text)
    common.add_output(parser, "pictures", "FOLDER")


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
