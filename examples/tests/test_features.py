"""Tests of what the examples share: common.py, features.py and labeled.py."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY

import dinoreg

pytest.importorskip("tqdm")

import common
import features
from test_dinoreg import randomised


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dinoreg"


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("R", [0, 4])
@torch.inference_mode()
def test_embed_returns_what_the_model_returns(R, ffn):
    model = randomised(replace(TINY, num_register_tokens=R, ffn=ffn))
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(features.embed(model, images), model(images), atol=1e-5, rtol=1e-5)


def test_pictures_have_names_of_their_own(tmp_path):
    names = ["a.jpg", "b/a.png", "a_2.jpg", "c/a.png", "l" * 251 + ".png", os.fsdecode(b"\xff.png")]
    pictures = common.name_pictures([Path(name) for name in names], tmp_path, "x")
    assert [path.name for path in pictures] == [
        "a_x.png",
        "a_2_x.png",
        "a_2_2_x.png",
        "a_3_x.png",
        "l" * 200 + "_x.png",
        "_x.png",
    ]
    many = [Path(f"{i}/photo.jpg") for i in range(50_000)]
    assert len(set(common.name_pictures(many, tmp_path, "x"))) == 50_000  # minutes, if quadratic


# --------------------------------------------------------------------------------------------------
# The cache


def lengths(paths):
    """The size of each file as a feature of one or two dimensions; or a reason, as if text files
    were unreadable.
    """
    for path in paths:
        size = torch.tensor([float(path.stat().st_size if path.exists() else 0)])
        yield f"{path}: text" if path.suffix == ".txt" else size if path.stem < "c" else size[None]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    for i, name in enumerate(["a.bin", "b.bin", "c.bin", "d.txt"]):
        (tmp_path / "files" / name).write_bytes(bytes(i + 1))
    return tmp_path / "files"


def computed(files, function=lengths, key="key", **options):
    """The names of the files whose features were computed, after a check of all features."""
    asked = []

    def function_of_paths(paths):
        asked.extend(path.name for path in paths)
        yield from function(paths)

    paths = sorted(files.iterdir())
    cache = features.Cache("test", files, key, **options)
    unreadable = cache.fill(function_of_paths, paths)
    for path, expected in zip(paths, lengths(paths)):
        if isinstance(expected, str):
            assert unreadable.pop(path) == expected
        else:
            torch.testing.assert_close(cache[path], expected, rtol=0, atol=0)
    assert not unreadable
    return asked


def test_only_features_of_new_and_changed_files_are_computed(files, capsys):
    assert computed(files) == ["a.bin", "b.bin", "c.bin", "d.txt"]
    assert computed(files) == ["d.txt"]  # the unreadable one is tried again
    (files / "a.bin").write_bytes(bytes(9))
    (files / "aa.bin").write_bytes(bytes(10))
    (files / "c.bin").unlink()
    assert computed(files) == ["a.bin", "aa.bin", "d.txt"]
    (files / "d.txt").unlink()
    assert computed(files) == []
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("features: 3 images: 0 computed, 3 from the cache (")


def test_a_run_on_some_images_keeps_the_features_of_others(files):
    computed(files)
    new = files.parent / "new.bin"
    features.Cache("test", files, "key").fill(lengths, [new])
    assert computed(files) == ["d.txt"]


def test_an_interrupted_run_keeps_its_features(files):
    def interrupted(paths):
        yield from list(lengths(paths))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        computed(files, interrupted)
    assert computed(files) == ["c.bin", "d.txt"]


def test_each_model_and_folder_has_a_cache_of_its_own(files, tmp_path):
    (tmp_path / "others").mkdir()
    others = tmp_path / "others" / "files"
    others.mkdir()
    (others / "a.bin").write_bytes(bytes(5))
    first = features.Cache("test", files, "key")
    first.fill(lengths, [files / "a.bin"])
    assert computed(others) == ["a.bin"]
    assert computed(files, key="other") == ["a.bin", "b.bin", "c.bin", "d.txt"]
    # A run that is still at work is not disturbed, and goes on.
    assert first[files / "a.bin"] == 1
    assert first.fill(lengths, [files / "b.bin"]) == {}
    assert computed(files) == ["c.bin", "d.txt"]


def test_no_cache(files, cache, capsys):
    for _ in range(2):
        assert computed(files, enabled=False) == ["a.bin", "b.bin", "c.bin", "d.txt"]
    assert not cache.exists() and "(no cache)" in capsys.readouterr().err


def test_a_damaged_cache_is_named(files, cache):
    computed(files)
    (database,) = cache.rglob("*.sqlite")
    database.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="DatabaseError: file is not a database"):
        computed(files)


def test_names_of_any_bytes_and_length(tmp_path):
    folder = tmp_path / ("d" * 250)
    folder.mkdir()
    path = os.path.join(os.fsencode(folder), b"\xff.bin")
    with open(path, "wb") as file:
        file.write(b"123")
    assert computed(folder) == [os.fsdecode(b"\xff.bin")]
    assert computed(folder) == []


def test_the_fingerprint_tells_models_apart():
    model = randomised(TINY)
    key = features.fingerprint(model)
    assert features.fingerprint(randomised(TINY)) == key
    seen = {key, features.fingerprint(model, 4)}
    for change in (
        dict(transform=dinoreg.Transform(std=(1.0, 1.0, 1.0))),
        dict(config=replace(TINY, num_heads=2)),
        dict(norm=torch.nn.LayerNorm(32)),
    ):
        other = randomised(TINY)
        for name, value in change.items():
            setattr(other, name, value)
        seen.add(features.fingerprint(other))
    model.patch_embed.proj.stride = (2, 2)
    assert len(seen | {features.fingerprint(model)}) == 6


def test_a_new_version_has_a_new_cache_but_knows_old_corpora(files, monkeypatch):
    model = randomised(TINY)
    key = features.fingerprint(model)
    computed(files)
    monkeypatch.setattr(dinoreg, "__version__", "0.0.0")
    assert features.fingerprint(model) == key  # which embed_corpus.py writes into its files
    assert computed(files) == ["a.bin", "b.bin", "c.bin", "d.txt"]


def test_features_that_are_not_finite_are_an_error_of_their_image(tmp_path):
    def read(path):
        return torch.full((3, 2, 2), int(path.stem), dtype=torch.uint8)

    def function(images):
        return [torch.log(x[0, 0, 0] - images[0][0, 0, 0]) for x in images]  # log(0) first

    paths = [Path("0.png"), Path("255.png")]
    nan, x = features.compute(function, read, paths, dinoreg.Transform())
    assert nan == "the model returns NaN or infinity" and x.isfinite()
