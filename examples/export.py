"""Export a model at a fixed image size to ONNX or AOTInductor, and compare its output to PyTorch's.

    pip install -e ".[examples]"
    python examples/export.py vitb14_reg_lc --size 518 784 -o vitb14.onnx
    python examples/export.py vits14_reg --to aoti --batch-size 8 --dtype bfloat16 -o vits14.pt2
    python examples/export.py vits14_reg --to int8 --images examples/images -o int8.pt2

    session = onnxruntime.InferenceSession("vitb14.onnx")
    logits = session.run(None, {"images": images.numpy()})[0]               # (B, 1000)
    embeddings = torch._inductor.aoti_load_package("vits14.pt2")(images)    # (8, 384)

The input is images (B, C, H, W), float32, as `dinoreg.preprocess` returns them; the output is the
logits (B, num_classes) of a classifier or the embeddings (B, D) of a backbone. The position
embedding is resized before the export, so that no bicubic resize is left in the graph. Export and
comparison run on the CPU. A file whose outputs differ from PyTorch's is not kept.

An ONNX file is float32, for any batch size and device; the class names are in its metadata
("labels", as JSON). AOTInductor compiles for this CPU, one batch size and --dtype, which the output
has too: it folds the weights into the package and chooses each matrix product by measuring. It
needs a C++ compiler and torch 2.6, and to run it the same version of torch.

int8 is a package of AOTInductor whose linear layers torchao has quantized: weights per channel in
advance, activations per token at run time. It was tried on an AMD EPYC with AVX512-BF16 and VNNI,
without AMX. On processors with AMX, layers that torch.compile had compiled for a single token were
wrong, hence the comparison of whole forward passes, which is best made on photos (--images).
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common
import dinoreg
import features
import outputs

Model = dinoreg.DinoVisionTransformer | dinoreg.LinearClassifier

SUFFIXES = {"onnx": ".onnx", "aoti": ".pt2", "int8": ".pt2"}
INDUCTOR = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the output, in units of its largest value
MIN_COSINE = 0.99  # of int8


@torch.no_grad()
def write(model: Model, images: Tensor, path: Path, to: str) -> None:
    """Export a model of a fixed image size, for images (B, C, H, W). ONNX takes other batch sizes
    too; B must be above 1.
    """
    if to == "onnx":
        write_onnx(model, images, path)
        return
    # torchao makes a deprecated call; that there is no GPU does not matter.
    for logger in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    program = torch.export.export(quantize(model) if to == "int8" else model, (images,))
    # Hides the tables of measured matrix products.
    with contextlib.redirect_stderr(io.StringIO()):
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=INDUCTOR
        )


def write_onnx(model: Model, images: Tensor, path: Path) -> None:
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    # It warns that torchvision, which is not needed, is missing.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    output = "embeddings" if isinstance(model, dinoreg.DinoVisionTransformer) else "logits"
    names = {"input_names": ["images"], "output_names": [output]}
    onnx = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    onnx.model.metadata_props["labels"] = json.dumps(getattr(model, "labels", None))
    onnx.save(path)  # weights of more than 2 GB are in a second file


def quantize(model: Model) -> Model:
    """A copy whose linear layers compute in int8."""
    warnings.filterwarnings("ignore", "Int8Tensor does not implement _stable_hash_for_caching")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def read(path: Path, to: str) -> Callable[[Tensor], Tensor]:
    """The exported model as a function of images (B, C, H, W), with as many threads as PyTorch."""
    if to != "onnx":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# Comparison ---------------------------------------------------------------------------------------


def load_batches(
    args: argparse.Namespace, shape: tuple[int, int, int], transform: dinoreg.Transform
) -> tuple[list[Tensor], dict[Path, str]]:
    """Batches of images (B, C, H, W) to compare the outputs on: those of --images, repeated to fill
    the last batch, or random ones. Also why images could not be read.
    """
    B = 2 if args.to == "onnx" else args.batch_size
    images, unreadable = torch.randn(B, *shape), {}
    if args.images:
        transform = dataclasses.replace(transform, resize=shape[1:], crop=None)
        paths = dinoreg.find_images(args.images)
        read = {path: features.read_image(path, transform=transform) for path in paths}
        unreadable = {path: x for path, x in read.items() if isinstance(x, str)}
        images = [x for path, x in read.items() if path not in unreadable]
        if not images:
            raise ValueError("no image of --images can be read")
    count = math.ceil(len(images) / B) * B
    images = torch.stack([*itertools.islice(itertools.cycle(images), count)])
    # An ONNX file takes another size of batch as well.
    return [*images.split(B), *([images[:1]] if args.to == "onnx" else [])], unreadable


@torch.no_grad()
def compare(
    model: Model, exported: Callable, batches: list[Tensor], args: argparse.Namespace
) -> str:
    """The differences between the outputs, in words. Raises a ValueError if they are too large."""
    found, wanted = (torch.cat([f(x) for x in batches]).float() for f in (exported, model))
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    cosine = F.cosine_similarity(found, wanted, dim=1).min().item()
    good = cosine >= MIN_COSINE if args.to == "int8" else error < TOLERANCE[args.dtype]
    text = f"largest difference to PyTorch, in units of the largest value: {error:.1e}"
    text += f"; lowest cosine: {cosine:.6f}"
    if not good:  # or NaN
        raise ValueError(f"the exported model is wrong, and not kept ({text})")
    return text


@torch.no_grad()
def measure_speed(model: Model, exported: Callable, images: Tensor, turns: int) -> float:
    """How many times as fast the exported model is: the median over runs in turn."""
    ratios = []
    for _ in range(turns + 1):  # the first one warms up
        seconds = []
        for function in (model, exported):
            start = time.perf_counter()
            function(images)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def check_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for what could not be exported, before anything takes time."""
    outputs.check_new_file(args.output, SUFFIXES[args.to], args.model)
    if len(args.size) > 2:
        raise ValueError("--size takes one or two numbers")
    if args.to == "onnx" and (args.batch_size, args.dtype) != (1, "float32"):
        raise ValueError("an ONNX file is float32, for any --batch-size: leave out these options")
    if args.to != "onnx" and not shutil.which("c++"):
        raise ValueError("there is no C++ compiler, c++, which AOTInductor needs")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    model = dinoreg.load(args.model, args.layers, dtype=getattr(torch, args.dtype))
    backbone = getattr(model, "backbone", model)
    if not args.size:
        common.set_input(backbone)  # refuses a transform whose images have no fixed size
    H, W = args.size * 2 if len(args.size) == 1 else args.size or backbone.transform.size
    backbone.fix_image_size(H, W)
    C = backbone.config.in_chans
    batches, unreadable = load_batches(args, (C, H, W), model.transform)
    status = common.report("export", unreadable)

    path = Path(os.path.realpath(args.output))
    with dinoreg.atomic(path) as part:
        write(model, batches[0], part, args.to)
        exported = read(part, args.to)
        text = compare(model, exported, batches, args)
        speed = measure_speed(model, exported, batches[0], args.turns)
        for extra in set(part.parent.iterdir()) - {part}:  # of an ONNX file above 2 GB
            os.replace(extra, path.with_name(extra.name))
    B = "B" if args.to == "onnx" else args.batch_size
    output = f"embeddings ({B}, {backbone.embed_dim})"
    if model is not backbone:
        output = f"logits ({B}, {model.linear_head.out_features})"
    print(dinoreg.printable(f"{args.output} written: images ({B}, {C}, {H}, {W}) -> {output}"))
    print(text)
    print(f"{speed:.2f} times as fast as PyTorch with batches of {len(batches[0])}")
    return status


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "an official model, or a file of weights (default: %(default)s)"
    add("model", nargs="?", default="vits14_reg", help=text)
    text = "the .onnx or .pt2 file to write"
    add("-o", "--output", type=common.output, required=True, metavar="FILE", help=text)
    add("--to", choices=SUFFIXES, default="onnx", help="default: %(default)s")
    text = "side, or height and width (default: the model's)"
    add("--size", type=common.positive, nargs="+", default=[], metavar="PIXELS", help=text)
    text = "layers that an official classifier uses (default: 4)"
    add("--layers", type=int, choices=(1, 4), default=4, help=text)
    text = "images in a forward pass, for AOTInductor (default: 1)"
    add("--batch-size", type=common.positive, default=1, metavar="B", help=text)
    text = "of the model, for AOTInductor (default: %(default)s)"
    add("--dtype", choices=TOLERANCE, default="float32", help=text)
    text = "compare the outputs on these (default: on random numbers)"
    add("--images", nargs="+", default=[], metavar="IMAGE|FOLDER", help=text)
    text = "runs of each side to measure the speed (default: %(default)s)"
    add("--turns", type=common.positive, default=5, help=text)


def main(argv: list[str] | None = None) -> int:
    """0 if the file was written, 1 if some images could not be read, 2 if no file was written."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
