"""Compare a model with its int8 form on the CPU: speed, and cosine to the float32 features.

    pip install -e ".[examples]"
    python examples/quantize.py examples/images/*.jpg --model vits14_reg

torchao quantises the linear layers: weights per channel in advance, activations per token on the fly. The speed comes from
torch.compile, so both sides are compiled. They take turns; the ratio is the median over all turns. The features of a batch
and of a single image are compared with those of float32: below a cosine of 0.99 the exit status is 1.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import common
import dinoreg

MIN_COSINE = 0.99


def compare(args: argparse.Namespace) -> int:
    model = common.load_backbone(args.model)
    size = model.config.crop_size
    images = torch.stack([dinoreg.preprocess(path, size, patch_size=model.patch_size) for path in args.images])
    model.fix_image_size(size, size)
    int8 = copy.deepcopy(model)
    quantize_(int8, Int8DynamicActivationInt8WeightConfig())
    sides = [torch.compile(side.embed) for side in (model, int8)]

    lowest = 1.0
    with torch.inference_mode():
        reference = model.embed(images)
        for batch in {len(images), 1}:
            cosines = F.cosine_similarity(sides[1](images[:batch]), reference[:batch], dim=-1)
            print(f"batch of {batch}: cosine to float32 from {cosines.min():.6f} to {cosines.max():.6f}")
            lowest = min(lowest, cosines.nan_to_num(nan=-1).min().item())
        ratios = []
        for _ in range(args.turns + 1):
            seconds = []
            for side in sides:
                start = time.perf_counter()
                side(images)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    print(f"int8 is {statistics.median(ratios[1:]):.2f} times as fast as float32, at a batch of {len(images)}")
    if lowest < MIN_COSINE:
        print(f"quantize: the int8 features are wrong: cosine {lowest:.3f}, below {MIN_COSINE}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="real photographs")
    parser.add_argument("--model", default="vits14_reg", help="a name or a file (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=30, help="default: %(default)s")
    return common.run(compare, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
