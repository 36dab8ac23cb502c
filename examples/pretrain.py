"""Train a DINOv2 with registers on a folder of images: from scratch, weights, or a larger model.

    pip install -e ".[examples]"
    python examples/pretrain.py FOLDER -o RUN                       # from scratch
    python examples/pretrain.py FOLDER -o RUN --model vits14_reg    # continue from weights
    python examples/pretrain.py FOLDER -o RUN --teacher vitl14_reg --config vits14_reg  # distil
    torchrun --nproc-per-node 8 examples/pretrain.py FOLDER -o RUN --preset official

RUN/teacher.safetensors is the trained model, for `dinoreg.load` and the other examples; curves are
in log.csv, curves.png. The same command continues a run that was interrupted or killed, on the same
curve: crops, masks and order depend on the seed and the step alone. Sub-folders of FOLDER, if any,
are classes for the k-NN accuracy, and used for nothing else.

The method is that of section 4 of the paper (https://arxiv.org/abs/2304.07193), computed as in the
official code: dinov2/train, dinov2/loss, dinov2/layers/dino_head.py, dinov2/data,
dinov2/utils/param_groups.py. One thing differs: several processes compute what one would, so KoLeo
sees the images of all of them. Shapes are in the letters of dinoreg.py, and L: local crops of an
image, K: prototypes, M: masked patches of a batch.
"""

import argparse
import copy
import functools
import itertools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

import common
import dinoreg
from evaluate import knn_accuracy
from training_parts import (
    DINOHead,
    all_reduce,
    dino_loss,
    ibot_loss,
    init_unit_variance,
    koleo_loss,
    parameter_groups,
    random_mask,
    schedule,
    sinkhorn_knopp,
    softmax_center,
)


@dataclass(frozen=True)
class Recipe:
    """All constants. The defaults are the official ones of ViT-L/14 (configs/train/vitl14.yaml);
    the number in a comment is that of the official run on ImageNet-1k (ssl_default_config.yaml),
    where it differs."""

    # Crops: pixels, shares of the image's area, probabilities
    global_size: int = 224
    global_scale: tuple = (0.32, 1.0)
    local_crops: int = 8
    local_size: int = 98  # 96
    local_scale: tuple = (0.05, 0.32)
    flip: float = 0.5
    # Degrees: crops are rotated and sheared by up to this; for images without a top and a bottom.
    rotate: float = 0.0
    jitter: float = 0.8  # by up to 0.4, 0.4, 0.2, 0.1 in brightness, contrast, saturation, hue
    grey: float = 0.2
    # Of both global crops and the local ones; official files say 1, 0.1, 0.5, but invert it.
    blur: tuple = (0.0, 0.9, 0.5)
    solarize: float = 0.2  # the second global crop only
    mask_probability: float = 0.5  # share of the global crops that have masked patches
    mask_ratio: tuple = (0.1, 0.5)  # share of their patches
    # Heads
    prototypes: int = 131072  # K; 65536
    bottleneck_dim: int = 384  # 256
    ibot_prototypes: int = 131072  # 0: iBOT shares the head of DINO
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
    # Optimiser
    batch_size: int = 3072  # images of all processes: 96 GPUs with 32; 32 with 64
    accumulate: int = 1  # parts in which a batch is computed; Sinkhorn-Knopp and KoLeo see one part
    epochs: float = 500.0  # 100
    epoch_length: int = 1250  # steps; 0: as many as the folder has batches
    warmup_epochs: float = 80.0  # 10
    freeze_last_layer_epochs: float = 1.0
    # Only heads are trained at first, as --model and --teacher come without heads.
    freeze_epochs: float = 1.0
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
    # "unit": larger weights, without which narrow models learn slowly (init_unit_variance).
    init: str = "official"
    seed: int = 0


