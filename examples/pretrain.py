"""Train a DINOv2 with registers on a folder of images: from scratch, weights, or a larger model.

    pip install -e ".[examples]"
    python examples/pretrain.py FOLDER -o RUN                       # from scratch
    python examples/pretrain.py FOLDER -o RUN --model vits14_reg    # continue from weights
    python examples/pretrain.py FOLDER -o RUN --teacher vitl14_reg --config vits14_reg  # distill
    python examples/pretrain.py FOLDER -o RUN518 --model RUN --global-size 518  # the last stage
    torchrun --nproc-per-node 8 examples/pretrain.py FOLDER -o RUN --preset official --accumulate 12

RUN/teacher.safetensors is the trained model, for `dinoreg.load` and the other examples; curves are
in log.csv and curves.png. The same command continues a run that was interrupted or killed, on the
same curve: crops, masks and order depend on the seed and the step alone. --dry-run prints the
memory that a run needs. Subfolders of FOLDER, if any, are classes for the k-NN accuracy, and used
for nothing else.

The method is that of section 4 of the paper (https://arxiv.org/abs/2304.07193), computed as in the
official code: dinov2/train, dinov2/loss, dinov2/layers/dino_head.py, dinov2/data,
dinov2/utils/param_groups.py. One thing differs: several processes compute what one would, so KoLeo
sees the images of all of them. Shapes are in the letters of dinoreg.py, and L: local crops of an
image, K: prototypes, M: masked patches of a batch.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import common
import dinoreg
from features import fingerprint
from pretrain_images import Crops, Files, make_probe, read_batches, thumbnails
from pretrain_run import (
    HEADS,
    Run,
    collect_signals,
    describe_memory,
    get_processes,
    read_checkpoint,
    start_processes,
)
from training_parts import (
    DINOHead,
    all_reduce,
    dino_loss,
    ibot_loss,
    init_unit_variance,
    koleo_loss,
    schedule,
    sinkhorn_knopp,
    softmax_center,
)

# Constants ----------------------------------------------------------------------------------------


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
    gray: float = 0.2
    # Of both global crops and the local ones; official files say 1, 0.1, 0.5, but invert it
    # (dinov2/data/transforms.py, GaussianBlur: keep_p = 1 - p).
    blur: tuple = (0.0, 0.9, 0.5)
    solarize: float = 0.2  # the second global crop only
    mask_probability: float = 0.5  # share of the global crops that have masked patches
    mask_ratio: tuple = (0.1, 0.5)  # share of their patches
    # Of images of more than 8 bits, such as 4095 for 12 bits in 16; 0: the largest of the type.
    white_level: float = 0.0
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
    centering: str = "sinkhorn_knopp"  # "centering": softmax, minus a moving center
    # Optimizer
    batch_size: int = 3072  # images of all processes: 96 GPUs with 32; 32 with 64
    accumulate: int = 1  # parts in which a batch is computed; Sinkhorn-Knopp and KoLeo see one part
    epochs: float = 500.0  # 100
    epoch_length: int = 1250  # steps; 0: as many as the folder has batches
    warmup_epochs: float = 80.0  # 10
    freeze_last_layer_epochs: float = 1.0
    # New heads on a trained backbone learn alone at first, at the full rate; not in official files.
    freeze_epochs: float = 1.0
    base_lr: float = 2e-4  # times sqrt(batch_size / 1024); 4e-3
    backbone_lr_mult: float = 1.0
    min_lr: float = 1e-6
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2  # 0.4
    clip_grad: float = 3.0  # norm, of the backbone and of each head; 0: none
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


# The presets below list what differs from the official values above.
ONE_GPU = Recipe(  # a starting point for ViT-S/14
    prototypes=16384, bottleneck_dim=256, ibot_prototypes=16384,
    batch_size=128, epochs=100.0, epoch_length=0, warmup_epochs=10.0,
    base_lr=2e-3, momentum_teacher=0.992, drop_path_rate=0.1,
)  # fmt: skip

LAPTOP = Recipe(  # a starting point for small models and images
    global_size=112, local_size=56, local_crops=4,
    prototypes=128, bottleneck_dim=64, ibot_prototypes=128, ibot_bottleneck_dim=64, hidden_dim=256,
    batch_size=64, epochs=100.0, epoch_length=0, init="unit",
    # Few steps: a sharp teacher that follows fast, branches that count from the start, no tenth of
    # the run for warming up.
    teacher_temp=0.02, warmup_teacher_temp=0.02, momentum_teacher=0.97,
    base_lr=6e-3, warmup_epochs=2.0, patch_embed_lr_mult=1.0, weight_decay_end=0.1,
    koleo_weight=0.2, drop_path_rate=0.0, layerscale_init=1.0,
)  # fmt: skip

CONTINUE = Recipe(  # from weights, on images of one's own: see pretrain.md
    prototypes=16384, bottleneck_dim=256, ibot_prototypes=16384, batch_size=128, drop_path_rate=0.1,
    # 10,000 steps, for a folder of any size: so many at high resolution end the official training
    # (section 6 of the paper). An epoch is 500 steps here.
    epochs=20.0, epoch_length=500, warmup_teacher_temp_epochs=6.0,
    # The heads start from nothing: alone, and at the rate of `gpu`.
    freeze_epochs=1.0, base_lr=2e-3,
    # The backbone does not: up to 7e-5, less in earlier blocks (0.9: ssl_default_config.yaml). At
    # 1.1e-4, 20 steps took the CLS token of a ViT-S/14 to a cosine of 0.88 with the old one.
    backbone_lr_mult=0.1, layerwise_decay=0.9, warmup_epochs=1.0,
    # Small batches need a slow teacher (main_dino.py of DINO: 0.9995 for 256 images).
    momentum_teacher=0.998,
)  # fmt: skip

VITL14_SWIGLU = replace(dinoreg.CONFIGS["vitl14_reg"], ffn="swiglu")  # as vitl14.yaml says
PRESETS = {  # the architecture of a new model, and the recipe
    "official": (VITL14_SWIGLU, Recipe()),
    "gpu": (dinoreg.CONFIGS["vits14_reg"], ONE_GPU),
    "laptop": (dinoreg.Config(embed_dim=192, depth=6, num_heads=3), LAPTOP),
    "continue": (dinoreg.CONFIGS["vits14_reg"], CONTINUE),
}
CHOICES = dict(
    centering=("sinkhorn_knopp", "centering"),
    ffn=("mlp", "swiglu"),
    init=("official", "unit"),
)
ARCHITECTURE = ("embed_dim", "depth", "num_heads", "ffn", "patch_size", "num_register_tokens")
ARCHITECTURE += ("in_chans",)
POSITIVE = ("embed_dim", "depth", "patch_size", "in_chans")

# A step of training -------------------------------------------------------------------------------


class Network(nn.Module):
    """A backbone and its heads: the parts of the official SSLMetaArch.student and
    SSLMetaArch.teacher, by their names.
    """

    is_fixed = False  # the backbone never learns, and is not saved

    def __init__(self, backbone: dinoreg.DinoVisionTransformer, recipe: Recipe):
        super().__init__()
        D, K, ibot_K = backbone.embed_dim, recipe.prototypes, recipe.ibot_prototypes
        shape = dict(hidden_dim=recipe.hidden_dim, nlayers=recipe.nlayers)
        self.backbone = backbone
        self.dino_head = DINOHead(D, K, bottleneck_dim=recipe.bottleneck_dim, **shape)
        if ibot_K:
            width = recipe.ibot_bottleneck_dim
            self.ibot_head = DINOHead(D, ibot_K, bottleneck_dim=width, **shape)
        self.register_buffer("dino_center", torch.zeros(1, K))
        self.register_buffer("ibot_center", torch.zeros(1, ibot_K or K))

    def forward(
        self, crops: list[Tensor], masks: Tensor, hide: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """CLS tokens (B, D) of each stack of crops, their logits (B, K), and logits (M, K) of the
        patches of the first stack that masks (B, h * w) selects. With hide, the backbone sees the
        mask token in their place."""
        with torch.autocast(masks.device.type, torch.bfloat16, enabled=masks.is_cuda):
            hidden = [masks if hide else None, None][: len(crops)]
            features = self.backbone(crops, hidden, is_training=True)
            cls = [part["x_norm_clstoken"] for part in features]
            logits = self.dino_head(torch.cat(cls)).split([len(part) for part in cls])
            patches = features[0]["x_norm_patchtokens"][masks]
            return cls, list(logits), getattr(self, "ibot_head", self.dino_head)(patches)


def compute_losses(
    student, teacher, crops, masks, recipe: Recipe, temperature: float, distill=False
) -> dict[str, Tensor]:
    """The terms of the loss for crops (2 B, C, H, W), (L B, C, H', W') and masks (2 B, h * w);
    `loss` is their weighted sum. `entropy` is that of the teacher's assignments, and `information`
    the entropy of their mean minus `entropy`: 0 if all images are assigned alike, after a collapse,
    and ln K at most. In a distillation no patch is hidden, and the loss is that of all patches
    (section 5 of the paper). Official: SSLMetaArch.forward_backward."""
    masks = torch.ones_like(masks) if distill else masks
    with torch.no_grad():
        _, (cls_logits,), patch_logits = teacher(crops[:1], masks, hide=False)
        if recipe.centering == "centering":
            targets = softmax_center(cls_logits, temperature, teacher.dino_center)
            patch_targets = softmax_center(patch_logits, temperature, teacher.ibot_center)
        else:
            targets = sinkhorn_knopp(cls_logits, temperature)
            patch_targets = sinkhorn_knopp(patch_logits, temperature)
        targets = targets.unflatten(0, (2, -1))  # (2, B, K)
    cls, (global_logits, *local_logits), patch_logits = student(crops, masks, hide=not distill)

    # Each global crop of the student is compared with the other one of the teacher, each local crop
    # with both.
    temp, L = recipe.student_temp, recipe.local_crops
    pairs, others = 2 + max(2 * L, 1), targets.flip(0).flatten(0, 1)
    terms = {"dino_global": 2 / pairs * dino_loss(global_logits[None], others[None], temp)}
    if L:
        logits = local_logits[0].unflatten(0, (L, -1))
        terms["dino_local"] = 1 / pairs * dino_loss(logits, targets, temp)
    terms["ibot"] = ibot_loss(patch_logits, patch_targets, masks, temp)
    terms["koleo"] = sum(map(koleo_loss, cls[0].chunk(2)))  # not between crops of the same image
    loss = recipe.dino_weight * (terms["dino_global"] + terms.get("dino_local", 0))
    loss = loss + recipe.ibot_weight * terms["ibot"] + recipe.koleo_weight * terms["koleo"]
    mean = all_reduce(targets.sum(dim=(0, 1)))
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    information = torch.special.entr(mean / mean.sum()).sum() - entropy
    return dict(loss=loss, **terms, entropy=entropy, information=information)


def train_step(
    student, teacher, ema, optimizer, parts, recipe: Recipe, now: dict, distill=False
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
        terms = compute_losses(student, teacher, crops, masks, recipe, now["teacher_temp"], distill)
        (terms["loss"] / len(parts)).backward()
        for name, term in terms.items():
            total[name] = total.get(name, 0) + term.detach() / len(parts)
    network = getattr(student, "module", student)
    clip, device = recipe.clip_grad or math.inf, terms["loss"].device
    norms = [nn.utils.clip_grad_norm_(part.parameters(), clip) for part in network.children()]
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), network.parameters()):
            average.lerp_(parameter, 1 - now["momentum"])
    norms = [norm.to(device) for norm in norms]  # that of a frozen part is on the CPU
    return dict(**total, gradient=torch.stack(norms).norm())


# A run --------------------------------------------------------------------------------------------


def prepare(run: Run, args) -> nn.Module:
    """The student for the next step, with a backbone that learns or does not; in several processes,
    one that averages the gradients over them.
    """
    learns, backbone = run.step >= run.frozen, run.student.train().backbone
    backbone.train(learns).requires_grad_(learns)
    backbone.mask_token.requires_grad_(learns and not run.distill)
    backbone.grad_checkpointing = args.checkpointing
    several = get_processes()[1] > 1
    return nn.parallel.DistributedDataParallel(run.student) if several else run.student


def train(run: Run, args) -> Network:
    """Take the steps that are left of a run, and return the moving average of the student."""
    run.load()
    rank, world = get_processes()
    student, teacher, ema, recipe = run.student, run.teacher, run.ema, run.recipe
    transform, device = student.backbone.transform, args.device
    probe = make_probe(run, args) if rank == 0 else None
    if rank == 0 and run.step:  # the run may have been killed between the checkpoint and the model
        run.write_outputs()
    elif probe:
        pixels, before = probe(thumbnails), probe(ema.backbone)
        print(f"k-NN on pixels {pixels:.4g}, before training {before:.4g}", flush=True)
    if rank == 0 and run.step < run.steps:
        frozen = teacher if run.distill else None
        print(describe_memory(student, frozen, recipe, args), flush=True)
    for network in (student, teacher) if args.compile else ():
        network.backbone.compile()

    size = recipe.batch_size // recipe.accumulate
    places = range(rank * size // world, (rank + 1) * size // world)
    config = student.backbone.config
    grid = recipe.global_size // config.patch_size
    crops = Crops(run.files, recipe, size, grid, config.in_chans)
    steps = range(run.step + 1, run.steps + 1)
    batches = read_batches(crops, steps, places, transform, args)
    with collect_signals() as stops, contextlib.closing(batches):
        for step in steps:
            if step in (steps.start, run.frozen + 1):
                network = prepare(run, args)
            began, now = time.perf_counter(), schedule(recipe, step - 1, run.epoch_length)
            batch = next(batches)
            waited = time.perf_counter() - began
            torch.manual_seed(hash((recipe.seed, 3, step, rank)))  # of stochastic depth
            terms = train_step(
                network, teacher, ema, run.optimizer, batch, recipe, now, run.distill
            )
            # All processes have the same values, and stop after the same step.
            stop = torch.tensor(float(len(stops)), device=device)
            *values, stop = (all_reduce(torch.stack([*terms.values(), stop])) / world).tolist()
            row = dict(zip(terms, values), waited=waited, seconds=time.perf_counter() - began)
            if not math.isfinite(row["loss"]):
                raise ValueError(
                    f"the loss is not finite in step {step}: give the same command with a lower "
                    "--base-lr or --clip-grad to continue from the last checkpoint"
                )
            run.step = step
            log = step % run.every == 0 or step == run.steps
            keep = args.keep_every and step % args.keep_every == 0
            if rank == 0:
                run.rows.append(row)
                run.show_progress()
                if log:
                    values = dict(epoch=step / run.epoch_length, step=step, **now)
                    run.log(values, probe and probe(ema.backbone))
                if log or keep or stop:
                    run.save(keep)
            if log or keep or stop:  # the other processes wait until the run is saved
                all_reduce(torch.zeros(1, device=device)).item()
            if stop:
                raise KeyboardInterrupt
    return ema


# What to train, on what ---------------------------------------------------------------------------


def choose(args: argparse.Namespace) -> tuple[dinoreg.Config, Recipe]:
    """The architecture of a new model, and the recipe: those of the preset, changed by options."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if value is not None
    }
    for name, value in given.items():
        option, least = f"--{name.replace('_', '-')}", name in POSITIVE
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"{option} must be at least {least:d}, got {value}")
        own = name in (*ARCHITECTURE, "config", "init", "layerscale_init") and name != "in_chans"
        if args.model and own:
            raise ValueError(f"--model has its own architecture: leave out {option}")
    config, recipe = PRESETS[args.preset or ("continue" if args.model else "gpu")]
    recipe = replace(recipe, **{name: given[name] for name in vars(recipe) if name in given})
    config = dinoreg.CONFIGS.get(args.config, config)
    config = replace(config, **{name: given[name] for name in ARCHITECTURE if name in given})
    size, scale = recipe.global_size, recipe.layerscale_init
    return replace(config, image_size=size, layerscale_init=scale), recipe


