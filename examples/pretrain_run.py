"""What surrounds the training in pretrain.py: the images that it reads, the files that it writes.

`Files` are the paths of the images, `Crops` what the networks see of them, in batches from
`read_batches`. A `Run` is the folder of results: it loads, saves and logs.
"""

import array
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor, nn

import common  # noqa: F401 (finds dinoreg)
import dinoreg
from labeled import knn_accuracy
from training_parts import parameter_groups, random_mask

# Images -------------------------------------------------------------------------------------------


class Files(Sequence):
    """The image files below a folder, sorted, without hidden ones; also those with other suffixes.

    The paths are kept in two tensors, which the readers share. A million of them take about 50 MB;
    as `Path` objects they would take 400 MB in every reader.
    """

    def __init__(self, folder: Path, suffixes: Sequence[str] = ()):
        def is_image_suffix(suffix: str) -> bool:
            return suffix in suffixes or dinoreg.is_image_name(f"image{suffix}")

        is_image, folder = functools.cache(is_image_suffix), Path(folder)
        names, ends, seen = bytearray(), array.array("q", [0]), set()
        for here, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:  # a loop of links
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = os.path.relpath(here, folder)
            prefix = os.fsencode("" if inside == "." else inside + os.sep)
            for name in sorted(files):
                if not name.startswith(".") and is_image(os.path.splitext(name)[1].lower()):
                    names += prefix + os.fsencode(name)
                    ends.append(len(names))
        if not names:
            raise ValueError(f"{folder}: no folder with images")
        self.folder = folder
        self.names = torch.frombuffer(names, dtype=torch.uint8)
        self.ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self.ends[i : i + 2].tolist()
        return Path(self.folder, os.fsdecode(self.names[start:end].numpy().tobytes()))

    def digest(self) -> str:
        """A short text that changes with the number, the names or the order of the files."""
        return f"{len(self)} files, {hashlib.sha256(self.names.numpy()).hexdigest()[:16]}"


def read_image(path: Path, channels: int, white: float, least: int) -> Image.Image | Tensor:
    """A file as an RGB image, or for other channels than 3 as a tensor (C, H, W), uint8.

    Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size, as long as both sides have at
    least `least` pixels. white is the level of white, or 0 for that of the file's type. Channels
    are those of a .npy file, (H, W), (H, W, C) or (C, H, W), or the pages of a TIFF file.
    """
    if path.suffix.lower() == ".npy":
        x = np.load(path, allow_pickle=False)
    else:
        image = dinoreg.open_image(path)
        image.draft("RGB", (least, least))
        if channels == 3 and not (white and image.mode[0] in "IF"):
            return dinoreg.to_rgb(image)
        pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        x = np.stack(pages) if len(pages) > 1 else pages[0]
        if channels == 1 and x.ndim == 3:
            x = np.asarray(dinoreg.to_rgb(image).convert("L"))
    x = x[None] if x.ndim == 2 else x
    x = x if len(x) == channels or x.shape[-1] != channels else np.moveaxis(x, -1, 0)
    x = np.repeat(x, 3, axis=0) if channels == 3 and len(x) == 1 else x
    if len(x) != channels or x.ndim != 3:
        raise ValueError(f"an image of shape {x.shape}, not of {channels} channels")
    white = white or (np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1.0)
    return torch.from_numpy((x.clip(0, white) * (255 / white)).round().astype(np.uint8))


@functools.lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


