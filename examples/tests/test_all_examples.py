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
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py"))}
# The others are modules that these import.
EXAMPLES = [name for name, source in SOURCES.items() if '__name__ == "__main__"' in source]
COMMANDS = {"digits": ["train"]}  # of scripts that have several, one with all options
CPU_ONLY = {"export"}
PRINTS_ONLY = {"benchmark", "evaluate", "registers_at_test_time"}
# Slow to import, and not needed before the arguments are parsed.
HEAVY = {
    "matplotlib",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pandas",
    "pyarrow.dataset",
    "ray",
    "scipy",
    "skimage",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torchao",
    "torchvision",
    "tqdm",
    "transformers",
}


def import_example(name):
    if name == "embed_corpus":
        pytest.importorskip("fsspec")
        pytest.importorskip("pyarrow")
    return importlib.import_module(name)


def test_the_clone_comes_before_an_installed_dinoreg(tmp_path):
    (tmp_path / "examples").mkdir()
    for script in ("common.py", "features.py", "labeled.py", "evaluate.py"):
        shutil.copy(HERE / script, tmp_path / "examples")
    (tmp_path / "dinoreg.py").write_text("raise SystemExit('this clone')")
    command = [sys.executable, tmp_path / "examples" / "evaluate.py", "-h"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == "this clone\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_find_the_clone_first(name):
    imports = re.findall(r"^(?:import|from) (\w+)", SOURCES[name], re.MULTILINE)
    assert "common" in imports and imports.index("common") < [*imports, "dinoreg"].index("dinoreg")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_same_options(name, capsys):
    example = import_example(name)
    parameters = inspect.signature(example.main).parameters
    assert list(parameters) == ["argv"] and parameters["argv"].default is None
    with pytest.raises(SystemExit, match="0"):
        example.main([*COMMANDS.get(name, []), "-h"])
    text = capsys.readouterr().out
    assert ("--device" in text) == (name not in CPU_ONLY)
    assert name not in CPU_ONLY or "the CPU" in example.__doc__
    assert bool(re.search(r"-o \w+, --output \w+", text)) == (name not in PRINTS_ONLY)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_command_line_changes_the_boundary(name):
    """Errors of all examples go through `common.main`, which turns them into one line."""
    assert "return common.main(run, add_options, argv)" in SOURCES[name]


# Runs the scripts of the other arguments with -h, where the modules in the first one cannot be
# imported; prints the errors.
HELP = """
import contextlib, importlib, io, sys
import torch
heavy, *names = sys.argv[1:]
sys.modules |= {name: None for name in heavy.split() if name not in sys.modules}
for name in names:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            importlib.import_module(name).main(["-h"])
    except SystemExit:
        pass
    except Exception as error:
        print(f"{name}: {error!r}")
    if "--help" not in text.getvalue():
        print(f"{name}: no help")
"""


@pytest.mark.parametrize("optimized", [[], ["-OO"]])
def test_help_imports_nothing_that_takes_long(optimized):
    """Also where Python removes the docstrings."""
    names = [
        name
        for name in EXAMPLES
        if name != "embed_corpus" or (find_spec("pyarrow") and find_spec("fsspec"))
    ]
    command = [sys.executable, *optimized, "-c", HELP, " ".join(HEAVY), *names]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
