"""Tests of what all examples have in common: `python -m pytest examples/tests/test_all_examples.py`."""

import importlib
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith(("common", "masks", "test_")))
CPU_ONLY = {"export_aoti", "export_onnx", "quantize"}
NO_OUTPUT = {"benchmark", "evaluate", "quantize"}  # they only print
PACKAGES = ("matplotlib", "mlxtend", "onnxruntime", "scipy", "sklearn", "torchao", "tqdm")

needs_packages = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="the extra `examples` is not installed")


def test_the_clone_comes_before_an_installed_dinoreg(tmp_path):
    pytest.importorskip("tqdm")
    (tmp_path / "examples").mkdir()
    for script in ("common.py", "evaluate.py"):
        shutil.copy(HERE / script, tmp_path / "examples")
    (tmp_path / "dinoreg.py").write_text("raise SystemExit('this clone')")
    command = [sys.executable, tmp_path / "examples" / "evaluate.py", "-h"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == "this clone\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_find_the_clone_first(name):
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE)
    assert "common" in imports and imports.index("common") < imports.index("dinoreg")


@needs_packages
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_same_options(name, monkeypatch, capsys):
    if name == "embed_corpus":
        pytest.importorskip("ray")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "-h"])
    example = importlib.import_module(name)
    with pytest.raises(SystemExit, match="0"):
        example.main()
    text = capsys.readouterr().out
    assert ("--device" in text) == (name not in CPU_ONLY)
    assert name not in CPU_ONLY or "the CPU" in example.__doc__
    assert bool(re.search(r"-o \w+, --output \w+", text)) == (name not in NO_OUTPUT)