class Crops(torch.utils.data.Dataset):
    """Crops of an image, global (2, C, H, W) and local (L, C, H', W'), uint8, and masks (2, h * w)
    of the global ones. An item's key is (batch, place).

    The order of an epoch depends on the seed and the epoch; batch and place are a position in it.
    Crops depend on the seed, the batch and the place. In the place of an image that cannot be read
    comes the next one; the item's last part has a line about each such.
    Official: dinov2/data/augmentations.py and collate.py.
    """

    def __init__(self, paths: Sequence[Path], recipe, batch_size: int, grid: int, channels=3):
        from torchvision.transforms import v2

        def crop(size: int, scale: tuple, blur: float, solarize: float = 0.0) -> v2.Transform:
            bicubic = v2.InterpolationMode.BICUBIC
            turn = v2.RandomAffine(recipe.rotate, shear=recipe.rotate, interpolation=bicubic)
            transforms = (
                (float(recipe.rotate > 0), turn),
                (1.0, v2.RandomResizedCrop(size, scale, interpolation=bicubic)),
                (recipe.flip, v2.RandomHorizontalFlip(1.0)),
                (recipe.jitter, v2.ColorJitter(0.4, 0.4, 0.2, 0.1)),
                (recipe.gray, v2.RandomGrayscale(1.0)),
                (blur, v2.GaussianBlur(9, (0.1, 2.0))),
                (solarize, v2.RandomSolarize(128, 1.0)),
            )
            chosen = [v2.RandomApply([x], p) for p, x in transforms if p > 0]
            return v2.Compose([*chosen, v2.PILToTensor()])

        self.paths, self.recipe, self.batch_size, self.grid = paths, recipe, batch_size, grid
        sizes, scales = (
            (recipe.global_size, recipe.local_size),
            (recipe.global_scale, recipe.local_scale),
        )
        first_blur, second_blur, local_blur = recipe.blur
        first = crop(sizes[0], scales[0], first_blur)
        second = crop(sizes[0], scales[0], second_blur, recipe.solarize)
        local = crop(sizes[1], scales[1], local_blur)
        self.crops = [stack for stack in ([first, second], [local] * recipe.local_crops) if stack]
        # The smallest crop has this share of the area, and sides of 3 : 4: nothing is enlarged.
        least = max(size / math.sqrt(low * 3 / 4) for size, (low, _) in zip(sizes, scales))
        self.read = functools.partial(
            read_image, channels=channels, white=recipe.white_level, least=math.ceil(least)
        )
        self.blank = (
            Image.new("RGB", (1, 1))
            if channels == 3
            else torch.zeros(channels, 1, 1, dtype=torch.uint8)
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, str]:
        (batch, place), seed, image, failed = key, self.recipe.seed, self.blank, ""
        epoch, start = divmod(batch * self.batch_size + place, len(self.paths))
        order = permutation(len(self.paths), seed, 0, epoch)
        for i in itertools.chain(order[start:], order[:start]):
            try:
                image = self.read(self.paths[i])
                break
            except Exception as error:  # PIL's decoders raise many types for broken files
                failed += f"{self.paths[i]}: {dinoreg.reason(error)}\n"
        torch.default_generator.manual_seed(hash((seed, 1, batch, place)))
        crops = [torch.stack([crop(image) for crop in stack]) for stack in self.crops]
        masks = [self.mask(batch, i) for i in (place, place + self.batch_size)]
        return crops, torch.stack(masks), failed

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


