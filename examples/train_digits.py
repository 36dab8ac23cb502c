"""Train a small DINOv2 with registers from scratch on handwritten digits in a few minutes on a CPU.

    pip install -e ".[examples]"
    python examples/make_digits.py digits
    python examples/train_digits.py digits -o digits.safetensors

The last line printed is the accuracy on the held-out digits. The model is saved with its class
names, so that `python -m dinoreg digit.png --weights digits.safetensors` classifies digits.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
import dinoreg
from make_digits import LABELS

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


def read_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """The images (M, C, H, W) in the folders of the ten classes, and their classes (M,)."""
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


def run(args: argparse.Namespace) -> int:
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: no such folder")
    torch.manual_seed(0)
    (x, classes), (val_x, val_classes) = (
        read_folder(args.folder / part) for part in ("train", "val")
    )
    val_x, val_classes = val_x.to(args.device), val_classes.to(args.device)

    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(CONFIG), num_classes=10).to(
        args.device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = args.epochs * -(-len(x) // 50)  # of 50 images
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.15
    )
    for _ in (bar := tqdm(range(args.epochs), unit="epoch")):
        model.train()
        for batch in torch.randperm(len(x)).split(50):
            logits = model(augment(x[batch]).to(args.device))
            loss = F.cross_entropy(logits, classes[batch].to(args.device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        bar.set_postfix_str(
            f"loss {loss:.3f}, held-out accuracy {accuracy(model, val_x, val_classes):.1%}"
        )

    model.backbone.transform = dinoreg.Transform().at_size(SIZE)
    dinoreg.save(model, args.output, LABELS)
    print(
        f"{args.output}: {accuracy(model, val_x, val_classes):.1%} accuracy "
        f"on {len(val_x):,} held-out digits"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="what make_digits.py wrote: train and val, with a folder for each class",
    )
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the trained model, a .safetensors file",
    )
    add("--epochs", type=int, default=90, help="default: %(default)s")
    common.add_device(parser)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