ONE_GPU = Recipe(
    prototypes=16384,
    bottleneck_dim=256,
    ibot_prototypes=16384,
    batch_size=128,
    epochs=100.0,
    epoch_length=0,
)
ONE_GPU = replace(
    ONE_GPU, warmup_epochs=10.0, base_lr=2e-3, momentum_teacher=0.992, drop_path_rate=0.1
)
# Few steps: a sharp teacher that follows fast, branches that count from the start, no tenth of the
# run for warming up.
SHORT = dict(
    teacher_temp=0.02,
    warmup_teacher_temp=0.02,
    momentum_teacher=0.97,
    base_lr=6e-3,
    layerscale_init=1.0,
)
SHORT |= dict(
    warmup_epochs=2.0,
    patch_embed_lr_mult=1.0,
    weight_decay_end=0.1,
    koleo_weight=0.2,
    drop_path_rate=0.0,
)
HEADS = dict(
    prototypes=128, ibot_prototypes=128, hidden_dim=256, bottleneck_dim=64, ibot_bottleneck_dim=64
)
LAPTOP = replace(
    ONE_GPU,
    **SHORT,
    **HEADS,
    global_size=112,
    local_size=56,
    local_crops=4,
    batch_size=64,
    init="unit",
)
PRESETS = {  # the architecture of a new model, and the recipe; the last two are starting points
    "official": (dinoreg.CONFIGS["vitl14_reg"], Recipe()),
    "gpu": (dinoreg.CONFIGS["vits14_reg"], ONE_GPU),
    "laptop": (dinoreg.Config(embed_dim=192, depth=6, num_heads=3), LAPTOP),
}
CHOICES = dict(
    centering=("sinkhorn_knopp", "centering"),
    ffn=("mlp", "swiglu"),
    init=("official", "unit"),
)
ARCHITECTURE = ("embed_dim", "depth", "num_heads", "ffn", "patch_size", "num_register_tokens")


@functools.lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


class Crops(torch.utils.data.Dataset):
    """Crops of an image, global (2, 3, H, W) and local (L, 3, H', W'), uint8, and masks (2, h * w)
    of the global ones. An item's key is (batch, place). In the place of an image that cannot be
    read comes the next one; the item's last part has a line about each such. Official:
    dinov2/data/augmentations.py and collate.py."""

    def __init__(self, paths: list[Path], recipe: Recipe, batch_size: int, grid: int):
        from torchvision.transforms import v2

        def crop(size: int, scale: tuple, blur: float, solarize: float = 0.0) -> v2.Transform:
            bicubic = v2.InterpolationMode.BICUBIC
            transforms = (
                (
                    float(recipe.rotate > 0),
                    v2.RandomAffine(recipe.rotate, shear=recipe.rotate, interpolation=bicubic),
                ),
                (1.0, v2.RandomResizedCrop(size, scale, interpolation=bicubic)),
                (recipe.flip, v2.RandomHorizontalFlip(1.0)),
                (recipe.jitter, v2.ColorJitter(0.4, 0.4, 0.2, 0.1)),
                (recipe.grey, v2.RandomGrayscale(1.0)),
                (blur, v2.GaussianBlur(9, (0.1, 2.0))),
                (solarize, v2.RandomSolarize(128, 1.0)),
            )
            return v2.Compose(
                [*(v2.RandomApply([x], p) for p, x in transforms if p > 0), v2.PILToTensor()]
            )

        self.paths, self.recipe, self.batch_size, self.grid = paths, recipe, batch_size, grid
        first, second = (
            crop(recipe.global_size, recipe.global_scale, *p)
            for p in zip(recipe.blur, (0.0, recipe.solarize))
        )
        local = crop(recipe.local_size, recipe.local_scale, recipe.blur[2])
        self.crops = [stack for stack in ([first, second], [local] * recipe.local_crops) if stack]

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, str]:
        (batch, place), seed, image, failed = key, self.recipe.seed, Image.new("RGB", (1, 1)), ""
        epoch, start = divmod(batch * self.batch_size + place, len(self.paths))
        order = permutation(len(self.paths), seed, 0, epoch)
        for i in itertools.chain(order[start:], order[:start]):
            try:
                image = dinoreg.to_rgb(dinoreg.open_image(self.paths[i]))
                break
            except Exception as error:  # PIL's decoders raise many types for broken files
                failed += f"{self.paths[i]}: {dinoreg.reason(error)}\n"
        torch.default_generator.manual_seed(hash((seed, 1, batch, place)))
        crops = [torch.stack([crop(image) for crop in stack]) for stack in self.crops]
        return (
            crops,
            torch.stack([self.mask(batch, place), self.mask(batch, place + self.batch_size)]),
            failed,
        )

    def mask(self, batch: int, i: int) -> Tensor:
        """The mask of global crop i of a batch. Over the batch, the shares of masked patches are
        spread evenly.
        """
        n, count, recipe = 2 * self.batch_size, 0, self.recipe
        masked, rank = int(n * recipe.mask_probability), permutation(n, recipe.seed, 2, batch)[i]
        if rank < masked:
            low, high = np.linspace(*recipe.mask_ratio, masked + 1)[rank : rank + 2]
            count = int(self.grid**2 * (low + (high - low) * torch.rand(()).item()))
        return random_mask(self.grid, self.grid, count).flatten()


