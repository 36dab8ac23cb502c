"""Find the images in a folder that are most similar to a given one.

    pip install -e ".[examples]"    # to search in a corpus: ".[corpus,examples]"
    python examples/search.py FOLDER --query photo.jpg
    python examples/search.py FOLDER --query photo.jpg --output nearest.png    # draws them as well

Neighbors are ranked by the cosine similarity of their CLS tokens, as in the retrieval experiments
of the DINOv2 paper (section 7.3); an image is never its own neighbor. Near-duplicates of a result,
with a cosine above 0.99 to it, are listed below it and marked with =. The features are cached: only
images that are new or changed since the last run are embedded.

Instead of a folder of images, FOLDER may be a Parquet file that embed_corpus.py wrote, or a folder
of them; --model is then the model that embedded them.
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
from torch import Tensor

import common
import dinoreg
import features
import outputs
import patches

DUPLICATE = 0.99  # cosine similarity above which two images are listed as one
THUMBNAIL = 224  # pixels


def embed(model: dinoreg.DinoVisionTransformer, paths: list[Path]) -> Iterator[Tensor | str]:
    """For each image file in order: its normalized CLS token (D,), float16, or the reason why there
    is none.
    """

    def function(x: Tensor) -> Tensor:
        return F.normalize(features.embed(model, x), dim=1).half()

    return features.apply(function, paths, model.transform, model.pos_embed.device)


def embed_folder(
    args: argparse.Namespace, model: dinoreg.DinoVisionTransformer
) -> tuple[list[str], Tensor, int]:
    """The images of the folder that can be read, their features (n, D), and the exit status: 1 if
    some could not be read, else 0.
    """
    paths = [path for path in dinoreg.find_images([args.folder]) if path != args.folder]
    paths = [path for path in paths if not args.output or path.resolve() != args.output.resolve()]
    if not paths:
        raise ValueError(f"{args.folder}: no images")
    key = features.fingerprint(model)
    cache = features.Cache("search", args.folder, key, enabled=not args.no_cache)
    unreadable = cache.fill(lambda paths: embed(model, paths), paths)
    status = common.report("search", unreadable)
    paths = [path for path in paths if path not in unreadable]
    if not paths:
        raise ValueError(f"{args.folder}: none of the images can be read")
    return [*map(str, paths)], torch.stack([cache[path] for path in paths]), status


def read_corpus(folder: Path, model: dinoreg.DinoVisionTransformer) -> tuple[list[str], Tensor]:
    """The rows that embed_corpus.py wrote: paths, CLS tokens (n, D) of length 1, float16. The
    model's transform makes crops of their size from now on.
    """
    import embed_corpus

    settings, rows = embed_corpus.read_output(str(folder), ["path", "embedding", "error"])
    if not settings:
        raise ValueError(f"{folder}: no Parquet file that embed_corpus.py wrote")
    if list(model.transform.size or ()) != settings["size"]:
        common.set_input(model, size=settings["size"][0])
    if features.fingerprint(model) != settings["fingerprint"]:
        raise ValueError(f"{folder}: embedded by other weights, or with another transform")
    rows = rows.filter(rows["error"].is_null())
    if not len(rows):
        raise ValueError(f"{folder}: none of its images has an embedding")
    vectors = np.concatenate([chunk.flatten() for chunk in rows["embedding"].chunks])
    vectors = torch.from_numpy(vectors).unflatten(0, (len(rows), -1))
    return rows["path"].to_pylist(), F.normalize(vectors, dim=1)


def find_nearest(
    query: Path, feature: Tensor, names: list[str], others: Tensor, top: int
) -> list[tuple[float, str, list[str]]]:
    """The images nearest to the query, by the cosine of its feature (D,) to theirs (n, D): cosine,
    name, near-duplicates.
    """
    cosines, results = others @ feature, []  # (n,)
    left = cosines.argsort(descending=True)
    while len(left) and len(results) < top:
        alike = (others @ others[left[0]] > DUPLICATE)[left]
        alike[0] = True
        group = [i for i in left[alike].tolist() if Path(names[i]).resolve() != query.resolve()]
        left = left[~alike]
        if group:
            results.append(
                (cosines[group[0]].item(), names[group[0]], [names[i] for i in group[1:]])
            )
    return results


def draw(path: Path, images: list[Path], captions: list[str]) -> None:
    """Draw the central crops of images with captions; the first one, the query, has a frame."""
    from matplotlib.figure import Figure

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.45 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, image, caption in zip(axes, images, captions):
        pixels = dinoreg.preprocess(image, THUMBNAIL)
        axis.imshow(patches.to_pixels(pixels, dinoreg.Transform()).numpy())
        axis.set_xlabel(dinoreg.printable(caption), fontsize=9, color="0.2", parse_math=False)
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


def run(args: argparse.Namespace) -> int:
    is_corpus = args.folder.suffix == ".parquet" or any(args.folder.glob("*.parquet"))
    if is_corpus and not args.query:
        raise ValueError("to search in a corpus, give --query")
    if not is_corpus and not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    if args.output and args.query:
        outputs.check_outputs([args.output], [args.query])
    model = common.load_backbone(args.model, args.device)
    if is_corpus:
        names, vectors = read_corpus(args.folder, model)
    if args.query:
        (query,) = embed(model, [args.query])  # first, since it may not be an image
        if isinstance(query, str):
            raise ValueError(f"{args.query}: {query}")
    status = 0
    if not is_corpus:
        names, vectors, status = embed_folder(args, model)
    if args.query:
        results = find_nearest(args.query, query.float(), names, vectors.float(), args.top)
        show(args, results)
    return status


def show(args: argparse.Namespace, results: list[tuple[float, str, list[str]]]) -> None:
    """Print the neighbors, and draw them if there is an output."""
    for cosine, name, duplicates in results:
        if args.json:
            print(json.dumps({"path": name, "cosine": cosine, "duplicates": duplicates}))
            continue
        print(f"{cosine:.3f}  {dinoreg.printable(name)}")
        for other in duplicates:
            print(f"    =  {dinoreg.printable(other)}")
    if not args.output:
        return
    images, captions = [args.query], [f"{shorten(args.query.name)}\nquery"]
    for cosine, name, duplicates in results:
        images.append(Path(name))
        more = f", and {len(duplicates)} like it" if duplicates else ""
        captions.append(f"{shorten(Path(name).name)}\n{cosine:.3f}{more}")
    if not all(path.is_file() for path in images):
        raise ValueError(f"{args.output}: not drawn, as some images are not on this machine")
    draw(args.output, images, captions)
    dinoreg.complain(f"{args.output} written", "search")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "a folder of images, searched recursively, or embed_corpus.py's Parquet files"
    add("folder", type=Path, help=text)
    text = "find the images most similar to it (default: only fill the cache)"
    add("--query", type=Path, metavar="IMAGE", help=text)
    common.add_model(parser)
    text = "number of neighbors (default: %(default)s)"
    add("--top", type=common.positive, default=8, metavar="K", help=text)
    add("--json", action="store_true", help="print one JSON object per line, for each neighbor")
    add("-o", "--output", type=common.output, metavar="FILE", help="a picture of the neighbors")
    add("--no-cache", action="store_true", help="compute all features, and keep none")
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
