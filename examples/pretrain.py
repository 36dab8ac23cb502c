"""Train a DINOv2 with registers on a folder of images: from scratch, from weights, or from a larger model.

    pip install -e ".[examples]"
    python examples/pretrain.py FOLDER -o RUN                                           # from scratch
    python examples/pretrain.py FOLDER -o RUN --model vits14_reg                        # continue from weights
    python examples/pretrain.py FOLDER -o RUN --teacher vitl14_reg --config vits14_reg  # distil
    torchrun --nproc-per-node 8 examples/pretrain.py FOLDER -o RUN --preset official

RUN/teacher.safetensors is the trained model, for `dinoreg.load` and the other examples; log.csv and curves.png lie beside.
The same command continues a run that was interrupted or killed, on the same curve: crops, masks and order depend on the
seed and the step alone. The sub-folders of FOLDER, if any, are classes for the k-NN accuracy, and used for nothing else.

The method is that of section 4 of the paper (https://arxiv.org/abs/2304.07193), computed as in the official code:
dinov2/train, dinov2/loss, dinov2/layers/dino_head.py, dinov2/data, dinov2/utils/param_groups.py. One thing differs: several
processes compute what one would, so KoLeo sees the images of all of them. Shapes are in the letters of dinoreg.py, and
L: local crops of an image, K: prototypes, M: masked patches of a batch.
"""

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
import dinoreg


@dataclass(frozen=True)
class Recipe:
    """All constants. The defaults are the official ones of ViT-L/14 (configs/train/vitl14.yaml); comments add those of the
    official run on ImageNet-1k (ssl_default_config.yaml) where they differ."""

    # Crops: pixels, shares of the image's area, probabilities
    global_size: int = 224
    global_scale: tuple = (0.32, 1.0)
    local_crops: int = 8
    local_size: int = 98  # 96
    local_scale: tuple = (0.05, 0.32)
    flip: float = 0.5
    jitter: float = 0.8  # by up to 0.4, 0.4, 0.2, 0.1 in brightness, contrast, saturation, hue
    grey: float = 0.2
    blur: tuple = (0.0, 0.9, 0.5)  # of both global crops and the local ones; official files say 1, 0.1, 0.5, but invert it
    solarize: float = 0.2  # the second global crop only
    mask_probability: float = 0.5  # share of the global crops that have masked patches
    mask_ratio: tuple = (0.1, 0.5)  # share of their patches
    # Heads
    prototypes: int = 131072  # K; 65536
    bottleneck_dim: int = 384  # 256
    ibot_prototypes: int = 131072  # 0: iBOT shares the head of DINO, as here
    ibot_bottleneck_dim: int = 256
    hidden_dim: int = 2048
    nlayers: int = 3
    # Losses
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.07
    warmup_teacher_temp_epochs: float = 30.0
    centering: str = "sinkhorn_knopp"  # "centering": softmax, less a moving centre
    center_momentum: float = 0.9
    # Optimiser
    batch_size: int = 3072  # images of all processes: 96 GPUs with 32; 32 with 64
    accumulate: int = 1  # parts in which a batch is computed; Sinkhorn-Knopp and KoLeo see one part
    epochs: float = 500.0  # 100
    epoch_length: int = 1250  # steps; 0: as many as the folder has batches
    warmup_epochs: float = 80.0  # 10
    freeze_last_layer_epochs: float = 1.0
    base_lr: float = 2e-4  # times sqrt(batch_size / 1024); 4e-3
    min_lr: float = 1e-6
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2  # 0.4
    clip_grad: float = 3.0  # norm, of the backbone and of each head
    layerwise_decay: float = 1.0  # 0.9
    patch_embed_lr_mult: float = 0.2
    momentum_teacher: float = 0.994  # 0.992
    final_momentum_teacher: float = 1.0
    # A new backbone; the rest of it is in dinoreg.Config
    drop_path_rate: float = 0.4  # 0.3
    layerscale_init: float = 1e-5
    seed: int = 0


