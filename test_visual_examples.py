"""Tests of examples/visualize.py: `python -m pytest test_visual_examples.py`."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinoreg
from dinoreg import Config, DinoVisionTransformer, preprocess

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"
REAL_WEIGHTS = HERE.parent / "shared" / "data" / "dinov2_vits14_pretrain_fp16.pth"  # ViT-S/14 without registers
needs_real_weights = pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="the real ViT-S/14 weights are not here")

TINY = Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=20, crop_size=16)
TINY_PLAIN = replace(TINY, num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1)

sys.path.insert(0, str(EXAMPLES))
import visualize  # noqa: E402


def random_model(config: Config) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
            parameter.copy_(torch.randn_like(parameter) * spread + 0.02)
    return model.eval()


def random_photo(width: int, height: int) -> Image.Image:
    """Smooth noise, so that neighbouring patches are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def run(script: str, *args) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, EXAMPLES / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def errors(result: subprocess.CompletedProcess, script: str) -> list[str]:
    assert "Traceback" not in result.stderr, result.stderr
    return [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith(f"{script}: ")]


# ---------------------------------------------------------------------------------------------------------------------
# visualize.py


def test_principal_components_are_those_of_the_covariance():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([1, 9, 2, 5, 3, 0.1]) + 7
    variances, axes = np.linalg.eigh(np.cov(x.numpy().T))
    components = visualize.principal_components(x)
    assert np.allclose(np.cov(components.numpy().T), np.diag(variances[:2:-1]))
    assert np.allclose(abs(components), abs((x - x.mean(0)).numpy() @ axes[:, :2:-1]))
    # An axis keeps its direction whatever the order and the sign of the points.
    assert torch.allclose(visualize.principal_components(-x), -components)
    assert torch.allclose(visualize.principal_components(x.flip(0)), components.flip(0))


@pytest.mark.parametrize("count", [1, 2])
def test_principal_components_of_few_points(count):
    components = visualize.principal_components(torch.eye(count, 6))
    assert components.shape == (count, 3)
    assert torch.allclose(components.norm(dim=1), torch.tensor([0.0, 0.5**0.5])[count - 1])


@pytest.mark.parametrize("swap", [False, True])
def test_foreground_is_the_side_away_from_the_border_and_the_rest_is_black(swap):
    torch.manual_seed(0)
    h, w = 7, 9
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[2:5, 3:7] = True
    one, other = torch.randn(2, 16) * (-1 if swap else 1)
    patches = torch.where(inside.flatten()[:, None], one, other) + 0.1 * torch.randn(h * w, 16)
    foreground = visualize.find_foreground(patches, h, w)
    assert torch.equal(foreground, inside)
    colours = visualize.colour(patches, foreground)
    assert (colours[~inside] == 0).all()
    assert (colours[inside].amin(dim=0) == 0).all() and (colours[inside].amax(dim=0) == 1).all()


def test_colours_of_degenerate_images():
    same = torch.ones(6, 16)
    assert not visualize.colour(same, visualize.find_foreground(same, 2, 3)).any()
    assert visualize.find_foreground(torch.ones(1, 16), 1, 1).shape == (1, 1)
    assert torch.isfinite(visualize.colour(same, torch.ones(2, 3, dtype=torch.bool))).all()


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_maps_are_those_of_the_model(config):
    model, photo = random_model(config), random_photo(24, 16)
    x = preprocess(photo, (24 * 16) ** 0.5, keep_aspect=True, patch_size=4)
    maps = visualize.see(model, x)
    registers = [f"attention of register {i}" for i in range(1, config.num_register_tokens + 1)]
    assert list(maps) == ["image", "principal components", "norm", "attention of CLS", *registers]
    assert np.allclose(maps["image"], np.asarray(photo) / 255, atol=1e-6)
    with torch.inference_mode():
        (before_norm,) = model.get_intermediate_layers(x[None], norm=False, reshape=True)
        attention = model.attention_maps(x[None])
    assert torch.allclose(maps["norm"], before_norm[0].square().sum(0).sqrt())
    for i, title in enumerate(["attention of CLS", *registers]):
        assert torch.allclose(maps[title], attention[0, :, i].sum(0) / config.num_heads)
    assert maps["principal components"].shape == (4, 6, 3)


