"""Checks of the files that a script will write, before anything takes time."""

import os
from collections.abc import Iterable
from pathlib import Path


def check_outputs(outputs: Iterable[Path], images: Iterable[Path]) -> None:
    """Raise a ValueError if an output file would replace an image, a folder or a device."""
    inputs = {os.path.realpath(path) for path in images}
    for path in outputs:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a regular file")
        if os.path.realpath(path) in inputs:
            raise ValueError(f"{path} is one of the images: choose another --output")


def check_new_file(path: Path, suffix: str, model: str = "") -> None:
    """Raise a ValueError unless path is a file with this suffix that can be written, and is not the
    file of the model.
    """
    usable = os.access(path.parent, os.W_OK) and (path.is_file() or not path.exists())
    if not usable or path.suffix != suffix:
        raise ValueError(f"{path}: must be a {suffix} file in a folder that is writable")
    if os.path.realpath(path) == os.path.realpath(model):
        raise ValueError(f"{path} is the file of the model: choose another --output")
