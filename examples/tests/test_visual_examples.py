"""Tests of the scripts visualize.py, find_objects.py and explore.py.

The page of the last has its own, test_explore.py.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinoreg
from dinoreg import preprocess
from test_dinoreg import SALIENCY_WEIGHTS, TINY, TINY_PLAIN, randomised

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

HERE = Path(__file__).parents[1]
needs_saliency_weights = pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)

import common
import explore
import find_objects
import patches
import visualize


def random_photo(width: int, height: int) -> Image.Image:
    """Smooth noise, so that neighboring patches are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def call(capsys):
    """Run a script in this process: its exit status, standard output and the lines of its error
    messages.
    """

    def call(script, *arguments):
        name = script.__name__
        capsys.readouterr()
        status = script.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return (
            status,
            out,
            [line for line in err.replace("\r", "\n").splitlines() if line.startswith(f"{name}: ")],
        )

    return call


def test_a_script_runs_in_a_clone_that_is_not_installed(tmp_path):
    arguments = [
        HERE / "images" / "two.png",
        "--model",
        HERE / "digits.safetensors",
        "-o",
        tmp_path / "page.html",
    ]
    command = [sys.executable, HERE / "explore.py", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("script", ["visualize", "explore", "find_objects"])
def test_plotting_libraries_are_imported_after_the_arguments_are_parsed(script):
    imports = re.findall(
        r"^(?:import|from) (\w+)", (HERE / f"{script}.py").read_text(), re.MULTILINE
    )
    assert "common" in imports and not {"matplotlib", "scipy", "sklearn"} & set(imports)


# --------------------------------------------------------------------------------------------------
# visualize.py


def test_principal_components_are_those_of_the_covariance():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([1, 9, 2, 5, 3, 0.1]) + 7
    variances, axes = np.linalg.eigh(np.cov(x.numpy().T))
    components = patches.principal_components(x)
    assert np.allclose(np.cov(components.numpy().T), np.diag(variances[:2:-1]))
    assert np.allclose(abs(components), abs((x - x.mean(0)).numpy() @ axes[:, :2:-1]))
    # An axis keeps its direction whatever the order and the sign of the points.
    assert torch.allclose(patches.principal_components(-x), -components)
    assert torch.allclose(patches.principal_components(x.flip(0)), components.flip(0))


@pytest.mark.parametrize("count", [1, 2])
def test_principal_components_of_few_points(count):
    components = patches.principal_components(torch.eye(count, 6))
    assert components.shape == (count, 3)
    assert torch.allclose(components.norm(dim=1), torch.tensor([0.0, 0.5**0.5])[count - 1])


@pytest.mark.parametrize("swap", [False, True])
def test_foreground_is_away_from_the_border_and_background_is_black(swap):
    torch.manual_seed(0)
    h, w = 7, 9
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[2:5, 3:7] = True
    one, other = torch.randn(2, 16) * (-1 if swap else 1)
    x = torch.where(inside.flatten()[:, None], one, other) + 0.1 * torch.randn(h * w, 16)
    foreground = patches.find_foreground(x, h, w)
    assert torch.equal(foreground, inside)
    colors = patches.color(x, foreground.flatten())
    assert (colors[~inside.flatten()] == 0).all()
    inside = colors[inside.flatten()]
    assert (inside.amax(dim=1) > 0.5).all()  # none looks like background
    assert len(inside.unique(dim=0)) == len(inside)


def oklab_lightness(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB (M, 3) -> lightness (M,), by the published equations."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).double()
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    cones = (linear @ torch.tensor(to_cones).double().T) ** (1 / 3)
    return cones @ torch.tensor([0.2104542553, 0.7936177850, -0.0040720468]).double()


def test_oklab_has_the_published_colors():
    # https://bottosson.github.io/posts/oklab/: white, and the primary colors of sRGB.
    lab = [[1, 0, 0], [0.62796, 0.22486, 0.12585], [0.86644, -0.23389, 0.17950]]
    lab += [[0.45201, -0.03246, -0.31153], [0, 0, 0]]
    expected = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert torch.allclose(patches.oklab_to_rgb(*torch.tensor(lab).T), expected, atol=2e-3)


def test_colors_are_vivid_of_similar_lightness_and_as_different_as_features():
    torch.manual_seed(0)
    features = torch.randn(2000, 16) * torch.tensor([9.0, 3, 1] + 13 * [0.1])
    colors = patches.color(features, torch.ones(2000, dtype=torch.bool))
    lightness = oklab_lightness(colors)
    assert lightness.min() > 0.55 and lightness.max() < 0.9
    saturation = colors.amax(dim=1) - colors.amin(dim=1)
    assert saturation.mean() > 0.3
    # The third component counts as much as the first, whose variance is 81 times as large.
    for axis in range(3):
        low, high = (colors[index].mean(dim=0) for index in features[:, axis].argsort().chunk(2))
        assert (low - high).abs().max() > 0.15


def test_colors_of_degenerate_images():
    same = torch.ones(6, 16)
    assert not patches.color(same, patches.find_foreground(same, 2, 3).flatten()).any()
    assert patches.find_foreground(torch.ones(1, 16), 1, 1).shape == (1, 1)
    assert torch.isfinite(patches.color(same, torch.ones(6, dtype=torch.bool))).all()


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_maps_match_the_model_and_take_one_pass(config):
    model, x = randomised(config), torch.randn(3, 16, 24)
    runs = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    maps = visualize.compute_maps(model, x, [0, -1])
    assert runs == [0, 1, 2]
    with torch.inference_mode():
        (features,) = model.get_intermediate_layers(x[None], reshape=True)
        (before_norm,) = model.get_intermediate_layers(x[None], norm=False, reshape=True)
        attention = model.attention_maps(x[None], [0, -1])
    assert torch.allclose(maps["features"], features[0].permute(1, 2, 0), atol=1e-5)
    assert torch.allclose(maps["norms"], before_norm[0].square().sum(0).sqrt())
    assert maps["attention"].shape == (2, 4, 1 + config.num_register_tokens, 4, 6)
    assert torch.allclose(maps["attention"], torch.cat(attention))


def test_the_same_feature_has_the_same_color_in_all_photos():
    torch.manual_seed(0)
    # The background and four parts of objects.
    parts = torch.cat([torch.full((1, 16), 9.0), torch.randn(4, 16)])
    photos, places = [], [torch.zeros(6, 8, dtype=torch.long) for _ in range(2)]
    for place, inside in zip(places, ([1, 2, 3, 1], [3, 4, 1, 4])):
        place[1:-1, 1:-1] = torch.tensor(inside)[:, None]
        photos.append({"features": parts[place] + 0.01 * torch.randn(6, 8, 16), "norms": place})
    patches.add_colors(photos)
    first, second = (photo["colors"] for photo in photos)
    assert torch.equal(first.any(dim=2), places[0] > 0) and torch.equal(
        second.any(dim=2), places[1] > 0
    )
    means = [
        colors[place == part].mean(dim=0)
        for colors, place in ((first, places[0]), (second, places[1]))
        for part in (1, 3)
    ]
    assert torch.allclose(torch.stack(means[:2]), torch.stack(means[2:]), atol=0.05)
    assert (means[0] - means[1]).abs().max() > 0.5
    patches.add_colors(photos[1:])
    assert (photos[1]["colors"] - second).abs().max() > 0.2  # alone it has other colors


def test_visualize_draws_the_maps_of_each_model_and_counts_outliers(tmp_path, call):
    plain, registers = randomised(TINY_PLAIN), randomised(TINY)
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

    args = ["--output", out, "--model", *models, "--stride", 4]
    status, printed, errors = call(visualize, *images, *args)
    assert status == 1
    assert [line.split(": ")[1] for line in errors] == [str(images[0]), str(images[3])]
    *pictures, outliers, none = printed.splitlines()
    assert pictures == [str(out / "photo_features.png"), str(out / "photo_2_features.png")]
    assert outliers.startswith(f"{models[0]}: 4.00% of 50 patches") and none.startswith(
        f"{models[1]}: 0.00% of 50 "
    )
    assert sorted(os.listdir(out)) == ["photo_2_features.png", "photo_features.png"]
    two = read_pixels(out / "photo_features.png")

    # Half of the norms are above their median.
    norms = visualize.compute_maps(plain, preprocess(images[1] / "photo.png", 20, True, 4))["norms"]
    cutoff = norms.median().item() - 1e-3
    args = ["--model", models[0], "--cutoff", cutoff, "--resolution", 20, "--output", out]
    status, printed, errors = call(visualize, tmp_path / "a" / "photo.png", *args, "--stride", 4)
    assert status == 0 and not errors
    picture, share = printed.splitlines()
    assert picture == str(out / "photo_features.png")
    assert share.startswith(f"{models[0]}: 52.00% of 25 patches")  # 13 of 25
    one = read_pixels(out / "photo_features.png")
    # One row of four maps for the model without registers, and two of four for the other one: no
    # places are empty.
    assert two.shape[1] == one.shape[1] and two.shape[0] == pytest.approx(3 * one.shape[0], rel=0.1)
    # Only the outlier is yellow, in the map of norms, which is the third: one of 25 patches.
    side = round(visualize.TILE * 150)
    yellow = (abs(one - [253, 231, 37]).max(axis=2) < 3).sum(axis=0)
    left, right = 2 * side, 3 * side + 50
    assert yellow[left:right].sum() == pytest.approx(side**2 / 25, rel=0.15)
    # Each model has its own scale: the norms of the other one, without outliers, are not all dark.
    top = round(two.shape[0] * 0.4)
    other = two[top : top + side, 2 * side + 60 : 3 * side]
    assert (abs(other - [68, 1, 84]).max(axis=2) > 60).mean() > 0.5


@pytest.mark.parametrize(
    "config, heads, tiles", [(TINY, 0, 8), (TINY_PLAIN, 0, 4), (TINY, 4, 12), (TINY_PLAIN, 4, 8)]
)
def test_the_maps_of_a_picture(tmp_path, call, config, heads, tiles):
    model = randomised(config)
    dinoreg.save(model, tmp_path / "tiny.safetensors")
    maps = visualize.compute_maps(model, torch.randn(3, 20, 20))
    maps["colors"] = torch.zeros(5, 5, 3)
    listed = visualize.list_tiles(torch.zeros(20, 20, 3), maps, bool(heads))
    assert len(listed) == tiles
    titles = ["image", "principal components", "norm", "attention of CLS"]
    titles += [f"attention of register {i + 1}" for i in range(config.num_register_tokens)]
    titles += [f"CLS, head {i + 1}" for i in range(heads)]
    assert [title for title, _ in listed] == titles
    if heads:
        attention = torch.stack([values for _, values in listed[-heads:]])
        assert torch.equal(attention, maps["attention"][0, :, 0])
    random_photo(20, 20).save(tmp_path / "photo.png")
    args = [tmp_path / "photo.png", "--model", tmp_path / "tiny.safetensors", "-o", tmp_path]
    assert call(visualize, *args, *["--heads"] * bool(heads))[0] == 0
    width = Image.open(tmp_path / "photo_features.png").width
    assert width == pytest.approx(4 * visualize.TILE * 150, rel=0.15)


def test_maps_are_written_as_arrays(tmp_path, call):
    model = randomised(TINY)
    dinoreg.save(model, tmp_path / "tiny.safetensors")
    for name, size in (("a", (24, 16)), ("b", (16, 24))):
        random_photo(*size).save(tmp_path / f"{name}.png")
    args = [
        tmp_path / "a.png",
        tmp_path / "b.png",
        "--model",
        tmp_path / "tiny.safetensors",
        "--npy",
        "--stride",
        4,
        "-o",
        tmp_path,
    ]
    colors = []
    for per_photo in ([], ["--per-photo"]):
        status, _, errors = call(visualize, *args, *per_photo)
        assert status == 0 and not errors
        expected = [
            visualize.compute_maps(
                model, preprocess(tmp_path / f"{name}.png", 20, True, 4, transform=model.transform)
            )
            for name in "ab"
        ]
        for group in ([maps] for maps in expected) if per_photo else [expected]:
            patches.add_colors(group)
        for name, maps in zip("ab", expected):
            for kind in ("features", "norms", "attention", "colors"):
                array = np.load(tmp_path / f"{name}_tiny_{kind}.npy")
                assert np.allclose(array, maps[kind], atol=1e-5), kind
        colors.append(np.load(tmp_path / "b_tiny_colors.npy"))
    assert not np.allclose(*colors, atol=0.05)
    (tmp_path / "other").mkdir()
    dinoreg.save(model, tmp_path / "other" / "tiny.safetensors")
    models = ["--model", tmp_path / "tiny.safetensors", tmp_path / "other" / "tiny.safetensors"]
    status, _, (error,) = call(visualize, tmp_path / "a.png", *models, "--npy", "-o", tmp_path)
    assert status == 2 and "give models of different names" in error


@pytest.mark.parametrize("script", [visualize, explore, find_objects])
@pytest.mark.parametrize(
    "model, size, reason",
    [
        ("none.pth", 20, "no such file"),
        ("bad.pth", 20, "not a checkpoint"),
        ("tiny.safetensors", 3, "at least 4"),
    ],
)
def test_start_errors_are_one_line(tmp_path, call, script, model, size, reason):
    random_photo(20, 20).save(tmp_path / "photo.png")
    (tmp_path / "bad.pth").write_text("no weights")
    dinoreg.save(randomised(TINY), tmp_path / "tiny.safetensors")
    args = ["--model", tmp_path / model, "--resolution", size, "--output", tmp_path / "out"]
    status, printed, (line,) = call(script, tmp_path / "photo.png", *args)
    assert status == 2 and reason in line and not printed
    assert not (tmp_path / "out").exists()


@needs_saliency_weights
def test_foreground_of_the_cup():
    photo = HERE / "images" / "coffee.jpg"
    maps = visualize.compute_maps(
        dinoreg.load(SALIENCY_WEIGHTS), preprocess(photo, 336, keep_aspect=True)
    )
    patches.add_colors([maps])
    foreground = maps["colors"].any(dim=2)  # (20, 29)
    assert foreground[5:18, 8:20].float().mean() > 0.95
    assert foreground[:, :3].float().mean() < 0.05 and foreground[:, -5:].float().mean() < 0.05
    assert maps["norms"].max() < patches.OUTLIER * maps["norms"].median()


@pytest.mark.parametrize("script", [visualize, find_objects, explore])
def test_a_stride_makes_the_grid_denser(tmp_path, call, script):
    model, x = randomised(TINY), torch.randn(3, 12, 20)
    common.set_input(model, stride=2)
    assert visualize.compute_maps(model, x)["norms"].shape == (5, 9)
    assert find_objects.last_attention(model, x)["keys"].shape == (45, 32)
    dinoreg.save(randomised(TINY), tmp_path / "tiny.safetensors")
    random_photo(40, 24).save(tmp_path / "photo.png")
    args = [tmp_path / "photo.png", "--model", tmp_path / "tiny.safetensors", "--resolution", 20]
    output = tmp_path / "page.html" if script is explore else tmp_path
    assert call(script, *args, "--stride", 2, "--output", output)[0] == 0
    status, _, (error,) = call(script, *args, "--stride", 3, "--output", output)
    assert status == 2 and "--stride must be a divisor of the patch size, 4, got 3" in error


@pytest.mark.parametrize(
    "patch_size, options, grid", [(4, [], 9), (4, ["--stride", 4], 5), (5, [], 4)]
)
def test_patches_overlap_by_half_unless_a_stride_is_given(
    tmp_path, call, patch_size, options, grid
):
    config = replace(TINY, patch_size=patch_size)
    dinoreg.save(randomised(config), tmp_path / "tiny.safetensors")
    random_photo(20, 20).save(tmp_path / "photo.png")
    args = [tmp_path / "photo.png", "--model", tmp_path / "tiny.safetensors", "-o", tmp_path]
    assert call(visualize, *args, "--npy", *options)[0] == 0
    assert np.load(tmp_path / "photo_tiny_norms.npy").shape == (grid, grid)


# --------------------------------------------------------------------------------------------------
# All three: inputs and outputs that go wrong


@pytest.fixture
def tiny(tmp_path) -> Path:
    dinoreg.save(randomised(TINY), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def output_of(script, folder: Path) -> Path:
    return folder / "page.html" if script is explore else folder


@pytest.mark.parametrize("script", [visualize, find_objects, explore])
def test_features_that_are_not_finite_are_an_error_of_the_image(tmp_path, call, script):
    model = randomised(TINY_PLAIN)
    with torch.no_grad():  # a patch that is nearly white becomes infinite
        model.patch_embed.proj.weight.fill_(1e37)
    dinoreg.save(model, tmp_path / "inf.safetensors")
    photos = [tmp_path / "white.png", tmp_path / "other.png"]
    for photo in photos:
        Image.new("RGB", (20, 20), "white").save(photo)
    out = tmp_path / "out" if script is not explore else tmp_path / "page.html"
    args = ["--model", tmp_path / "inf.safetensors", "--output", out]
    status, _, errors = call(script, *photos, *args)
    assert status == 1 and len(errors) == 2
    assert all(str(x) in line and "NaN or infinity" in line for x, line in zip(photos, errors))
    assert not (os.listdir(out) if out.is_dir() else out.exists())


@pytest.mark.parametrize("script", [visualize, find_objects, explore])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_strange_names_in_a_folder_cost_only_themselves(tmp_path, call, script, tiny):
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    names = ["plain.png", "l" * 251 + ".png", "\x1b]0;x\x07.png", os.fsdecode(b"\xff.png")]
    for name in names:
        random_photo(20, 20).save(folder / name)
    (folder / "\x1b[31m.png").write_text("no image")
    out = output_of(script, tmp_path / "out")
    out.parent.mkdir(exist_ok=True)
    status, printed, errors = call(script, folder, "--model", tiny, "--output", out)
    assert status == 1 and len(errors) == 2
    assert "\x1b" not in printed + "".join(errors) and "\x07" not in printed
    assert out.exists() if script is explore else len(os.listdir(out)) == 4


@pytest.mark.parametrize("script, name", [(visualize, "features"), (find_objects, "object")])
def test_outputs_never_replace_an_image(tmp_path, call, tiny, script, name):
    photos = [tmp_path / "photo.png", tmp_path / f"photo_{name}.png"]
    for photo in photos:
        random_photo(20, 20).save(photo)
    before = photos[1].read_bytes()
    status, printed, (error,) = call(script, *photos, "--model", tiny, "--output", tmp_path)
    assert status == 2 and not printed
    assert f"photo_{name}.png is one of the images: choose another --output" in error
    assert photos[1].read_bytes() == before
    assert call(script, photos[0], "--model", tiny, "--output", tmp_path)[0] == 0


@pytest.mark.parametrize("kind", ["input", "folder", "pipe"])
def test_pages_replace_only_files(tmp_path, call, tiny, kind):
    photo, pipe = tmp_path / "photo.png", tmp_path / "pipe"
    random_photo(20, 20).save(photo)
    os.mkfifo(pipe)
    before = photo.read_bytes()
    output = {"input": photo, "folder": tmp_path, "pipe": pipe}[kind]
    status, printed, (error,) = call(explore, photo, "--model", tiny, "--output", output)
    assert status == 2 and not printed and str(output) in error
    assert photo.read_bytes() == before


# --------------------------------------------------------------------------------------------------
# explore.py


def cosine_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of a cosine between all pairs of rows of x (M, D) and those of y
    (M, K).
    """
    own, kept = (F.cosine_similarity(z[:, None], z[None], dim=2) for z in (x, y.float()))
    return (own - kept).abs().max().item()


def test_compressed_features_keep_the_cosines():
    torch.manual_seed(0)
    x = torch.randn(300, 64) * 0.9 ** torch.arange(64) + 0.1
    compressed, error = explore.compress(x)
    assert compressed.dtype == torch.int8 and compressed.shape[1] < 64
    assert abs(cosine_error(x, compressed) - error) < 1e-5
    assert error <= explore.TOLERANCE < cosine_error(x, compressed[:, :-1])


def test_the_patches_that_lose_most_have_the_largest_error(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(600, 48) * 0.9 ** torch.arange(48) + 0.1
    x[::50] += torch.randn(12, 48) * 0.4  # a few differ from all others
    expected = explore.compress(x)[0]
    monkeypatch.setattr(explore, "CHECKED", 60)
    compressed, error = explore.compress(x)
    assert torch.equal(compressed, expected) and abs(cosine_error(x, compressed) - error) < 1e-5


@pytest.mark.parametrize("count, dim", [(1, 8), (3, 8), (5, 1)])
def test_few_features_are_compressed(count, dim):
    torch.manual_seed(0)
    compressed, error = explore.compress(torch.randn(count, dim))
    assert len(compressed) == count and error <= explore.TOLERANCE


def test_explore_continues_after_a_bad_image(tmp_path, call):
    (tmp_path / "broken.png").write_text("no image")
    two, page, model = (
        HERE / "images" / "two.png",
        tmp_path / "page.html",
        HERE / "digits.safetensors",
    )
    photos = [two, tmp_path / "broken.png"]
    status, printed, (error,) = call(explore, *photos, "--model", model, "-o", page)
    assert status == 1 and "broken.png: cannot identify" in error and page.exists()
    exactness, written = printed.splitlines()
    assert re.fullmatch(r"digits: the page keeps \d+ of \d+ dimensions .* exact ones", exactness)
    assert re.fullmatch(rf"{page}: 1 photo, \d\.\d MB; open it in a browser", written)
    page.unlink()
    status, _, (error,) = call(explore, tmp_path / "broken.png", "--model", model, "-o", page)
    assert status == 1 and not page.exists()
    status, _, (error,) = call(explore, two, "--model", model, "--layers", 3, "-o", page)
    assert status == 2 and "--layers must be among the 3 blocks" in error and not page.exists()


# --------------------------------------------------------------------------------------------------
# find_objects.py


def lost_by_hand(similarity: np.ndarray, h: int, w: int, k: int) -> np.ndarray:
    """LOST, one patch at a time, from the text of the paper."""
    patches = range(h * w)
    degree = [sum(similarity[p, q] > 0 for q in patches) for p in patches]
    order = sorted(patches, key=lambda p: degree[p])
    seed = order[0]
    seeds = [p for p in order[:k] if similarity[p, seed] > 0]
    alike = {q for q in patches if sum(similarity[p, q] for p in seeds) > 0}
    found, edge = set(), {seed} & alike
    while edge:
        p = edge.pop()
        found.add(p)
        near = (
            {p + step for step in (-w, w)}
            | ({p - 1} if p % w else set())
            | ({p + 1} if (p + 1) % w else set())
        )
        edge |= near & alike - found
    return np.array([p in found for p in patches]).reshape(h, w)


@pytest.mark.parametrize("seed", range(8))
def test_lost_matches_the_text_of_the_paper(seed, monkeypatch):
    monkeypatch.setattr(find_objects, "CANDIDATES", 20)
    torch.manual_seed(seed)
    h, w = 8, 11
    features = torch.randn(5, 3, 4) if seed % 2 else torch.randn(5, 4, 4)
    features = torch.nn.functional.interpolate(
        features.permute(2, 0, 1)[None], size=(h, w), mode="bilinear"
    )
    features = features[0].flatten(1).T + 0.5 * torch.randn(h * w, 4)
    similarity = features @ features.T
    mask = find_objects.lost(similarity, h, w)
    assert 0 < mask.sum() < h * w
    assert np.array_equal(mask, lost_by_hand(similarity.double().numpy(), h, w, 20))


def test_lost_finds_the_smaller_part_if_connected():
    h, w = 10, 12
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[3:6, 2:7] = True
    other = torch.zeros(h, w, dtype=torch.bool)
    other[8, 10] = True  # similar to the object, but not connected to it
    features = torch.where(
        (mask | other).flatten()[:, None], torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.2])
    )
    found = find_objects.lost(features @ features.T, h, w)
    assert np.array_equal(found, mask)
    assert find_objects.find_box(found, 120, 100) == [20, 30, 70, 60]
    assert find_objects.find_box(found, 60, 205) == [10, 62, 35, 123]
    nothing = find_objects.lost(-torch.ones(h * w, h * w), h, w)
    assert (
        nothing.shape == (h, w)
        and not nothing.any()
        and find_objects.find_box(nothing, 120, 100) is None
    )


def test_a_mask_of_most_of_the_border_is_inverted():
    inside, speck = np.zeros((2, 9, 11), dtype=bool)
    inside[2:, 3:8] = True  # 5 of 36 patches of the border
    speck[0, 0] = True
    assert np.array_equal(find_objects.exclude_border(inside), inside)
    assert np.array_equal(find_objects.exclude_border(~inside), inside)
    assert np.array_equal(find_objects.exclude_border(~(inside | speck)), inside)
    for mask in (inside | ~inside, inside & ~inside):
        assert np.array_equal(find_objects.exclude_border(mask), mask)


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN, replace(TINY, depth=1)])
def test_keys_queries_and_values_are_those_of_the_last_block(config):
    model, x = randomised(config), torch.randn(3, 16, 24)
    seen = []
    hook = model.blocks[-1].attn.qkv.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.inference_mode():
        model(x[None])
    hook.remove()
    expected = seen[0][0, 1 + config.num_register_tokens :]  # (h * w, 3 D)
    features = find_objects.last_attention(model, x)
    for i, name in enumerate(("queries", "keys", "values")):
        assert features[name].shape == (24, 32)
        assert torch.allclose(features[name], expected[:, 32 * i : 32 * (i + 1)], atol=1e-5)


def test_find_objects_prints_and_draws_the_box(tmp_path, call):
    model = randomised(TINY)
    dinoreg.save(model, tmp_path / "tiny.safetensors")
    photo = random_photo(96, 64)
    photo.save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to stand upright
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    images, out = (
        [tmp_path / name for name in ("photo.png", "text.png", "turned.png", "none.png")],
        tmp_path / "out",
    )
    args = [
        "--model",
        tmp_path / "tiny.safetensors",
        "--resolution",
        40,
        "--output",
        out,
        "--features",
        "keys",
    ]

    status, printed, errors = call(find_objects, *images, *args)
    assert status == 1
    assert [line.split(": ")[1] for line in errors] == [str(images[1]), str(images[3])]
    x = preprocess(photo, 40, keep_aspect=True, patch_size=4)
    keys = find_objects.last_attention(model, x)["keys"]
    gram = keys @ keys.T
    mask = find_objects.lost(
        gram + find_objects.BIAS["keys"] * gram.mean(), x.shape[1] // 4, x.shape[2] // 4
    )
    mask = find_objects.exclude_border(mask)
    box = find_objects.find_box(mask, 96, 64)
    left, top, right, bottom = box
    assert (right - left) * (bottom - top) < 96 * 64  # or all would be one
    pictures = [out / "photo_object.png", out / "turned_object.png"]
    where = f"left {left}, top {top}, right {right}, bottom {bottom}"
    assert printed.splitlines() == [f"{picture}: {where}" for picture in pictures]
    status, printed, _ = call(find_objects, *images, *args, "--json")
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"image": str(image), "box": box, "picture": str(picture)}
        for image, picture in zip(images[::2], pictures)
    ]

    assert sorted(os.listdir(out)) == ["photo_object.png", "turned_object.png"]
    picture, turned = (
        np.asarray(Image.open(out / f"{name}_object.png")) for name in ("photo", "turned")
    )
    assert picture.shape == (64, 96, 3) and np.array_equal(picture, turned)
    yellow = (picture == [255, 255, 0]).all(axis=2)
    y, x = yellow.nonzero()
    assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box
    assert yellow[top, left:right].all() and yellow[bottom - 1, left:right].all()
    assert yellow[top:bottom, left].all() and yellow[top:bottom, right - 1].all()
    same = (picture == np.asarray(photo)).all(axis=2)
    patches_of_object = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    light = np.asarray(patches_of_object.resize((96, 64), Image.Resampling.BILINEAR))
    assert same[(light == 255) & ~yellow].all()
    assert same[(light == 0) & ~yellow].mean() < 0.05


@pytest.mark.parametrize("bias, box", [(1, [0, 0, 96, 64]), (-9, None)])
def test_the_bias_makes_all_patches_similar_or_none(tmp_path, call, bias, box):
    dinoreg.save(randomised(TINY), tmp_path / "tiny.safetensors")
    photo = random_photo(96, 64)
    photo.save(tmp_path / "photo.png")
    args = [
        "--features",
        "keys",
        "--bias",
        bias,
        "--model",
        tmp_path / "tiny.safetensors",
        "--resolution",
        40,
    ]
    args += ["--output", tmp_path]
    _, printed, _ = call(find_objects, tmp_path / "photo.png", *args, "--json")
    assert json.loads(printed)["box"] == box
    _, printed, _ = call(find_objects, tmp_path / "photo.png", *args)
    assert ("no object found" in printed) == (box is None)
    same = (np.asarray(Image.open(tmp_path / "photo_object.png")) == photo).all(axis=2)
    assert same[2:-2, 2:-2].mean() == (1 if box else 0)


@needs_saliency_weights
@pytest.mark.parametrize("features", ["values", "queries", "keys"])
def test_objects_found_with_fine_tuned_weights(tmp_path, call, features):
    images = [HERE / "images" / name for name in ("astronaut.jpg", "coffee.jpg", "chelsea.jpg")]
    args = ["--model", SALIENCY_WEIGHTS, "--features", features, "--output", tmp_path, "--json"]
    status, printed, errors = call(find_objects, *images, *args)
    assert status == 0 and not errors
    face, cup, _ = (json.loads(line)["box"] for line in printed.splitlines())
    assert face[0] < 160 and face[1] < 40 and face[2] > 270 and face[3] > 200  # contains the head
    if features != "keys":  # whose object is all of her, and the flag
        assert 0.1 < (face[2] - face[0]) * (face[3] - face[1]) / 512**2 < 0.3
    true = [74, 13, 478, 390]  # cup and saucer
    width, height = (max(0, min(cup[i + 2], true[i + 2]) - max(cup[i], true[i])) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (cup, true))
    assert width * height / (area - width * height) > 0.85
    # Half way between the brightness of the object and that of the darkened rest.
    photo, picture = read_pixels(images[2]), read_pixels(tmp_path / "chelsea_object.png")
    cat = picture.sum(axis=2) > (255 + 90) / 2 / 255 * photo.sum(axis=2)
    # The mask contains her face, although it fills most of the photo.
    assert cat[60:240, 120:330].mean() > 0.95
    assert cat[:60, 380:].mean() < 0.1  # and not the background
