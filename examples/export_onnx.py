"""Export a model to ONNX at a fixed image size, and compare its output in onnxruntime with that of PyTorch.

    pip install -e ".[examples]"
    python examples/export_onnx.py examples/digits.safetensors -o digits.onnx
    python examples/export_onnx.py vitb14_reg_lc --size 518 784 -o vitb14.onnx

The position embedding is resized before the export, so that no bicubic resize is left in the graph. The batch size is
dynamic. The input "images" is (B, C, H, W), float32, as returned by `dinoreg.preprocess`. The output is "logits"
(B, num_classes) of a classifier, whose class names are stored in the metadata ("labels", as JSON), or "embeddings" (B, D) of
a backbone. Export and comparison run on the CPU; the file is the same for every device.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import common
import dinoreg

TOLERANCE = 1e-4  # of an output, absolute


def run(args: argparse.Namespace) -> int:
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    model = dinoreg.load(args.model, args.layers)
    backbone = model.backbone if isinstance(model, dinoreg.LinearClassifier) else model
    H, W = args.size * 2 if len(args.size) == 1 else args.size or common.set_size(backbone, None)
    images = torch.randn(2, backbone.config.in_chans, H, W)
    backbone.fix_image_size(H, W)
    with torch.inference_mode():
        expected = model(images).numpy()

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision, which is not needed, is missing
    name = "logits" if isinstance(model, dinoreg.LinearClassifier) else "embeddings"
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=[name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.model.metadata_props["labels"] = json.dumps(getattr(model, "labels", None))
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        program.save(Path(folder, args.output.name))
        for file in Path(folder).iterdir():  # weights of more than 2 GB are in a second file
            os.replace(file, args.output.with_name(file.name))

    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    difference = max(
        np.abs(session.run([name], {"images": x.numpy()})[0] - y).max()
        for x, y in ((images, expected), (images[:1], expected[:1]))
    )
    print(f"{args.output}: images (B, {images.shape[1]}, {H}, {W}) -> {name} (B, {expected.shape[1]})")
    print(f"largest difference between onnxruntime and PyTorch: {difference:.1e}")
    return 0 if difference < TOLERANCE else 1


def main() -> int:
    """0 if the outputs agree, 1 if they differ by more than TOLERANCE, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="vits14_reg_lc", help="an official model or a file of weights (default: %(default)s)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the .onnx file to write")
    sides = "side of the image, or height and width (default: the model's)"
    add("--size", type=int, nargs="+", default=[], metavar="PIXELS", help=sides)
    add("--layers", type=int, choices=(1, 4), default=4, help="layers that an official classifier uses (default: 4)")
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error("--size takes one or two numbers")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
