"""The parts of DINOv2's training, for your own training loops.

They are the head, assignments, losses, masks, parameter groups and the schedule. Each but
init_unit_variance computes what its official counterpart in facebookresearch/dinov2 does, and
several processes compute what one would. Features (B, D) of images are assigned to K prototypes; M
patches of a batch are masked.
"""

import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """MLP, then cosines with K prototypes, times a learned length of each: (..., in_dim) ->
    (..., out_dim = K). The last layer has the parameters of the official nn.utils.weight_norm.
    Official: dinov2/layers/dino_head.py."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        layers = [layer for linear in linears for layer in (linear, nn.GELU())][:-1]
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else linears[0]
        prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False).weight
        self.last_layer = nn.ParameterDict(
            dict(weight_g=torch.ones(out_dim, 1), weight_v=prototypes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        length, direction = self.last_layer["weight_g"], self.last_layer["weight_v"]
        return F.linear(x, direction * (length / direction.norm(dim=1, keepdim=True)))


def all_reduce(x: Tensor) -> Tensor:
    """Sum x over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes: (B, D) -> (processes * B, D), for a loss whose gradients are
    averaged over processes.
    """
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * len(parts))
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def log_sum_exp(x: Tensor) -> Tensor:
    """The logarithm of the sum of exp(x) over the rows of all processes: (B, K) -> (K,)."""
    total = x.logsumexp(dim=0)
    if not dist.is_initialized():
        return total
    largest = total.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest + all_reduce((total - largest).exp()).log()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments (B, K), float32, from logits (B, K): those of a sample sum to 1, and all
    prototypes get the same in total, over all processes.
    Official: DINOLoss.sinkhorn_knopp_teacher, which divides where this subtracts logarithms. At a
    temperature of 0.02, exp(logits / temperature) exceeds float32 for logits of 1.8."""
    Q = logits.float() / temperature
    for _ in range(iterations):
        Q -= log_sum_exp(Q)  # 1 in total for each prototype; the next line makes it B / K
        Q -= Q.logsumexp(dim=1, keepdim=True)  # 1 for each sample
    return Q.exp()


@torch.no_grad()
def softmax_center(
    logits: Tensor, temperature: float, center: Tensor, momentum: float = 0.9
) -> Tensor:
    """Softmax of logits (B, K) minus the center (1, K), float32. The center then moves toward their
    mean, in place.
    Official: DINOLoss.softmax_center_teacher and update_center."""
    logits = logits.float()
    probs = ((logits - center) / temperature).softmax(dim=-1)
    total, count = (
        all_reduce(logits.sum(dim=0)),
        all_reduce(torch.tensor(float(len(logits)), device=logits.device)),
    )
    if count > 0:
        center.lerp_((total / count)[None], 1 - momentum)
    return probs


def cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Of each row: (..., K), (..., K) -> (...), float32."""
    log_probs = (student_logits.float() / student_temp).log_softmax(dim=-1)
    return -(teacher_probs * log_probs).sum(dim=-1)


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Cross-entropy of student crops (S, B, K) with teacher crops (T, B, K): summed over S * T
    pairs, averaged over B.
    Official: DINOLoss.forward."""
    return cross_entropy(student_logits, teacher_probs.sum(dim=0), student_temp).mean(dim=1).sum()


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, masks: Tensor, student_temp: float = 0.1
) -> Tensor:
    """Cross-entropy of masked patches (M, K), those where masks (B, h * w) is True: averaged over
    each image's, then over B.
    Official: iBOTPatchLoss.forward_masked."""
    weights = (1 / masks.sum(dim=1).clamp(min=1))[:, None].expand_as(masks)[masks]
    return (cross_entropy(student_logits, teacher_probs, student_temp) * weights).sum() / len(masks)


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance of features (B, D) to their nearest neighbors on the unit
    sphere, over all processes.
    Official: KoLeoLoss."""
    with torch.autocast(x.device.type, enabled=False):
        x = all_gather(F.normalize(x.float(), dim=-1, eps=eps))
        nearest = (x.detach() @ x.detach().mT).fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()


def random_mask(h: int, w: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """A mask (h, w), bool, of at most `count` patches, in rectangles of random size, shape and
    place.
    Official: dinov2/data/masking.py, with the largest rectangle that dinov2/train/train.py gives
    it."""
    mask, tries = torch.zeros(h, w, dtype=torch.bool), 0
    while (room := min(count - int(mask.sum()), h // 2 * w)) > 0 and tries < 10:
        area, shape, y, x = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area, ratio = 4 + (room - 4) * area, 0.3 ** (1 - 2 * shape)  # 0.3 to 1 / 0.3
        height, width, tries = (
            round(math.sqrt(area * ratio)),
            round(math.sqrt(area / ratio)),
            tries + 1,
        )
        if height < h and width < w:
            top, left = int(y * (h - height + 1)), int(x * (w - width + 1))
            part = mask[top : top + height, left : left + width]
            if 0 < int((~part).sum()) <= room:
                part[:], tries = True, 0
    return mask


def parameter_groups(
    network: nn.Module, layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict]:
    """Groups of the parameters of network.backbone and its heads for AdamW, each with factors of
    the learning rate and the weight decay, and the name of its learning rate's schedule. Official:
    dinov2/utils/param_groups.py."""
    groups, last = {}, len(network.backbone.blocks) + 1
    for name, parameter in network.named_parameters():
        part, _, name = name.partition(".")
        layer = last if part != "backbone" or name.startswith("norm") else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        lr_multiplier = layerwise_decay ** (last - layer)
        lr_multiplier *= patch_embed_lr_mult if name.startswith("patch_embed") else 1.0
        wd_multiplier = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
        lr = "backbone_lr" if part == "backbone" else "lr"
        lr = "last_layer_lr" if "last_layer" in name else lr
        group = dict(lr_multiplier=lr_multiplier, wd_multiplier=wd_multiplier, schedule=lr)
        groups.setdefault(tuple(group.values()), dict(params=[], **group))["params"].append(
            parameter
        )
    return list(groups.values())


def init_unit_variance(backbone: nn.Module) -> None:
    """Random weights that keep a variance of 1 at any width, for tokens, positions and what the
    blocks' matrices return. The official ones have a standard deviation of 0.02 at any width, which
    makes a narrow model learn very slowly."""
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 3:  # CLS, registers, positions
            nn.init.normal_(parameter)
        elif parameter.ndim == 2 and name.startswith("blocks"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def cosine(
    step: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0
) -> float:
    """A value that rises from start to base, then falls to final along a cosine. Official:
    CosineScheduler.
    """
    if step >= total:
        return final
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    return final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def schedule(recipe, step: int, epoch_length: int) -> dict[str, float]:
    """The values that change from step to step, by the constants of pretrain.Recipe. Official:
    build_schedulers.

    While a trained backbone is frozen, its new heads learn at the full rate, prototypes too; the
    backbone warms up after that.
    """

    def steps(epochs: float) -> int:
        return int(epochs * epoch_length)

    total, frozen, warmup = map(steps, (recipe.epochs, recipe.freeze_epochs, recipe.warmup_epochs))
    peak, temp = recipe.base_lr * math.sqrt(recipe.batch_size / 1024), recipe.teacher_temp
    lr = cosine(step, peak, recipe.min_lr, total, 0 if frozen else warmup)
    backbone_peak = peak * recipe.backbone_lr_mult
    backbone_lr = cosine(step - frozen, backbone_peak, recipe.min_lr, total - frozen, warmup)
    last_layer_starts = 0 if frozen else steps(recipe.freeze_last_layer_epochs)
    temp_warmup = steps(recipe.warmup_teacher_temp_epochs)
    return dict(
        lr=lr,
        last_layer_lr=lr if step >= last_layer_starts else 0.0,
        backbone_lr=backbone_lr if step >= frozen else 0.0,
        weight_decay=cosine(step, recipe.weight_decay, recipe.weight_decay_end, total),
        momentum=cosine(step, recipe.momentum_teacher, recipe.final_momentum_teacher, total),
        teacher_temp=cosine(step, temp, temp, temp_warmup, temp_warmup, recipe.warmup_teacher_temp),
    )
