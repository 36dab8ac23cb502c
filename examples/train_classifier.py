"""Train a classifier on your own images: a folder with one sub-folder per class, named like the class.

    pip install -e ".[examples]"
    python examples/train_classifier.py FOLDER --output mine.safetensors
    python -m dinoreg photo.jpg --weights mine.safetensors

The backbone runs once over the images, and its features are cached in a file. On these features:
  - a linear head is trained as in the official linear evaluation (dinov2/eval/linear.py): SGD with momentum, a cosine
    schedule, no weight decay, and one head for each of 13 learning rates. The head with the highest held-out accuracy is
    kept, so the reported accuracy is that of the best of 13;
  - or, with --knn, the 20 nearest images vote, as in the official k-NN evaluation (dinov2/eval/knn.py).
With --finetune the backbone is trained as well, after the head (Kumar et al., 2022, https://arxiv.org/abs/2202.10054), with
lower learning rates for earlier blocks (Bao et al., 2021, https://arxiv.org/abs/2106.08254). A fifth of each class is held
out.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor, nn
from tqdm import tqdm

import common
import dinoreg

BATCH = 16  # images in a step of --finetune
HEAD_BATCH, HEAD_STEPS = 128, 2000
LEARNING_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]  # of a batch of 256


def find_classes(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names, all image files, and the class index of each."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(f"{folder}: two or more sub-folders are needed, one for each class; there are {len(folders)}")
    found = [(path, i) for i, one in enumerate(folders) for path in dinoreg.find_images([one]) if path != one]
    return [path.name for path in folders], [path for path, _ in found], [i for _, i in found]


def split(names: list[str], classes: Tensor) -> Tensor:
    """Which images are held out (n,), bool: a fifth of each class, at least one, by a fixed seed."""
    generator, held_out = torch.Generator().manual_seed(0), torch.zeros(len(classes), dtype=torch.bool)
    for i, name in enumerate(names):
        members = torch.where(classes == i)[0]
        if len(members) < 2:
            raise ValueError(f"{name}: a class needs two or more images that can be read; there are {len(members)}")
        members = members[torch.randperm(len(members), generator=generator)]
        held_out[members[: max(1, len(members) // 5)]] = True
    return held_out


def apply(
    function: Callable[[Tensor], Tensor], paths: list[Path], transform: dinoreg.Transform, device: str
) -> list[Tensor | str]:
    """What a function of images (B, 3, H, W) gives for each file, on the CPU; or why it could not be read."""

    def read(path: Path) -> Tensor | str:
        return common.read_image(path, normalized=False, transform=transform)

    def apply_batch(images: list[Tensor]) -> Tensor:
        return function(torch.stack(images).to(device)).float().cpu()

    return list(tqdm(common.compute(apply_batch, read, paths, transform), total=len(paths), unit="image"))


def cached_features(
    model: dinoreg.LinearClassifier, name: str, paths: list[Path], size: int, device: str, cache: Path
) -> tuple[Tensor, dict[str, str]]:
    """What the linear layer sees of the images that can be read (n, F), and why others cannot. Computed only if the
    cache is not of this model, these files and this size."""
    key = common.feature_key(name, model.layers, size, paths)
    if cache.exists():
        tensors, metadata = dinoreg.read_tensors(cache)
        if "unreadable" not in metadata:  # it would be overwritten
            raise ValueError(f"{cache}: not a cache of features")
        if metadata["key"] == key:
            print(f"{len(tensors['features'])} features from {cache}")
            return tensors["features"].clone(), json.loads(metadata["unreadable"])
    results = apply(model.linear_input, paths, model.transform, device)
    readable = [x for x in results if isinstance(x, Tensor)]
    unreadable = {str(path): x for path, x in zip(paths, results) if isinstance(x, str)}
    features = torch.stack(readable) if readable else torch.empty(0, model.linear_head.in_features)
    dinoreg.write_tensors({"features": features}, cache, {"key": key, "unreadable": json.dumps(unreadable)})
    print(f"{len(features)} features written to {cache}")
    return features, unreadable


def vote(train: Tensor, classes: Tensor, queries: Tensor, k: int = 20) -> Tensor:
    """The class (m,) of each query (m, D), by the votes of the k training images (n, D) of the greatest cosines."""
    return common.vote(train, F.one_hot(classes).float(), queries, k).argmax(dim=1)


def train_head(model: dinoreg.LinearClassifier, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """The best learning rate. Trains a head for each on features x (n, F) of classes y (n,), and gives the model the head
    with the highest held-out accuracy.

    All heads are one linear layer: without weight decay, a learning rate is equivalent to a factor of the loss.
    """
    rates = torch.tensor(LEARNING_RATES, device=x.device) * HEAD_BATCH / 256
    K = model.linear_head.out_features
    heads = nn.Linear(x.shape[1], len(rates) * K, device=x.device)
    nn.init.normal_(heads.weight, std=0.01)
    nn.init.zeros_(heads.bias)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS, eta_min=0)

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each head on features (B, F), and its number of correct predictions."""
        logits = heads(x).unflatten(1, (-1, K)).mT  # (B, K, heads)
        y = y[:, None].expand(-1, len(rates))
        return F.cross_entropy(logits, y, reduction="none").mean(dim=0), (logits.argmax(dim=1) == y).sum(dim=0)

    for _ in tqdm(range(HEAD_STEPS), unit="step"):
        batch = torch.randint(len(x), (HEAD_BATCH,), device=x.device)
        optimizer.zero_grad()
        (losses(x[batch], y[batch])[0] @ rates).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss, right = losses(test_x, test_y)
        best = max(range(len(rates)), key=lambda i: (right[i].item(), -loss[i].item()))
        model.linear_head.weight.copy_(heads.weight.unflatten(0, (-1, K))[best])
        model.linear_head.bias.copy_(heads.bias.unflatten(0, (-1, K))[best])
    return LEARNING_RATES[best]


