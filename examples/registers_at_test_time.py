"""Add a register to a model trained without any: outliers move to it (Jiang et al., 2025).

    pip install -e ".[examples]"
    python examples/registers_at_test_time.py PHOTO... --model vitl14

It was tried on small models only: on one whose outliers were planted, and on a ViT-S/14 fine-tuned
for saliency, whose largest norms are twice the median. It was not tried on the models it is
made for, such as ViT-L/14, for which the authors published neurons: compare the norms before and
after. ViT-g/14 is refused, as its MLPs are SwiGLU.

Without registers, large models store global information in a few patches, whose norms become very
high. In the blocks where these outliers appear, a few neurons of the MLPs fire at them. Here a zero
token is added as a register; at these neurons it takes the value of largest magnitude over the
tokens of its image, and the patches take 0 ("Vision Transformers Don't Need Trained Registers",
https://arxiv.org/abs/2506.08010).

It prints which neurons were found, and how norms and final features of each photo change; with
--json as JSON objects. The model is changed in memory only: `dinoreg.save` refuses it, since
`dinoreg.load` would not build it again.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg
import patches
from features import NOT_FINITE

LAYER = -2  # norms are those after the second-to-last block, as in the authors' code for DINOv2


class MlpWithRegister(nn.Module):
    """The `Mlp` of a block, in which some neurons (outputs of `act`) fire at the added register
    instead of at patches.
    """

    def __init__(self, mlp: dinoreg.Mlp, neurons: list[int], register: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2
        # register is the index of the register; patches follow it.
        self.neurons, self.register = neurons, register

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # (B, N, hidden)
        values = x[..., self.neurons]
        peak = values.abs().argmax(dim=1, keepdim=True)  # (B, 1, neurons): the token
        x[:, self.register, self.neurons] = values.gather(1, peak)[:, 0]
        x[:, self.register + 1 :, self.neurons] = 0
        return self.fc2(x)


def add_register(
    model: dinoreg.DinoVisionTransformer, neurons: dict[int, list[int]]
) -> Callable[[], None]:
    """Add a register that takes over the activations of neurons, {block: [neuron, ...]}; return a
    function that removes it.

    It is the last of the model's `register_tokens`. Raises a ValueError if there are no such
    neurons.
    """
    R, registers, mlps = model.num_register_tokens, model.register_tokens, {}
    for i, indices in neurons.items():
        mlps[i] = model.blocks[i].mlp if 0 <= i < len(model.blocks) else None
        hidden = mlps[i].fc2.in_features if isinstance(mlps[i], dinoreg.Mlp) else 0
        if not hidden or not all(0 <= j < hidden for j in indices):
            raise ValueError(f"block {i} of the model has no MLP with the neurons {indices}")
    zero = torch.zeros_like(model.cls_token)
    tokens = zero if registers is None else torch.cat([registers, zero], dim=1)
    model.register_tokens = nn.Parameter(tokens)
    model.num_register_tokens = R + 1
    for i, mlp in mlps.items():
        model.blocks[i].mlp = MlpWithRegister(mlp, neurons[i], register=1 + R)

    def remove() -> None:
        model.register_tokens, model.num_register_tokens = registers, R
        for i, mlp in mlps.items():
            model.blocks[i].mlp = mlp

    return remove


@torch.inference_mode()
def find_register_neurons(
    model: dinoreg.DinoVisionTransformer,
    images: Iterable[Tensor],
    count: int = 50,
    cutoff: float = 3,
    layer: int = LAYER,
) -> dict[int, list[int]]:
    """The `count` neurons of largest mean magnitude at outlier patches of images, each (3, H, W):
    {block: [neuron, ...]}.

    Outliers are patches whose norm after block `layer` is above `cutoff` times the median of their
    image. Blocks after the one where their mean norm reaches that are left out. Raises a ValueError
    if there are no outliers. Source: section 3 of the paper.
    """
    for i, block in enumerate(model.blocks):
        if not isinstance(block.mlp, dinoreg.Mlp):
            found = f"block {i} has a {type(block.mlp).__name__}"
            raise ValueError(f"register neurons are those of an Mlp, but {found}")
    activations: list[Tensor] = []  # of each block, at the patches of an image: (h * w, hidden)

    def keep(module, inputs, x):
        activations.append(x[0, 1 + model.num_register_tokens :])

    hooks = [block.mlp.act.register_forward_hook(keep) for block in model.blocks]
    largest = 0.0
    # Sums over outliers: their number, norms (depth,) and magnitudes of neurons (depth, hidden).
    total, norms, scores = 0, 0, 0
    try:
        for image in images:
            activations.clear()
            x = image[None].to(model.pos_embed.device)
            outputs = model.get_intermediate_layers(x, len(model.blocks), norm=False)
            relative = torch.cat(outputs).float().norm(dim=-1)  # (depth, h * w)
            relative /= relative.median(dim=1, keepdim=True).values
            outliers = relative[layer] > cutoff
            largest = max(largest, relative[layer].max().item())
            total += outliers.sum().item()
            norms += relative[:, outliers].sum(dim=1)
            scores += torch.stack([x[outliers].float().abs().sum(dim=0) for x in activations])
    finally:
        for hook in hooks:
            hook.remove()
    if not total:
        rule = f"no patch has a norm above {cutoff:g} times the median"
        raise ValueError(f"{rule}: the largest has {largest:.2f} times")
    first = (norms / total > cutoff).nonzero()[0].item()
    neurons: dict[int, list[int]] = {}
    for index in scores[: first + 1].flatten().argsort(descending=True)[:count].tolist():
        neurons.setdefault(index // scores.shape[1], []).append(index % scores.shape[1])
    return neurons


def move_outliers(model: dinoreg.DinoVisionTransformer, paths: list[Path], cutoff: float) -> None:
    """Give a model without registers one for its outliers in image files; those that cannot be read
    are left out.
    """
    if model.num_register_tokens == 0:
        images = [x for _, x in patches.read_photos(model, paths, {})]
        if not images:
            raise ValueError("--add-register: none of the images can be read")
        add_register(model, find_register_neurons(model, images, cutoff=cutoff))


@torch.inference_mode()
def measure(model: dinoreg.DinoVisionTransformer, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the patches (h * w,) and registers (R,) of an image (3, H, W), and the final
    features of CLS and patches (1 + h * w, D).
    """
    x = image[None].to(model.pos_embed.device)
    outputs = model._get_intermediate_layers_not_chunked(x, len(model.blocks))
    _, registers, norms = model.split_tokens(outputs[LAYER].norm(dim=-1))
    cls, _, features = model.split_tokens(model.norm(outputs[-1]))
    return norms[0], registers[0], torch.cat([cls, features[0]])


