"""Fine-tuning of a classifier with its backbone, for train_classifier.py and scripts of your own.

Earlier blocks have lower learning rates (Bao et al., 2021, arXiv 2106.08254). It starts from a
trained head, so that the first gradients do not spoil the backbone (Kumar et al., 2022,
arXiv 2202.10054).
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common  # noqa: F401 (finds dinoreg)
import dinoreg
import features

BATCH = 16  # images in a step


def parameter_groups(model: dinoreg.LinearClassifier, lr: float, decay: float = 0.75) -> list[dict]:
    """Parameter groups: the learning rate falls by a factor from each layer to the one before; only
    matrices decay.
    """
    last, groups = model.backbone.n_blocks + 1, {}
    for name, parameter in model.named_parameters():
        layer = last if name.startswith(("backbone.norm", "linear_head")) else 0
        if name.startswith("backbone.blocks"):
            layer = 1 + int(name.split(".")[2])
        weight_decay = 0.05 if parameter.ndim > 1 and name.endswith("weight") else 0.0
        empty = {"params": [], "lr": lr * decay ** (last - layer), "weight_decay": weight_decay}
        groups.setdefault((layer, weight_decay), empty)["params"].append(parameter)
    return list(groups.values())


def random_crop(path: Path, numbers: Tensor, flip: bool, transform: dinoreg.Transform) -> Tensor:
    """A crop of 35 to 100 % of an image, up to a third longer or shorter for its height than the
    transform's results, at the size (3, H, W) of these, given five random numbers in [0, 1).
    """
    area, shape, top, left, mirror = numbers.tolist()
    H, W = transform.size
    x = dinoreg.preprocess(path, round(1.5 * math.sqrt(H * W)), True, 1, transform=transform)
    side = math.sqrt((0.35 + 0.65 * area) * x[0].numel())
    stretch = (4 / 3) ** (shape - 0.5) * math.sqrt(H / W)
    h, w = min(x.shape[1], round(side * stretch)), min(x.shape[2], round(side / stretch))
    top, left = round(top * (x.shape[1] - h)), round(left * (x.shape[2] - w))
    x = x[None, :, top : top + h, left : left + w]
    x = F.interpolate(x, (H, W), mode="bicubic", antialias=True)[0]
    return x.flip(2) if flip and mirror < 0.5 else x  # horizontally


def finetune(
    model: dinoreg.LinearClassifier,
    paths: Sequence[Path],
    classes: Tensor,
    epochs: int,
    flip: bool = True,
) -> dinoreg.LinearClassifier:
    """A copy of the model, with all its weights trained on images and their classes (n,)."""
    device = model.linear_head.weight.device
    on_gpu, dtype = device.type == "cuda", dinoreg.best_dtype(device)
    config = dataclasses.replace(model.config, drop_path_rate=0.1)
    tensors = {key: x.clone() for key, x in model.state_dict().items()}
    model = dinoreg.from_state_dict(tensors, config, transform=model.transform).train()
    model.backbone.grad_checkpointing = on_gpu  # a third slower, for a fraction of the memory
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))
    order = [i for _ in range(epochs) for i in torch.randperm(len(paths)).split(BATCH)]
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, len(order), pct_start=0.1, cycle_momentum=False
    )
    # Random numbers are drawn here, as threads would draw in any order.
    items = ([(paths[i], torch.rand(5)) for i in batch] for batch in order)
    images = features.read_ahead(lambda item: random_crop(*item, flip, model.transform), items)
    start, bar = time.perf_counter(), features.progress(order, unit="step")
    for step, (batch, crops) in enumerate(zip(bar, images), 1):
        with torch.autocast(device.type, dtype, enabled=on_gpu and dtype != torch.float32):
            logits = model(torch.stack(crops).to(device))
        loss = F.cross_entropy(logits.float(), classes[batch].to(device))
        if not loss.isfinite():
            raise ValueError("the loss of fine-tuning is NaN or infinity")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
        if step == 3:  # for a log file, which has no progress bar
            minutes = (time.perf_counter() - start) / step * len(order) / 60
            features.write_line(f"fine-tuning: {len(order)} steps, about {minutes:.0f} min")
    return model.eval()
