"""The tests import the examples and helpers of `test_dinoreg.py`, also in a clone not installed."""

import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

import dinoreg


def save_tiny(config: dinoreg.Config, path: Path, seed: int = 0) -> Path:
    """Save a backbone of random weights whose features depend on colors more than on places."""
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(config)
    model.transform = dinoreg.Transform().at_size(16)
    torch.nn.init.normal_(model.patch_embed.proj.weight, std=0.3)
    dinoreg.save(model, path)
    return path
