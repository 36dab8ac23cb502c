"""Export a model at a fixed image size to ONNX or AOTInductor, and compare its output to PyTorch's.

    pip install -e ".[examples]"
    python examples/export.py vitb14_reg_lc --size 518 784 -o vitb14.onnx
    python examples/export.py vits14_reg --to aoti --batch-size 8 --dtype bfloat16 -o vits14.pt2

    session = onnxruntime.InferenceSession("vitb14.onnx")
    logits = session.run(None, {"images": images.numpy()})[0]               # (B, 1000)
    embeddings = torch._inductor.aoti_load_package("vits14.pt2")(images)    # (8, 384)

The input is images (B, C, H, W), float32, as `dinoreg.preprocess` returns them; the output is the
logits (B, num_classes) of a classifier or the embeddings (B, D) of a backbone. The position
embedding is resized before the export, so that no bicubic resize is left in the graph. Export and
comparison run on the CPU.

An ONNX file is float32, for any batch size and device; the class names are in its metadata
("labels", as JSON). AOTInductor compiles for this CPU, one batch size and --dtype, which the output
has too: it folds the weights into the package and chooses each matrix product by measuring. It
needs a C++ compiler and torch 2.6, and to run it the same version of torch.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import common
import dinoreg

SUFFIXES = {"onnx": ".onnx", "aoti": ".pt2"}
INDUCTOR = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the output, in units of its largest value


@torch.no_grad()
def write(
    model: dinoreg.DinoVisionTransformer | dinoreg.LinearClassifier,
    images: Tensor,
    path: Path,
    to: str,
) -> None:
    """Export a model of a fixed image size, for images (B, C, H, W). ONNX takes other batch sizes
    too; B must be above 1.
    """
    shapes = ({0: torch.export.Dim("batch")},) if to == "onnx" else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    with dinoreg.atomic(path) as part:
        if to == "aoti":
            # Hides the tables of measured matrix products.
            with contextlib.redirect_stderr(io.StringIO()):
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(part), inductor_configs=INDUCTOR
                )
            return
        # It warns that torchvision, which is not needed, is missing.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        is_backbone = isinstance(model, dinoreg.DinoVisionTransformer)
        names = {
            "input_names": ["images"],
            "output_names": ["embeddings" if is_backbone else "logits"],
        }
        onnx = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
        onnx.model.metadata_props["labels"] = json.dumps(getattr(model, "labels", None))
        onnx.save(part)
        # Weights of more than 2 GB are in a second file.
        for extra in set(part.parent.iterdir()) - {part}:
            os.replace(extra, path.with_name(extra.name))


def read(path: Path, to: str) -> Callable[[Tensor], Tensor]:
    """The exported model as a function of images (B, C, H, W), with as many threads as PyTorch."""
    if to == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    if args.output.suffix != SUFFIXES[args.to] or not args.output.parent.is_dir():
        raise ValueError(
            f"{args.output}: must be a {SUFFIXES[args.to]} file in a folder that exists"
        )
    if args.to == "aoti" and not shutil.which("c++"):
        raise ValueError("there is no C++ compiler, c++, which AOTInductor needs")
    model = dinoreg.load(args.model, args.layers, dtype=getattr(torch, args.dtype))
    backbone = model.backbone if isinstance(model, dinoreg.LinearClassifier) else model
    H, W = args.size * 2 if len(args.size) == 1 else args.size or common.set_size(backbone, None)
    backbone.fix_image_size(H, W)
    sizes = (2, 1) if args.to == "onnx" else (args.batch_size,)  # of the batches to compare
    images = torch.randn(sizes[0], backbone.config.in_chans, H, W)
    write(model, images, args.output, args.to)
    exported = read(args.output, args.to)
    found, wanted = (torch.cat([f(images[:n]) for n in sizes]).float() for f in (exported, model))
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    B, name = (
        "B" if args.to == "onnx" else args.batch_size,
        "embeddings" if model is backbone else "logits",
    )
    print(
        f"{args.output}: images ({B}, {images.shape[1]}, {H}, {W}) "
        f"-> {name} ({B}, {wanted.shape[1]})"
    )
    print(f"largest difference to PyTorch, in units of the largest value: {error:.1e}")
    return 0 if error < TOLERANCE[args.dtype] else 1


def main(argv: list[str] | None = None) -> int:
    """0 if the outputs agree, 1 if they differ by more than TOLERANCE, 2 if the run could not
    start.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default="vits14_reg",
        help="an official model or a file of weights (default: %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the .onnx or .pt2 file to write",
    )
    add("--to", choices=SUFFIXES, default="onnx", help="default: %(default)s")
    add(
        "--size",
        type=int,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="side, or height and width (default: the model's)",
    )
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=4,
        help="layers that an official classifier uses (default: 4)",
    )
    add(
        "--batch-size",
        type=int,
        default=1,
        metavar="B",
        help="images in a forward pass, for AOTInductor (default: 1)",
    )
    add(
        "--dtype",
        choices=TOLERANCE,
        default="float32",
        help="of the model, for AOTInductor (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if len(args.size) > 2 or min([*args.size, args.batch_size]) < 1:
        parser.error("--size takes one or two numbers, and --batch-size one, of at least 1")
    if args.to == "onnx" and (args.batch_size, args.dtype) != (1, "float32"):
        parser.error(
            "--batch-size and --dtype are for --to aoti: "
            "an ONNX file is float32, for any batch size"
        )
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
