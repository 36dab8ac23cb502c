"""Draw the patch features of DINOv2: principal components, norms and attention maps.

    pip install -e ".[examples]"
    python examples/visualize.py examples/images/*.jpg --model vitl14 vitl14_reg --output pictures

For each image it writes a picture with a row for each model:
  - the input image;
  - the patch features as colours (Oquab et al., 2023, figure 1): the first principal component of a
    photo separates its foreground from its background, which is black; the first three components
    of the foreground of all photos are red, green and blue, so that the same colour is a similar
    feature in all of them;
  - the norms of the patch tokens after the last block, before the final norm, on one scale for all
    photos and models;
  - the attention of the CLS token and of each register to the patches, in the last block, averaged
    over its heads.
Without registers, large models have outlier tokens of very high norm, which are visible as
artifacts in these maps (Darcet et al., "Vision Transformers Need Registers", section 2). The script
prints the share of such patch tokens.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
import dinoreg
import test_time_registers
from common import OUTLIER, colour, find_foreground

Models = dict[str, dinoreg.DinoVisionTransformer]  # by the argument that names them


@torch.inference_mode()
def see(
    model: dinoreg.DinoVisionTransformer, x: Tensor, layers: Sequence[int] = (-1,)
) -> dict[str, Tensor]:
    """The maps of an image (3, H, W), on the CPU, from one forward pass.

    These are features (h, w, D) after the final norm, norms (h, w) before it, and the attention
    (L, A, 1 + R, h, w) of CLS and registers to the patches in each of L layers.
    """
    grid, special = model.to_grid(*x.shape[1:]), 1 + model.num_register_tokens
    tokens = model.prepare_tokens_with_masks(x[None].to(model.pos_embed.device))
    # The inputs of each block, and of the final norm.
    *inputs, tokens = tokens, *model.run_blocks(tokens, range(len(model.blocks)))
    attention = []
    for i in layers:
        block = model.blocks[i]
        rows = block.attn.attention_rows(block.norm1(inputs[i]), special)  # (1, A, 1 + R, N)
        attention.append(rows[0, ..., special:])
    return {
        "features": model.norm(tokens)[0, special:].unflatten(0, grid).cpu(),
        "norms": tokens[0, special:].norm(dim=1).unflatten(0, grid).cpu(),
        "attention": torch.stack(attention).unflatten(-1, grid).cpu(),
    }


def see_photos(
    script: str, models: Models, images: Sequence[Path], layers: Sequence[int] = (-1,)
) -> Iterator[tuple[Path, Tensor, dict[str, dict[str, Tensor]]]]:
    """For each image that can be read: its path, the input of the first model, and what each model
    sees.
    """
    for image in tqdm(images, unit="image"):
        inputs = [
            common.read_image(image, None, True, x.patch_size, transform=x.transform)
            for x in models.values()
        ]
        if isinstance(inputs[0], str):
            tqdm.write(f"{script}: {image}: {inputs[0]}", file=sys.stderr)
        else:
            yield (
                image,
                inputs[0],
                {name: see(model, x, layers) for (name, model), x in zip(models.items(), inputs)},
            )


def add_colours(photos: list[dict[str, Tensor]]) -> None:
    """Add the colours (h, w, 3) of features to what one model sees in each photo; they compare
    within these photos.
    """
    features = [maps["features"].flatten(0, 1) for maps in photos]
    grids = [maps["norms"].shape for maps in photos]
    foreground = torch.cat(
        [find_foreground(x, *grid).flatten() for x, grid in zip(features, grids)]
    )
    parts = colour(torch.cat(features), foreground).split([len(x) for x in features])
    for maps, part, grid in zip(photos, parts, grids):
        maps["colours"] = part.unflatten(0, grid)


def draw(
    pixels: Tensor, rows: dict[str, dict[str, Tensor]], limits: tuple[float, float], path: Path
) -> None:
    """Write a picture of what each model sees in an image (H, W, 3), a row for each; limits are
    those of the norms.
    """
    from matplotlib.figure import Figure

    H, W, _ = pixels.shape
    # (1 + R, h, w)
    attention = {name: maps["attention"][-1].mean(dim=0) for name, maps in rows.items()}
    registers = max(map(len, attention.values())) - 1
    low, high = limits
    titles = [
        "image",
        "principal components",
        f"norm ({low:.0f} to {high:.0f})",
        "attention of CLS",
    ]
    titles += [f"attention of register {i + 1}" for i in range(registers)]
    figure = Figure(
        figsize=(2.1 * len(titles), (2.1 * H / W + 0.25) * len(rows) + 0.25), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], box_aspect=H / W)
        ax.spines[:].set_visible(False)
    for ax, title in zip(grid[0], titles):
        ax.set_title(title, fontsize=10)
    for axes, (name, maps) in zip(grid, rows.items()):
        axes[0].imshow(pixels.numpy())
        axes[1].imshow(maps["colours"].numpy())
        axes[2].imshow(maps["norms"].numpy(), vmin=low, vmax=high, cmap="viridis")
        for ax, weights in zip(axes[3:], attention[name]):
            # A peak would darken the rest.
            ax.imshow(weights.numpy(), vmax=weights.quantile(0.995), cmap="inferno")
        label = axes[0].set_xlabel(Path(name).stem, loc="left", fontsize=9, parse_math=False)
        label.set_in_layout(False)  # a long name must not push the columns apart
        axes[2].set_xlabel("{:.0f} to {:.0f}".format(*maps["norms"].aminmax()), fontsize=9)
    with dinoreg.atomic(path) as part:
        figure.savefig(part, dpi=150)


def load_models(args: argparse.Namespace) -> Models:
    models = {
        source: common.load_backbone(source, args.device, args.stride) for source in args.model
    }
    for model in models.values():
        common.set_resolution(model, args.resolution)
    return models


def run(args: argparse.Namespace) -> int:
    models, images = load_models(args), dinoreg.find_images(args.images)
    if args.npy and len({Path(name).stem for name in models}) < len(models):
        raise ValueError("--npy names files by model: give models of different names")
    for model in models.values() if args.add_register else ():
        test_time_registers.move_outliers(model, images, args.add_register)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = dict(zip(images, common.name_pictures(images, args.output, "features")))

    norms: dict[str, list[Tensor]] = {name: [] for name in models}
    photos, done = see_photos("visualize", models, images), 0
    # Colours compare within a group.
    groups = ([photo] for photo in photos) if args.per_photo else [list(photos)]
    for group in filter(None, groups):
        done += len(group)
        for name in models:
            add_colours([seen[name] for _, _, seen in group])
            norms[name] += [seen[name]["norms"].flatten() for _, _, seen in group]
        every = torch.cat(
            [maps["norms"].flatten() for _, _, seen in group for maps in seen.values()]
        )
        limits = every.min().item(), every.max().item()
        transform = next(iter(models.values())).transform
        for image, x, seen in group:
            draw(common.to_pixels(x, transform), seen, limits, pictures[image])
            for name, maps in seen.items() if args.npy else ():
                stem = pictures[image].stem.removesuffix("features") + Path(name).stem
                for kind, array in maps.items():
                    with dinoreg.atomic(args.output / f"{stem}_{kind}.npy") as part:
                        np.save(part, array.numpy())

    for name, parts in norms.items():
        if parts:
            every = torch.cat(parts)
            cutoff = OUTLIER * every.median().item() if args.cutoff is None else args.cutoff
            share = (every > cutoff).float().mean().item()
            print(
                f"{name}: {share:.2%} of {len(every):,} patches are outliers, "
                f"with norms above {cutoff:.1f}"
            )
    return 1 if done < len(images) else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose what is seen, and by which models."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add(
        "--model",
        nargs="+",
        default=["vits14_reg"],
        help="official models or files of weights (default: vits14_reg)",
    )
    common.add_resolution(parser)
    common.add_stride(parser)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    add = parser.add_argument
    test_time_registers.add_option(parser)
    alone = (
        "fit colours and the scale of norms to each photo alone, "
        "which keeps one in memory instead of all"
    )
    add("--per-photo", action="store_true", help=alone)
    rule = f"{OUTLIER} times the median norm of all images, for each model"
    add(
        "--cutoff",
        type=float,
        metavar="NORM",
        help=f"the norm above which tokens are outliers (default: {rule})",
    )
    add(
        "--npy",
        action="store_true",
        help="also write features, norms, attention and colours as NAME_MODEL_*.npy",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("pictures"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
