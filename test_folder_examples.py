"""Tests of the examples that work on a folder of images: examples/search.py."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinoreg

HERE = Path(__file__).parent
REAL_WEIGHTS = HERE.parent / "shared" / "data" / "dinov2_vits14_pretrain_fp16.pth"  # ViT-S/14 without registers
TINY = dinoreg.Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=16, crop_size=16)
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run_example(name, *arguments):
    """Run a script as its users do."""
    command = [sys.executable, HERE / "examples" / f"{name}.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def load_example(monkeypatch):
    def load(name):
        for module in ("matplotlib", "tqdm"):
            pytest.importorskip(module)
        monkeypatch.syspath_prepend(HERE / "examples")
        return importlib.import_module(name)

    return load


@pytest.fixture
def call_example(load_example, monkeypatch, capsys):
    """Run a script in this process, which saves the seconds of its imports."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = load_example(name).main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        return Result(status, *capsys.readouterr())

    return call


def save_tiny(path, seed=0, **changes):
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(replace(TINY, **changes))
    torch.nn.init.normal_(model.patch_embed.proj.weight, std=0.3)  # colours count for more than the place
    dinoreg.save(model, path)
    return path


def paint(path, colour, seed=0):
    """An image of 24 x 20 noisy pixels of about one colour."""
    pixels = np.array(colour) + np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of three colours, in sub-folders."""
    for name, colour in COLOURS.items():
        for i in range(10):
            paint(tmp_path / "images" / name / f"{i}.png", colour, i)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# search.py


@pytest.fixture
def search(call_example):
    return lambda folder, model, *arguments: call_example("search", folder, "--model", model, *arguments)


def test_search_finds_the_nearest_by_cosine(load_example, folder, model, tmp_path):
    load_example("search")  # or skip
    query, output = paint(tmp_path / "query.png", COLOURS["red"], 99), tmp_path / "sheet.png"
    result = run_example("search", folder, "--model", model, "--query", query, "--top", 5, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "30 embedded, 0 kept, 0 gone" in result.stdout

    backbone, paths = dinoreg.load(model), dinoreg.find_images([folder])
    with torch.inference_mode():
        features = backbone(torch.stack([dinoreg.preprocess(path, 16) for path in [query, *paths]]))
    features = F.normalize(features, dim=1)
    expected = (features[1:] @ features[0]).sort(descending=True)
    found = [line.split("  ") for line in result.stdout.splitlines()[1:-1]]
    np.testing.assert_allclose([float(cosine) for cosine, _ in found], expected.values[:5], atol=2e-3)
    assert all(Path(path).parent.name == "red" for _, path in found) and len({path for _, path in found}) == 5

    stored, metadata = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    assert stored["features"].dtype == torch.float16
    assert [name for name, _ in json.loads(metadata["files"])] == [p.relative_to(folder).as_posix() for p in paths]
    torch.testing.assert_close(stored["features"].float(), features[1:], atol=1e-3, rtol=0)
    with Image.open(output) as sheet:
        assert sheet.format == "PNG" and sheet.width > 800
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - COLOURS["red"]).max(axis=1) < 40).mean() > 0.4  # six red squares, and some paper


def test_search_embeds_only_what_changed(search, folder, model):
    index = folder / ".dinoreg-index.safetensors"
    first = search(folder, model)
    assert "30 embedded, 0 kept, 0 gone" in first.stdout
    before = index.stat().st_mtime_ns
    assert "0 embedded, 30 kept, 0 gone" in search(folder, model).stdout
    assert index.stat().st_mtime_ns == before  # was not written again

    paint(folder / "red" / "0.png", COLOURS["blue"], 50)
    paint(folder / "new.png", COLOURS["blue"], 51)
    (folder / "green" / "9.png").unlink()
    (folder / "green" / "8.png").unlink()
    result = search(folder, model, "--query", folder / "new.png", "--top", 11, "--output", folder / "sheet.png")
    assert "2 embedded, 27 kept, 2 gone" in result.stdout
    found = {Path(line.split("  ")[1]) for line in result.stdout.splitlines()[1:-1]}
    assert found == {folder / "red" / "0.png", *(folder / "blue").iterdir()}  # and not new.png itself
    assert "0 embedded, 29 kept, 0 gone" in search(folder, model, "--output", folder / "sheet.png").stdout
    assert [path.name for path in folder.iterdir() if path.name.startswith(("tmp", "part"))] == []


def test_search_rebuilds_for_another_model(search, folder, model, tmp_path):
    search(folder, model)
    features, _ = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    features = features["features"].clone()
    assert "30 embedded, 0 kept" in search(folder, save_tiny(tmp_path / "other.safetensors", 1)).stdout
    others, _ = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    assert (features - others["features"]).abs().max() > 0.05
    save_tiny(tmp_path / "other.safetensors", 2, embed_dim=64)  # of the same name
    assert "30 embedded, 0 kept" in search(folder, tmp_path / "other.safetensors").stdout


def test_search_goes_on_after_a_bad_image(search, folder, model):
    (folder / "bad.jpg").write_text("no image")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    for embedded, kept in [(30, 0), (0, 30)]:
        result = search(folder, model)
        assert result.returncode == 1
        assert f"{embedded} embedded, {kept} kept" in result.stdout
        assert "bad.jpg: cannot identify" in result.stderr and "gone.png: No such file" in result.stderr
        assert "Traceback" not in result.stderr


def test_search_keeps_what_an_interrupted_run_has_done(search, load_example, folder, model, monkeypatch):
    module = load_example("search")
    whole = module.embed

    def interrupted(*arguments):
        features = whole(*arguments)
        yield from (next(features) for _ in range(7))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "embed", interrupted)
    assert search(folder, model).returncode == 130
    monkeypatch.setattr(module, "embed", whole)
    assert "23 embedded, 7 kept, 0 gone" in search(folder, model).stdout


def test_search_says_what_is_wrong_in_a_line(call_example, folder, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no image")
    before = model.read_bytes()
    image = folder / "red" / "0.png"
    for arguments, message in [
        ([tmp_path / "nowhere", "--model", model], "no such folder"),
        ([tmp_path / "empty", "--model", model], "no images"),
        ([folder, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([folder, "--model", tmp_path / "bad.jpg"], "not a checkpoint"),
        ([folder, "--model", model, "--query", tmp_path / "bad.jpg"], "cannot identify"),
        ([folder, "--model", model, "--query", tmp_path / "nothing.jpg"], "No such file"),
        ([folder, "--model", model, "--query", image, "--output", tmp_path / "nowhere" / "x.png"], "no such folder"),
        ([folder, "--model", model, "--index", model], "not an index"),
    ]:
        result = call_example("search", *arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert model.read_bytes() == before
    assert not (folder / ".dinoreg-index.safetensors").exists()


@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="the real ViT-S/14 weights are not here")
def test_search_with_real_weights_finds_the_cat(search, tmp_path):
    for name in ("astronaut", "chelsea", "coffee"):
        with Image.open(HERE / "examples" / "images" / f"{name}.jpg") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{name}.png")
    query, output = HERE / "examples" / "images" / "chelsea.jpg", tmp_path / "sheet.png"
    result = search(tmp_path, REAL_WEIGHTS, "--query", query, "--output", output)
    found = [line.split("  ") for line in result.stdout.splitlines()[1:-1]]
    assert Path(found[0][1]).stem == "chelsea" and float(found[0][0]) > 0.9 and float(found[1][0]) < 0.7
