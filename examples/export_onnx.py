"""Export a model to ONNX at a fixed image size, and check it in onnxruntime against PyTorch.

    pip install -e ".[examples]"
    python examples/export_onnx.py examples/digits.safetensors -o digits.onnx
    python examples/export_onnx.py vitb14_reg_lc --size 518 784 -o vitb14.onnx

The position embedding is resized before the export, so that no bicubic resize is left in the graph; the batch is dynamic.
The input "images" is (B, C, H, W), float32, as `dinoreg.preprocess` gives it. The output is "logits" (B, num_classes) of a
classifier, whose class names go into the metadata ("labels", JSON), or "embeddings" (B, D) of a backbone.
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

import common  # noqa: F401  finds dinoreg in a clone that is not installed
import dinoreg


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="vits14_reg_lc", help="a name or a file (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .onnx file to write")
    parser.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="a side, or H and W (default: the model's)")
    args = parser.parse_args()
    try:
        model = dinoreg.load(args.model)
        backbone = model.backbone if isinstance(model, dinoreg.LinearClassifier) else model
        H, W = (args.size or [backbone.config.crop_size]) * (2 if len(args.size or [0]) == 1 else 1)
        images = torch.randn(2, backbone.config.in_chans, H, W)
        backbone.fix_image_size(H, W)
        with torch.inference_mode():
            expected = model(images).numpy()
    except (OSError, ValueError) as error:
        print(f"export_onnx: {error}", file=sys.stderr)
        return 2

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
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
        for file in Path(folder).iterdir():  # weights of more than 2 GB are in a second one
            os.replace(file, args.output.with_name(file.name))

    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    difference = max(
        np.abs(session.run([name], {"images": x.numpy()})[0] - y).max()
        for x, y in ((images, expected), (images[:1], expected[:1]))
    )
    print(f"{args.output}: images (B, {images.shape[1]}, {H}, {W}) -> {name} (B, {expected.shape[1]})")
    print(f"largest difference between onnxruntime and PyTorch: {difference:.1e}")
    return 0 if difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