ONE_GPU = Recipe(prototypes=16384, bottleneck_dim=256, ibot_prototypes=16384, batch_size=128, epochs=100.0, epoch_length=0)
ONE_GPU = replace(ONE_GPU, warmup_epochs=10.0, base_lr=2e-3, momentum_teacher=0.992, drop_path_rate=0.1)
HEADS = dict(prototypes=1024, ibot_prototypes=1024, hidden_dim=512, bottleneck_dim=128, ibot_bottleneck_dim=128)
LAPTOP = replace(ONE_GPU, **HEADS, global_size=112, local_size=56, local_crops=4, batch_size=64, layerscale_init=1.0)
PRESETS = {  # the architecture of a new model, and the recipe
    "official": (dinoreg.CONFIGS["vitl14_reg"], Recipe()),
    "gpu": (dinoreg.CONFIGS["vits14_reg"], ONE_GPU),
    "laptop": (dinoreg.Config(embed_dim=192, depth=6, num_heads=3), LAPTOP),
}
ARCHITECTURE = ("embed_dim", "depth", "num_heads", "ffn", "patch_size", "num_register_tokens")

# ---------------------------------------------------------------------------------------------------------------------
# Heads and losses


class DINOHead(nn.Module):
    """MLP, then cosines with K prototypes times a learnt length of each: (..., in_dim) -> (..., out_dim = K).

    Parameters have the official names: the last layer is what nn.utils.weight_norm made of a linear layer.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, nlayers: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for widths in itertools.pairwise([in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]):
            layers += [nn.Linear(*widths), nn.GELU()]
        for linear in layers[::2]:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(*layers[:-1]) if nlayers > 1 else layers[0]
        weights = dict(weight_g=torch.ones(out_dim, 1), weight_v=nn.Linear(bottleneck_dim, out_dim, bias=False).weight)
        self.last_layer = nn.ParameterDict(weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        length, direction = self.last_layer["weight_g"], self.last_layer["weight_v"]
        return F.linear(x, direction * (length / direction.norm(dim=1, keepdim=True)))


def full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def all_reduce(x: Tensor) -> Tensor:
    """x, which becomes its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes: (B, D) -> (processes * B, D), for a loss whose gradients are averaged over processes."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    x.register_hook(lambda gradient: gradient * len(parts))
    parts[dist.get_rank()] = x
    return torch.cat(parts)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments (B, K), float32, of the samples of all processes to prototypes, by logits (B, K).

    A sample's sum to 1, and all prototypes get the same in total. Official Implementation: sinkhorn_knopp_teacher.
    """
    Q = (logits.float() / temperature).exp()
    samples, prototypes = all_reduce(torch.tensor(float(len(Q)), device=Q.device)), Q.shape[1]
    Q /= all_reduce(Q.sum())
    for _ in range(iterations):
        Q /= all_reduce(Q.sum(dim=0)) * prototypes  # 1 / K in total for each prototype
        Q /= Q.sum(dim=1, keepdim=True) * samples  # 1 / B for each sample
    return Q * samples


@torch.no_grad()
def softmax_center(logits: Tensor, temperature: float, center: Tensor, momentum: float = 0.9) -> Tensor:
    """Softmax of logits (B, K) less the centre (1, K), which then moves towards their mean, in place.

    Official Implementation: softmax_center_teacher and update_center, of DINOLoss and iBOTPatchLoss.
    """
    logits = full_precision(logits)
    probs = ((logits - center) / temperature).softmax(dim=-1)
    total, count = all_reduce(logits.sum(dim=0)), all_reduce(torch.tensor(len(logits), device=logits.device))
    if count > 0:
        center.copy_(center * momentum + total / count * (1 - momentum))
    return probs


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Cross-entropy of student crops (S, B, K) with teacher crops (T, B, K): summed over S * T pairs, averaged over B.

    Official Implementation: DINOLoss.forward.
    """
    log_probs = F.log_softmax(full_precision(student_logits) / student_temp, dim=-1)
    return -(teacher_probs.sum(dim=0) * log_probs).sum(dim=-1).mean(dim=-1).sum()


