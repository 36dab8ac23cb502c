"""Compile a model ahead of time for this processor with AOTInductor, and compare its output with that of PyTorch.

    pip install -e .
    python examples/export_aoti.py vits14_reg -o vits14.pt2 --batch-size 8 --dtype bfloat16

    model = torch._inductor.aoti_load_package("vits14.pt2")
    embeddings = model(images)  # (8, 384)

Inductor folds the weights into the package and chooses each matrix product by measuring (`freezing` and `max_autotune` with
the C++ templates). The package is for the CPU it was compiled on, for float32 images of one shape (B, C, H, W) only. It
returns the embeddings (B, D) of a backbone or the logits (B, num_classes) of a classifier, in --dtype. Compiling needs a C++
compiler and torch 2.6 or newer; the package runs in the same version of torch.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg

OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
MIN_COSINE = 0.999


class Embedding(nn.Module):
    """`embed` as a module, as `torch.export` takes modules only."""

    def __init__(self, backbone: dinoreg.DinoVisionTransformer):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.embed(x)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".pt2" or not args.output.parent.is_dir():
        raise ValueError(f"{args.output}: must be a .pt2 file in a folder that exists")
    if not shutil.which("c++"):
        raise ValueError("there is no C++ compiler, c++, which AOTInductor needs")
    model = dinoreg.load(args.model, args.layers, dtype=getattr(torch, args.dtype))
    is_classifier = isinstance(model, dinoreg.LinearClassifier)
    backbone = model.backbone if is_classifier else model
    H, W = common.set_size(backbone, args.size)
    backbone.fix_image_size(H, W)
    images = torch.randn(args.batch_size, backbone.config.in_chans, H, W)
    function = model if is_classifier else Embedding(model)
    expected = function(images).float()

    program = torch.export.export(function, (images,))
    with dinoreg.atomic(args.output) as part, contextlib.redirect_stderr(io.StringIO()):  # hides the autotuning tables
        torch._inductor.aoti_compile_and_package(program, package_path=str(part), inductor_configs=OPTIONS)
    found = torch._inductor.aoti_load_package(str(args.output))(images).float()
    cosine = F.cosine_similarity(found, expected, dim=1).min().item()
    print(f"{args.output}: images {tuple(images.shape)} -> {tuple(found.shape)}, lowest cosine to PyTorch {cosine:.6f}")
    return 0 if cosine > MIN_COSINE else 1


def main() -> int:
    """0 if the outputs agree, 1 if a cosine is below MIN_COSINE, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="vits14_reg", help="an official model or a file of weights (default: %(default)s)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the .pt2 file to write")
    add("--size", type=int, metavar="PIXELS", help="side of the image (default: the model's)")
    add("--layers", type=int, choices=(1, 4), default=4, help="layers that an official classifier uses (default: 4)")
    add("--batch-size", type=int, default=1, metavar="B", help="images in a forward pass (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: %(default)s)")
    args = parser.parse_args()
    if args.batch_size < 1 or (args.size is not None and args.size < 1):
        parser.error("--batch-size and --size must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
