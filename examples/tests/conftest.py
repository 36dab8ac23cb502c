"""The tests import the examples and helpers of `test_dinoreg.py`, also in a clone not installed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

import dinoreg

TINY = dinoreg.Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=16)
COLORS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture
def call(capsys):
    """Run a script in this process, which saves the seconds of its imports."""

    def call(main, *arguments):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as exit:  # argparse's
            status = exit.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=output.out, stderr=output.err)

    return call


def paint(path, color, seed=0):
    """An image of 24 x 20 noisy pixels of about one color."""
    pixels = np.array(color) + np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def save_tiny(config: dinoreg.Config, path: Path, seed: int = 0) -> Path:
    """Save a backbone of random weights whose features depend on colors more than on places."""
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(config)
    model.transform = dinoreg.Transform().at_size(16)
    torch.nn.init.normal_(model.patch_embed.proj.weight, std=0.3)
    dinoreg.save(model, path)
    return path
