"""Compare dinoreg with the official code, transformers, timm, onnxruntime, openvino, if installed.

    pip install -e ".[examples,parity]"
    python -c "import torch; \
        torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14_reg', pretrained=False)"
    # all parts but corpus; or some: forward start ...
    python examples/benchmark.py > examples/benchmark.md

All sides have the same random weights, and run once in each turn, in random order; short runs are
repeated for half a second, and the fastest counts. Figures are medians over the turns, ratios are
medians of the ratios within each turn. `--device` is that of `forward` and `engines`; the rest
runs on the CPU.
"""

import argparse
import copy
import importlib
import inspect
import itertools
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import common
import convert_weights
import dinoreg
import export
from dinoreg import CONFIGS, Config, DinoVisionTransformer, LinearClassifier

HERE = Path(__file__).parent
PHOTOS = sorted(HERE.glob("images/*.jpg"))
# torch.hub's clone of the official code.
OFFICIAL = Path(torch.hub.get_dir(), "facebookresearch_dinov2_main")
PYTHON, SECONDS = [sys.executable, "-c"], 0.5  # for which short runs are repeated


def seconds_of(run: Callable) -> list[float]:
    """[the seconds of the fastest of several runs]."""
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        getattr(torch, dinoreg.best_device()).synchronize()  # a GPU computes in the background
        times.append(time.perf_counter() - start)
    return [min(times)]


def numbers_of(command: list) -> list[float]:
    """The numbers that a command prints, one a line. Raises a RuntimeError if it fails."""
    result = subprocess.run([*map(str, command)], cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"a process failed: {' '.join(result.stderr.splitlines()[-1:])}")
    return [float(number) for number in re.findall(r"^\d[\d.e-]*$", result.stdout, re.MULTILINE)]


# The peak memory of a process includes what its parent had in memory when it was started, so this
# parent has little.
PARENT = """
import resource, subprocess, sys, time
start = time.perf_counter()
result = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,\
 sep="\\n")
sys.exit(result.returncode)
"""


@torch.inference_mode()
def compare(
    runs: dict, turns: int, seconds: float = 0, measure: Callable = seconds_of
) -> dict[str, list[float]]:
    """For each run: its time as a ratio to that of the first run, and the medians of the numbers
    that `measure` returns.
    """
    results, start = {name: [] for name in runs}, time.perf_counter()
    for turn in itertools.count():  # the first one warms up
        for name, run in random.sample(list(runs.items()), len(runs)):
            results[name].append(measure(run))
        if turn >= turns and time.perf_counter() - start > seconds:
            break
    first = next(iter(results.values()))
    columns = {
        name: ([a[0] / b[0] for a, b in zip(rows, first)], *zip(*rows))
        for name, rows in results.items()
    }
    return {name: [statistics.median(column[1:]) for column in columns[name]] for name in runs}


def cells(compared: dict[str, list[float]], count: int = 1) -> dict[str, str]:
    """Milliseconds for each of so many images, and in brackets the ratio."""
    return {
        name: f"{1000 * seconds / count:.1f} ({ratio:.2f})"
        for name, (ratio, seconds) in compared.items()
    }


@torch.inference_mode()
def cosines_of(runs: dict[str, Callable]) -> dict[str, float]:
    """The lowest cosine of the features (B, D) of each run to those of the first; a RuntimeError if
    one is below 0.999.
    """
    first = next(iter(runs.values()))().float()
    cosines = {
        name: F.cosine_similarity(run().float(), first).min().item() for name, run in runs.items()
    }
    if not all(cosine > 0.999 for cosine in cosines.values()):
        raise RuntimeError(f"the features differ, with cosines of {cosines}")
    return cosines


def optional(library: str):
    """The imported library, or None if it is not installed."""
    return importlib.import_module(library) if find_spec(library) else None


def random_model(args: argparse.Namespace, name: str) -> DinoVisionTransformer:
    dtype = torch.float32 if torch.device(args.device).type == "cpu" else torch.bfloat16
    return DinoVisionTransformer(CONFIGS[name]).to(args.device, dtype).eval()


def save_crops(folder: Path, count: int) -> Path:
    """The folder, with so many random crops of 256 x 256 pixels of the photographs as JPEG
    files.
    """
    photos = [Image.open(photo).convert("RGB") for photo in PHOTOS]
    for i, photo in zip(range(count), itertools.cycle(photos)):
        left, top = random.randrange(photo.width - 256), random.randrange(photo.height - 256)
        photo.crop((left, top, left + 256, top + 256)).save(folder / f"{i}.jpg", quality=90)
    return folder


