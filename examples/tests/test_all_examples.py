"""Tests of what all examples have in common.

Run them with `python -m pytest examples/tests/test_all_examples.py`.
"""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="needs the packages of the extra `examples`")

HERE = Path(__file__).parents[1]
MODULES = {"common", "masks", "training_parts"}  # imported by the scripts
EXAMPLES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in MODULES)
NO_MODEL = {"architecture", "make_digits"}  # they compute no features
CPU_ONLY = {"export", "quantize"}
# These print.
NO_OUTPUT = {"benchmark", "evaluate", "make_digits", "quantize", "test_time_registers"}
# Slow to import, and not needed before the arguments are parsed.
HEAVY = {
    "matplotlib",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ray",
    "scipy",
    "sklearn",
    "torchao",
    "torchvision",
}
HEAVY |= {
    "openvino",
    "pandas",
    "pyarrow.dataset",
    "skimage",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
}


def import_example(name):
    if name == "embed_corpus":
        pytest.importorskip("fsspec")
        pytest.importorskip("pyarrow")
    return importlib.import_module(name)


def test_the_clone_comes_before_an_installed_dinoreg(tmp_path):
    (tmp_path / "examples").mkdir()
    for script in ("common.py", "evaluate.py"):
        shutil.copy(HERE / script, tmp_path / "examples")
    (tmp_path / "dinoreg.py").write_text("raise SystemExit('this clone')")
    command = [sys.executable, tmp_path / "examples" / "evaluate.py", "-h"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == "this clone\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_find_the_clone_first(name):
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE)
    assert "common" in imports and imports.index("common") < [*imports, "dinoreg"].index("dinoreg")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_same_options(name, capsys):
    example = import_example(name)
    parameters = inspect.signature(example.main).parameters
    assert list(parameters) == ["argv"] and parameters["argv"].default is None
    with pytest.raises(SystemExit, match="0"):
        example.main(["-h"])
    text = capsys.readouterr().out
    assert ("--device" in text) == (name not in CPU_ONLY | NO_MODEL)
    assert name not in CPU_ONLY or "the CPU" in example.__doc__
    assert bool(re.search(r"-o \w+, --output \w+", text)) == (name not in NO_OUTPUT)


# Runs the scripts of the other arguments with -h, where the modules in the first one cannot be
# imported; prints the errors.
HELP = """
import contextlib, importlib, io, sys
import torch
heavy, *names = sys.argv[1:]
sys.modules |= {name: None for name in heavy.split() if name not in sys.modules}
for name in names:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name).main(["-h"])
    except ImportError as error:
        print(f"{name}: {error}")
    except SystemExit:
        pass
"""


def test_help_imports_nothing_that_takes_long():
    names = [
        name
        for name in EXAMPLES
        if name != "embed_corpus" or (find_spec("pyarrow") and find_spec("fsspec"))
    ]
    command = [sys.executable, "-c", HELP, " ".join(HEAVY), *names]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