def ignore_signals(worker: int) -> None:
    """Let a reader go on until the run has been saved, also if a signal is sent to all processes.

    Launchers send SIGTERM to the whole group. DataLoader sets its own handler when a reader starts,
    which would end it: this comes after that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_batches(
    crops: Crops, steps: range, places: range, transform: dinoreg.Transform, args
) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """For each step the parts of its batch, each (crops, masks), of these places in it: normalized
    crops (2 B, C, H, W) and (L B, C, H', W'), crop by crop, and masks (2 B, h * w).

    Images that cannot be read are printed, and added to args.failed. Closing the iterator ends the
    readers.
    """
    count, device = crops.recipe.accumulate, torch.device(args.device)
    numbers = range((steps.start - 1) * count, (steps.stop - 1) * count)
    loader = torch.utils.data.DataLoader(
        crops,
        batch_sampler=([(number, place) for place in places] for number in numbers),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    parts = []
    for stacks, masks, failed in loader:
        for line in sorted(set("".join(failed).splitlines()) - args.failed):
            dinoreg.complain(line, "pretrain")
            args.failed.add(line)
        if len(args.failed) == len(crops.paths):
            raise ValueError("none of the images can be read")
        tensors = [x.to(device, non_blocking=True) for x in (*stacks, masks)]  # (B, crops, ...)
        *stacks, masks = (x.transpose(0, 1).flatten(0, 1) for x in tensors)
        parts.append(([normalize(stack, transform) for stack in stacks], masks))
        if len(parts) == count:
            yield parts
            parts = []


def normalize(pixels: Tensor, transform: dinoreg.Transform) -> Tensor:
    """Pixels (B, C, H, W), uint8, as the model sees them: for other channels than 3, by the means
    of the transform's three.
    """
    if pixels.shape[1] != 3:
        mean, std = ((sum(x) / 3,) * 3 for x in (transform.mean, transform.std))
        gray = dataclasses.replace(transform, mean=mean, std=std)
        return dinoreg.normalize(pixels.unsqueeze(2).expand(-1, -1, 3, -1, -1), gray)[:, :, 0]
    return dinoreg.normalize(pixels, transform)


def make_probe(run: "Run", args) -> Callable | None:
    """A function that measures the k-NN accuracy of a function of images. Without --val, the
    queries are a tenth of the images.

    None if they have no classes or are not read as `dinoreg.preprocess` does, or if the backbone
    never changes.
    """
    files, backbone = run.files, run.student.backbone
    sample = files[:: math.ceil(len(files) / 10000)]
    queries = Files(args.val)[:] if args.val else sample[::10]
    train = sample if args.val else [path for i, path in enumerate(sample) if i % 10]
    special = backbone.config.in_chans != 3 or run.recipe.white_level
    if special or run.ema.is_fixed or len({path.parent for path in sample}) < 2:
        return None
    return functools.partial(
        knn_accuracy,
        transform=backbone.transform,
        device=args.device,
        train=train,
        queries=queries,
    )


def thumbnails(x: Tensor) -> Tensor:
    return F.interpolate(x, (16, 16), mode="bilinear", antialias=True).flatten(1)


# Processes and their memory -----------------------------------------------------------------------


def get_processes() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes(args) -> None:
    """Join the processes that torchrun started, each with a GPU of its own."""
    if "RANK" in os.environ:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        # The others wait while the first process measures the k-NN accuracy.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))


def estimate_memory(student, teacher, recipe, checkpointing: bool) -> tuple[float, float]:
    """GiB that training needs on a GPU: fixed, and for each image that is computed at once."""
    config, L = student.backbone.config, recipe.local_crops
    D, depth, hidden = config.embed_dim, config.depth, config.hidden_dim
    # Weights, gradients, two moments of AdamW and the average, float32, and weights in bfloat16
    count = sum(parameter.numel() for parameter in student.parameters())
    fixed = 22 * count + 6 * sum(p.numel() for p in (teacher or nn.Module()).parameters())
    # What a block keeps of each token for the backward pass, partly in bfloat16
    block = 26 * D + (8 if config.ffn == "swiglu" else 4) * hidden
    kept = 4 * D * depth + block if checkpointing else depth * block
    grids = [(size // config.patch_size) ** 2 for size in (recipe.global_size, recipe.local_size)]
    global_tokens, local_tokens = (1 + config.num_register_tokens + grid for grid in grids)
    tokens = 2 * global_tokens + L * local_tokens
    # Logits, assignments and their temporaries; a distillation compares all patches
    masked = (
        2 * grids[0] if teacher else recipe.mask_probability * sum(recipe.mask_ratio) * grids[0]
    )
    K, ibot_K = recipe.prototypes, recipe.ibot_prototypes or recipe.prototypes
    return fixed / 2**30, (tokens * kept + 16 * ((2 + L) * K + masked * ibot_K)) / 2**30


def describe_memory(student, teacher, recipe, args) -> str:
    """How much memory each process needs, and whether its GPU has it."""
    images = recipe.batch_size // (recipe.accumulate * get_processes()[1])
    texts, needed = [], []
    for checkpointing in (args.checkpointing, not args.checkpointing):
        fixed, each = estimate_memory(student, teacher, recipe, checkpointing)
        needed.append(fixed + each * images)
        option = f"with{'' if checkpointing else 'out'} --checkpointing"
        texts.append(f"{needed[-1]:.3g} GiB {option} ({fixed:.3g} + {each:.3g} an image)")
    text = f"memory of a GPU for {images} images at once: {', '.join(texts)}"
    if args.device.startswith("cuda"):
        has = torch.cuda.get_device_properties(args.device).total_memory / 2**30
        advice = ", too little: raise --accumulate" if needed[0] > 0.95 * has else ""
        text += f"; this one has {has:.1f} GiB{advice}"
        if torch.cuda.get_device_capability(args.device)[0] < 8:
            text += "\nthis GPU has no bfloat16: PyTorch emulates it, which is slow"
    return text


# Results ------------------------------------------------------------------------------------------

# What a run cannot change when it is continued, besides its model and its images
HEADS = ("prototypes", "bottleneck_dim", "ibot_prototypes", "ibot_bottleneck_dim", "hidden_dim")
HEADS += ("nlayers",)
FIXED = (*HEADS, "batch_size", "epoch_length", "seed")
OUTPUTS = ("teacher.safetensors", "log.csv", "curves.png")


def identify(backbone: dinoreg.DinoVisionTransformer) -> str:
    """A short text that changes with the weights, not with their path or format."""
    vectors = [x.detach().numpy().tobytes() for x in backbone.parameters() if x.ndim == 1]
    return hashlib.sha256(b"".join(vectors)).hexdigest()[:16]


def read_checkpoint(folder: Path) -> dict | None:
    """What `Run.save` wrote last; None if the folder has no checkpoint."""
    for path in (folder / "checkpoint.pth", folder / "checkpoint_previous.pth"):
        if path.exists():
            with dinoreg.naming(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not (isinstance(state, dict) and isinstance(state.get("settings"), dict)):
                    raise ValueError("not a checkpoint of this version of pretrain.py")
                return state | dict(path=path)
    return None


class Run:
    """A training run: its networks, its step and its log, and how they are loaded, saved and shown.

    teacher is a frozen one to distill from; without it, the moving average of the student is the
    teacher. sources says what the run was started with.
    """

    def __init__(self, student, teacher, files, recipe, folder: Path, sources, args):
        length = recipe.epoch_length or len(files) // recipe.batch_size
        self.student, self.files, self.recipe, self.folder = student, files, recipe, folder
        self.steps, self.frozen = (int(x * length) for x in (recipe.epochs, recipe.freeze_epochs))
        self.epoch_length, self.every = length, args.every or min(length, 1000)
        self.step, self.history, self.rows = 0, [], []
        self.shown, self.distill = time.monotonic(), teacher is not None

        # A backbone that never learns is also that of the average.
        student.is_fixed = self.frozen >= self.steps
        shared = {id(student.backbone): student.backbone} if student.is_fixed else {}
        self.ema = copy.deepcopy(student.to(args.device), shared).eval().requires_grad_(False)
        self.teacher = teacher or self.ema
        groups = parameter_groups(student, recipe.layerwise_decay, recipe.patch_embed_lr_mult)
        self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
        names = ("student", "ema", "teacher", "optimizer")
        self.parts = {name: getattr(self, name) for name in names}
        config = dataclasses.asdict(student.backbone.config)
        self.settings = config | dataclasses.asdict(recipe) | sources

    def load(self) -> None:
        """Continue what the folder has a checkpoint of. Raises a ValueError for files of others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = read_checkpoint(self.folder)
        if state is None:
            if names := [name for name in OUTPUTS if (self.folder / name).exists()]:
                raise ValueError(
                    f"{self.folder}: has {names[0]}, but no checkpoint of a run to continue; "
                    "give another folder"
                )
            return
        with dinoreg.naming(state["path"]):
            self.compare(state["settings"])
            for name, part in self.parts.items():
                full = part.state_dict() if isinstance(part, nn.Module) else {}
                part.load_state_dict(full | state[name])  # the checkpoint may lack the backbone
            self.step, self.history, self.rows = state["step"], state["history"], state["rows"]

    def compare(self, old: dict) -> None:
        """Print the constants that differ from those of the run in the folder. Raises a ValueError
        for what cannot change.
        """
        free = {field.name for field in dataclasses.fields(self.recipe)} - set(FIXED)
        changes = {True: [], False: []}
        for name, new in self.settings.items():
            if old.get(name, new) != new:
                option = f"--{name.replace('_', '-')}" if name in vars(self.recipe) else name
                changes[name in free].append(f"{option} {old[name]}, now {new}")
        if changes[False]:
            raise ValueError(
                f"the run was started with {'; '.join(changes[False])}: give another folder"
            )
        if changes[True] and get_processes()[0] == 0:
            print(f"the run was started with {'; '.join(changes[True])}", flush=True)

    def save(self, keep: bool = False) -> None:
        """Write the checkpoint, then the model and the log. The checkpoint before is kept, too."""
        state = {name: trained_state(part) for name, part in self.parts.items()}
        state |= dict(step=self.step, history=self.history, rows=self.rows, settings=self.settings)
        path = self.folder / "checkpoint.pth"
        with dinoreg.atomic(path) as part:
            torch.save(state, part)
            if path.exists():
                os.replace(path, self.folder / "checkpoint_previous.pth")
        self.write_outputs()
        for name in ("checkpoint.pth", "teacher.safetensors") if keep else ():
            stem, _, suffix = name.partition(".")
            shutil.copyfile(self.folder / name, self.folder / f"{stem}_{self.step}.{suffix}")

    def write_outputs(self) -> None:
        model = self.folder / "teacher.safetensors"
        if not (self.ema.is_fixed and model.exists()):
            dinoreg.save(self.ema.backbone, model)
        if self.history:
            write_log(self.history, self.folder)

    def show_progress(self) -> None:
        """Print the last steps: every second in place on a terminal, else every ten seconds."""
        on_terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self.shown < (1 if on_terminal else 10):
            return
        self.shown = now
        loss, seconds, waited = (
            np.mean([row[name] for row in self.rows[-20:]])
            for name in ("loss", "seconds", "waited")
        )
        left = datetime.timedelta(seconds=round(seconds * (self.steps - self.step)))
        text = f"step {self.step} of {self.steps}: loss {loss:.3f}, "
        text += f"{self.recipe.batch_size / seconds:.1f} images/s, "
        text += f"{waited / seconds:.0%} of the time waiting for images, {left} left"
        start, end = ("\r", "\x1b[K") if on_terminal else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)

    def log(self, values: dict, accuracy: float | None) -> None:
        """Add a row to the log: these values, and the means over the steps since the last row."""
        row = values | {name: float(np.mean([x[name] for x in self.rows])) for name in self.rows[0]}
        row["images_per_s"] = self.recipe.batch_size / row["seconds"]
        if next(self.student.parameters()).is_cuda:
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row |= {} if accuracy is None else dict(knn=accuracy)
        self.history, self.rows = [*self.history, row], []
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        if row["information"] < 0.01 * row["entropy"] and row["epoch"] > self.recipe.warmup_epochs:
            dinoreg.complain("collapsed? The teacher assigns all images alike", "pretrain")


def trained_state(part) -> dict:
    """The state dict of a network or an optimizer, without a backbone that never changes."""
    fixed = getattr(part, "is_fixed", False)
    state = part.state_dict()
    return {key: x for key, x in state.items() if not (fixed and key.startswith("backbone."))}


def write_log(history: list[dict], folder: Path) -> None:
    """Write log.csv and curves.png."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    with dinoreg.atomic(folder / "log.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    figure = Figure(figsize=(16, 9), layout="constrained")
    for axes, name in zip(figure.subplots(4, 5).flat, names[2:]):  # after epoch and step
        axes.plot([row["epoch"] for row in history], [row.get(name) for row in history])
        axes.set_title(name)
    with dinoreg.atomic(folder / "curves.png") as part:
        figure.savefig(part)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """A list of the SIGINT and SIGTERM that were sent: a run is saved before it ends."""
    numbers: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(one, lambda number, _: numbers.append(number)) for one in stops]
    try:
        yield numbers
    finally:
        for one, handler in zip(stops, handlers):
            signal.signal(one, handler)