def forward(
    args: argparse.Namespace, temp: Path, name: str, size: int, batch: int
) -> Iterator[dict]:
    """Forward pass, milliseconds per image, float32 on a CPU and bfloat16 elsewhere; in brackets
    the ratio to dinoreg: above 1, dinoreg is faster. All tokens are computed and normalized, except
    that `embed`, of common.py, computes the last block for the CLS token only. `matrix products`
    runs those of the linear layers and nothing else; GFLOP/s is their rate.
    """
    model = random_model(args, name)
    images = torch.randn(batch, 3, size, size).to(model.pos_embed)
    runs = {
        "dinoreg": lambda: model.forward_features(images)["x_norm_clstoken"],
        "embed": lambda: common.embed(model, images),
    }
    if OFFICIAL.is_dir():
        official = torch.hub.load(str(OFFICIAL), f"dinov2_{name}", source="local", pretrained=False)
        official.load_state_dict(model.state_dict())
        official.to(images).eval()
        runs["official"] = lambda: official.forward_features(images)["x_norm_clstoken"]
    if transformers := optional("transformers"):
        convert_weights.write(model, temp / "hf", "hf")
        hf = transformers.AutoModel.from_pretrained(temp / "hf").to(images).eval()
        runs["transformers"] = lambda: hf(images).last_hidden_state[:, 0]
    if timm := optional("timm"):
        letter = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[3]]
        other = timm.create_model(
            f"vit_{letter}_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True
        )
        other.load_state_dict(convert_weights.from_official(model, "timm"))
        other.to(images).eval()
        runs["timm"] = lambda: other.forward_features(images)[:, 0]
    cosines_of(runs)
    tokens = batch * (1 + model.num_register_tokens + (size // model.patch_size) ** 2)
    weights = [
        layer.weight.detach().T for layer in model.modules() if isinstance(layer, torch.nn.Linear)
    ]
    x, y = (
        {width: torch.randn(tokens, width).to(images) for w in weights for width in w.shape}
        for _ in range(2)
    )
    runs["matrix products"] = lambda: [
        torch.mm(x[w.shape[0]], w, out=y[w.shape[1]]) for w in weights
    ]
    compared = compare(runs, args.turns, args.seconds)
    rate = 2 * tokens * sum(weight.numel() for weight in weights) / compared["matrix products"][1]
    yield {
        "model": name,
        "pixels": size,
        "batch": batch,
        **cells(compared, batch),
        "GFLOP/s": f"{rate / 1e9:.0f}",
    }


def engines(
    args: argparse.Namespace, temp: Path, name: str, size: int, batch: int
) -> Iterator[dict]:
    """Ways to compute the CLS token, milliseconds per image; in brackets the ratio to float32
    (below 1: faster), and the lowest cosine of a token to it. `compile` is `torch.compile(model)`;
    AOTInductor runs a package of export.py, onnxruntime and openvino its ONNX file (`default`:
    openvino's choice of precision).
    """
    on_cpu, has_compiler = torch.device(args.device).type == "cpu", shutil.which("c++")
    model = DinoVisionTransformer(CONFIGS[name]).eval()
    model.fix_image_size(size, size)
    images, graph, runs = (
        torch.randn(batch, 3, size, size, device=args.device),
        temp / "model.onnx",
        {},
    )
    torch.compiler.reset()
    for dtype in ("float32", "bfloat16"):
        cast, package = (
            copy.deepcopy(model).to(args.device, getattr(torch, dtype)),
            temp / f"{dtype}.pt2",
        )
        runs[dtype] = partial(cast, images)
        if has_compiler or not on_cpu:
            runs[f"compile, {dtype}"] = partial(torch.compile(cast), images)
        if has_compiler and on_cpu:
            export.write(cast, images, package, "aoti")
            runs[f"AOTInductor, {dtype}"] = partial(export.read(package, "aoti"), images)
    if on_cpu and find_spec("onnxruntime") and find_spec("onnxscript"):
        export.write(model, torch.randn(2, 3, size, size), graph, "onnx")
        runs["onnxruntime"] = partial(export.read(graph, "onnx"), images)
        if openvino := optional("openvino"):
            for label, precision in (
                ("float32", {"INFERENCE_PRECISION_HINT": "f32"}),
                ("default", {}),
            ):
                run = openvino.compile_model(
                    graph, "CPU", {**precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
                )
                runs[f"openvino, {label}"] = lambda run=run: torch.from_numpy(
                    run(images.numpy())[0]
                )
    cosines, compared = cosines_of(runs), cells(compare(runs, args.turns, args.seconds), batch)
    row = {run: f"{cell[:-1]}, {cosines[run]:.5f})" for run, cell in compared.items()}
    yield {"model": name, "pixels": size, "batch": batch, **row}


CLASSIFY = """
import sys, torch
from PIL import Image
library, file, photo, hub = sys.argv[1:]
if library == "transformers":
    from transformers import pipeline
    sys.exit(print(pipeline("image-classification", model=file)(photo)))
if library == "timm":
    import timm
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=1000,\
 dynamic_img_size=True, checkpoint_path=file)
    transform = timm.data.create_transform(224, interpolation="bicubic", crop_pct=0.875)
if library == "official":
    from torchvision import transforms as T
    model = torch.hub.load(hub, "dinov2_vits14_reg_lc", source="local", layers=1, pretrained=False)
    model.load_state_dict(torch.load(file))
    steps = [T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()]
    transform = T.Compose([*steps, T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
model.eval()
with torch.inference_mode():
    print(model(transform(Image.open(photo).convert("RGB"))[None]).softmax(-1).topk(5))
"""


def start(args: argparse.Namespace, temp: Path) -> Iterator[dict]:
    """One photo, the whole process, ViT-S/14 with registers: each process classifies the photo and
    prints the result. Seconds, their ratio to dinoreg, and peak resident memory in megabytes.
    """
    model = LinearClassifier(DinoVisionTransformer(Config()), num_classes=1000)
    # timm's heads are on the CLS token only.
    model.linear_head.weight.data[:, model.backbone.embed_dim :] = 0
    dinoreg.save(model, temp / "dinoreg.safetensors")
    runs = {
        "dinoreg": [
            sys.executable,
            "dinoreg.py",
            PHOTOS[0],
            "--weights",
            temp / "dinoreg.safetensors",
        ]
    }
    runs["import torch"] = [*PYTHON, "import torch"]
    formats = [
        ("official", "official", ".pth"),
        ("transformers", "hf", ""),
        ("timm", "timm", ".safetensors"),
    ]
    for library, dialect, suffix in formats:
        if (
            OFFICIAL.is_dir() and find_spec("torchvision")
            if library == "official"
            else find_spec(library)
        ):
            convert_weights.write(model, weights := temp / f"{library}{suffix}", dialect)
            runs[library] = [*PYTHON, CLASSIFY, library, weights, PHOTOS[0], OFFICIAL]
    compared = compare(
        runs, args.turns, measure=lambda command: numbers_of([*PYTHON, PARENT, *command])
    )
    for name, (ratio, seconds, megabytes) in compared.items():
        yield {
            "process": name,
            "seconds": f"{seconds:.2f}",
            "ratio": f"{ratio:.2f}",
            "peak MB": f"{megabytes:.0f}",
        }


FOLDERS = [(16, 4000, 3000), (32, 500, 375)]  # photos, width, height


def folder(
    args: argparse.Namespace, temp: Path, count: int, width: int, height: int
) -> Iterator[dict]:
    """A folder of JPEG photographs, read and classified by ViT-S/14 with registers: milliseconds
    per image, and in brackets the ratio to dinoreg. `--fast` decodes at reduced size, though not
    below that of the model's input (its choice of a dtype is not part of this). `forward` is the
    model alone, `decode` reading alone on one core.
    """
    model, images = (
        LinearClassifier(DinoVisionTransformer(CONFIGS["vits14_reg"]), 1000).eval(),
        torch.randn(8, 3, 224, 224),
    )
    model.backbone.fix_image_size(224, 224)
    paths = [str(temp / f"{i}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        Image.open(PHOTOS[0]).resize((width, height)).rotate(i).save(path, quality=90)
    runs = {
        "dinoreg": lambda: list(dinoreg.classify(model, paths, 224)),
        "dinoreg --fast": lambda: list(dinoreg.classify(model, paths, 224, fast=True)),
        "forward": lambda: [model(images).softmax(dim=-1) for _ in range(0, count, 8)],
        "decode": lambda: [dinoreg.preprocess(path, normalized=False) for path in paths],
    }
    if transformers := optional("transformers"):
        convert_weights.write(model, temp / "hf", "hf")
        pipe = transformers.pipeline("image-classification", model=str(temp / "hf"))
        runs["transformers pipeline"] = lambda: list(pipe(paths, batch_size=8))
    yield {
        "JPEG files": f"{count} of {width} x {height}",
        **cells(compare(runs, args.turns), count),
    }


@torch.inference_mode()
def fast(args: argparse.Namespace, temp: Path) -> Iterator[dict]:
    """The error of `--fast` with the model `--weights`: cosines between CLS tokens for a photo
    decoded at full and at reduced size, and for the model in float32 and in bfloat16.
    """
    model, half = dinoreg.load(args.weights), dinoreg.load(args.weights, dtype=torch.bfloat16)
    for photo, size in itertools.product(PHOTOS, (98, 140, 224)):
        full, reduced = (dinoreg.preprocess(photo, size, fast=flag)[None] for flag in (False, True))
        with Image.open(photo) as image:
            pixels = "{} x {}".format(*image.size)
            image.draft("RGB", (size * 8 // 7,) * 2)
            row = {
                "photo": photo.name,
                "pixels": pixels,
                "decoded at": "{} x {}".format(*image.size),
                "seen at": size,
            }
        for label, features in (
            ("reduced size", model(reduced)),
            ("bfloat16", half(full).float()),
        ):
            row[f"cosine, {label}"] = f"{F.cosine_similarity(model(full), features).item():.5f}"
        yield row
    random.seed(0)
    crops, nearest = (
        torch.stack([dinoreg.preprocess(path) for path in save_crops(temp, 96).iterdir()]),
        [],
    )
    for version in (model, half):
        features = F.normalize(
            torch.cat([version(batch).float() for batch in crops.split(16)]), dim=1
        )
        nearest.append((features @ features.T).fill_diagonal_(-1).argmax(dim=1))
    same = (nearest[0] == nearest[1]).sum()
    print(
        f"\nOf {len(crops)} random crops of these photos, "
        f"{same} have the same nearest neighbour in float32 and bfloat16."
    )
    print(f"`best_dtype({args.device!r})` is {dinoreg.best_dtype(args.device)} here.")


MEMORY = """
import re, sys, time, torch
from dinoreg import Config, DinoVisionTransformer, load
megabytes = lambda key: int(re.search(key + r":\\s+(\\d+)",\
 open("/proc/self/status").read())[1]) / 1024
exec(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # resets the peak, VmHWM
before, seconds = megabytes("VmRSS"), []
with torch.inference_mode():
    for _ in range(4):
        start = time.perf_counter()
        exec(sys.argv[2])
        seconds.append(time.perf_counter() - start)
print(sorted(seconds[1:])[1], megabytes("VmHWM") - before, sep="\\n")
"""


def memory(args: argparse.Namespace, temp: Path) -> Iterator[dict]:
    """Time and memory of a forward pass (ViT-S/14 with registers, float32), and of loading
    ViT-g/14. glibc returns freed memory to the system after each layer. The command line prevents
    that; in other programs, such as these measurements, MALLOC_MMAP_MAX_=0 and
    MALLOC_TRIM_THRESHOLD_=1073741824 in the environment do.
    """
    build, runs = (
        "model, images = DinoVisionTransformer(Config()).eval(), torch.randn({}, 3, {}, {})",
        {},
    )
    for batch, size in zip(
        (*[1] * 6, 2, 4, 8, 16, 32, 64), (224, 378, 518, 700, 868, 1036, *[224] * 6)
    ):
        runs[f"forward, {batch} x {size} x {size}"] = (
            build.format(batch, size, size),
            "model.forward_features(images)",
        )
    dinoreg.save(DinoVisionTransformer(CONFIGS["vitg14_reg"]), temp / "x.safetensors")
    runs["load, 4.5 GB, mapped"] = ("", f"model = load('{temp}/x.safetensors', mmap=True)")
    for label, code in runs.items():
        seconds, megabytes = numbers_of([*PYTHON, MEMORY, *code])
        yield {"": label, "seconds": f"{seconds:.2f}", "MB more": f"{megabytes:.0f}"}


def corpus(args: argparse.Namespace, temp: Path, count: int) -> Iterator[dict]:
    """embed_corpus.py with Ray and without, whole processes with as many threads: ViT-S/14 with
    registers at 224 pixels, batches of 16 JPEG files of 256 x 256 pixels. Images per hour are those
    with Ray.
    """
    weights, images = (
        temp / "model.safetensors",
        save_crops(Path(tempfile.mkdtemp(dir=temp)), count),
    )
    dinoreg.save(DinoVisionTransformer(Config()), weights)
    command = [
        sys.executable,
        HERE / "embed_corpus.py",
        images,
        "--model",
        weights,
        "--size",
        224,
        "--output",
    ]
    # By default Ray's workers have a lower priority.
    ray = ["env", "RAY_ADDRESS=local", "RAY_worker_niceness=0"]
    runs = {  # into a new folder each time, as an old one would be resumed
        "loop": lambda: numbers_of([*command, tempfile.mkdtemp(dir=temp)]),
        "ray": lambda: numbers_of([*ray, *command, tempfile.mkdtemp(dir=temp)]),
    }
    (_, loop), (ratio, on_ray) = compare(runs, args.turns).values()
    row = {
        "images": count,
        "plain loop, s": f"{loop:.1f}",
        "Ray, s": f"{on_ray:.1f}",
        "ratio": f"{ratio:.2f}",
    }
    yield {**row, "images per hour": f"{3600 * count / on_ray:,.0f}"}


# The docstring of a part is printed, and the rows that it yields as a table; `temp` is an empty
# folder.
PARTS = {part.__name__: part for part in (forward, engines, start, folder, fast, memory, corpus)}


def run(args: argparse.Namespace) -> int:
    device, info = (
        torch.device(args.device),
        Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "",
    )
    processor = re.search(r"model name\s*: (.+)", info)
    # The vector units that count here.
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {unit} " in info]
    where = (
        f"{processor[1] if processor else sys.platform} ({', '.join(units)}), "
        f"{torch.get_num_threads()} threads"
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that `synchronize` waits for
        where = f"{torch.cuda.get_device_name()}; {where}"
    libraries = ("torch", "transformers", "timm", "onnxruntime", "openvino", "ray")
    versions = (f"{name} {metadata.version(name)}" for name in libraries if find_spec(name))
    print(f"# Benchmark\n\n{where}; {', '.join(versions)}. Written by\n")
    print(
        f"    python examples/benchmark.py {' '.join(args.argv)}\n\n"
        "whose docstring says how it measures."
    )
    grid = list(itertools.product(args.models, args.pixels, args.batches))
    cases = {"forward": grid, "engines": grid, "folder": FOLDERS}
    cases["corpus"] = [(count,) for count in args.images]
    for name in args.parts or ([*PARTS][:-1] if device.type == "cpu" else ["forward", "engines"]):
        print(f"\n## {name}\n\n{inspect.getdoc(PARTS[name])}\n")
        with tempfile.TemporaryDirectory() as temp:
            tables = (
                PARTS[name](args, Path(tempfile.mkdtemp(dir=temp)), *case)
                for case in cases.get(name, [()])
            )
            for i, row in enumerate(itertools.chain.from_iterable(tables)):
                if i == 0:
                    print("|", " | ".join(row), "|\n|", " | ".join("---" for _ in row), "|")
                print("|", " | ".join(map(str, row.values())), "|", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 2 if something is missing or fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, names = parser.add_argument, [name for name in CONFIGS if name.endswith("_reg")]
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"any of {', '.join(PARTS)} (default: all but corpus)",
    )
    add(
        "--turns",
        type=int,
        default=5,
        help="turns that are measured, at least (default: %(default)s)",
    )
    common.add_device(parser)
    add(
        "--models",
        nargs="+",
        choices=names,
        default=names[:2],
        help="for forward and engines (default: %(default)s)",
    )
    add(
        "--pixels",
        nargs="+",
        type=int,
        default=[224, 518],
        help="for forward and engines (default: %(default)s)",
    )
    add(
        "--batches",
        nargs="+",
        type=int,
        default=[1, 8],
        help="for forward and engines (default: %(default)s)",
    )
    add(
        "--seconds",
        type=float,
        default=60,
        help="per row of forward and engines, at least (default: %(default)s)",
    )
    add(
        "--weights",
        default="vits14",
        metavar="FILE",
        help="for fast: a backbone's trained weights (default: %(default)s)",
    )
    add(
        "--images",
        nargs="+",
        type=int,
        default=[500, 2000],
        help="for corpus: numbers of images (default: %(default)s)",
    )
    args = parser.parse_args(argv, argparse.Namespace(argv=sys.argv[1:] if argv is None else argv))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if min(args.turns, *args.batches, *args.images, *args.pixels) < 1 or any(
        side % 14 for side in args.pixels
    ):
        parser.error(
            "--turns, --batches and --images must be at least 1, and --pixels multiples of 14"
        )
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