def parameter_groups(model: dinoreg.LinearClassifier, lr: float, decay: float = 0.75) -> list[dict]:
    """Parameter groups: the learning rate falls by the factor decay from each layer to the one before; only matrices have
    weight decay."""
    last, groups = model.backbone.n_blocks + 1, {}
    for name, parameter in model.named_parameters():
        layer = last if name.startswith(("backbone.norm", "linear_head")) else 0
        if name.startswith("backbone.blocks"):
            layer = 1 + int(name.split(".")[2])
        weight_decay = 0.05 if parameter.ndim > 1 and name.endswith("weight") else 0.0
        empty = {"params": [], "lr": lr * decay ** (last - layer), "weight_decay": weight_decay}
        groups.setdefault((layer, weight_decay), empty)["params"].append(parameter)
    return list(groups.values())


OFFICIAL = dinoreg.Transform()


def random_crop(path: Path, numbers: Tensor, size: int, flip: bool, transform: dinoreg.Transform = OFFICIAL) -> Tensor:
    """A crop (3, size, size) of 35 to 100 % of an image, of aspect ratio 3:4 to 4:3, determined by five random numbers in
    [0, 1); flipped horizontally half of the time if flip."""
    x = dinoreg.preprocess(path, size * 3 // 2, True, 1, transform=transform)
    area, shape, top, left, mirror = numbers.tolist()
    H, W = x.shape[1:]
    side, stretch = math.sqrt((0.35 + 0.65 * area) * H * W), (4 / 3) ** (shape - 0.5)
    h, w = min(H, round(side * stretch)), min(W, round(side / stretch))
    top, left = round(top * (H - h)), round(left * (W - w))
    x = x[None, :, top : top + h, left : left + w]
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)[0]
    return x.flip(2) if flip and mirror < 0.5 else x


def finetune(
    model: dinoreg.LinearClassifier, paths: list[Path], classes: Tensor, size: int, epochs: int, flip: bool, device: str
) -> None:
    """Train the whole model on images and their classes (n,)."""
    on_gpu = device == "cuda"
    model.backbone.grad_checkpointing = on_gpu  # a third slower, for a fraction of the memory
    groups, steps = parameter_groups(model, lr=1e-4), math.ceil(len(paths) / BATCH)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    bar = tqdm(total=epochs * steps, unit="step")
    order = [batch for _ in range(epochs) for batch in torch.randperm(len(paths)).split(BATCH)]
    items = ([(paths[i], torch.rand(5)) for i in batch] for batch in order)  # drawn here, as threads would draw in any order
    for batch, images in zip(order, common.read_ahead(lambda item: random_crop(*item, size, flip, model.transform), items)):
        x, y = torch.stack(images).to(device), classes[batch].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}")
    bar.close()
    model.eval()


def report(kind: str, names: list[str], classes: Tensor, predicted: Tensor) -> None:
    """Print the accuracy and the most frequent confusions."""
    print(f"{kind}: {accuracy_score(classes, predicted):.1%} of {len(classes)} held-out images are right")
    wrong = torch.from_numpy(confusion_matrix(classes, predicted, labels=range(len(names)))).fill_diagonal_(0)
    counts, pairs = wrong.flatten().topk(min(5, wrong.numel()))
    for count, pair in zip(counts.tolist(), pairs.tolist()):
        if count:
            print(f"{count:4} x  {names[pair // len(names)]} taken for {names[pair % len(names)]}")


