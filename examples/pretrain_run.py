"""What surrounds the training in pretrain.py: processes, their memory, and a `Run`, the folder of
results.
"""

import contextlib
import copy
import csv
import dataclasses
import datetime
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import common  # noqa: F401 (finds dinoreg)
import dinoreg
from training_parts import parameter_groups

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
