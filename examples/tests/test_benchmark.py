"""Tests of examples/benchmark.py: `python -m pytest examples/tests/test_benchmark.py`."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from test_dinoreg import SALIENCY_WEIGHTS

pytest.importorskip("tqdm")

HERE = Path(__file__).parents[1]


def run_benchmark(*args, **env) -> list[list[str]]:
    """The cells of the table that it prints, row by row."""
    return table_rows(benchmark_output(*args, **env))


def table_rows(lines: list[str]) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


def benchmark_output(*args, **env) -> list[str]:
    command = [sys.executable, HERE / "benchmark.py", *args, "--turns", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def torch_home_with_hub(tmp_path) -> str:
    """Has in place of torch.hub's clone of the official code this one, which has the same entry points."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "facebookresearch_dinov2_main").symlink_to(HERE.parent)
    return str(tmp_path)


def test_benchmark_of_the_forward(torch_home_with_hub):
    options = ["--models", "vits14_reg", "--pixels", "28", "--batches", "2", "--seconds", "0"]
    header, _, row = run_benchmark("forward", *options, TORCH_HOME=torch_home_with_hub)
    assert len(header) == len(row) and header[:5] == ["model", "pixels", "batch", "dinoreg", "embed"]
    assert "official" in header
    for library in ("transformers", "timm"):
        assert (library in header) == (find_spec(library) is not None)
    assert row[:3] == ["vits14_reg", "28", "2"] and row[3].endswith("(1.00)")
    for cell in row[4:-1]:
        milliseconds, ratio = cell.rstrip(")").split(" (")
        assert float(milliseconds) * float(ratio) > 0


def test_benchmark_of_lists():
    header, _, *rows = run_benchmark("lists", "--models", "vits14_reg", "--seconds", "0")
    assert header == ["model", "images", "packed", "one by one", "padded"] and len(rows) == 3
    assert all(row[2].endswith("(1.00)") and float(row[3].split()[0]) > 0 for row in rows)


def test_benchmark_of_engines():
    options = ["--models", "vits14_reg", "--pixels", "28", "--batches", "2", "--seconds", "0"]
    header, _, row = run_benchmark("engines", *options)
    expected = {"float32", "bfloat16"}
    if shutil.which("c++"):
        expected |= {f"{engine}, {dtype}" for engine in ("compile", "AOTInductor") for dtype in ("float32", "bfloat16")}
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        expected |= {"onnxruntime"}
        expected |= {"openvino, float32", "openvino, default"} if find_spec("openvino") else set()
    assert set(header[3:]) == expected and len(header) == len(row)
    for cell in row[3:]:
        milliseconds, ratio, cosine = re.fullmatch(r"(.+) \((.+), (.+)\)", cell).groups()
        assert float(milliseconds) * float(ratio) > 0 and 0.999 < float(cosine) < 1.001
    assert row[3].endswith("(1.00, 1.00000)")


def test_benchmark_of_folders():
    header, _, large, small = run_benchmark("folder")
    assert header[:5] == ["JPEG files", "dinoreg", "dinoreg --fast", "forward", "decode"]
    milliseconds = [[float(cell.split()[0]) for cell in row[1:]] for row in (large, small)]
    assert milliseconds[0][3] > 5 * milliseconds[1][3]  # 12 megapixels take longer to decode than 0.2


@pytest.mark.parametrize("arguments", [["--pixels", "225"], ["--turns", "0"], ["--batches", "0"], ["backward"]])
def test_benchmark_says_what_is_wrong(arguments):
    command = [sys.executable, HERE / "benchmark.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("benchmark.py: error: ")


def test_benchmark_of_the_start(torch_home_with_hub):
    table = run_benchmark("start", TORCH_HOME=torch_home_with_hub)
    rows = {name: [float(x) for x in cells] for name, *cells in table[2:]}
    assert ("official" in rows) == (find_spec("torchvision") is not None)
    assert rows["dinoreg"][1] == 1 and rows["dinoreg"][2] > rows["import torch"][2]


@pytest.mark.skipif(not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here")
def test_benchmark_of_fast_decoding():
    lines = benchmark_output("fast", "--weights", SALIENCY_WEIGHTS)
    for _, pixels, decoded, _, reduced, bfloat16 in table_rows(lines)[2:]:
        assert 0.999 < float(reduced) <= 1 and (decoded != pixels or float(reduced) == 1)
        assert 0.999 < float(bfloat16) < 1
    (same,) = re.findall(r"Of 96 random crops of these photos, (\d+) have", "\n".join(lines))
    assert 80 < int(same) <= 96
