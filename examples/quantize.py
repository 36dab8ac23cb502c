"""Compare a model with its int8 version on the CPU: speed, and cosine similarity of the features.

    pip install -e ".[examples]"
    python examples/quantize.py examples/images/*.jpg --model vits14_reg

torchao quantises the linear layers: weights per channel in advance, activations per token at run
time. Only a compiled model is faster in int8, so both models are compiled. Their runs alternate;
the speedup is the median of the ratios of successive runs. Features are compared at two batch
sizes, all images and one. If a cosine is below 0.99, the exit status is 1. There is no --device:
these int8 kernels are for the CPU.
"""

import argparse
import copy
import logging
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F

import common
import dinoreg

MIN_COSINE = 0.99


def run(args: argparse.Namespace) -> int:
    # torchao makes a deprecated call, and its compiled kernels are not cached; that there is no GPU
    # does not matter.
    for logger in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Int8Tensor does not implement _stable_hash_for_caching")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = common.load_backbone(args.model)
    H, W = common.set_size(model, args.size)
    inputs = {
        path: common.read_image(path, transform=model.transform)
        for path in dinoreg.find_images(args.images)
    }
    for path, x in inputs.items():
        if isinstance(x, str):
            print(f"quantize: {path}: {x}", file=sys.stderr)
    readable = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    if not readable:
        return 1
    images = torch.stack(readable)
    model.fix_image_size(H, W)
    int8 = copy.deepcopy(model)
    quantize_(int8, Int8DynamicActivationInt8WeightConfig())
    compiled = [torch.compile(version) for version in (model, int8)]

    lowest = 1.0
    with torch.inference_mode():
        reference = model(images)
        for batch in {len(images), 1}:
            cosines = F.cosine_similarity(compiled[1](images[:batch]), reference[:batch], dim=-1)
            print(
                f"batch of {batch}: cosine to float32 "
                f"from {cosines.min():.6f} to {cosines.max():.6f}"
            )
            lowest = min(lowest, cosines.nan_to_num(nan=-1).min().item())
        ratios = []
        for _ in range(args.turns + 1):  # the first one compiles float32
            seconds = []
            for version in compiled:
                start = time.perf_counter()
                version(images)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    print(
        f"int8 is {statistics.median(ratios[1:]):.2f} times as fast as float32, "
        f"at a batch of {len(images)}"
    )
    if lowest < MIN_COSINE:
        print(
            (
                "quantize: the int8 features are wrong: "
                f"a cosine of {lowest:.3f} is below {MIN_COSINE}"
            ),
            file=sys.stderr,
        )
        return 1
    return 1 if len(readable) < len(inputs) else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if int8 features are wrong or images could not be read, 2 if the run
    could not start.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="photographs, or folders of them")
    add(
        "--model",
        default="vits14_reg",
        help="an official model or a file of weights (default: %(default)s)",
    )
    add(
        "--size", type=int, metavar="PIXELS", help="side of the central crop (default: the model's)"
    )
    add("--turns", type=int, default=30, help="timed runs of each model (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.turns < 1:
        parser.error("--turns must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