def make_student(
    args: argparse.Namespace, config: dinoreg.Config, recipe: Recipe
) -> tuple[Network, Recipe, str | None]:
    """A new network, or that of --model; its recipe, and what identifies its first weights.

    The heads are those of the run that --model names. New heads of a trained backbone learn alone
    first, unless a larger model is the teacher: then that one's do, see `run`.
    """
    path = Path(args.model or "")
    saved = read_checkpoint(path) if args.model and path.is_dir() else None
    source = None
    if args.model:
        if path.is_dir() and not saved:
            raise ValueError(f"{path}: no run of pretrain.py (it has no checkpoint.pth)")
        source = common.load_backbone(str(path / "teacher.safetensors") if saved else args.model)
        config = replace(source.config, in_chans=vars(args).get("in_chans", source.config.in_chans))
    rate = 0.0 if args.teacher else recipe.drop_path_rate
    config = replace(config, drop_path_rate=rate, drop_path_uniform=True)
    backbone = dinoreg.DinoVisionTransformer(config)
    if source:
        tensors, C = source.state_dict(), config.in_chans
        weight = tensors["patch_embed.proj.weight"]  # (D, C, P, P)
        if weight.shape[1] != C:  # gray images give the same features with any number of channels
            weight = weight.mean(dim=1, keepdim=True).repeat(1, C, 1, 1) * (weight.shape[1] / C)
        backbone.load_state_dict(tensors | {"patch_embed.proj.weight": weight})
        backbone.transform = source.transform
    elif recipe.init == "unit":
        init_unit_variance(backbone)
    backbone.transform = backbone.transform.at_size(recipe.global_size)
    if recipe.global_size // backbone.patch_size > max(config.grid):
        backbone.fix_image_size(recipe.global_size, recipe.global_size)  # learn all positions
    if saved:
        heads = {name: saved["settings"][name] for name in HEADS}
        if wrong := [name for name in HEADS if vars(args).get(name, heads[name]) != heads[name]]:
            raise ValueError(f"the heads of {path} have {wrong[0]} {heads[wrong[0]]}")
        recipe = replace(recipe, **heads)
    if not source or (saved and "freeze_epochs" not in vars(args)):
        recipe = replace(recipe, freeze_epochs=0.0)
    student = Network(backbone, recipe)
    if saved:  # the positions may have been resized
        student.load_state_dict(saved["ema"] | backbone.state_dict(prefix="backbone."))
    return student, recipe, fingerprint(source) if source else None


