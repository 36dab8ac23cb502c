"""Tests of examples/export_onnx.py, export_aoti.py and quantize.py: `python -m pytest examples/tests/test_export.py`."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dinoreg
from dinoreg import CONFIGS, LinearClassifier, Transform
from test_dinoreg import DIGITS, TINY, randomised, scaled_error

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("size", [(224, 224), (518, 518), (140, 98)])
def test_export_to_onnx(size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = LinearClassifier(randomised(replace(CONFIGS["vits14_reg"], depth=2)), 3, layers=1).eval()
    model.labels = ["cat", "dog", "ü"]
    dinoreg.save(model, tmp_path / "model.safetensors")
    command = [sys.executable, HERE / "export_onnx.py", tmp_path / "model.safetensors", "--size"]
    command += [*map(str, size if size[0] != size[1] else size[:1]), "-o", tmp_path / "model.onnx"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1e-4

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == model.labels
    images = torch.randn(3, 3, *size)
    with torch.inference_mode():
        assert scaled_error(session.run(["logits"], {"images": images.numpy()})[0], model(images)) < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.safetensors"]


def test_export_says_what_is_wrong(tmp_path):
    pytest.importorskip("onnxruntime")
    command = [sys.executable, HERE / "export_onnx.py", DIGITS, "-o", tmp_path / "x.onnx", "--size", "30"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and os.listdir(tmp_path) == []
    assert result.stderr == "export_onnx: image sides must be multiples of 4 pixels, got 30 x 30; the nearest is 32 x 32\n"


def test_quantize_tells_speed_and_nearness(tmp_path):
    pytest.importorskip("torchao")
    model = randomised(replace(CONFIGS["vits14_reg"], depth=1))
    model.transform = Transform()
    dinoreg.save(model, tmp_path / "model.safetensors")
    command = [sys.executable, HERE / "quantize.py", HERE / "images" / "coffee.jpg"]
    options = ["--model", tmp_path / "model.safetensors", "--turns", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    cosine, speed = result.stdout.splitlines()
    assert "times as fast as float32" in speed and cosine.startswith("batch of 1: ")
    assert 0.99 < float(cosine.split()[-1]) < 1  # it is int8: near, and not the same


@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a C++ compiler")
def test_aoti_packages_compute_what_the_model_does(tmp_path):
    model, weights, package = randomised(TINY), tmp_path / "model.safetensors", tmp_path / "model.pt2"
    dinoreg.save(model, weights)
    script = [sys.executable, HERE / "export_aoti.py", weights, "-o"]
    result = subprocess.run([*script, package, "--batch-size", "3"], capture_output=True, text=True)
    assert result.returncode == 0 and "(3, 3, 16, 16) -> (3, 32)" in result.stdout, result.stderr
    images = torch.randn(3, 3, 16, 16)
    found = torch._inductor.aoti_load_package(str(package))(images)
    torch.testing.assert_close(found, model.embed(images), atol=1e-4, rtol=1e-4)
    for output in ("model.onnx", "nowhere/model.pt2"):
        result = subprocess.run([*script, tmp_path / output], capture_output=True, text=True)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and ".pt2" in result.stderr