def load_model(args: argparse.Namespace, num_classes: int) -> dinoreg.LinearClassifier:
    """A trained backbone for images of --size pixels, with a new head."""
    backbone = dinoreg.load(args.model)
    backbone = getattr(backbone, "backbone", backbone)  # of a classifier
    if args.size is not None and (args.size < 1 or args.size % backbone.patch_size):
        raise ValueError(f"--size must be a multiple of {backbone.patch_size}, got {args.size}")
    H, W = common.set_size(backbone, args.size)
    if H != W:
        raise ValueError(f"--model makes images of {H} x {W} pixels, this needs square ones: give --size")
    if args.layers > backbone.n_blocks:
        raise ValueError(f"--layers must be at most {backbone.n_blocks}, got {args.layers}")
    if args.finetune:
        trained, transform = backbone.state_dict(), backbone.transform
        backbone = dinoreg.DinoVisionTransformer(dataclasses.replace(backbone.config, drop_path_rate=0.1))
        backbone.load_state_dict(trained)
        backbone.transform = transform
    return dinoreg.LinearClassifier(backbone, num_classes, args.layers).eval()


def run(args: argparse.Namespace) -> int:
    names, paths, classes = find_classes(args.folder)
    split(names, torch.tensor(classes))  # fails early if there are too few images
    folder = args.folder.resolve()
    cache = args.cache or folder.with_name(f"{folder.name}.features.safetensors")
    for path in [cache] if args.knn else [cache, args.output]:
        if path.suffix != ".safetensors" or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: must be a .safetensors file in a folder that can be written to")
    device = args.device
    model = load_model(args, len(names)).to(device)
    D, size = model.backbone.embed_dim, model.transform.size[0]

    features, unreadable = cached_features(model, args.model, paths, size, device, cache)
    for path, reason in unreadable.items():
        print(f"train_classifier: {path}: {reason}", file=sys.stderr)
    status = 1 if unreadable else 0
    readable = [i for i, path in enumerate(paths) if str(path) not in unreadable]
    paths, classes = [paths[i] for i in readable], torch.tensor([classes[i] for i in readable])
    held_out = split(names, classes)
    train_paths, test_paths = ([path for path, out in zip(paths, held_out) if out == part] for part in (False, True))
    x, y, test_x, test_y = features[~held_out], classes[~held_out], features[held_out], classes[held_out]

    if args.knn:
        cls = slice((args.layers - 1) * D, args.layers * D)  # of the last block; the mean of the patches follows
        report("k-NN", names, test_y, vote(x[:, cls], y, test_x[:, cls]))
        print("no file is written: `python -m dinoreg` serves linear classifiers")
        return status
    torch.manual_seed(0)
    rate = train_head(model, *(tensor.to(device) for tensor in (x, y, test_x, test_y)))
    with torch.inference_mode():
        predicted = model.linear_head(test_x.to(device)).argmax(dim=1).cpu()
    report(f"linear head, learning rate {rate:g}", names, test_y, predicted)
    if args.finetune:
        finetune(model, train_paths, y, size, args.epochs, not args.no_flip, device)
        predicted = torch.stack(apply(model, test_paths, model.transform, device)).argmax(dim=1)
        report(f"fine-tuned, {args.epochs} epochs", names, test_y, predicted)
    dinoreg.save(model, args.output, names)
    print(f"{args.output} written: python -m dinoreg IMAGE --weights {args.output}")
    return status


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="has one sub-folder of images per class")
    add("--model", default="vits14_reg", help="an official backbone, or a file (default: %(default)s)")
    add("--size", type=int, metavar="PIXELS", help="side of the central crop (default: the model's)")
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=1,
        help="last blocks whose CLS tokens the head uses (default: %(default)s)",
    )
    add("--knn", action="store_true", help="only report the accuracy of a k-NN classifier")
    add("--finetune", action="store_true", help="train the backbone as well; best on a GPU")
    add("--epochs", type=int, default=10, help="for --finetune (default: %(default)s)")
    add("--no-flip", action="store_true", help="no horizontal flips in --finetune: for text and digits")
    add("--cache", type=Path, metavar="FILE", help="features of the images (default: FOLDER.features.safetensors)")
    add("-o", "--output", type=Path, default=Path("classifier.safetensors"), help="default: %(default)s")
    common.add_device(parser)
    args = parser.parse_args()
    if args.knn and args.finetune:
        parser.error("--knn trains nothing: leave out --finetune")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
