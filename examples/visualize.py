"""Draw the patch features of DINOv2: principal components, norms and attention maps.

    pip install -e ".[examples]"
    python examples/visualize.py examples/images/*.jpg --model vitl14 vitl14_reg --output pictures

For each image it writes a picture with a row for each model:
  - the input image;
  - the patch features as colours (Oquab et al., 2023, figure 1): the first principal component separates foreground from
    background, which is black; the first three components of the foreground are red, green and blue;
  - the norms of the patch tokens after the last block, before the final norm;
  - the attention of the CLS token and of each register to the patches, in the last block, averaged over its heads.
Without registers, large models have outlier tokens of very high norm, which are visible as artifacts in these maps
(Darcet et al., "Vision Transformers Need Registers", section 2). The script prints the share of such patch tokens.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import common
import dinoreg
from common import OUTLIER, colour, find_foreground


@torch.inference_mode()
def see(model: dinoreg.DinoVisionTransformer, x: Tensor) -> dict[str, Tensor]:
    """The maps of an image (3, H, W), by title: (h, w), or (h, w, 3) for colours."""
    h, w = model.to_grid(*x.shape[1:])
    batch = x[None].to(model.pos_embed.device)
    features = model.forward_features(batch)
    patches = features["x_norm_patchtokens"][0].cpu()
    _, _, (tokens,) = model.split_tokens(features["x_prenorm"].cpu())  # (h * w, D)
    attention = model.attention_maps(batch)[0].mean(dim=0).cpu()  # (1 + R, h, w)
    names = ["CLS", *(f"register {i + 1}" for i in range(model.num_register_tokens))]
    return {
        "image": common.to_pixels(x, model.transform),
        "principal components": colour(patches, find_foreground(patches, h, w)),
        "norm": tokens.norm(dim=1).unflatten(0, (h, w)),
        **{f"attention of {name}": attention[i] for i, name in enumerate(names)},
    }


def draw(rows: dict[str, dict[str, Tensor]]) -> Figure:
    """The maps of each model as one picture: a row per model, a column per title."""
    titles = max(rows.values(), key=len)  # of the model with most registers
    H, W, _ = next(iter(rows.values()))["image"].shape
    figure = Figure(figsize=(2.1 * len(titles), (2.1 * H / W + 0.25) * len(rows) + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, (name, maps) in enumerate(rows.items()):
        for ax, title in zip(grid[i], titles):
            ax.set(xticks=[], yticks=[], box_aspect=H / W)
            ax.set_title(title if i == 0 else "", fontsize=10)
            ax.spines[:].set_visible(False)
            if title in maps:
                top = maps[title].quantile(0.995 if title.startswith("attention") else 1)  # a peak would darken the rest
                ax.imshow(maps[title], vmax=top, cmap="viridis" if title == "norm" else "inferno")
        label = grid[i, 0].set_xlabel(Path(name).stem, loc="left", fontsize=9, parse_math=False)
        label.set_in_layout(False)  # a long name must not push the columns apart
        grid[i, 2].set_xlabel("{:.0f} to {:.0f}".format(*maps["norm"].aminmax()), fontsize=9)
    return figure


def run(args: argparse.Namespace) -> int:
    models = {}
    for source in args.model:
        models[source] = model = common.load_backbone(source, args.device, args.stride)
        if args.size < model.patch_size:
            raise ValueError(f"--size must be at least {model.patch_size}, the side of a patch, got {args.size}")
    args.output.mkdir(parents=True, exist_ok=True)

    images, failed = dinoreg.find_images(args.images), 0
    norms: dict[str, list[Tensor]] = {source: [] for source in models}
    for image, picture in zip(tqdm(images, unit="image"), common.name_pictures(images, args.output, "features")):
        inputs = [
            common.read_image(image, args.size, True, model.patch_size, transform=model.transform)
            for model in models.values()
        ]
        if isinstance(inputs[0], str):
            tqdm.write(f"visualize: {image}: {inputs[0]}", file=sys.stderr)
            failed += 1
            continue
        rows = {source: see(model, x) for (source, model), x in zip(models.items(), inputs)}
        for source, maps in rows.items():
            norms[source].append(maps["norm"].flatten())
        with dinoreg.atomic(picture) as part:
            draw(rows).savefig(part, dpi=150)

    for source, parts in norms.items():
        if parts:
            all_norms = torch.cat(parts)
            cutoff = OUTLIER * all_norms.median().item() if args.cutoff is None else args.cutoff
            share = (all_norms > cutoff).float().mean().item()
            print(f"{source}: {share:.2%} of {len(all_norms):,} patches are outliers, with norms above {cutoff:.1f}")
    return 1 if failed else 0


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add("--model", nargs="+", default=["vits14_reg"], help="official models or files of weights (default: vits14_reg)")
    area = "side of a square with as many pixels as the resized image"
    add("--size", type=int, default=518, metavar="PIXELS", help=f"{area} (default: %(default)s)")
    rule = f"{OUTLIER} times the median norm of all images, for each model"
    add("--cutoff", type=float, metavar="NORM", help=f"the norm above which tokens are outliers (default: {rule})")
    add("-o", "--output", type=Path, default=Path("pictures"), metavar="FOLDER", help="default: %(default)s")
    common.add_stride(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
