"""Tests of examples/search.py."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLORS, TINY, paint, save_tiny
from PIL import Image

import dinoreg

pytest.importorskip("tqdm")

import search
from test_dinoreg import SALIENCY_WEIGHTS

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Its list of fonts takes seconds.
    monkeypatch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    return tmp_path / "cache" / "dinoreg"


def run_example(name, *arguments):
    """Run a script as its users do."""
    return subprocess.run(
        [sys.executable, HERE / f"{name}.py", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def model(tmp_path):
    return save_tiny(TINY, tmp_path / "model.safetensors")


@pytest.fixture
def many(tmp_path):
    """Thirty images of random colors, in subfolders."""
    generator = np.random.default_rng(0)
    for i in range(30):
        paint(tmp_path / "many" / str(i % 3) / f"{i}.png", generator.integers(0, 256, 3), i)
    return tmp_path / "many"


def embed(model, paths):
    """The normalized CLS tokens of image files (n, D)."""
    with torch.inference_mode():
        return F.normalize(
            dinoreg.load(model)(torch.stack([dinoreg.preprocess(path, 16) for path in paths])),
            dim=1,
        )


def neighbors(result):
    """(cosine, path) of each result, without near-duplicates."""
    lines = [line.split("  ") for line in result.stdout.splitlines() if not line.startswith(" ")]
    return [(float(cosine), Path(path)) for cosine, path in lines]


def test_search_finds_the_nearest_by_cosine(many, model, tmp_path):
    query, output = paint(tmp_path / "query.png", COLORS["red"], 99), tmp_path / "sheet.png"
    result = run_example(
        "search", many, "--model", model, "--query", query, "--top", 5, "--output", output
    )
    assert result.returncode == 0, result.stderr
    assert "30 computed, 0 from the cache" in result.stderr
    paths = dinoreg.find_images([many])
    features = embed(model, [query, *paths])
    expected = (features[1:] @ features[0]).sort(descending=True)
    ranked = [paths[i] for i in expected.indices]
    found = neighbors(result)
    lines = [line.split()[1] for line in result.stdout.splitlines()]  # near-duplicates, too
    assert len(found) == 5 and sorted(lines) == sorted(map(str, ranked[: len(lines)]))
    np.testing.assert_allclose(
        [cosine for cosine, _ in found], sorted([c for c, _ in found], reverse=True)
    )
    for cosine, path in found:
        assert cosine == pytest.approx(expected.values[ranked.index(path)].item(), abs=2e-3)
    with Image.open(output) as sheet:
        assert sheet.format == "PNG" and sheet.width > 800
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    for path in [query, *(path for _, path in found)]:
        color = np.asarray(Image.open(path)).reshape(-1, 3).mean(axis=0)
        assert (np.abs(pixels - color).max(axis=1) < 40).mean() > 0.06, path  # a square of the six


def test_search_lists_near_duplicates_as_one(many, model, call):
    query, other = many / "0" / "0.png", many / "1" / "1.png"
    for original, copy in [(query, "a.png"), (query, "b.png"), (other, "c.png")]:
        shutil.copy(original, many / copy)
    paths = [path for path in dinoreg.find_images([many]) if path != query]
    cosines = dict(zip(paths, (embed(model, paths) @ embed(model, [query])[0]).tolist()))

    arguments = [many, "--model", model, "--query", query, "--top", 40]
    result = call(search.main, *arguments)
    groups = []
    for line in result.stdout.splitlines():
        if line.startswith("    =  "):
            groups[-1].append(Path(line[7:]))
        else:
            groups.append([Path(line[7:])])
    # Each once, and not the query.
    assert sorted(path for group in groups for path in group) == paths
    assert sorted(groups[0][:2]) == [many / "a.png", many / "b.png"]
    assert any({other, many / "c.png"} <= set(group) for group in groups)
    between = embed(model, [group[0] for group in groups])
    assert (between @ between.T).fill_diagonal_(0)[1:, 1:].max() < search.DUPLICATE + 1e-3
    for first, *rest in groups:
        assert (
            not rest
            or (embed(model, rest) @ embed(model, [first])[0]).min() > search.DUPLICATE - 1e-3
        )

    objects = [
        json.loads(line) for line in call(search.main, *arguments, "--json").stdout.splitlines()
    ]
    assert [[found["path"], *found["duplicates"]] for found in objects] == [
        [*map(str, group)] for group in groups
    ]
    for found in objects:
        assert found["cosine"] == pytest.approx(cosines[Path(found["path"])], abs=2e-3)


def test_search_draws_only_with_an_output(many, model, call, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (
        call(search.main, many, "--model", model, "--query", many / "0" / "0.png").returncode == 0
    )
    # Nor does it leave an index.
    assert not any((tmp_path / "here").iterdir()) and len(list(many.rglob("*"))) == 30 + 3


def test_search_embeds_only_what_changed(many, model, call):
    assert "30 computed, 0 from the cache" in call(search.main, many, "--model", model).stderr
    assert "0 computed, 30 from the cache" in call(search.main, many, "--model", model).stderr
    paint(many / "1" / "1.png", COLORS["blue"], 50)
    paint(many / "new.png", COLORS["blue"], 51)
    (many / "2" / "2.png").unlink()
    (many / "0" / "0.png").unlink()
    arguments = [many, "--model", model, "--query", many / "new.png"]
    for computed in (2, 0):
        result = call(search.main, *arguments, "--top", 1, "--output", many / "sheet.png")
        # The picture is none of the images.
        assert f"29 images: {computed} computed, {29 - computed} from the cache" in result.stderr
    assert neighbors(result)[0][1] == many / "1" / "1.png"
    result = call(search.main, *arguments, "--top", 40)
    assert "30 images: 1 computed" in result.stderr  # the picture, as it lies in the folder
    assert {Path(line[7:]) for line in result.stdout.splitlines()} == {
        *dinoreg.find_images([many])
    } - {many / "new.png"}
    assert result.stdout == call(search.main, *arguments, "--top", 40, "--no-cache").stdout


def test_search_embeds_anew_for_another_model(many, model, call, tmp_path):
    before = call(search.main, many, "--model", model, "--query", many / "0" / "0.png")
    other = save_tiny(TINY, tmp_path / "other.safetensors", 1)
    after = call(search.main, many, "--model", other, "--query", many / "0" / "0.png")
    assert "30 computed" in after.stderr and before.stdout != after.stdout
    save_tiny(replace(TINY, embed_dim=64), other, 2)  # of the same name
    assert "30 computed" in call(search.main, many, "--model", other).stderr


def test_search_reports_unreadable_files(many, model, call):
    (many / "bad.jpg").write_text("no image")
    (many / "gone.png").symlink_to(many / "nowhere.png")
    first, second = (
        call(search.main, many, "--model", model, "--query", many / "0" / "0.png") for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (1, 1) and first.stdout == second.stdout
    assert "32 images: 32 computed" in first.stderr and "32 images: 2 computed" in second.stderr
    for stderr in (first.stderr, second.stderr):
        assert "bad.jpg: cannot identify" in stderr and "gone.png: no such image" in stderr
        assert len(stderr.splitlines()) == 3


def test_search_keeps_what_an_interrupted_run_has_done(many, model, call, monkeypatch):
    def interrupted(*arguments, embed=search.embed):
        features = embed(*arguments)
        yield from (next(features) for _ in range(7))
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(search, "embed", interrupted)
        assert call(search.main, many, "--model", model).returncode == 130
    assert "23 computed, 7 from the cache" in call(search.main, many, "--model", model).stderr


def test_errors_of_search_are_one_line(many, model, call, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no image")
    image = many / "0" / "0.png"
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "no images"),
        ([many, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([many, "--model", tmp_path / "bad.jpg"], "not a checkpoint"),
        ([many, "--query", tmp_path / "bad.jpg"], "cannot identify"),
        ([many, "--query", tmp_path / "nothing.jpg"], "no such image file"),
        ([many, "--query", image, "--output", tmp_path / "nowhere" / "x.png"], "no such folder"),
    ]:
        result = call(search.main, "--model", model, *arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result.stderr)
        assert (
            message in result.stderr
            and len(result.stderr.splitlines()) == 1
            and result.stderr.startswith("search: ")
        )
    assert not cache.exists()
    assert call(search.main, many, "--top", "0").returncode == 2
    (tmp_path / "empty" / "bad.jpg").write_text("no image")
    result = call(search.main, tmp_path / "empty", "--model", model)
    assert result.returncode == 2 and result.stderr.endswith("none of the images can be read\n")


def test_search_in_the_output_of_embed_corpus(many, model, call, tmp_path):
    pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow.dataset")
    import embed_corpus

    (many / "bad.jpg").write_text("no image")
    query, output = many / "1" / "1.png", tmp_path / "embeddings"
    arguments = ["--model", model, "--size", 20]
    assert call(embed_corpus.main, many, "--output", output, *arguments).returncode == 1
    backbone = dinoreg.load(model)
    with torch.inference_mode():
        paths = [path for path in dinoreg.find_images([many]) if path.suffix == ".png"]
        features = F.normalize(
            backbone(torch.stack([dinoreg.preprocess(path, 20) for path in paths])), dim=1
        )
    cosines = features @ features[paths.index(query)]
    expected = [paths[i] for i in cosines.argsort(descending=True)[1:4]]
    for source in (output, *output.glob("*.parquet")):
        result = call(
            search.main,
            source,
            "--query",
            query,
            "--top",
            3,
            "--model",
            model,
            "--output",
            tmp_path / "x.png",
        )
        assert result.returncode == 0, result.stderr
        assert [Path(line[7:]) for line in result.stdout.splitlines()[:3]] == expected
        assert (tmp_path / "x.png").stat().st_size > 1000
    other = save_tiny(TINY, tmp_path / "other.safetensors", 1)
    result = call(search.main, output, "--query", query, "--model", other)
    assert result.returncode == 2 and "embedded by other weights" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
    # The same weights with another transform, in a file of the same name.
    other = dinoreg.load(model)
    other.transform = replace(other.transform, mean=(0.0, 0.0, 0.0))
    (tmp_path / "transform").mkdir()
    dinoreg.save(other, tmp_path / "transform" / model.name)
    arguments = [output, "--query", query, "--model", tmp_path / "transform" / model.name]
    result = call(search.main, *arguments)
    assert result.returncode == 2 and "with another transform" in result.stderr


@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_search_with_fine_tuned_weights(call, tmp_path):
    for name in ("astronaut", "chelsea", "coffee"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        with Image.open(HERE / "images" / f"{name}.jpg") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
                tmp_path / "photos" / f"{name}.png"
            )
    query = HERE / "images" / "chelsea.jpg"
    found = neighbors(
        call(search.main, tmp_path / "photos", "--model", SALIENCY_WEIGHTS, "--query", query)
    )
    assert found[0][1].stem == "chelsea" and found[0][0] > 0.9 and found[1][0] < 0.7


def test_search_shows_no_control_characters(many, model, call, tmp_path):
    escape = "\x1b]0;x\x07"
    shutil.copy(many / "0" / "0.png", many / f"{escape}.png")
    (many / f"bad{escape}.png").write_text("no image")
    arguments = [many, "--query", many / "0" / "0.png", "--model", model]
    result = call(search.main, *arguments, "--output", tmp_path / "sheet.png")
    assert result.returncode == 1 and "\\x1b]0;x\\x07.png" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert "\x1b" not in call(search.main, *arguments, "--json").stdout


def test_search_with_a_model_that_returns_nan(many, call, tmp_path):
    model = dinoreg.DinoVisionTransformer(TINY)
    model.blocks[1].mlp.fc2.weight.data[0, 0] = float("nan")
    model.transform = dinoreg.Transform().at_size(16)
    dinoreg.save(model, tmp_path / "nan.safetensors")
    arguments = [many, "--model", tmp_path / "nan.safetensors"]
    result = call(search.main, *arguments, "--query", many / "0" / "0.png", "--json")
    assert (result.returncode, result.stdout) == (2, "") and "NaN" in result.stderr
    result = call(search.main, *arguments)
    assert result.returncode == 2 and result.stderr.count("NaN") == 30


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_search_finds_files_of_any_name(many, model, call, tmp_path):
    for name in (b"\xff.png", b"l" * 251 + b".png"):
        shutil.copy(os.fsencode(many / "0" / "0.png"), os.path.join(os.fsencode(many), name))
    result = call(search.main, many, "--query", many / "0" / "0.png", "--model", model)
    assert result.returncode == 0 and "\\udcff.png" in result.stdout and "llll" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs closed file descriptors")
@pytest.mark.parametrize(
    "redirection, status, lines", [("2>&-", 0, 3), (">/dev/full", 2, 0), ("2>/dev/full", 0, 3)]
)
def test_search_with_closed_or_full_streams(many, model, redirection, status, lines):
    command = f"{sys.executable} {HERE}/search.py {many} --query {many}/0/0.png --top 3"
    command += f" --model {model} --no-cache {redirection}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    found = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert (result.returncode, len(found)) == (status, lines)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_help_and_errors_without_docstrings(tmp_path):
    for arguments, status in (["-h"], 0), ([tmp_path / "nowhere"], 2):
        command = [sys.executable, "-OO", HERE / "search.py", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == status and "Traceback" not in result.stderr
