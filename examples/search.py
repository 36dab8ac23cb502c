"""Find the images in a folder that are most similar to a given one.

    pip install -e ".[examples]"
    python examples/search.py FOLDER --query photo.jpg

The index is one safetensors file in the folder: the normalised CLS token of each image, as in the retrieval experiments
of the DINOv2 paper (section 7.3). Only images that are new or changed since the last run are embedded; deleted images leave
the index. Neighbours are ranked by cosine similarity; an image is never its own neighbour.

In place of a folder of images, FOLDER may be a Parquet file that embed_corpus.py wrote, or a folder of them; --model is then
the model that it was run with.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import common
import dinoreg

THUMBNAIL = 224  # pixels

Index = dict[str, tuple[list[int], Tensor]]  # path in the folder: (stamp, feature (D,))


def read_index(path: Path, model: list) -> Index:
    """The index of an earlier run; empty if there is none, or if another model made it."""
    if not path.exists():
        return {}
    tensors, metadata = dinoreg.read_tensors(path)
    if "files" not in metadata:  # it would be overwritten
        raise ValueError(f"{path}: not an index of images")
    if json.loads(metadata["model"]) != model:
        return {}
    features = tensors["features"].clone()  # not mapped: Windows replaces no file that is
    return {name: (when, feature) for (name, when), feature in zip(json.loads(metadata["files"]), features)}


def write_index(index: Index, path: Path, model: list) -> None:
    files = [(name, when) for name, (when, _) in index.items()]
    features = torch.stack([feature for _, feature in index.values()])  # (n, D), float16
    dinoreg.write_tensors({"features": features}, path, {"model": json.dumps(model), "files": json.dumps(files)})


def embed(model: dinoreg.DinoVisionTransformer, paths: list[Path]) -> Iterator[Tensor | str]:
    """For each image file in order: its normalised CLS token (D,), float16, or the reason why it could not be read."""

    def read(path: Path) -> Tensor | str:
        image = common.read_image(path, normalized=False, transform=model.transform)
        return f"{path}: {image}" if isinstance(image, str) else image

    def embed_batch(images: list[Tensor]) -> Tensor:
        features = model.embed(torch.stack(images).to(model.pos_embed.device))  # (B, D)
        return F.normalize(features, dim=1).half().cpu()

    return common.compute(embed_batch, read, paths, model.transform)


def read_corpus(path: Path, model: str) -> tuple[list[str], Tensor, int]:
    """The rows in Parquet of embed_corpus.py: paths, CLS tokens (n, D) of length 1, float16; and the size of their crops."""
    import pyarrow.dataset

    dataset = pyarrow.dataset.dataset(path, format="parquet")
    settings = json.loads((dataset.schema.metadata or {}).get(b"dinoreg", "null"))
    if settings is None:
        raise ValueError(f"{path}: not written by embed_corpus.py")
    if settings["model"] != Path(model).name:
        raise ValueError(f"{path}: embedded by {settings['model']}, not by {Path(model).name}: give it as --model")
    rows = dataset.to_table(columns=["path", "embedding"], filter=pyarrow.dataset.field("error").is_null())
    features = np.concatenate([chunk.flatten() for chunk in rows["embedding"].chunks])
    features = torch.from_numpy(features).unflatten(0, (len(rows), -1))
    return rows["path"].to_pylist(), F.normalize(features, dim=1), settings["size"]


def draw(path: Path, images: list[Path], captions: list[str]) -> None:
    """Draw the central crops of images with captions; the first one, the query, has a frame."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.45 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, image, caption in zip(axes, images, captions):
        axis.imshow(common.to_pixels(dinoreg.preprocess(image, THUMBNAIL), dinoreg.Transform()).numpy())
        axis.set_xlabel(caption, fontsize=9, color="0.2", parse_math=False)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(image is images[0])
        axis.spines[:].set(linewidth=3, color="tab:orange")
    for axis in axes[len(images) :]:
        axis.set_axis_off()
    with dinoreg.atomic(path) as part:
        figure.savefig(part, bbox_inches="tight", pad_inches=0.1)