# A step of training -------------------------------------------------------------------------------


class Network(nn.Module):
    """A backbone and its heads: the parts of the official SSLMetaArch.student and
    SSLMetaArch.teacher, by their names.
    """

    def __init__(self, backbone: dinoreg.DinoVisionTransformer, recipe: Recipe):
        super().__init__()
        D, K, shape = (
            backbone.embed_dim,
            recipe.prototypes,
            dict(hidden_dim=recipe.hidden_dim, nlayers=recipe.nlayers),
        )
        self.backbone = backbone
        self.dino_head = DINOHead(D, K, bottleneck_dim=recipe.bottleneck_dim, **shape)
        if recipe.ibot_prototypes:
            self.ibot_head = DINOHead(
                D, recipe.ibot_prototypes, bottleneck_dim=recipe.ibot_bottleneck_dim, **shape
            )
        self.register_buffer("dino_center", torch.zeros(1, K))
        self.register_buffer("ibot_center", torch.zeros(1, recipe.ibot_prototypes or K))

    def forward(
        self, crops: list[Tensor], masks: Tensor, hide: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """CLS tokens (B, D) of each stack of crops, their logits (B, K), and logits (M, K) of the
        patches of the first stack where masks (B, h * w) is True, of which the backbone sees the
        mask token if hide."""
        with torch.autocast(masks.device.type, torch.bfloat16, enabled=masks.is_cuda):
            features = self.backbone(
                crops, [masks if hide else None, None][: len(crops)], is_training=True
            )
            cls = [part["x_norm_clstoken"] for part in features]
            logits = self.dino_head(torch.cat(cls)).split([len(part) for part in cls])
            patches = features[0]["x_norm_patchtokens"][masks]
            return cls, list(logits), getattr(self, "ibot_head", self.dino_head)(patches)


def compute_losses(
    student, teacher, crops, masks, recipe: Recipe, temperature: float, distil=False
) -> dict[str, Tensor]:
    """The terms of the loss for crops (2 B, C, H, W), (L B, C, H', W') and masks (2 B, h * w);
    `loss` is their weighted sum. `entropy` is that of the teacher's assignments, and `information`
    the entropy of their mean less it: 0 if all images are assigned alike, after a collapse, and
    ln K at most. In a distillation no patch is hidden, and the loss is that of all patches
    (section 5 of the paper). Official: SSLMetaArch.forward_backward."""
    masks = torch.ones_like(masks) if distil else masks
    with torch.no_grad():
        _, (cls_logits,), patch_logits = teacher(crops[:1], masks, hide=False)
        if recipe.centering == "centering":
            targets = softmax_center(cls_logits, temperature, teacher.dino_center)
            patch_targets = softmax_center(patch_logits, temperature, teacher.ibot_center)
        else:
            targets, patch_targets = (
                sinkhorn_knopp(cls_logits, temperature),
                sinkhorn_knopp(patch_logits, temperature),
            )
        targets = targets.unflatten(0, (2, -1))  # (2, B, K)
    (cls, *_), (global_logits, *local_logits), patch_logits = student(crops, masks, hide=not distil)

    # Each global crop of the student is compared with the other one of the teacher, each local crop
    # with both.
    pairs, temp, L = 2 + max(2 * recipe.local_crops, 1), recipe.student_temp, recipe.local_crops
    terms = {
        "dino_global": 2
        / pairs
        * dino_loss(global_logits[None], targets.flip(0).flatten(0, 1)[None], temp)
    }
    if L:
        terms["dino_local"] = (
            1 / pairs * dino_loss(local_logits[0].unflatten(0, (L, -1)), targets, temp)
        )
    terms["ibot"] = ibot_loss(patch_logits, patch_targets, masks, temp)
    terms["koleo"] = sum(map(koleo_loss, cls.chunk(2)))  # not between crops of the same image
    dino = terms["dino_global"] + terms.get("dino_local", 0)
    loss = (
        recipe.dino_weight * dino
        + recipe.ibot_weight * terms["ibot"]
        + recipe.koleo_weight * terms["koleo"]
    )
    mean = all_reduce(targets.sum(dim=(0, 1)))
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return dict(
        loss=loss,
        **terms,
        entropy=entropy,
        information=torch.special.entr(mean / mean.sum()).sum() - entropy,
    )


def train_step(
    student, teacher, ema, optimizer, parts, recipe: Recipe, now: dict, distil=False
) -> dict[str, Tensor]:
    """The terms of the loss in a step on the parts of a batch, each (crops, masks), with the values
    of `schedule`.
    """
    for group in optimizer.param_groups:
        group["lr"] = now[group["schedule"]] * group["lr_multiplier"]
        group["weight_decay"] = now["weight_decay"] * group["wd_multiplier"]
    optimizer.zero_grad(set_to_none=True)
    total: dict = {}
    for i, (crops, masks) in enumerate(parts, 1):
        student.require_backward_grad_sync = i == len(parts)  # of DistributedDataParallel
        terms = compute_losses(student, teacher, crops, masks, recipe, now["teacher_temp"], distil)
        (terms["loss"] / len(parts)).backward()
        total = {
            name: total.get(name, 0) + term.detach() / len(parts) for name, term in terms.items()
        }
    network = getattr(student, "module", student)
    norms = [
        nn.utils.clip_grad_norm_(part.parameters(), recipe.clip_grad) for part in network.children()
    ]
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), network.parameters()):
            average.lerp_(parameter, 1 - now["momentum"])
    return dict(**total, gradient=torch.stack(norms).norm())


