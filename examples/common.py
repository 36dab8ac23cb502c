"""What all examples share: options, the backbone that they choose, and one line for every error."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# The examples also run in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dinoreg


def main(run: Callable, add_options: Callable, argv: list[str] | None = None) -> int:
    """Exit status of a script: that of `run`, which is 1 if some inputs failed; 2, and one line on
    standard error, if it could not run; 130 if it was interrupted."""
    module = sys.modules[run.__module__]
    script = Path(module.__file__)
    head = (module.__doc__ or "").partition("\n")[0]  # python -OO removes docstrings
    parser = argparse.ArgumentParser(script.name, description=head)
    add_options(parser)
    args = parser.parse_args(argv)

    def run_or_advise() -> int:
        try:
            return run(args)
        except ModuleNotFoundError as error:  # packages are imported where they are used
            if "." in (error.name or ""):  # a part of a package that is there
                raise
            advice = f"see the head of {script.name} for what to install"
            raise ValueError(f"{error}: {advice}") from error

    return dinoreg.guard(script.stem, run_or_advise)


def report(script: str, unreadable: dict[Path, str]) -> int:
    """Print why files could not be read; return the exit status: 1 if there are any, else 0."""
    for path, why in unreadable.items():
        dinoreg.complain(f"{path}: {why}", script)
    return int(bool(unreadable))


# Options ------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """The type of options that are positive integers."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def output(text: str) -> Path:
    """The type of options that name a file or folder to write."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def add_images(parser: argparse.ArgumentParser) -> None:
    text = "image files, or folders of them"
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    text = "an official model, or a file of weights (default: %(default)s)"
    parser.add_argument("--model", default="vits14_reg", help=text)


def add_output(parser: argparse.ArgumentParser, default: str | None, kind: str = "FILE") -> None:
    text = "default: %(default)s" if default else "default: none"
    path = Path(default) if default else None
    parser.add_argument("-o", "--output", type=output, default=path, metavar=kind, help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "cpu, cuda, mps, ... (default: the best available, here %(default)s)"
    parser.add_argument("--device", default=dinoreg.best_device(), help=text)


def add_size(parser: argparse.ArgumentParser) -> None:
    text = "side of the central crop (default: the model's)"
    parser.add_argument("--size", type=positive, metavar="PIXELS", help=text)


def add_resolution(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    text = "resize whole images to as many pixels as a square of this side has"
    text += f" (default: {default or 'as in training'})"
    parser.add_argument("--resolution", type=positive, default=default, metavar="PIXELS", help=text)


def add_stride(parser: argparse.ArgumentParser) -> None:
    text = "distance between patches, a divisor of the patch size (default: the patch size)"
    parser.add_argument("--stride", type=positive, metavar="PIXELS", help=text)


# The backbone -------------------------------------------------------------------------------------


def load_backbone(source: str, device: str = "cpu", **options) -> dinoreg.DinoVisionTransformer:
    """The backbone of an official model or of a file; for the options see `set_input`."""
    model = dinoreg.load(source, device=device)
    backbone = getattr(model, "backbone", model)  # of a classifier
    set_input(backbone, **options)
    return backbone


def set_input(backbone, size: int | None = None, whole=False, stride: int | None = None) -> None:
    """Change the images that a backbone's transform makes, and the distance between its patches.

    size is the side of a square crop, by default the transform's. With whole, images are resized to
    as many pixels as a square of this side has, by default as in training: read them with
    keep_aspect=True. Raises a ValueError for what the model cannot take."""
    P = backbone.patch_size
    if stride is not None:
        if P % stride:
            raise ValueError(f"--stride must be a divisor of the patch size, {P}, got {stride}")
        backbone.patch_embed.proj.stride = (stride, stride)
    if size is not None and size < P:
        raise ValueError(f"images must have at least {P} pixels, the side of a patch, got {size}")
    if whole:
        size = size or round(math.sqrt(math.prod(backbone.config.grid)) * P)
    if size:
        backbone.transform = backbone.transform.at_size(size)
    if backbone.transform.size is None and not whole:
        raise ValueError("this model's transform keeps the shape of images; one size is needed")


def name_pictures(images: Iterable[Path], folder: Path, kind: str) -> list[Path]:
    """A file NAME_kind.png in folder for each image, numbered if names repeat; long ones cut."""
    pictures, numbers, taken = [], dict[str, int](), set[str]()
    for image in images:
        name = stem = os.fsencode(image.stem)[:200].decode(errors="ignore")
        while name in taken:
            numbers[stem] = numbers.get(stem, 1) + 1
            name = f"{stem}_{numbers[stem]}"
        taken.add(name)
        pictures.append(folder / f"{name}_{kind}.png")
    return pictures
