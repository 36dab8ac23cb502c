"""Compare a model with its int8 form on the CPU: how fast, and how near.

    pip install -e ".[examples]"
    python examples/quantize.py examples/images/*.jpg --model vits14_reg

The linear layers are quantised by torchao, weights per channel and activations per token on the fly; torch.compile is what
makes them fast, and so both sides are compiled. They take turns, and the ratio is the median over all turns.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import dinoreg


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="real photographs")
    parser.add_argument("--model", default="vits14_reg", help="a name or a file (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=30, help="default: %(default)s")
    args = parser.parse_args()
    try:
        model = dinoreg.load(args.model)
        model = getattr(model, "backbone", model)
        size = model.config.crop_size
        images = torch.stack([dinoreg.preprocess(path, size, patch_size=model.patch_size) for path in args.images])
    except (OSError, ValueError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2

    model.fix_image_size(size, size)
    int8 = copy.deepcopy(model)
    quantize_(int8, Int8DynamicActivationInt8WeightConfig())
    sides = [torch.compile(side) for side in (model, int8)]

    ratios = []
    with torch.inference_mode():
        cosines = F.cosine_similarity(*(side(images) for side in sides), dim=-1)
        for turn in range(args.turns + 1):
            seconds = []
            for side in sides:
                start = time.perf_counter()
                side(images)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    print(f"int8 is {statistics.median(ratios[1:]):.2f} times as fast as float32, at a batch of {len(images)}")
    print(f"cosine of its CLS tokens to those of float32: {cosines.min():.6f} to {cosines.max():.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