# A run --------------------------------------------------------------------------------------------


def write_log(history: list[dict], folder: Path) -> None:
    """Write log.csv and curves.png, and print the last row."""
    from matplotlib.figure import Figure

    lines = [",".join(map(str, line)) for line in (history[0], *(row.values() for row in history))]
    with dinoreg.atomic(folder / "log.csv") as part:
        part.write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(16, 9), layout="constrained")
    for axes, name in zip(figure.subplots(4, 5).flat, [*history[0]][2:]):  # after epoch and step
        axes.plot([row["epoch"] for row in history], [row[name] for row in history])
        axes.set_title(name)
    with dinoreg.atomic(folder / "curves.png") as part:
        figure.savefig(part)
    print(", ".join(f"{name} {value:.4g}" for name, value in history[-1].items()), flush=True)


def train(
    student: Network, teacher: Network | None, paths, recipe: Recipe, folder: Path, args
) -> Network:
    """Train a student, and return its moving average, which is also its teacher unless another,
    frozen one is given. The files of the run are in folder."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, transform, distil = (
        torch.device(args.device),
        student.backbone.transform,
        teacher is not None,
    )
    epoch_length = recipe.epoch_length or len(paths) // recipe.batch_size
    steps, every = int(recipe.epochs * epoch_length), args.every or epoch_length
    student = student.to(device).train()
    student.backbone.grad_checkpointing = args.checkpointing
    student.backbone.mask_token.requires_grad_(not distil)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    teacher = teacher.to(device).eval().requires_grad_(False) if distil else ema
    groups = parameter_groups(student, recipe.layerwise_decay, recipe.patch_embed_lr_mult)
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
    saved = dict(student=student, ema=ema, teacher=teacher, optimizer=optimizer)
    start, history, rows = 0, [], []
    settings = f"{recipe} {student.backbone.config} {len(paths)} {args.model} {args.teacher}"
    if (folder / "checkpoint.pth").exists():
        state = torch.load(folder / "checkpoint.pth", map_location=device, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{folder}: a run with other constants, images or weights; give another folder"
            )
        for name, part in saved.items():
            part.load_state_dict(state[name])
        start, history, rows = state["step"], state["history"], state["rows"]

    sample = paths[:: math.ceil(len(paths) / 10000)]
    queries = dinoreg.find_images([args.val]) if args.val else sample[::10]
    others = sample if args.val else [path for i, path in enumerate(sample) if i % 10]
    accuracy = functools.partial(
        knn_accuracy, transform=transform, device=device, train=others, queries=queries
    )
    has_classes = rank == 0 and len({path.parent for path in sample}) > 1
    if has_classes and start == 0:
        print(
            (
                f"k-NN on pixels {accuracy(nn.Flatten()):.4g}, "
                f"before training {accuracy(ema.backbone):.4g}"
            ),
            flush=True,
        )

    part_size = recipe.batch_size // recipe.accumulate
    places = range(rank * part_size // world, (rank + 1) * part_size // world)
    keys = (
        [(part, i) for i in places]
        for part in range(start * recipe.accumulate, steps * recipe.accumulate)
    )
    crops = Crops(paths, recipe, part_size, recipe.global_size // student.backbone.patch_size)
    options = dict(num_workers=args.workers, pin_memory=device.type == "cuda")
    # The readers inherit this, and go on until the run is saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loader = iter(torch.utils.data.DataLoader(crops, batch_sampler=keys, **options))
    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stops.append(number))

    def read_part() -> tuple[list[Tensor], Tensor]:
        """Normalised crops (2 B, 3, H, W) and (L B, 3, H', W'), crop by crop, and masks
        (2 B, h * w).
        """
        crops, masks, failed = next(loader)
        for line in set("".join(failed).splitlines()) - args.failed:
            print(f"pretrain: {line}", file=sys.stderr, flush=True)
            args.failed.add(line)
        if len(args.failed) == len(paths):
            raise ValueError("none of the images can be read")
        *crops, masks = (
            x.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1) for x in (*crops, masks)
        )
        return [dinoreg.normalize(x, transform) for x in crops], masks

    for network in (student, teacher) if args.compile else ():
        network.backbone.compile()
    parallel = nn.parallel.DistributedDataParallel(student) if world > 1 else student
    for step in range(start + 1, steps + 1):
        began, now = time.perf_counter(), schedule(recipe, step - 1, epoch_length)
        parts, waited = [read_part() for _ in range(recipe.accumulate)], time.perf_counter() - began
        torch.manual_seed(hash((recipe.seed, 3, step, rank)))  # of stochastic depth
        terms = train_step(parallel, teacher, ema, optimizer, parts, recipe, now, distil)
        # All processes stop after the same step.
        stop = torch.tensor(float(len(stops)), device=device)
        *values, stop = (all_reduce(torch.stack([*terms.values(), stop])) / world).tolist()
        rows.append(dict(zip(terms, values), waited=waited, seconds=time.perf_counter() - began))
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(
                f"the loss is not finite in step {step}; a lower --base-lr or --clip-grad may help"
            )
        if log := step % every == 0 or step == steps:
            row = dict(epoch=step / epoch_length, step=step, **now)
            row |= {name: float(np.mean([one[name] for one in rows])) for name in rows[0]}
            row["images_per_s"] = recipe.batch_size / row["seconds"]
            row |= (
                dict(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
                if device.type == "cuda"
                else {}
            )
            row |= dict(knn=accuracy(ema.backbone)) if has_classes else {}
            history, rows = [*history, row], []
        if rank == 0 and (log or stop):
            state = {name: part.state_dict() for name, part in saved.items()}
            with dinoreg.atomic(folder / "checkpoint.pth") as part:
                torch.save(
                    dict(**state, step=step, history=history, rows=rows, settings=settings), part
                )
            dinoreg.save(ema.backbone, folder / "teacher.safetensors")
        if rank == 0 and log:
            write_log(history, folder)
            if row["information"] < 0.01 * row["entropy"] and row["epoch"] > recipe.warmup_epochs:
                print(
                    "pretrain: collapsed? The teacher assigns all images alike",
                    file=sys.stderr,
                    flush=True,
                )
        if stop:
            raise KeyboardInterrupt
    return ema


def run(args: argparse.Namespace) -> int:
    for name, value in vars(args).items():
        least = int(name in ("embed_dim", "depth", "patch_size"))
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if args.model and name in ARCHITECTURE:
            raise ValueError(
                f"--model has its own architecture: leave out --{name.replace('_', '-')}"
            )
    config, recipe = PRESETS[args.preset]
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
    }
    recipe = replace(recipe, **{name: given[name] for name in vars(recipe) if name in given})
    architecture = {name: given[name] for name in ARCHITECTURE if name in given} | dict(
        image_size=recipe.global_size
    )
    config = replace(
        dinoreg.CONFIGS.get(args.config, config),
        **architecture,
        layerscale_init=recipe.layerscale_init,
    )
    for folder in filter(None, (args.val, args.folder)):
        paths = dinoreg.find_images([folder])
        if paths == [folder]:
            raise ValueError(f"{folder}: no folder with images")
    if "RANK" in os.environ:  # torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    share = recipe.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
    if not 0 < recipe.batch_size <= len(paths) or not share or recipe.batch_size % share:
        raise ValueError(
            f"--batch-size must be at most {len(paths)} images, "
            f"a multiple of {share}, got {recipe.batch_size}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    args.failed = set()

    torch.manual_seed(recipe.seed)
    source = common.load_backbone(args.model) if args.model else None
    rates = dict(
        drop_path_rate=0.0 if args.teacher else recipe.drop_path_rate, drop_path_uniform=True
    )
    backbone = dinoreg.DinoVisionTransformer(replace(source.config if source else config, **rates))
    if recipe.init == "unit":
        init_unit_variance(backbone)
    if source:
        backbone.load_state_dict(source.state_dict())
    backbone.transform = (source or backbone).transform.at_size(recipe.global_size)
    teacher = None
    if args.teacher:
        frozen = common.load_backbone(args.teacher)
        frozen.transform = backbone.transform
        if frozen.patch_size != backbone.patch_size:
            raise ValueError(
                f"--teacher has patches of {frozen.patch_size} pixels, "
                f"the student of {backbone.patch_size}"
            )
        heads = replace(
            recipe, epochs=recipe.freeze_epochs, warmup_epochs=0.0, freeze_last_layer_epochs=0.0
        )
        (args.output / "heads").mkdir(exist_ok=True)
        teacher = train(Network(frozen, recipe), None, paths, heads, args.output / "heads", args)
    recipe = recipe if source else replace(recipe, freeze_epochs=0.0)
    train(Network(backbone, recipe), teacher, paths, recipe, args.output, args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if args.failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start, 130 if
    it was interrupted.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="images, in sub-folders or not")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="RUN",
        help="folder of the results, or of a run to continue",
    )
    add("--preset", choices=PRESETS, default="gpu", help="default: %(default)s")
    add(
        "--config",
        choices=dinoreg.CONFIGS,
        help="architecture of a new model (default: that of the preset)",
    )
    add("--model", help="an official model or a file to continue from")
    add("--teacher", help="an official model or a file to distil from; it does not change")
    add(
        "--val",
        type=Path,
        metavar="FOLDER",
        help="images for the k-NN accuracy (default: a tenth of those of training)",
    )
    add(
        "--every",
        type=int,
        metavar="STEPS",
        help="between checkpoints and lines of the log (default: an epoch)",
    )
    add(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="processes that read images (default: %(default)s)",
    )
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="compile the backbones")
    common.add_device(parser)
    constants = parser.add_argument_group(
        "constants (default: those of the preset; here the official ones)"
    )
    official = vars(Recipe()) | {
        name: getattr(PRESETS["official"][0], name) for name in ARCHITECTURE
    }
    for name, value in official.items():
        kind = (
            dict(type=float, nargs=len(value))
            if isinstance(value, tuple)
            else dict(type=type(value))
        )
        kind |= dict(choices=CHOICES[name]) if name in CHOICES else dict(metavar="X")
        constants.add_argument(
            f"--{name.replace('_', '-')}", **kind, default=argparse.SUPPRESS, help=str(value)
        )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
