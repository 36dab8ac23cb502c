"""What the examples share: loading a backbone, reading images ahead of the model, error messages, atomic files."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples also run in a clone that is not installed
import dinoreg  # noqa: E402


def add_device(parser: argparse.ArgumentParser) -> None:
    best = dinoreg.best_device()
    parser.add_argument("--device", default=best, help="cpu, cuda, mps, ... (default: the best available, here %(default)s)")


def load_backbone(source: str, device: str = "cpu") -> dinoreg.DinoVisionTransformer:
    """The backbone of an official name or a file; of a classifier, its backbone alone."""
    model = dinoreg.load(source, device=device)
    return model.backbone if isinstance(model, dinoreg.LinearClassifier) else model


def reason(error: Exception) -> str:
    """An exception as one line for the user."""
    return (getattr(error, "strerror", None) or str(error) or repr(error)).partition("\n")[0]


def read_image(path: Path, *args, **kwargs) -> Tensor | str:
    """The tensor of `dinoreg.preprocess`, or the reason why the image could not be read."""
    try:
        return dinoreg.preprocess(path, *args, **kwargs)
    except (OSError, ValueError) as error:
        return reason(error)


def read_ahead(read: Callable, items: Sequence, batch_size: int) -> Iterator[list]:
    """Batches of `read(item)`, in order; threads read the next batch while the caller works on this one."""
    with ThreadPoolExecutor() as pool:
        ahead: Iterable = ()
        for start in range(0, len(items), batch_size):
            now, ahead = ahead, pool.map(read, items[start : start + batch_size])
            if batch := list(now):
                yield batch
        if batch := list(ahead):
            yield batch


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` only if nothing was raised."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        yield part
        os.replace(part, path)


def run(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit status of an example: what `function(args)` returns (0, or 1 if some inputs failed); 2 if it could not run."""
    try:
        return function(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:  # a file, the network, a device
        print(f"{Path(sys.argv[0]).stem}:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
