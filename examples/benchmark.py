"""Compare dinoreg with the official code, transformers, timm, onnxruntime, openvino, if installed.

    pip install -e ".[examples,parity]"
    python -c "import torch; \
        torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14_reg', pretrained=False)"
    python examples/benchmark.py > examples/benchmark.md    # all parts but corpus; or some:
    python examples/benchmark.py sizes forward

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
import shlex
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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import common
import convert_weights
import dinoreg
import export
import features
from dinoreg import CONFIGS, Config, DinoVisionTransformer, LinearClassifier

HERE = Path(__file__).parent
PHOTOS = sorted(HERE.glob("images/*.jpg"))
# torch.hub's clone of the official code.
OFFICIAL = Path(torch.hub.get_dir(), "facebookresearch_dinov2_main")
PYTHON, SECONDS = [sys.executable, "-c"], 0.5  # for which short runs are repeated
FOLDERS = [(16, 4000, 3000), (32, 500, 375)]  # photos, width, height
SIDES = (224, 518)  # pixels, of the images of `sizes`


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
def compare(runs: dict, turns: int, seconds: float = 0, measure: Callable = seconds_of) -> dict:
    """For each run: its time as a ratio to that of the first run, and the medians of the numbers
    that `measure` returns.
    """
    results = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in itertools.count():  # the first one warms up
        for name, run in random.sample(list(runs.items()), len(runs)):
            results[name].append(measure(run))
        if turn >= turns and time.perf_counter() - start > seconds:
            break
    first, medians = next(iter(results.values())), {}
    for name, rows in results.items():
        columns = [[a[0] / b[0] for a, b in zip(rows, first)], *zip(*rows)]
        medians[name] = [statistics.median(column[1:]) for column in columns]
    return medians


def cells(compared: dict[str, list[float]], count: int = 1) -> dict[str, str]:
    """Milliseconds for each of `count` images, and in parentheses the ratio."""
    return {name: f"{1000 * x / count:.1f} ({ratio:.2f})" for name, (ratio, x) in compared.items()}


@torch.inference_mode()
def cosines_of(runs: dict[str, Callable]) -> dict[str, float]:
    """The lowest cosine of the features (B, D) of each run to those of the first; a RuntimeError if
    one is below 0.999, or 0.99 for int8.
    """
    first = next(iter(runs.values()))().float()
    cosines = {}
    for name, run in runs.items():
        cosines[name] = F.cosine_similarity(run().float(), first).min().item()
    if not all(cosine > (0.99 if "int8" in name else 0.999) for name, cosine in cosines.items()):
        raise RuntimeError(f"the features differ, with cosines of {cosines}")
    return cosines


def optional(library: str):
    """The imported library, or None if it is not installed."""
    return importlib.import_module(library) if find_spec(library) else None


def save_crops(folder: Path, count: int) -> Path:
    """The folder, with `count` random crops of the photographs: JPEG, 256 x 256 pixels."""
    photos = [Image.open(photo).convert("RGB") for photo in PHOTOS]
    for i, photo in zip(range(count), itertools.cycle(photos)):
        left, top = random.randrange(photo.width - 256), random.randrange(photo.height - 256)
        photo.crop((left, top, left + 256, top + 256)).save(folder / f"{i}.jpg", quality=90)
    return folder


def forward(args: argparse.Namespace, temp: Path, name: str, size: int, batch: int) -> Iterator:
    """Forward pass, milliseconds per image, float32 on a CPU and bfloat16 elsewhere; in parentheses
    the ratio to dinoreg: above 1, dinoreg is faster. All tokens are computed and normalized, except
    that `embed`, of features.py, computes the last block for the CLS token only. `matrix products`
    runs those of the linear layers and nothing else; GFLOP/s is their rate.
    """
    dtype = torch.float32 if torch.device(args.device).type == "cpu" else torch.bfloat16
    model = DinoVisionTransformer(CONFIGS[name]).to(args.device, dtype).eval()
    images = torch.randn(batch, 3, size, size).to(model.pos_embed)
    runs = {"dinoreg": lambda: model.forward_features(images)["x_norm_clstoken"]}
    runs["embed"] = lambda: features.embed(model, images)
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
        arch = f"vit_{letter}_patch14_reg4_dinov2"
        other = timm.create_model(arch, num_classes=0, dynamic_img_size=True)
        other.load_state_dict(convert_weights.from_official(model, "timm"))
        other.to(images).eval()
        runs["timm"] = lambda: other.forward_features(images)[:, 0]
    cosines_of(runs)
    weights = [x.weight.detach().T for x in model.modules() if isinstance(x, torch.nn.Linear)]
    widths = {width for weight in weights for width in weight.shape}
    tokens = batch * (1 + model.num_register_tokens + (size // model.patch_size) ** 2)
    x, y = ({i: torch.randn(tokens, i).to(images) for i in widths} for _ in range(2))
    runs["matrix products"] = lambda: [torch.mm(x[len(w)], w, out=y[len(w.T)]) for w in weights]
    compared = compare(runs, args.turns, args.seconds)
    rate = 2 * tokens * sum(weight.numel() for weight in weights) / compared["matrix products"][1]
    row = {"model": name, "pixels": size, "batch": batch, **cells(compared, batch)}
    yield {**row, "GFLOP/s": f"{rate / 1e9:.0f}"}


def package(model: DinoVisionTransformer, path: Path, to: str, images: Tensor) -> Callable:
    """Export a model; what runs the result on images."""
    export.write(model, torch.cat([images, images]) if to == "onnx" else images, path, to)
    return partial(export.read(path, to), images)


def engines(args: argparse.Namespace, temp: Path, name: str, size: int, batch: int) -> Iterator:
    """Ways to compute the CLS token, milliseconds per image; in parentheses the ratio to float32
    (below 1: faster), and the lowest cosine of a token to it. `compile` is `torch.compile(model)`;
    AOTInductor runs a package of export.py, int8 one with quantized layers, onnxruntime and
    openvino its ONNX file (`default`: openvino's choice of precision).
    """
    on_cpu, has_compiler = torch.device(args.device).type == "cpu", shutil.which("c++")
    model = DinoVisionTransformer(CONFIGS[name]).eval()
    model.fix_image_size(size, size)
    images = torch.randn(batch, 3, size, size, device=args.device)
    torch.compiler.reset()
    runs = {}
    for dtype in ("float32", "bfloat16"):
        cast = copy.deepcopy(model).to(args.device, getattr(torch, dtype))
        runs[dtype] = partial(cast, images)
        if has_compiler or not on_cpu:
            runs[f"compile, {dtype}"] = partial(torch.compile(cast), images)
        if has_compiler and on_cpu:
            runs[f"AOTInductor, {dtype}"] = package(cast, temp / f"{dtype}.pt2", "aoti", images)
    if on_cpu and has_compiler and find_spec("torchao"):
        runs["AOTInductor, int8"] = package(model, temp / "int8.pt2", "int8", images)
    if on_cpu and find_spec("onnxruntime") and find_spec("onnxscript"):
        runs["onnxruntime"] = package(model, temp / "model.onnx", "onnx", images)
        if openvino := optional("openvino"):
            options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
            float32 = {**options, "INFERENCE_PRECISION_HINT": "f32"}
            for kind, chosen in (("float32", float32), ("default", options)):
                run = openvino.compile_model(temp / "model.onnx", "CPU", chosen)
                runs[f"openvino, {kind}"] = lambda run=run: torch.from_numpy(run(images.numpy())[0])
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
    dinoreg.save(model, weights := temp / "dinoreg.safetensors")
    runs = {"dinoreg": [sys.executable, "dinoreg.py", PHOTOS[0], "--model", weights]}
    runs["import torch"] = [*PYTHON, "import torch"]
    files = {"transformers": "hf", "timm": "timm.safetensors"}
    files = {library: file for library, file in files.items() if find_spec(library)}
    if OFFICIAL.is_dir() and find_spec("torchvision"):
        files["official"] = "official.pth"
    for library, file in files.items():
        convert_weights.write(model, temp / file, file.partition(".")[0])
        runs[library] = [*PYTHON, CLASSIFY, library, temp / file, PHOTOS[0], OFFICIAL]
    compared = compare(runs, args.turns, measure=lambda run: numbers_of([*PYTHON, PARENT, *run]))
    for name, (ratio, seconds, megabytes) in compared.items():
        row = {"process": name, "seconds": f"{seconds:.2f}", "ratio": f"{ratio:.2f}"}
        yield {**row, "peak MB": f"{megabytes:.0f}"}


def folder(args: argparse.Namespace, temp: Path, count: int, width: int, height: int) -> Iterator:
    """A folder of JPEG photographs, read and classified by ViT-S/14 with registers: milliseconds
    per image, and in parentheses the ratio to dinoreg. `--fast` decodes at reduced size, though not
    below that of the model's input (its choice of a dtype is not part of this). `forward` is the
    model alone, `decode` reading alone on one core.
    """
    model = LinearClassifier(DinoVisionTransformer(CONFIGS["vits14_reg"]), 1000).eval()
    images = torch.randn(8, 3, 224, 224)
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
    compared = cells(compare(runs, args.turns), count)
    yield {"JPEG files": f"{count} of {width} x {height}", **compared}


@torch.inference_mode()
def fast(args: argparse.Namespace, temp: Path) -> Iterator[dict]:
    """The error of `--fast` with the model `--weights`: cosines between CLS tokens for a photo
    decoded at full and at reduced size, and for the model in float32 and in bfloat16.
    """
    model, half = dinoreg.load(args.weights), dinoreg.load(args.weights, dtype=torch.bfloat16)
    for photo, size in itertools.product(PHOTOS, (98, 140, 224)):
        full, reduced = (dinoreg.preprocess(photo, size, fast=flag)[None] for flag in (False, True))
        with Image.open(photo) as image:
            row = {"photo": photo.name, "pixels": "{} x {}".format(*image.size)}
            image.draft("RGB", (size * 8 // 7,) * 2)
            row |= {"decoded at": "{} x {}".format(*image.size), "seen at": size}
        expected = model(full)
        for kind, x in {"reduced size": model(reduced), "bfloat16": half(full).float()}.items():
            row[f"cosine, {kind}"] = f"{F.cosine_similarity(expected, x).item():.5f}"
        yield row
    random.seed(0)
    crops = torch.stack([dinoreg.preprocess(path) for path in save_crops(temp, 96).iterdir()])
    nearest = []
    for version in (model, half):
        x = F.normalize(torch.cat([version(batch).float() for batch in crops.split(16)]), dim=1)
        nearest.append((x @ x.T).fill_diagonal_(-1).argmax(dim=1))
    same = f"{(nearest[0] == nearest[1]).sum()} of {len(crops)} random crops of these photos"
    print(f"\n{same} have the same nearest neighbor in float32 and bfloat16.")
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
    build = "model, images = DinoVisionTransformer(Config()).eval(), torch.randn({}, 3, {}, {})"
    shapes = [(1, size) for size in (224, 378, 518, 700, 868, 1036)]
    shapes += [(batch, 224) for batch in (2, 4, 8, 16, 32, 64)]
    runs = {}
    for B, size in shapes:
        code = build.format(B, size, size), "model.forward_features(images)"
        runs[f"forward, {B} x {size} x {size}"] = code
    dinoreg.save(DinoVisionTransformer(CONFIGS["vitg14_reg"]), temp / "x.safetensors")
    runs["load, 4.5 GB, mapped"] = ("", f"model = load('{temp}/x.safetensors', mmap=True)")
    for label, code in runs.items():
        seconds, megabytes = numbers_of([*PYTHON, MEMORY, *code])
        yield {"": label, "seconds": f"{seconds:.2f}", "MB more": f"{megabytes:.0f}"}


def count(config: Config) -> tuple[int, list[int]]:
    """The parameters of a model, and the operations for an image of each of SIDES."""
    operations = []
    with torch.device("meta"):
        model = DinoVisionTransformer(config).eval()
        for side in SIDES:
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, side, side))
            operations.append(counter.get_total_flops())
    return sum(parameter.numel() for parameter in model.parameters()), operations


def sizes(args: argparse.Namespace, temp: Path) -> Iterator[dict]:
    """The official models: parameters, size of a file, and operations of a forward pass for one
    image. A multiply-add counts as two; those of the patch embedding, of linear layers and of the
    two products of attention are counted, and no others. The registers' share is in parentheses.
    """
    counts = {name: count(config) for name, config in CONFIGS.items()}
    for name, (parameters, operations) in counts.items():
        row = {"model": f"`{name}`", "parameters": f"{parameters / 1e6:,.1f} M"}
        row["float32 file"] = f"{4 * parameters / 1e6:,.0f} MB"
        for side, x, y in zip(SIDES, operations, counts[name.removesuffix("_reg")][1]):
            share = f" ({1 - y / x:.1%})" if x > y else ""
            row[f"GFLOPs at {side} (registers)"] = f"{x / 1e9:,.1f}{share}"
        yield row


def corpus(args: argparse.Namespace, temp: Path, count: int) -> Iterator[dict]:
    """embed_corpus.py with Ray and without, whole processes with as many threads: ViT-S/14 with
    registers at 224 pixels, batches of 16 JPEG files of 256 x 256 pixels. Images per hour are those
    with Ray.
    """
    weights = temp / "model.safetensors"
    dinoreg.save(DinoVisionTransformer(Config()), weights)
    images = save_crops(Path(tempfile.mkdtemp(dir=temp)), count)
    command = [sys.executable, HERE / "embed_corpus.py", images]
    command += ["--model", weights, "--size", 224, "--output"]
    # By default Ray's workers have a lower priority.
    ray = ["env", "RAY_ADDRESS=local", "RAY_worker_niceness=0"]
    runs = {  # into a new folder each time, as an old one would be resumed
        "loop": lambda: numbers_of([*command, tempfile.mkdtemp(dir=temp)]),
        "ray": lambda: numbers_of([*ray, *command, tempfile.mkdtemp(dir=temp)]),
    }
    (_, loop), (ratio, on_ray) = compare(runs, args.turns).values()
    row = {"images": count, "plain loop, s": f"{loop:.1f}", "Ray, s": f"{on_ray:.1f}"}
    yield {**row, "ratio": f"{ratio:.2f}", "images per hour": f"{3600 * count / on_ray:,.0f}"}


# The script ---------------------------------------------------------------------------------------

# The docstring of a part is printed, and the rows that it yields as a table; `temp` is an empty
# folder.
PARTS = {f.__name__: f for f in (sizes, forward, engines, start, folder, fast, memory, corpus)}


def describe_machine(device: torch.device) -> str:
    """The processor, its vector units that count here, and the versions of the libraries."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = re.search(r"model name\s*: (.+)", info)
    units = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
    units = ", ".join(unit for unit in units if f" {unit} " in info)
    name = processor[1] if processor else sys.platform
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    libraries = ("torch", "transformers", "timm", "onnxruntime", "openvino", "torchao", "ray")
    versions = [f"{name} {metadata.version(name)}" for name in libraries if find_spec(name)]
    return f"{gpu}{name} ({units}), {torch.get_num_threads()} threads; {', '.join(versions)}"


def run(args: argparse.Namespace) -> int:
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(f"no such part: {', '.join(unknown)}")
    if any(side % 14 for side in args.pixels):
        raise ValueError("--pixels must be multiples of 14, the patch size")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that `synchronize` waits for
    print(f"# Benchmark\n\n{describe_machine(device)}. Written by\n")
    print(f"    python examples/benchmark.py {shlex.join(sys.argv[1:])}\n")
    print("whose docstring says how it measures.")
    grid = list(itertools.product(args.models, args.pixels, args.batches))
    corpora = [(count,) for count in args.images]
    cases = {"forward": grid, "engines": grid, "folder": FOLDERS, "corpus": corpora}
    for name in args.parts or ([*PARTS][:-1] if device.type == "cpu" else ["forward", "engines"]):
        print(f"\n## {name}\n\n{inspect.getdoc(PARTS[name]) or ''}\n")
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


def add_options(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, "(default: %(default)s)"
    text = f"any of {', '.join(PARTS)} (default: all but corpus)"
    add("parts", nargs="*", metavar="PART", help=text)
    add("--turns", type=common.positive, default=5, help=f"turns that are measured {default}")
    common.add_device(parser)
    names = [name for name in CONFIGS if name.endswith("_reg")]
    text = f"for forward and engines {default}"
    add("--models", nargs="+", choices=names, default=names[:2], help=text)
    add("--pixels", nargs="+", type=common.positive, default=[224, 518], help=text)
    add("--batches", nargs="+", type=common.positive, default=[1, 8], help=text)
    text = f"per row of forward and engines, at least {default}"
    add("--seconds", type=float, default=60, help=text)
    text = f"for fast: a backbone's trained weights {default}"
    add("--weights", default="vits14", metavar="FILE", help=text)
    text = f"for corpus {default}"
    add("--images", nargs="+", type=common.positive, default=[500, 2000], help=text)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 2 if something is missing or fails."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
