"""Registers for a model trained without: its outliers move to an added token (Jiang et al., 2025).

    python examples/test_time_registers.py PHOTO... --model vitl14

Without registers, large models store global information in a few patches, whose norms become very
high. In the blocks where these outliers appear, a few neurons of the MLPs fire at them. Here a zero
token is added as a register; at these neurons it takes the value of largest magnitude over the
tokens of its image, and the patches take 0 ("Vision Transformers Don't Need Trained Registers",
https://arxiv.org/abs/2506.08010).

It prints JSON objects: the neurons found, by block; then for each photo the median and the largest
norm of its patches, each [before, after], the norm of the added register, and the cosine similarity
of the final features before and after. The model is changed in memory only: `dinoreg.save` refuses
it, since `dinoreg.load` would not build it again.

The authors published neurons for one DINOv2 model, ViT-L/14. This script has not been tried on a
model with outliers of high norm: compare the norms before and after. ViT-g/14 is refused, as its
MLPs are SwiGLU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg

LAYER = -2  # norms are those after the last block but one, as in the authors' code for DINOv2


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
        x[:, self.register, self.neurons] = values.gather(
            1, values.abs().argmax(dim=1, keepdim=True)
        )[:, 0]
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
        if not isinstance(mlps[i], dinoreg.Mlp) or not all(
            0 <= j < mlps[i].fc2.in_features for j in indices
        ):
            raise ValueError(f"block {i} of the model has no MLP with the neurons {indices}")
    zero = torch.zeros_like(model.cls_token)
    model.register_tokens = nn.Parameter(
        zero if registers is None else torch.cat([registers, zero], dim=1)
    )
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
    image. Blocks after the one in which they reach that are left out. Raises a ValueError if there
    are none. Source: section 3 of the paper.
    """
    for i, block in enumerate(model.blocks):
        if not isinstance(block.mlp, dinoreg.Mlp):
            raise ValueError(
                "register neurons are those of an Mlp, "
                f"but block {i} has a {type(block.mlp).__name__}"
            )
    activations: list[Tensor] = []  # of each block, at the patches of an image: (h * w, hidden)

    def keep(module, inputs, x):
        activations.append(x[0, 1 + model.num_register_tokens :])

    hooks = [block.mlp.act.register_forward_hook(keep) for block in model.blocks]
    # The last three are sums over outliers: 1, norms (depth,), magnitudes (depth, hidden).
    largest, total, norms, scores = 0.0, 0, 0, 0
    try:
        for image in images:
            activations.clear()
            outputs = model.get_intermediate_layers(
                image[None].to(model.pos_embed.device), len(model.blocks), norm=False
            )
            relative = torch.cat(outputs).float().norm(dim=-1)  # (depth, h * w)
            relative /= relative.median(dim=1, keepdim=True).values
            outliers = relative[layer] > cutoff
            largest, total = (
                max(largest, relative[layer].max().item()),
                total + outliers.sum().item(),
            )
            norms += relative[:, outliers].sum(dim=1)
            scores += torch.stack([x[outliers].float().abs().sum(dim=0) for x in activations])
    finally:
        for hook in hooks:
            hook.remove()
    if not total:
        raise ValueError(
            f"no patch has a norm above {cutoff:g} times the median: "
            f"the largest has {largest:.2f} times"
        )
    first = (norms / total > cutoff).nonzero()[0].item()
    neurons: dict[int, list[int]] = {}
    for index in scores[: first + 1].flatten().argsort(descending=True)[:count].tolist():
        neurons.setdefault(index // scores.shape[1], []).append(index % scores.shape[1])
    return neurons


def add_option(parser: argparse.ArgumentParser) -> None:
    rule = (
        "give a model without registers one, to which outliers move: "
        "norms above TIMES (3, say) the median"
    )
    parser.add_argument(
        "--add-register", type=float, metavar="TIMES", help=f"{rule} (see test_time_registers.py)"
    )


def move_outliers(
    model: dinoreg.DinoVisionTransformer, paths: Iterable[Path], cutoff: float
) -> None:
    """Add a register for the outliers of a model without registers in image files, of those that
    can be read.
    """
    inputs = (
        common.read_image(path, None, True, model.patch_size, transform=model.transform)
        for path in paths
    )
    if model.num_register_tokens == 0:
        add_register(
            model,
            find_register_neurons(
                model, (x for x in inputs if isinstance(x, Tensor)), cutoff=cutoff
            ),
        )


@torch.inference_mode()
def see(model: dinoreg.DinoVisionTransformer, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an image (3, H, W), the norms of patches (h * w,) and of registers (R,); the features of
    CLS and patches.
    """
    outputs = model._get_intermediate_layers_not_chunked(image[None], len(model.blocks))
    _, registers, patches = model.split_tokens(outputs[LAYER].norm(dim=-1))
    cls, _, features = model.split_tokens(model.norm(outputs[-1]))
    return patches[0], registers[0], torch.cat([cls, features[0]])


def run(args: argparse.Namespace) -> int:
    model, paths = common.load_backbone(args.model, args.device), dinoreg.find_images(args.images)
    options = args.resolution, True, model.patch_size
    inputs = {path: common.read_image(path, *options, transform=model.transform) for path in paths}
    status = common.report(
        "test_time_registers", {path: x for path, x in inputs.items() if isinstance(x, str)}
    )
    images = {path: x.to(args.device) for path, x in inputs.items() if isinstance(x, Tensor)}
    if not images:
        return status
    neurons = find_register_neurons(model, images.values(), args.count, args.cutoff)
    print(json.dumps({"neurons": neurons}))
    for path, image in images.items():
        before, _, features = see(model, image)
        remove = add_register(model, neurons)
        after, registers, new_features = see(model, image)
        remove()
        cosines = F.cosine_similarity(features, new_features, dim=1)
        record = {
            "image": str(path),
            "median_norm": [x.median().item() for x in (before, after)],
            "largest_norm": [x.max().item() for x in (before, after)],
            "register_norm": registers[-1].item(),
            "cosine_cls": cosines[0].item(),
            "cosine_patches": cosines[1:].mean().item(),
        }
        print(json.dumps(record))
    return status


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if there are no outliers or the run
    could not start.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="PHOTO|FOLDER", help="image files, or folders of them")
    add(
        "--model",
        default="vitl14",
        help="an official model or a file of weights (default: %(default)s)",
    )
    add("--count", type=int, default=50, help="of neurons (default: %(default)s)")
    add(
        "--cutoff",
        type=float,
        default=3,
        help="outliers have norms above this times the median (default: %(default)s)",
    )
    common.add_resolution(parser, default=518)
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
