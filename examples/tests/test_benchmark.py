"""Tests of examples/benchmark.py: `python -m pytest examples/tests/test_benchmark.py`."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import benchmark
import dinoreg
import export
from test_dinoreg import SALIENCY_WEIGHTS

HERE = Path(__file__).parents[1]
SMALL = replace(dinoreg.CONFIGS["vits14_reg"], embed_dim=64, depth=1, num_heads=1)


@pytest.fixture
def run(capsys):
    """A function that runs the benchmark in this process and returns what it prints, and the cells
    of the table by row.
    """

    def run(*args) -> tuple[str, list[list[str]]]:
        options = ["--device", "cpu", "--seconds", "0", "--turns", "1"]
        assert benchmark.main([*map(str, args), *options]) == 0
        out = capsys.readouterr().out
        return out, table_rows(out)

    return run


def table_rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def small(monkeypatch):
    """Makes ViT-S/14 a model of one narrow block, and measures each run once instead of for half a
    second.
    """
    monkeypatch.setitem(dinoreg.CONFIGS, "vits14_reg", SMALL)
    monkeypatch.setattr(benchmark, "SECONDS", 0)


@pytest.fixture
def official(monkeypatch):
    """Puts this repository in place of torch.hub's clone of the official code: it has the same
    entry points.
    """
    monkeypatch.setattr(benchmark, "OFFICIAL", HERE.parent)


def test_medians_and_ratios_within_turns():
    numbers = {"a": iter([[9.0], [1.0], [2.0], [4.0]]), "b": iter([[9.0], [3.0], [2.0], [2.0]])}
    compared = benchmark.compare(numbers, turns=3, measure=next)
    # Of b, the ratios are 3, 1 and 1/2; the first turn does not count.
    assert compared == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    numbers = {"a": iter([[9.0, 0], [1.0, 5]]), "b": iter([[9.0, 0], [3.0, 7]])}
    assert benchmark.compare(numbers, turns=1, measure=next) == {
        "a": [1.0, 1.0, 5],
        "b": [3.0, 3.0, 7],
    }


def test_different_features_are_an_error():
    x = torch.randn(2, 8)
    assert benchmark.cosines_of({"a": lambda: x, "b": lambda: 2 * x})["b"] == pytest.approx(1)
    for wrong in (-x, x + x.flip(1), x * float("nan")):
        with pytest.raises(RuntimeError, match="the features differ"):
            benchmark.cosines_of({"a": lambda: x, "b": lambda wrong=wrong: wrong})
    near = x + 0.1 * x.flip(1) * torch.tensor([1.0, -1.0]).repeat(4)  # orthogonal: cosine 0.995
    assert benchmark.cosines_of({"a": lambda: x, "int8": lambda: near})["int8"] < 0.999


def test_failing_processes_are_an_error():
    assert benchmark.numbers_of([*benchmark.PYTHON, "print(1.5, 'text', 2, sep='\\n')"]) == [1.5, 2]
    with pytest.raises(RuntimeError, match="a process failed: ValueError: no"):
        benchmark.numbers_of(
            [*benchmark.PYTHON, benchmark.PARENT, *benchmark.PYTHON, "raise ValueError('no')"]
        )


@pytest.mark.slow
def test_benchmark_of_the_forward_pass(run, official):
    _, (header, _, row) = run(
        "forward", "--models", "vits14_reg", "--pixels", "28", "--batches", "2"
    )
    assert len(header) == len(row) and header[:5] == [
        "model",
        "pixels",
        "batch",
        "dinoreg",
        "embed",
    ]
    assert "official" in header
    for library in ("transformers", "timm"):
        assert (library in header) == (find_spec(library) is not None)
    assert row[:3] == ["vits14_reg", "28", "2"] and row[3].endswith("(1.00)")
    for cell in row[4:-1]:
        milliseconds, ratio = cell.rstrip(")").split(" (")
        assert float(milliseconds) * float(ratio) > 0


@pytest.mark.slow
def test_benchmark_of_engines(run, small, monkeypatch):
    monkeypatch.setattr(export, "INDUCTOR", {})  # compiles in less time
    _, (header, _, row) = run(
        "engines", "--models", "vits14_reg", "--pixels", "28", "--batches", "2"
    )
    expected = {"float32", "bfloat16"}
    if shutil.which("c++"):
        expected |= {
            f"{engine}, {dtype}"
            for engine in ("compile", "AOTInductor")
            for dtype in ("float32", "bfloat16")
        }
        expected |= {"AOTInductor, int8"} if find_spec("torchao") else set()
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        expected |= {"onnxruntime"}
        expected |= {"openvino, float32", "openvino, default"} if find_spec("openvino") else set()
    assert set(header[3:]) == expected and len(header) == len(row)
    for name, cell in zip(header[3:], row[3:]):
        milliseconds, ratio, cosine = re.fullmatch(r"(.+) \((.+), (.+)\)", cell).groups()
        assert float(milliseconds) >= 0 and float(ratio) > 0
        assert (0.99 if "int8" in name else 0.999) < float(cosine) < 1.001
    assert row[3].endswith("(1.00, 1.00000)")


def test_benchmark_of_folders(run, small, monkeypatch):
    monkeypatch.setattr(benchmark, "FOLDERS", [(2, 4000, 3000), (2, 500, 375)])
    _, (header, _, large, small_files) = run("folder")
    assert header[:5] == ["JPEG files", "dinoreg", "dinoreg --fast", "forward", "decode"]
    milliseconds = [[float(cell.split()[0]) for cell in row[1:]] for row in (large, small_files)]
    # 12 megapixels take longer to decode than 0.2.
    assert milliseconds[0][3] > 5 * milliseconds[1][3]


def test_benchmark_of_a_corpus(run, small, monkeypatch):
    embed_corpus, environments = pytest.importorskip("embed_corpus"), []

    def run_without_ray(command):
        script = command.index(HERE / "embed_corpus.py")
        environments.append(command[:script])
        assert embed_corpus.main([*map(str, command[script + 1 :])]) == 0

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(benchmark, "numbers_of", run_without_ray)
    _, (header, _, row) = run("corpus", "--images", "4")
    assert header == ["images", "plain loop, s", "Ray, s", "ratio", "images per hour"]
    loop, ray, per_hour = (float(row[i].replace(",", "")) for i in (1, 2, 4))
    # The printed time is rounded.
    assert row[0] == "4" and loop > 0 and 4 * 3600 / per_hour == pytest.approx(ray, abs=0.051)
    assert (
        sum("RAY_ADDRESS=local" in environment for environment in environments)
        == len(environments) / 2
    )


@pytest.mark.parametrize("name", ["vits14", "vits14_reg", "vitg14_reg"])
def test_operation_counts_match_a_count_by_hand(name):
    config = replace(dinoreg.CONFIGS[name], depth=2)
    D, hidden, matrices = config.embed_dim, config.hidden_dim, 3 if config.ffn == "swiglu" else 2
    for side, found in zip((224, 518), benchmark.count(config)[1]):
        patches = (side // 14) ** 2
        N = 1 + config.num_register_tokens + patches
        # qkv and proj, MLP; q @ k and attention @ v.
        block = N * (4 * D * D + matrices * D * hidden) + 2 * N * N * D
        assert found == 2 * (patches * 14 * 14 * 3 * D + config.depth * block)


def test_the_table_of_sizes(run, monkeypatch):
    configs = {name: dinoreg.CONFIGS[name] for name in ("vits14_reg", "vits14")}
    monkeypatch.setattr(benchmark, "CONFIGS", configs)
    _, (header, _, *rows) = run("sizes")
    assert header[3:] == ["GFLOPs at 224 (registers)", "GFLOPs at 518 (registers)"]
    assert rows == [
        ["`vits14_reg`", "22.1 M", "88 MB", "12.5 (1.7%)", "93.8 (0.4%)"],
        ["`vits14`", "22.1 M", "88 MB", "12.2", "93.4"],
    ]


@pytest.mark.parametrize("arguments", ["--pixels 225", "backward", "sizes backward"])
def test_what_cannot_be_measured_is_one_line(arguments, capsys):
    assert benchmark.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("benchmark: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--pixels 0", "--turns 0", "--batches 0", "--images 0"])
def test_wrong_options_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, HERE / "benchmark.py", "sizes"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_benchmark_of_the_start(run, official, monkeypatch):
    # Without a warm-up.
    run_once = cache(lambda *command, numbers_of=benchmark.numbers_of: numbers_of([*command]))
    monkeypatch.setattr(benchmark, "numbers_of", lambda command: run_once(*command))
    _, (_, _, *table) = run("start")
    rows = {name: [float(x) for x in cells] for name, *cells in table}
    assert ("official" in rows) == (find_spec("torchvision") is not None)
    assert rows["dinoreg"][1] == 1 and rows["dinoreg"][2] > rows["import torch"][2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_of_a_process():
    seconds, megabytes = benchmark.numbers_of(
        [*benchmark.PYTHON, benchmark.MEMORY, "", "x = torch.ones(5_000_000)"]
    )
    assert seconds > 0 and 15 < megabytes < 60  # 20 MB, and twice that while it is replaced


@pytest.mark.slow
@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_benchmark_of_fast_decoding(run, monkeypatch):
    save_crops = benchmark.save_crops
    monkeypatch.setattr(
        benchmark, "save_crops", lambda folder, count: save_crops(folder, count // 6)
    )
    monkeypatch.setattr(benchmark, "PHOTOS", benchmark.PHOTOS[::2])
    out, rows = run("fast", "--weights", SALIENCY_WEIGHTS)
    assert len(rows) == 2 + 6
    for _, pixels, decoded, _, reduced, bfloat16 in rows[2:]:
        assert 0.999 < float(reduced) <= 1 and (decoded != pixels or float(reduced) == 1)
        assert 0.999 < float(bfloat16) < 1
    (same,) = re.findall(r"(\d+) of 16 random crops of these photos have", out)
    assert 13 <= int(same) <= 16