def run(args: argparse.Namespace) -> int:
    config, recipe = choose(args)
    args.failed = set()
    start_processes(args)
    torch.manual_seed(recipe.seed)
    student, student_recipe, model = make_student(args, config, recipe)
    channels = student.backbone.config.in_chans
    if channels not in (1, 3) and (recipe.jitter or recipe.gray):
        raise ValueError(f"hue is of 1 or 3 channels: {channels} need --jitter 0 --gray 0")
    files = Files(args.folder, () if channels == 3 else (".npy",))
    share = recipe.accumulate * get_processes()[1]
    if not 0 < recipe.batch_size <= len(files) or not share or recipe.batch_size % share:
        raise ValueError(
            f"--batch-size must be at most {len(files)} images, "
            f"a multiple of {share}, got {recipe.batch_size}"
        )
    sources = dict(images=files.digest(), model=model, teacher=None)
    teacher = None
    if args.teacher:
        frozen, P = common.load_backbone(args.teacher), student.backbone.patch_size
        if frozen.patch_size != P:
            raise ValueError(f"--teacher has patches of {frozen.patch_size} pixels, not of {P}")
        frozen.transform = frozen.transform.at_size(recipe.global_size)
        student.backbone.transform = frozen.transform
        sources["teacher"] = fingerprint(frozen)
        teacher = Network(frozen, recipe)
    if args.dry_run:
        print(describe_memory(student, teacher, student_recipe, args))
        return 0
    if teacher:  # its heads come first
        heads, folder = replace(recipe, epochs=recipe.freeze_epochs), args.output / "heads"
        teacher = train(Run(teacher, None, files, heads, folder, sources, args), args)
    train(Run(student, teacher, files, student_recipe, args.output, sources, args), args)
    if dist.is_initialized():  # torchrun takes any other status for a failure of the whole run
        dist.destroy_process_group()
        return 0
    return int(bool(args.failed))


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="images, in subfolders or not")
    text = "folder of the results, or of a run to continue"
    add("-o", "--output", type=Path, required=True, metavar="RUN", help=text)
    add("--preset", choices=PRESETS, help="default: gpu, or continue with --model")
    text = "architecture of a new model (default: the preset's)"
    add("--config", choices=dinoreg.CONFIGS, help=text)
    text = "continue from an official model, a file, or a run (with its heads)"
    add("--model", metavar="MODEL|RUN", help=text)
    text = "an official model or a file to distill from; it does not change, and its preprocessing "
    add("--teacher", metavar="MODEL", help=f"{text}becomes the student's")
    text = "images for the k-NN accuracy (default: a tenth of those of training)"
    add("--val", type=Path, metavar="FOLDER", help=text)
    text = "between checkpoints and lines of the log (default: an epoch, at most 1000)"
    add("--every", type=common.positive, metavar="STEPS", help=text)
    text = "also keep the checkpoint and model of every STEPS-th step"
    add("--keep-every", type=common.positive, metavar="STEPS", help=text)
    text = "processes that read images (default: %(default)s)"
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help=text)
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--compile", action="store_true", help="compile the backbones")
    add("--dry-run", action="store_true", help="print how much memory it takes, and do nothing")
    common.add_device(parser)
    title = "constants (default: those of the preset; here the official ones)"
    constants = parser.add_argument_group(title)
    config, recipe = PRESETS["official"]
    official = vars(recipe) | {name: getattr(config, name) for name in ARCHITECTURE}
    for name, value in official.items():
        several = isinstance(value, tuple)
        kind = dict(type=float, nargs=len(value)) if several else dict(type=type(value))
        kind |= dict(choices=CHOICES[name]) if name in CHOICES else dict(metavar="X")
        option = f"--{name.replace('_', '-')}"
        constants.add_argument(option, **kind, default=argparse.SUPPRESS, help=str(value))


def main(argv: list[str] | None = None) -> int:
    """0 if all went well; 1 if some images could not be read (0 under torchrun); 2 if the run could
    not start or go on; 130 if it was interrupted, and saved.
    """
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
