"""Tests of examples/export.py and examples/quantize.py.

Run them with `python -m pytest examples/tests/test_export.py`.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dinoreg
import export
import quantize
from dinoreg import LinearClassifier
from test_dinoreg import DIGITS, TINY, randomised, scaled_error

HERE = Path(__file__).parents[1]
TINIEST = replace(TINY, depth=1)


@pytest.fixture
def weights(tmp_path) -> Path:
    dinoreg.save(randomised(TINIEST), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("size", [(20, 12), pytest.param((20, 20), marks=pytest.mark.slow)])
def test_export_of_a_classifier_to_onnx(size, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = LinearClassifier(randomised(TINIEST), 3, layers=1).eval()
    model.labels = ["cat", "dog", "ü"]
    dinoreg.save(model, tmp_path / "model.safetensors")
    sides = [*map(str, size if size[0] != size[1] else size[:1])]
    assert (
        export.main(
            [
                str(tmp_path / "model.safetensors"),
                "--size",
                *sides,
                "-o",
                str(tmp_path / "model.onnx"),
            ]
        )
        == 0
    )
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == model.labels
    images = torch.randn(3, 3, *size)
    with torch.inference_mode():
        assert (
            scaled_error(session.run(["logits"], {"images": images.numpy()})[0], model(images))
            < 1e-5
        )
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.safetensors"]


@pytest.mark.slow
def test_export_of_a_backbone_to_onnx(weights, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.main([str(weights), "-o", str(tmp_path / "model.onnx")]) == 0
    assert "images (B, 3, 16, 16) -> embeddings (B, 32)" in capsys.readouterr().out
    session, images = (
        onnxruntime.InferenceSession(tmp_path / "model.onnx"),
        torch.randn(3, 3, 16, 16),
    )
    with torch.inference_mode():
        expected = dinoreg.load(weights)(images)
    assert scaled_error(session.run(["embeddings"], {"images": images.numpy()})[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-o", "x.onnx", "--size", "30"],
            "30 x 30 pixels are not multiples of 4; the nearest are 32 x 32",
        ),
        (["-o", "x.pt2"], "x.pt2: must be a .onnx file in a folder that exists"),
        (["-o", "x.onnx", "--to", "aoti"], "x.onnx: must be a .pt2 file in a folder that exists"),
        (
            ["-o", "missing/x.pt2", "--to", "aoti"],
            "missing/x.pt2: must be a .pt2 file in a folder that exists",
        ),
    ],
)
def test_export_reports_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([str(DIGITS), *arguments]) == 2 and os.listdir(tmp_path) == []
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f": {message}\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", ["--size 0", "--size 4 4 4", "--batch-size 2", "--dtype bfloat16"]
)
def test_export_refuses_options_that_do_not_apply(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main([str(DIGITS), "-o", "x.onnx", *arguments.split()])
    assert "error: --" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a C++ compiler")
def test_aotinductor_packages_match_the_model(weights, tmp_path, capsys):
    package = tmp_path / "model.pt2"
    assert export.main([str(weights), "--to", "aoti", "-o", str(package), "--batch-size", "3"]) == 0
    assert "images (3, 3, 16, 16) -> embeddings (3, 32)" in capsys.readouterr().out
    images = torch.randn(3, 3, 16, 16)
    found = torch._inductor.aoti_load_package(str(package))(images)
    torch.testing.assert_close(found, dinoreg.load(weights)(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x * float("nan")])
def test_wrong_outputs_are_reported(wrong, weights, tmp_path, monkeypatch):
    model = dinoreg.load(weights)
    model.fix_image_size(16, 16)
    monkeypatch.setattr(export, "write", lambda *args: None)
    for function, status in ((model, 0), (lambda images: wrong(model(images)), 1)):
        monkeypatch.setattr(export, "read", lambda path, to, function=function: function)
        assert export.main([str(weights), "-o", str(tmp_path / "model.onnx")]) == status


needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")


@pytest.mark.slow
@needs_torchao
def test_quantize_prints_speed_and_cosine(weights, capsys):
    photo = str(HERE / "images" / "coffee.jpg")
    assert quantize.main([photo, "--model", str(weights), "--turns", "1"]) == 0
    out, err = capsys.readouterr()
    assert (
        "times as fast as float32" in out.splitlines()[1]
        and out.startswith("batch of 1: ")
        and err == ""
    )
    cosine = float(re.search(r"to ([\d.]+)$", out, re.MULTILINE)[1])
    assert 0.99 < cosine < 1  # int8: close, but not equal


@needs_torchao
def test_quantize_reports_unreadable_images(weights, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    assert quantize.main([str(tmp_path / "bad.png"), "--model", str(weights)]) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith(f"quantize: {tmp_path / 'bad.png'}: cannot identify image file")
        and err.count("\n") == 1
    )