def ibot_loss(student_logits: Tensor, teacher_probs: Tensor, masks: Tensor, student_temp: float = 0.1) -> Tensor:
    """Cross-entropy of masked patches (M, K), those where masks (B, h * w) is True: averaged over each image's, then over B.

    Official Implementation: iBOTPatchLoss.forward_masked.
    """
    log_probs = F.log_softmax(full_precision(student_logits) / student_temp, dim=-1)
    weights = (1 / masks.sum(dim=1).clamp(min=1))[:, None].expand_as(masks)[masks]
    return -((teacher_probs * log_probs).sum(dim=-1) * weights).sum() / len(masks)


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance of features (B, D) to their nearest neighbours on the unit sphere.

    Official Implementation: KoLeoLoss.forward.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(full_precision(x), dim=-1, eps=eps)
        nearest = (x.detach() @ x.detach().mT).fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Crops and masks


def random_mask(h: int, w: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """A mask (h, w), bool, of at most `count` patches, in rectangles of random size, shape and place.

    Official Implementation: dinov2/data/masking.py, with the largest rectangle of dinov2/train/train.py.
    """
    mask = torch.zeros(h, w, dtype=torch.bool)
    tries = 0
    while (left := min(count - int(mask.sum()), h // 2 * w)) > 0 and tries < 10:
        tries += 1
        area, ratio, top, left_side = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area, ratio = 4 + (left - 4) * area, 0.3 ** (1 - 2 * ratio)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < h and width < w:
            top, left_side = int(top * (h - height + 1)), int(left_side * (w - width + 1))
            part = mask[top : top + height, left_side : left_side + width]
            if 0 < int((~part).sum()) <= left:
                part[:], tries = True, 0
    return mask


@functools.lru_cache(maxsize=4)
def permutation(n: int, *seeds: int) -> list[int]:
    return np.random.default_rng(seeds).permutation(n).tolist()


def seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Crops(torch.utils.data.Dataset):
    """Crops of images in two stacks, global (2, 3, H, W) and local (L, 3, H', W'), uint8, and masks (2, h * w) of the former.

    An item's key is (batch, place). In the place of an image that cannot be read comes the next one; failed has the reasons.
    Official Implementation: dinov2/data/augmentations.py and collate.py.
    """

    def __init__(self, paths: Sequence[Path], recipe: Recipe, batch_size: int, grid: tuple[int, int]):
        from torchvision.transforms import v2

        def crop(size: int, scale: tuple, blur: float, solarize: float = 0.0) -> v2.Transform:
            transforms = {
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC): 1.0,
                v2.RandomHorizontalFlip(1.0): recipe.flip,
                v2.ColorJitter(0.4, 0.4, 0.2, 0.1): recipe.jitter,
                v2.RandomGrayscale(1.0): recipe.grey,
                v2.GaussianBlur(9, (0.1, 2.0)): blur,
                v2.RandomSolarize(128, 1.0): solarize,
            }
            return v2.Compose([*(v2.RandomApply([x], p) for x, p in transforms.items() if p > 0), v2.PILToTensor()])

        self.paths, self.recipe, self.batch_size, self.grid = paths, recipe, batch_size, grid
        first, second, local = recipe.blur
        size, scale = recipe.global_size, recipe.global_scale
        self.crops = [[crop(size, scale, first), crop(size, scale, second, recipe.solarize)]]
        if recipe.local_crops:
            self.crops.append([crop(recipe.local_size, recipe.local_scale, local)] * recipe.local_crops)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, dict[Path, str]]:
        (batch, place), n, failed = key, len(self.paths), {}
        epoch, start = divmod(batch * self.batch_size + place, n)
        for i in range(start, start + n):
            path = self.paths[permutation(n, self.recipe.seed, 0, epoch)[i % n]]
            try:
                image = dinoreg.to_rgb(dinoreg.open_image(path))
                break
            except Exception as error:  # PIL's decoders raise many types for broken files
                failed[path] = str(error).partition("\n")[0] or repr(error)
        else:
            return [], torch.empty(0), failed
        torch.default_generator.manual_seed(seed(self.recipe.seed, 1, batch, place))
        crops = [torch.stack([crop(image) for crop in stack]) for stack in self.crops]
        masks = torch.stack([self.mask(batch, place), self.mask(batch, place + self.batch_size)])
        return crops, masks.flatten(1), failed

    def mask(self, batch: int, i: int) -> Tensor:
        """The mask of global crop i of a batch. Over the batch, the shares of masked patches are spread evenly."""
        (h, w), recipe, n = self.grid, self.recipe, 2 * self.batch_size
        masked, rank = int(n * recipe.mask_probability), permutation(n, recipe.seed, 2, batch)[i]
        low, high = np.linspace(*recipe.mask_ratio, masked + 1)[rank : rank + 2] if rank < masked else (0, 0)
        return random_mask(h, w, int(h * w * (low + (high - low) * torch.rand(()).item())))


def collate(items: list) -> tuple[list[Tensor], Tensor, dict[Path, str]]:
    """Crops of a batch, crop by crop: (2 B, 3, H, W) and (L B, 3, H', W'); masks (2 B, h * w); the images that failed."""
    crops, masks, failed = zip(*items)
    *crops, masks = [torch.stack(parts, dim=1).flatten(0, 1) for parts in (*zip(*crops), masks)]
    return crops, masks, {path: reason for part in failed for path, reason in part.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A step of training


class Network(nn.Module):
    """A backbone and its heads; the parts of the official SSLMetaArch.student and SSLMetaArch.teacher, by their names."""

    def __init__(self, backbone: dinoreg.DinoVisionTransformer, recipe: Recipe):
        super().__init__()
        D, hidden_dim, nlayers = backbone.embed_dim, recipe.hidden_dim, recipe.nlayers
        self.backbone = backbone
        self.dino_head = DINOHead(D, recipe.prototypes, hidden_dim, recipe.bottleneck_dim, nlayers)
        if recipe.ibot_prototypes:
            self.ibot_head = DINOHead(D, recipe.ibot_prototypes, hidden_dim, recipe.ibot_bottleneck_dim, nlayers)

    def forward(self, crops: list[Tensor], masks: Tensor, hide: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """CLS tokens (B, D) of each stack of crops and their logits (B, K); logits (M, K) of the first's patches in masks.

        Of these patches the backbone sees the mask token if hide.
        """
        with torch.autocast(masks.device.type, torch.bfloat16, enabled=masks.is_cuda):
            features = self.backbone(crops, [masks if hide else None, None][: len(crops)], is_training=True)  # one pass
            cls = [part["x_norm_clstoken"] for part in features]
            logits = self.dino_head(torch.cat(cls)).split([len(part) for part in cls])
            patches = features[0]["x_norm_patchtokens"][masks]
            return cls, list(logits), getattr(self, "ibot_head", self.dino_head)(patches)


def compute_losses(
    student, teacher, crops, masks, recipe: Recipe, temperature, centers=None, distil=False
) -> dict[str, Tensor]:
    """The terms of the loss for crops (2 B, C, H, W) and (L B, C, H', W') and masks (2 B, h * w), and their weighted sum, loss.

    entropy is the mean of that of the teacher's assignments, and information the entropy of their mean less it: 0 if all
    images are assigned alike, after a collapse, and ln K at most. Official Implementation: SSLMetaArch.forward_backward.
    In a distillation no patch is hidden, and the loss of patches is that of all (section 5 of the paper).
    """
    masks = torch.ones_like(masks) if distil else masks
    with torch.no_grad():
        _, (cls_logits,), patch_logits = teacher(crops[:1], masks, hide=False)
        if recipe.centering == "centering":
            targets = softmax_center(cls_logits, temperature, centers["dino"], recipe.center_momentum)
            patch_targets = softmax_center(patch_logits, temperature, centers["ibot"], recipe.center_momentum)
        else:
            targets, patch_targets = sinkhorn_knopp(cls_logits, temperature), sinkhorn_knopp(patch_logits, temperature)
        targets = targets.unflatten(0, (2, -1))  # (2, B, K)
    (cls, *_), (global_logits, *local_logits), patch_logits = student(crops, masks, hide=not distil)

    # Each global crop of the student is compared with the other one of the teacher, each local crop with both.
    pairs = 2 + max(2 * recipe.local_crops, 1)
    temp, swapped = recipe.student_temp, targets.flip(0).flatten(0, 1)[None]
    terms = {"dino_global": 2 * dino_loss(global_logits[None], swapped, temp) / pairs}
    for logits in local_logits:
        terms["dino_local"] = dino_loss(logits.unflatten(0, (recipe.local_crops, -1)), targets, temp) / pairs
    terms["ibot"] = ibot_loss(patch_logits, patch_targets, masks, temp)
    terms["koleo"] = sum(koleo_loss(all_gather(part)) for part in cls.chunk(2))  # not between crops of the same image
    weights = dict(ibot=recipe.ibot_weight, koleo=recipe.koleo_weight)
    loss = sum(weights.get(name, recipe.dino_weight) * term for name, term in terms.items())

    mean = all_reduce(targets.mean(dim=(0, 1))) / (dist.get_world_size() if dist.is_initialized() else 1)
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return dict(loss=loss, **terms, entropy=entropy, information=torch.special.entr(mean).sum() - entropy)


def train_step(
    student, teacher, ema, optimizer, parts, recipe: Recipe, now, centers=None, distil=False
) -> dict[str, Tensor]:
    """One step on the parts of a batch, each (crops, masks), with the values `now` of the schedules. The terms of the loss."""
    network = getattr(student, "module", student)  # within DistributedDataParallel
    for group in optimizer.param_groups:
        lr = now["last_layer_lr"] if group["is_last_layer"] else now["backbone_lr"] if group["is_backbone"] else now["lr"]
        group["lr"], group["weight_decay"] = lr * group["lr_multiplier"], now["weight_decay"] * group["wd_multiplier"]

    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, (crops, masks) in enumerate(parts):
        with student.no_sync() if network is not student and i < len(parts) - 1 else contextlib.nullcontext():
            terms = compute_losses(student, teacher, crops, masks, recipe, now["teacher_temp"], centers, distil)
            (terms["loss"] / len(parts)).backward()
        sums = {name: sums.get(name, 0) + term.detach() / len(parts) for name, term in terms.items()}
    norms = [nn.utils.clip_grad_norm_(part.parameters(), recipe.clip_grad) for part in network.children()]
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), network.parameters()):
            average.lerp_(parameter, 1 - now["momentum"])
    return dict(**sums, gradient=torch.stack(norms).norm())


def parameter_groups(network: Network, recipe: Recipe) -> list[dict]:
    """Groups for AdamW, with factors of the learning rate and the weight decay. Official: dinov2/utils/param_groups.py."""
    groups, last = {}, len(network.backbone.blocks) + 1
    for name, parameter in network.named_parameters():
        part, _, name = name.partition(".")
        layer = last if part != "backbone" or name.startswith("norm") else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        lr_multiplier = recipe.layerwise_decay ** (last - layer)
        lr_multiplier *= recipe.patch_embed_lr_mult if name.startswith("patch_embed") else 1.0
        no_decay = name.endswith(".bias") or "norm" in name or "gamma" in name
        key = dict(lr_multiplier=lr_multiplier, wd_multiplier=0.0 if no_decay else 1.0)
        key.update(is_backbone=part == "backbone", is_last_layer="last_layer" in name)
        groups.setdefault(tuple(key.values()), dict(params=[], **key))["params"].append(parameter)
    return list(groups.values())


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """A value that rises from start to base, then falls to final along a cosine. Official: CosineScheduler."""
    if step < min(warmup, total):
        return start + (base - start) * step / max(warmup - 1, 1)
    return (
        final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2 if step < total else final
    )


def schedule(recipe: Recipe, step: int, epoch_length: int, freeze_epochs: float = 0.0) -> dict[str, float]:
    """The values that change from step to step. Official Implementation: dinov2/train/train.py, build_schedulers."""
    total, warmup, temp_warmup = (
        int(epochs * epoch_length) for epochs in (recipe.epochs, recipe.warmup_epochs, recipe.warmup_teacher_temp_epochs)
    )
    lr = cosine(step, recipe.base_lr * math.sqrt(recipe.batch_size / 1024), recipe.min_lr, total, warmup)
    temp, temp_start = recipe.teacher_temp, recipe.warmup_teacher_temp
    return dict(
        lr=lr,
        last_layer_lr=lr if step >= int(recipe.freeze_last_layer_epochs * epoch_length) else 0.0,
        backbone_lr=lr if step >= int(freeze_epochs * epoch_length) else 0.0,
        weight_decay=cosine(step, recipe.weight_decay, recipe.weight_decay_end, total),
        momentum=cosine(step, recipe.momentum_teacher, recipe.final_momentum_teacher, total),
        teacher_temp=cosine(step, temp, temp, temp_warmup, temp_warmup, temp_start),
    )


# ---------------------------------------------------------------------------------------------------------------------
# A run


@torch.no_grad()
def knn_accuracy(
    function, transform: dinoreg.Transform, train: Sequence[Path], queries: Sequence[Path], device: str
) -> float:
    """The share of queries whose class, the name of their folder, is the vote of the 20 images of the nearest features.

    function maps images (B, 3, H, W) to features (B, D). Images that cannot be read are left out.
    """

    def features(paths: Sequence[Path]) -> tuple[Tensor, list[str]]:
        rows, names = [], []
        for start in range(0, len(paths), 256):
            images = []
            for path in paths[start : start + 256]:
                with contextlib.suppress(OSError, ValueError):
                    images.append(dinoreg.preprocess(path, transform=transform))
                    names.append(path.parent.name)
            rows += [function(torch.stack(images).to(device)).float().cpu()] if images else []
        return torch.cat(rows), names

    (x, names), (y, truth) = features(train), features(queries)
    classes = sorted(set(names))
    labels = F.one_hot(torch.tensor([classes.index(name) for name in names])).float()
    votes = common.vote(x, labels, y, k=20).argmax(dim=1).tolist()
    return float(np.mean([classes[vote] == name for vote, name in zip(votes, truth)]))


def write_log(history: list[dict], folder: Path) -> None:
    """log.csv and curves.png in a folder, and the last row as a line, with a warning after a collapse."""
    from matplotlib.figure import Figure

    with dinoreg.atomic(folder / "log.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, history[-1].keys())
        writer.writeheader()
        writer.writerows(history)
    panels = (
        ("loss", "dino_global", "dino_local", "ibot"),
        ("koleo",),
        ("entropy", "information"),
        ("gradient",),
        ("lr",),
        ("knn",),
    )
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, names in zip(figure.subplots(2, 3).flat, panels):
        for name in names:
            axes.plot([row["epoch"] for row in history], [row.get(name) or math.nan for row in history], label=name)
        axes.legend()
    with dinoreg.atomic(folder / "curves.png") as part:
        figure.savefig(part)
    row = history[-1]
    names = ("loss", "dino_global", "dino_local", "ibot", "koleo", "entropy", "information", "gradient", "lr", "knn")
    print(f"epoch {row['epoch']:g}:", ", ".join(f"{name} {row[name]:.4g}" for name in names if name in row), end=", ")
    print(f"{row['images_per_s']:.0f} images/s, {row['memory_gb']:.1f} GB", flush=True)
    if row["last_layer_lr"] and row["information"] < 0.01 * row["entropy"]:
        print("pretrain: collapsed? The teacher assigns all images alike", file=sys.stderr, flush=True)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the readers too; they go on until the run is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(
    student: Network, teacher: Network | None, paths, recipe: Recipe, folder: Path, args, freeze_epochs=0.0
) -> Network:
    """Train a student, and return the moving average of it, which is its teacher unless another, frozen one is given.

    The files of the run are in folder; args.failed collects the images that cannot be read. The backbone does not change
    during the first freeze_epochs.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, transform = torch.device(args.device), student.backbone.transform
    epoch_length = recipe.epoch_length or len(paths) // recipe.batch_size
    steps, every = int(recipe.epochs * epoch_length), args.every or epoch_length

    distil = teacher is not None
    student = student.to(device).train()
    student.backbone.grad_checkpointing = args.checkpointing
    student.backbone.mask_token.requires_grad_(not distil)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    teacher = teacher.to(device).eval().requires_grad_(False) if distil else ema
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe), betas=recipe.betas)
    widths = dict(dino=recipe.prototypes, ibot=recipe.ibot_prototypes or recipe.prototypes)
    centers = {name: torch.zeros(1, width, device=device) for name, width in widths.items()}
    start, history, rows = 0, [], []
    settings = dict(recipe=str(recipe), config=str(student.backbone.config), images=len(paths), distil=distil)

    # Resume
    if (folder / "checkpoint.pth").exists():
        state = torch.load(folder / "checkpoint.pth", map_location=device, weights_only=True)
        if changed := [name for name, value in settings.items() if state["settings"][name] != value]:
            raise ValueError(f"{folder}: a run with another {' and '.join(changed)}; give a new folder")
        for name, part in dict(student=student, ema=ema, optimizer=optimizer).items():
            part.load_state_dict(state[name])
        centers, start, history, rows = state["centers"], state["step"], state["history"], state["rows"]

    def save(step: int) -> None:
        state = dict(student=student.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), centers=centers)
        with dinoreg.atomic(folder / "checkpoint.pth") as part:
            torch.save(dict(**state, step=step, history=history, rows=rows, settings=settings), part)
        dinoreg.save(ema.backbone, folder / "teacher.safetensors")

    # Data
    part_size, grid = recipe.batch_size // recipe.accumulate, recipe.global_size // student.backbone.patch_size
    places = range(rank * part_size // world, (rank + 1) * part_size // world)
    keys = ([(batch, i) for i in places] for batch in range(start * recipe.accumulate, steps * recipe.accumulate))
    crops = Crops(paths, recipe, part_size, (grid, grid))
    options = dict(num_workers=args.workers, collate_fn=collate, worker_init_fn=ignore_interrupts)
    loader = torch.utils.data.DataLoader(crops, batch_sampler=keys, pin_memory=device.type == "cuda", **options)

    def read_part(batch) -> tuple[list[Tensor], Tensor]:
        images, masks, failed = batch
        for path in failed.keys() - args.failed:
            print(f"pretrain: {path}: {failed[path]}", file=sys.stderr, flush=True)
        args.failed.update(failed)
        if not images:
            raise ValueError("none of the images can be read")
        return [dinoreg.normalize(x.to(device, non_blocking=True), transform) for x in images], masks.to(device)

    # k-NN
    sample = paths[:: math.ceil(len(paths) / 10000)]
    others, queries = [path for i, path in enumerate(sample) if i % 10], sample[::10]
    others, queries = (sample, dinoreg.find_images([args.val])) if args.val else (others, queries)
    accuracy = functools.partial(knn_accuracy, transform=transform, train=others, queries=queries, device=device)
    has_classes = rank == 0 and len({path.parent for path in others}) > 1
    if has_classes and start == 0:
        print(f"k-NN on pixels {accuracy(nn.Flatten()):.4g}, before training {accuracy(ema.backbone.embed):.4g}", flush=True)

    if args.compile:
        student.backbone.compile()
        teacher.backbone.compile()
    parallel = DistributedDataParallel(student, [device] if device.type == "cuda" else None) if world > 1 else student
    stops: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: stops.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    batches, clock, timed = iter(loader), time.perf_counter(), 0
    for step in range(start, steps):
        now = schedule(recipe, step, epoch_length, freeze_epochs)
        parts = [read_part(next(batches)) for _ in range(recipe.accumulate)]
        random = torch.default_generator if device.type == "cpu" else torch
        random.manual_seed(seed(recipe.seed, 3, step, rank))  # of stochastic depth
        terms = train_step(parallel, teacher, ema, optimizer, parts, recipe, now, centers, distil)
        stop = torch.tensor(float(len(stops)), device=device)
        means = (all_reduce(torch.stack([*terms.values(), stop])) / world).tolist()
        rows.append(dict(zip(terms, means)))
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(f"the loss is not finite in step {step}; a lower --base-lr or --clip-grad may help")
        timed += 1
        if (step + 1) % every == 0 or step + 1 == steps:
            row = dict(epoch=(step + 1) / epoch_length, step=step + 1, **now)
            row.update({name: float(np.mean([one[name] for one in rows])) for name in rows[0]})
            row["images_per_s"] = timed * recipe.batch_size / (time.perf_counter() - clock)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row["memory_gb"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 1e9
            if has_classes:
                row["knn"] = accuracy(ema.backbone.embed)
            history, rows = [*history, row], []
            if rank == 0:
                save(step + 1)
                write_log(history, folder)
            clock, timed = time.perf_counter(), 0
        if means[-1]:
            if rank == 0:
                save(step + 1)
            raise KeyboardInterrupt
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return ema


def run(args: argparse.Namespace) -> int:
    def given(names) -> dict:
        values = {name: value for name, value in vars(args).items() if name in names and value is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    config, recipe = PRESETS[args.preset]
    recipe = replace(recipe, **given({field.name for field in fields(Recipe)}))
    config = replace(dinoreg.CONFIGS.get(args.config, config), **given(ARCHITECTURE), image_size=recipe.global_size)
    rates = dict(drop_path_rate=0.0 if args.teacher else recipe.drop_path_rate, drop_path_uniform=True)
    paths = dinoreg.find_images([args.folder])
    if paths == [args.folder]:
        raise ValueError(f"{args.folder}: no folder with images")
    if "RANK" in os.environ:  # torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    share = recipe.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
    if recipe.batch_size > len(paths) or recipe.batch_size % share:
        limits = f"at most {len(paths)}, the number of images, and a multiple of {share}"
        raise ValueError(f"--batch-size must be {limits}, got {recipe.batch_size}")

    torch.manual_seed(recipe.seed)
    if args.model:
        trained = common.load_backbone(args.model)
        backbone = dinoreg.DinoVisionTransformer(replace(trained.config, **rates))
        backbone.load_state_dict(trained.state_dict())
        backbone.transform = trained.transform
    else:
        backbone = dinoreg.DinoVisionTransformer(replace(config, layerscale_init=recipe.layerscale_init, **rates))
    backbone.transform = backbone.transform.at_size(recipe.global_size)
    for name in ("global_size", "local_size"):
        if (side := getattr(recipe, name)) % backbone.patch_size:
            raise ValueError(
                f"--{name.replace('_', '-')} must be a multiple of {backbone.patch_size}, the patch size, got {side}"
            )

    args.output.mkdir(parents=True, exist_ok=True)
    args.failed = set()
    teacher = None
    if args.teacher:  # its heads are not published: they are trained first
        teacher = Network(common.load_backbone(args.teacher), recipe)
        teacher.backbone.transform = backbone.transform
        if teacher.backbone.patch_size != backbone.patch_size:
            raise ValueError(
                f"--teacher and student must have the same patch size, not {teacher.backbone.patch_size} and ..."
            )
        heads, folder = (
            replace(recipe, epochs=args.freeze_epochs, warmup_epochs=args.freeze_epochs / 10),
            args.output / "heads",
        )
        folder.mkdir(exist_ok=True)
        teacher = train(teacher, None, paths, heads, folder, args, args.freeze_epochs)
    train(Network(backbone, recipe), teacher, paths, recipe, args.output, args, args.freeze_epochs if args.model else 0.0)
    return 1 if args.failed else 0


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="images, in sub-folders or not")
    add("-o", "--output", type=Path, required=True, metavar="RUN", help="folder of the results, or of a run to continue")
    add("--preset", choices=PRESETS, default="gpu", help="default: %(default)s")
    add("--config", choices=dinoreg.CONFIGS, help="architecture of a new model (default: that of the preset)")
    add("--model", help="an official model or a file to continue from")
    add("--teacher", help="an official model or a file to distil from; it does not change")
    add("--freeze-epochs", type=float, default=1.0, help="of --model and --teacher: only heads are trained (default: 1)")
    add("--val", type=Path, metavar="FOLDER", help="images for the k-NN accuracy (default: a tenth of those of training)")
    add("--every", type=int, metavar="STEPS", help="between checkpoints and lines of the log (default: an epoch)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes that read images (default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="compile the backbones")
    common.add_device(parser)
    constants = parser.add_argument_group("constants of the recipe (default: the preset's; here the official ones)")
    for field in fields(Recipe):
        option, value = f"--{field.name.replace('_', '-')}", field.default
        kind = dict(type=float, nargs=len(value)) if isinstance(value, tuple) else dict(type=type(value))
        constants.add_argument(option, **kind, metavar="X", help=str(value))
    for name in ARCHITECTURE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(dinoreg.Config(), name)))
    return common.run(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