def test_visualizing_draws_a_row_for_each_model_and_counts_outliers(tmp_path):
    plain, registers = random_model(TINY_PLAIN), random_model(TINY)
    with torch.no_grad():
        plain.pos_embed[0, 1 + 7] = 1000  # which makes an outlier of the 8th of 25 patches
    dinoreg.save(plain, tmp_path / "plain.safetensors")
    dinoreg.save(dinoreg.LinearClassifier(registers, 3), tmp_path / "registers.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        random_photo(20, 20).save(tmp_path / folder / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    out = tmp_path / "new" / "folder"
    images = [tmp_path / name for name in ("text.png", "a", "b", "none.png")]
    models = [tmp_path / "plain.safetensors", tmp_path / "registers.safetensors"]

    result = run("visualize.py", *images, "--size", 20, "--output", out, "--model", *models)
    assert result.returncode == 1
    assert [line.split(": ")[1] for line in errors(result, "visualize")] == [str(images[0]), str(images[3])]
    outliers, none = result.stdout.splitlines()
    assert outliers.startswith(f"{models[0]}: 4.00% of 50 patches") and none.startswith(f"{models[1]}: 0.00% of 50 ")
    assert sorted(os.listdir(out)) == ["photo_2_features.png", "photo_features.png"]
    two = np.asarray(Image.open(out / "photo_features.png").convert("RGB"))

    # Without registers there are four columns; half of the norms are above their median.
    with torch.inference_mode():
        norms = visualize.see(plain, preprocess(images[1] / "photo.png", 20, True, 4))["norm"]
    cutoff = norms.median().item() - 1e-3
    args = ["--model", models[0], "--cutoff", cutoff, "--size", 20, "--output", out]
    result = run("visualize.py", tmp_path / "a" / "photo.png", *args)
    assert result.returncode == 0 and not errors(result, "visualize")
    assert result.stdout.startswith(f"{models[0]}: 52.00% of 25 patches")  # 13 of 25
    one = np.asarray(Image.open(out / "photo_features.png").convert("RGB"))
    assert two.shape[1] == 2 * one.shape[1] and two.shape[0] > 1.5 * one.shape[0]
    # The outlier shines in the map of norms, the third column, and it alone: it is a 25th of that.
    yellow = (abs(one.astype(int) - [253, 231, 37]).max(axis=2) < 3).sum(axis=0)
    columns = yellow.reshape(4, -1).sum(axis=1)
    assert columns.argmax() == 2 and columns[2] == pytest.approx((one.shape[1] / 4) ** 2 / 25, rel=0.15)


@pytest.mark.parametrize("script", ["visualize.py"])
def test_what_cannot_start_says_why_in_a_line(tmp_path, script):
    name = script.removesuffix(".py")
    random_photo(20, 20).save(tmp_path / "photo.png")
    (tmp_path / "bad.pth").write_text("no weights")
    dinoreg.save(random_model(TINY), tmp_path / "tiny.safetensors")
    for args, reason in [
        (["--model", tmp_path / "none.pth"], "no such file"),
        (["--model", tmp_path / "bad.pth"], "not a checkpoint"),
        (["--model", tmp_path / "tiny.safetensors", "--size", 3], "at least 4"),
    ]:
        result = run(script, tmp_path / "photo.png", "--output", tmp_path / "out", *args)
        (line,) = errors(result, name)
        assert result.returncode == 2 and reason in line and not result.stdout
        assert not (tmp_path / "out").exists()


@needs_real_weights
def test_real_weights_see_the_cup():
    photo = EXAMPLES / "images" / "coffee.jpg"
    maps = visualize.see(dinoreg.load(REAL_WEIGHTS), preprocess(photo, 336, keep_aspect=True))
    foreground = maps["principal components"].any(dim=2)  # (20, 29)
    assert foreground[5:18, 8:20].float().mean() > 0.95
    assert foreground[:, :3].float().mean() < 0.05 and foreground[:, -5:].float().mean() < 0.05
    assert maps["norm"].max() < visualize.OUTLIER * maps["norm"].median()  # so small a model has no outliers
