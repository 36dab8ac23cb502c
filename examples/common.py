"""What the examples share: loading a backbone, reading images ahead of the model, error messages."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples also run in a clone that is not installed
import dinoreg


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


def read_ahead(read: Callable, batches: Iterable[Sequence]) -> Iterator[list]:
    """What `read` returns for the items of each batch; threads read the next batch while the caller works on this one."""
    with ThreadPoolExecutor() as pool:
        ahead = None
        for batch in batches:
            now, ahead = ahead, pool.map(read, batch)
            if now is not None:
                yield list(now)
        if ahead is not None:
            yield list(ahead)


def split_batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive parts of a sequence, of `size` items each; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def run(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit status of an example: what `function(args)` returns (0, or 1 if some inputs failed); 2 if it could not run."""
    try:
        return function(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:  # a file, the network, a device
        print(f"{Path(sys.argv[0]).stem}:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
