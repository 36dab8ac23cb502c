"""Tests of examples/export.py: `python -m pytest examples/tests/test_export.py`."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dinoreg
import export
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
    options = ["--size", *sides, "-o", str(tmp_path / "model.onnx"), "--turns", "1"]
    assert export.main([str(tmp_path / "model.safetensors"), *options]) == 0
    shapes, differences, speed = capsys.readouterr().out.splitlines()
    assert shapes.startswith(f"{tmp_path / 'model.onnx'} written: images (B, 3, ")
    assert shapes.endswith(" -> logits (B, 3)")
    assert differences.endswith("; lowest cosine: 1.000000")
    assert float(differences.partition(";")[0].split()[-1]) < 1e-5
    assert speed.endswith(" times as fast as PyTorch with batches of 2")

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
        ("-o x.onnx --size 30", "30 x 30 pixels are not multiples of 4; the nearest are 32 x 32"),
        ("-o x.onnx --size 4 4 4", "--size takes one or two numbers"),
        ("-o x.pt2", "x.pt2: must be a .onnx file in a folder that is writable"),
        ("-o x.onnx --to aoti", "x.onnx: must be a .pt2 file in a folder that is writable"),
        ("-o x.onnx --to int8", "x.onnx: must be a .pt2 file in a folder that is writable"),
        ("-o no/x.pt2 --to aoti", "no/x.pt2: must be a .pt2 file in a folder that is writable"),
        ("-o folder.onnx", "folder.onnx: must be a .onnx file in a folder that is writable"),
        ("-o pipe.onnx", "pipe.onnx: must be a .onnx file in a folder that is writable"),
        ("-o model.onnx", "model.onnx is the file of the model: choose another --output"),
        ("-o x.onnx --batch-size 2", "for any --batch-size: leave out these options"),
        ("-o x.onnx --dtype bfloat16", "for any --batch-size: leave out these options"),
        ("-o x.onnx --images folder.onnx", "no image of --images can be read"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.onnx")
    os.mkfifo("pipe.onnx")
    shutil.copy(DIGITS, "model.onnx")
    assert export.main(["model.onnx", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"{message}\n") and err.count("\n") == 1
    assert sorted(os.listdir()) == ["folder.onnx", "model.onnx", "pipe.onnx"]
    assert Path("model.onnx").read_bytes() == DIGITS.read_bytes()


@pytest.mark.parametrize("arguments", ["-o x.onnx --size 0", "-o x.onnx --turns 0", "", "-o "])
def test_wrong_options_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        export.main([str(DIGITS), *arguments.split(" ")])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a C++ compiler")
def test_aotinductor_packages_match_the_model(weights, tmp_path, capsys):
    package = tmp_path / "model.pt2"
    assert export.main([str(weights), "--to", "aoti", "-o", str(package), "--batch-size", "3"]) == 0
    assert "images (3, 3, 16, 16) -> embeddings (3, 32)" in capsys.readouterr().out
    images = torch.randn(3, 3, 16, 16)
    found = torch._inductor.aoti_load_package(str(package))(images)
    torch.testing.assert_close(found, dinoreg.load(weights)(images), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not shutil.which("c++"), reason="it is checked that there is a C++ compiler")
@pytest.mark.parametrize("to", ["onnx", "aoti", "int8"])
def test_a_file_of_wrong_outputs_is_not_kept(to, weights, tmp_path, monkeypatch, capsys):
    model, output = dinoreg.load(weights), tmp_path / f"x{export.SUFFIXES[to]}"
    model.fix_image_size(16, 16)
    monkeypatch.setattr(export, "write", lambda model, images, path, to: path.touch())
    changes = [lambda x: x, lambda x: x + x.roll(1, dims=1), lambda x: x * float("nan")]
    changes += [lambda x: x * 1.001] if to != "int8" else []
    for change, expected in zip(changes, [0, 2, 2, 2]):
        monkeypatch.setattr(export, "read", lambda *_, f=change: lambda images: f(model(images)))
        status = export.main([str(weights), "--to", to, "-o", str(output), "--turns", "1"])
        err = capsys.readouterr().err
        assert (status, output.exists()) == (expected, expected == 0)
        assert ("the exported model is wrong, and not kept" in err) == bool(expected)
        output.unlink(missing_ok=True)


def test_outputs_are_compared_on_photos(weights, tmp_path, monkeypatch, capsys):
    """All of them, and in batches of one size; unreadable ones are reported."""
    model, seen = dinoreg.load(weights), []
    model.fix_image_size(16, 20)
    monkeypatch.setattr(export, "write", lambda model, images, path, to: path.touch())
    monkeypatch.setattr(export, "read", lambda *_: lambda x: seen.append(x) or model(x))
    (tmp_path / "bad.png").write_text("no image")
    photos = [HERE / "images" / f"{name}.jpg" for name in ("astronaut", "chelsea", "coffee")]
    options = ["--images", *photos, tmp_path / "bad.png", "--size", 16, 20, "--turns", 1]
    assert export.main([*map(str, [weights, "-o", tmp_path / "x.onnx", *options])]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"export: {tmp_path / 'bad.png'}: cannot identify image file")
    assert err.count("\n") == 1 and [len(x) for x in seen[:3]] == [2, 2, 1]
    whole = dinoreg.Transform(resize=(16, 20), crop=None)
    expected = torch.stack([dinoreg.preprocess(photo, transform=whole) for photo in photos])
    assert torch.equal(torch.cat(seen[:3]), expected[[0, 1, 2, 0, 0]])


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
@pytest.mark.skipif(not shutil.which("c++"), reason="AOTInductor needs a C++ compiler")
def test_int8_packages_are_close_to_the_model(weights, tmp_path, monkeypatch, capsys):
    package = tmp_path / "model.pt2"
    options = ["--to", "int8", "-o", str(package), "--images", str(HERE / "images")]
    assert export.main([str(weights), *options, "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    cosine = float(out.partition("lowest cosine: ")[2].split()[0])
    assert 0.99 < cosine < 1  # close, but not equal
    assert "images (2, 3, 16, 16) -> embeddings (2, 32)" in out
    images = torch.randn(2, 3, 16, 16)
    found = torch._inductor.aoti_load_package(str(package))(images)
    expected = dinoreg.load(weights)(images)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