def compare(
    model: dinoreg.DinoVisionTransformer, image: Tensor, neurons: dict[int, list[int]]
) -> dict:
    """What a register for these neurons changes in an image (3, H, W): the JSON record."""
    norms, _, features = measure(model, image)
    remove = add_register(model, neurons)
    new_norms, registers, new_features = measure(model, image)
    remove()
    cosines = F.cosine_similarity(features, new_features, dim=1)
    return {
        "median_norm": [norms.median().item(), new_norms.median().item()],
        "largest_norm": [norms.max().item(), new_norms.max().item()],
        "register_norm": registers[-1].item(),
        "cosine_cls": cosines[0].item(),
        "cosine_patches": cosines[1:].mean().item(),
    }


def describe_neurons(neurons: dict[int, list[int]]) -> str:
    parts = [f"{len(neurons[i])} in block {i}" for i in sorted(neurons)]
    return f"register neurons: {', '.join(parts)} (the first block is 0)"


def describe_change(record: dict) -> str:
    (median, new_median), (largest, new_largest) = record["median_norm"], record["largest_norm"]
    return (
        f"{dinoreg.printable(record['image'])}: "
        f"the largest norm of a patch was {largest:.1f} and is {new_largest:.1f} "
        f"(median: {median:.1f}, {new_median:.1f}); "
        f"that of the added register is {record['register_norm']:.1f}. "
        f"Cosine of the features before and after: "
        f"CLS {record['cosine_cls']:.3f}, patches {record['cosine_patches']:.3f}"
    )


def run(args: argparse.Namespace) -> int:
    options = dict(size=args.resolution, whole=True)
    model = common.load_backbone(args.model, args.device, **options)
    paths, unreadable = dinoreg.find_images(args.images), dict[Path, str]()
    images = dict(patches.read_photos(model, paths, unreadable))
    if not images:
        return common.report("registers_at_test_time", unreadable)
    neurons = find_register_neurons(model, images.values(), args.count, args.cutoff)
    print(json.dumps({"neurons": neurons}) if args.json else describe_neurons(neurons))
    for path, image in images.items():
        record = {"image": str(path)} | compare(model, image, neurons)
        if math.isfinite(record["cosine_cls"] + record["cosine_patches"]):
            print(json.dumps(record) if args.json else describe_change(record))
        else:
            unreadable[path] = NOT_FINITE
    return common.report("registers_at_test_time", unreadable)


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option of other scripts that calls `move_outliers`."""
    text = "add a register to models without: it absorbs outlier tokens, those whose norm is above "
    text += "TIMES x the median, such as 3 (see registers_at_test_time.py)"
    parser.add_argument("--add-register", type=float, metavar="TIMES", help=text)


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_images(parser)
    add = parser.add_argument
    text = "an official model, or a file of weights (default: %(default)s)"
    add("--model", default="vitl14", help=text)
    add("--count", type=common.positive, default=50, help="of neurons (default: %(default)s)")
    text = "outliers have norms above this times the median (default: %(default)s)"
    add("--cutoff", type=float, default=3, metavar="TIMES", help=text)
    add("--json", action="store_true", help="print JSON objects")
    common.add_resolution(parser, default=518)
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if there are no outliers or the run
    could not start.
    """
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