def shorten(text: str, width: int = 28) -> str:
    """A text of at most `width` characters: its two ends with an ellipsis between."""
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"


def update(args: argparse.Namespace, model: dinoreg.DinoVisionTransformer) -> tuple[Index, int]:
    """The up-to-date index of the folder, written if it changed, and the number of images that could not be read."""
    identity = [args.model, common.stamp(Path(args.model))]
    old = read_index(args.index, identity)
    paths = [path for path in dinoreg.find_images([args.folder]) if path.resolve() != args.output.resolve()]
    if paths in ([], [args.folder]):
        raise ValueError(f"{args.folder}: no images")
    stamps = {path.relative_to(args.folder).as_posix(): common.stamp(path) for path in paths}
    index = {name: old[name] for name in stamps if name in old and old[name][0] == stamps[name]}
    kept, new, failed = len(index), [name for name in stamps if name not in index], 0
    features = embed(model, [args.folder / name for name in new])
    try:
        for name, feature in zip(new, tqdm(features, total=len(new), unit="image", disable=not new)):
            if isinstance(feature, Tensor):
                index[name] = (stamps[name], feature)
            else:
                failed += 1
                tqdm.write(f"search: {feature}", file=sys.stderr)
    finally:  # an interrupted run keeps what it has
        if index and (len(index) > kept or len(old) > kept):
            write_index(index, args.index, identity)
    print(f"{args.index}: {len(index) - kept} embedded, {kept} kept, {len(old.keys() - stamps)} gone")
    return index, failed


def run(args: argparse.Namespace) -> int:
    is_corpus = args.folder.suffix == ".parquet" or any(args.folder.glob("*.parquet"))
    if not is_corpus and not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    args.index = args.index or args.folder / ".dinoreg-index.safetensors"
    if args.query and not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    if args.index.suffix != ".safetensors":
        raise ValueError(f"{args.index}: the name of an index ends in .safetensors")
    model = common.load_backbone(args.model, args.device)
    if is_corpus:
        names, features, size = read_corpus(args.folder, args.model)
        common.set_size(model, size)
    if args.query:
        (query,) = embed(model, [args.query])  # first, since it may not be an image
        if isinstance(query, str):
            raise ValueError(query)

    failed = 0
    if not is_corpus:
        index, failed = update(args, model)
        if not index:  # no image could be read
            return 1
        names = [str(args.folder / name) for name in index]
        features = torch.stack([feature for _, feature in index.values()])  # (n, D)
    if args.query:
        cosines, order = (features.float() @ query.float()).topk(min(args.top + 1, len(names)))
        found = [(cosine, names[i]) for cosine, i in zip(cosines.tolist(), order.tolist())]
        found = [(cosine, name) for cosine, name in found if Path(name).resolve() != args.query.resolve()][: args.top]
        for cosine, name in found:
            print(f"{cosine:.3f}  {name}")
        images = [args.query, *(Path(name) for _, name in found)]
        if not all(path.is_file() for path in images):
            raise ValueError(f"{args.output}: not drawn, as some of these images are not on this machine")
        captions = [f"{shorten(Path(name).name)}\n{cosine:.3f}" for cosine, name in found]
        draw(args.output, images, [f"{shorten(args.query.name)}\nquery", *captions])
        print(args.output)
    return 1 if failed else 0


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="a folder of images, searched recursively, or embed_corpus.py's Parquet files")
    add("--query", type=Path, metavar="IMAGE", help="find the images most similar to it")
    add("--model", default="vits14_reg", help="an official backbone, or a file (default: %(default)s)")
    add("--index", type=Path, metavar="FILE", help="default: FOLDER/.dinoreg-index.safetensors")
    add("--top", type=int, default=8, metavar="K", help="number of neighbours (default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("nearest.png"), help="picture of the neighbours (default: %(default)s)")
    common.add_device(parser)
    args = parser.parse_args()
    if args.top < 1:
        parser.error("--top must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
