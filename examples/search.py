"""Find the images in a folder that are most similar to a given one.

    pip install -e ".[examples]"
    python examples/search.py FOLDER --query photo.jpg
    python examples/search.py FOLDER --query photo.jpg --output nearest.png    # draws them as well

Neighbours are ranked by the cosine similarity of their CLS tokens, as in the retrieval experiments
of the DINOv2 paper (section 7.3); an image is never its own neighbour. Near-duplicates of a result,
of a cosine above 0.99 to it, are listed below it and marked with =. The features are cached: only
images that are new or changed since the last run are embedded, and files that could not be read are
not tried again until they change.

In place of a folder of images, FOLDER may be a Parquet file that embed_corpus.py wrote, or a folder
of them; --model is then the model that it was run with.
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

DUPLICATE = 0.99  # cosine similarity above which two images are listed as one
THUMBNAIL = 224  # pixels


def embed(model: dinoreg.DinoVisionTransformer, paths: list[Path]) -> Iterator[Tensor | str]:
    """For each image file in order: its normalised CLS token (D,), float16, or the reason why it
    could not be read.
    """
    device = model.pos_embed.device
    return common.apply(
        lambda x: F.normalize(common.embed(model, x), dim=1).half(), paths, model.transform, device
    )


def embed_folder(
    args: argparse.Namespace, model: dinoreg.DinoVisionTransformer
) -> tuple[list[str], Tensor, int]:
    """The images of the folder that can be read, their features (n, D), and the exit status: 1 if
    some could not be read now, which earlier runs have not tried."""
    paths = [path for path in dinoreg.find_images([args.folder]) if path != args.folder]
    paths = [path for path in paths if not args.output or path.resolve() != args.output.resolve()]
    if not paths:
        raise ValueError(f"{args.folder}: no images")
    features, new = common.cached_features(
        lambda paths: embed(model, paths),
        paths,
        args.folder,
        "search",
        args.model,
        use_cache=not args.no_cache,
    )
    status = common.report(
        "search", {path: features[path] for path in new if isinstance(features[path], str)}
    )
    features = {str(path): x for path, x in features.items() if isinstance(x, Tensor)}
    if not features:
        raise ValueError(f"{args.folder}: none of the images can be read")
    return list(features), torch.stack(list(features.values())), status


def read_corpus(path: Path, model: str) -> tuple[list[str], Tensor, int]:
    """The rows in Parquet of embed_corpus.py: paths, CLS tokens (n, D) of length 1, float16; and
    the size of their crops.
    """
    import pyarrow.dataset

    dataset = pyarrow.dataset.dataset(path, format="parquet")
    settings = json.loads((dataset.schema.metadata or {}).get(b"dinoreg", "null"))
    if settings is None:
        raise ValueError(f"{path}: not written by embed_corpus.py")
    if settings["model"] != Path(model).name:
        raise ValueError(
            f"{path}: embedded by {settings['model']}, "
            f"not by {Path(model).name}: give it as --model"
        )
    rows = dataset.to_table(
        columns=["path", "embedding"], filter=pyarrow.dataset.field("error").is_null()
    )
    features = np.concatenate([chunk.flatten() for chunk in rows["embedding"].chunks])
    features = torch.from_numpy(features).unflatten(0, (len(rows), -1))
    return rows["path"].to_pylist(), F.normalize(features, dim=1), settings["size"]


def find_nearest(
    query: Path, feature: Tensor, names: list[str], features: Tensor, top: int
) -> list[tuple[float, str, list[str]]]:
    """The images nearest to the query, by the cosine of its feature (D,) to theirs (n, D): cosine,
    name, near-duplicates.
    """
    cosines, results = features @ feature, []  # (n,)
    left = cosines.argsort(descending=True)
    while len(left) and len(results) < top:
        alike = (features @ features[left[0]] > DUPLICATE)[left]
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
        axis.imshow(
            common.to_pixels(dinoreg.preprocess(image, THUMBNAIL), dinoreg.Transform()).numpy()
        )
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


def run(args: argparse.Namespace) -> int:
    is_corpus = args.folder.suffix == ".parquet" or any(args.folder.glob("*.parquet"))
    if not is_corpus and not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    model = common.load_backbone(args.model, args.device)
    if is_corpus:
        names, features, size = read_corpus(args.folder, args.model)
        common.set_size(model, size)
    if args.query:
        (query,) = embed(model, [args.query])  # first, since it may not be an image
        if isinstance(query, str):
            raise ValueError(f"{args.query}: {query}")
    status = 0
    if not is_corpus:
        names, features, status = embed_folder(args, model)
    if not args.query:
        return status

    results = find_nearest(args.query, query.float(), names, features.float(), args.top)
    for cosine, name, duplicates in results:
        if args.json:
            print(json.dumps({"path": name, "cosine": cosine, "duplicates": duplicates}))
        else:
            print(f"{cosine:.3f}  {name}", *(f"    =  {other}" for other in duplicates), sep="\n")
    if args.output:
        images = [args.query, *(Path(name) for _, name, _ in results)]
        if not all(path.is_file() for path in images):
            raise ValueError(
                f"{args.output}: not drawn, as some of these images are not on this machine"
            )
        more = [
            f", and {len(duplicates)} like it" if duplicates else "" for *_, duplicates in results
        ]
        captions = [
            f"{shorten(Path(name).name)}\n{cosine:.3f}{text}"
            for (cosine, name, _), text in zip(results, more)
        ]
        draw(args.output, images, [f"{shorten(args.query.name)}\nquery", *captions])
    return status


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        help="a folder of images, searched recursively, or embed_corpus.py's Parquet files",
    )
    add(
        "--query",
        type=Path,
        metavar="IMAGE",
        help="find the images most similar to it (default: only fill the cache)",
    )
    add(
        "--model",
        default="vits14_reg",
        help="an official backbone, or a file (default: %(default)s)",
    )
    add(
        "--top",
        type=common.positive,
        default=8,
        metavar="K",
        help="number of neighbours (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object per line, for each neighbour")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="picture of the neighbours (default: none)",
    )
    common.add_no_cache(parser)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
