"""Compare the speed of dinoreg with the official code, transformers, timm, onnxruntime and openvino, as far as installed.

    pip install -e ".[examples,parity]"
    python -c "import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14_reg', pretrained=False)"
    python examples/benchmark.py > examples/benchmark.md    # everything but corpus, as Markdown
    python examples/benchmark.py forward start              # or some parts: forward lists start ...

All sides have the same random weights and take turns, in a new random order for each turn. Short workloads are repeated for
half a second per turn, and the fastest run counts. A figure is the median over turns; a ratio is the median of the ratios
within each turn. `--device` is that of `forward` and `engines`; the other parts run on the CPU, and by default only if it is
the device. `fast` needs trained weights, `--weights` (default: the official ViT-S/14, downloaded). `corpus` compares
embed_corpus.py, which needs Ray, with a plain loop.
"""

import argparse
import copy
import functools
import itertools
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._inductor
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common
import convert_weights
import dinoreg

PHOTOS = sorted(Path(__file__).with_name("images").glob("*.jpg"))
OFFICIAL = Path(torch.hub.get_dir(), "facebookresearch_dinov2_main")  # torch.hub's clone of the official code


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns


def seconds_of(work) -> float:
    """The fastest of the runs that begin within half a second."""
    times = []
    while sum(times) < 0.5:
        times.append(seconds_of_run(work))
    return min(times)


def seconds_of_run(work) -> float:
    start = time.perf_counter()
    work()
    getattr(torch, dinoreg.best_device()).synchronize()  # a GPU computes in the background
    return time.perf_counter() - start


def take_turns(sides: dict, turns: int, measure=seconds_of, seconds: float = 0) -> dict[str, list]:
    """The measurements of each side, one per turn: at least so many turns and seconds, after a first turn to warm up."""
    results, start = {name: [] for name in sides}, time.perf_counter()
    for turn in tqdm(itertools.count(), unit="turn", leave=False, disable=None):
        for name, work in random.sample(list(sides.items()), len(sides)):
            results[name].append(measure(work))
        if turn >= turns and time.perf_counter() - start > seconds:
            return {name: values[1:] for name, values in results.items()}


def ratio(others: list[float], ours: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(others, ours)):.2f}"


def table(header: list[str], rows: Iterable[list]) -> None:
    """Print a Markdown table, each row as soon as it is computed."""
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print("|", " | ".join(map(str, row)), "|", flush=True)
    print()


def numbers_from(command: list) -> list[float]:
    """The numbers printed by a command."""
    return [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


# The peak memory of a process includes what its parent had in memory when it was started, so this parent has little.
PARENT = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def whole_process(command: list) -> list[float]:
    """[wall seconds, peak resident megabytes] of a command."""
    return numbers_from([sys.executable, "-c", PARENT, *map(str, command)])


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def peers(model: dinoreg.DinoVisionTransformer, images: torch.Tensor, name: str, folder: Path) -> dict:
    """The same model in other libraries: functions without arguments that compute and normalise all tokens and return
    the CLS tokens (B, D)."""
    sides, device, dtype = {}, images.device, images.dtype
    if OFFICIAL.is_dir():
        official = torch.hub.load(str(OFFICIAL), f"dinov2_{name}", source="local", pretrained=False)
        official.load_state_dict(model.state_dict())
        official = official.to(device, dtype).eval()
        sides["official"] = lambda: official.forward_features(images)["x_norm_clstoken"]
    if find_spec("transformers"):
        from transformers import AutoModel

        convert_weights.write(model, folder / "hf", "hf")
        hf = AutoModel.from_pretrained(folder / "hf").to(device, dtype).eval()
        sides["transformers"] = lambda: hf(images).last_hidden_state[:, 0]
    if find_spec("timm"):
        import timm

        arch = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}[name[:4]]
        other = timm.create_model(f"vit_{arch}_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True)
        other.load_state_dict(convert_weights.from_official(model, "timm"))
        other = other.to(device, dtype).eval()
        sides["timm"] = lambda: other.forward_features(images)[:, 0]
    return sides


def table_of_models(args: argparse.Namespace, measure) -> None:
    """Print the table whose rows, dicts by column, are what `measure` returns for each model, image size and batch size."""
    table_of_dicts(measure(args, *which) for which in itertools.product(args.models, args.pixels, args.batches))


def table_of_dicts(rows: Iterator[dict]) -> None:
    """Print a table of rows by column, each as soon as it is computed."""
    first = next(rows)
    table(list(first), (list(row.values()) for row in itertools.chain([first], rows)))


def forward(args: argparse.Namespace) -> None:
    print("Forward pass, milliseconds per image, float32 on a CPU and bfloat16 elsewhere; in brackets the ratio to dinoreg:")
    print(
        "above 1, dinoreg is faster. All tokens are computed and normalised, except that `embed` returns the CLS token only."
    )
    print("`matrix products` runs those of the linear layers and nothing else; GFLOP/s is their rate.\n")
    table_of_models(args, forward_row)


@torch.inference_mode()
def forward_row(args: argparse.Namespace, name: str, size: int, batch: int) -> dict:
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS[name]).to(device, dtype).eval()
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    sides = {"dinoreg": lambda: model.forward_features(images)["x_norm_clstoken"], "embed": lambda: model.embed(images)}
    with tempfile.TemporaryDirectory() as folder:
        sides |= peers(model, images, name, Path(folder))
        cls = sides["dinoreg"]().float()
        for side, work in sides.items():
            if torch.cosine_similarity(work().float(), cls).min() < 0.999:
                raise RuntimeError(f"{side}: the CLS tokens differ from those of dinoreg")
        sides["matrix products"], operations = matrix_products(model, batch, size)
        results = take_turns(sides, args.turns, seconds=args.seconds)
    medians = {side: statistics.median(times) for side, times in results.items()}
    cells = {side: f"{1000 * medians[side] / batch:.1f} ({ratio(results[side], results['dinoreg'])})" for side in sides}
    rate = operations / medians["matrix products"] / 1e9
    return {"model": name, "pixels": size, "batch": batch, **cells, "GFLOP/s": f"{rate:.0f}"}


def lists(args: argparse.Namespace) -> None:
    print(
        "Images of several sizes through `forward`, milliseconds for all; in brackets the ratio to one packed pass. Others:"
    )
    print("a pass for each tensor, and one batch padded with zeros to the largest size, whose features are not the same.\n")
    table_of_dicts(lists_row(args, name, *case) for name, case in itertools.product(args.models, LISTS.items()))


LISTS = {
    "eight images near 224 x 224": [
        (1, 14 * h, 14 * w) for h, w in zip((12, 14, 15, 16, 16, 17, 18, 20), (20, 18, 17, 15, 16, 16, 14, 13))
    ],
    "twelve images of 98 x 98": [(1, 98, 98)] * 12,
    "a training step: 2 global crops (224), 8 local ones (98)": [(2, 224, 224), (8, 98, 98)],
}


@torch.inference_mode()
def lists_row(args: argparse.Namespace, name: str, label: str, shapes: list[tuple[int, int, int]]) -> dict:
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS[name]).to(device, dtype).eval()
    images = [torch.randn(B, 3, H, W, device=device, dtype=dtype) for B, H, W in shapes]
    H, W = (max(image.shape[side] for image in images) for side in (2, 3))
    padded = torch.cat([F.pad(image, (0, W - image.shape[3], 0, H - image.shape[2])) for image in images])
    sides = {
        "packed": lambda: model(images),
        "one by one": lambda: torch.cat([model(image) for image in images]),
        "padded": lambda: model(padded),
    }
    results = take_turns(sides, args.turns, seconds=args.seconds)
    cells = {
        side: f"{1000 * statistics.median(times):.0f} ({ratio(times, results['packed'])})" for side, times in results.items()
    }
    return {"model": name, "images": label, **cells}


def engines(args: argparse.Namespace) -> None:
    print("Ways to compute `embed`, milliseconds per image; in brackets the ratio to float32 (below 1: faster), and the")
    print("lowest cosine of an embedding to it. `compile` is `torch.compile(model.embed)`, AOTInductor runs the package of")
    print(
        "export_aoti.py, onnxruntime and openvino the file of export_onnx.py (`default`: openvino's choice of precision).\n"
    )
    table_of_models(args, engines_row)


@torch.inference_mode()
def engines_row(args: argparse.Namespace, name: str, size: int, batch: int) -> dict:
    device, threads = torch.device(args.device), torch.get_num_threads()
    model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS[name]).eval()
    model.fix_image_size(size, size)
    images, sides = torch.randn(batch, 3, size, size, device=device), {}
    torch.compiler.reset()
    for dtype in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(model).to(device, dtype)
        label = str(dtype).removeprefix("torch.")
        sides[label] = functools.partial(cast.embed, images)
        if device.type == "cuda" or shutil.which("c++"):
            sides[f"compile, {label}"] = functools.partial(torch.compile(cast.embed), images)
    with tempfile.TemporaryDirectory() as folder:
        weights, graph = Path(folder, "model.safetensors"), Path(folder, "model.onnx")
        dinoreg.save(model, weights)

        def export(script: str, output: Path, *options: str) -> None:
            path = Path(__file__).with_name(script)
            command = [sys.executable, path, weights, "-o", output, "--size", str(size), *options]
            subprocess.run(command, check=True, capture_output=True)

        if device.type == "cpu" and shutil.which("c++"):
            for label in ("float32", "bfloat16"):
                package = Path(folder, f"{label}.pt2")
                export("export_aoti.py", package, "--batch-size", str(batch), "--dtype", label)
                sides[f"AOTInductor, {label}"] = functools.partial(torch._inductor.aoti_load_package(str(package)), images)
        if device.type == "cpu" and find_spec("onnxruntime") and find_spec("onnxscript"):
            import onnxruntime

            export("export_onnx.py", graph)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            sides["onnxruntime"] = lambda: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            if find_spec("openvino"):
                import openvino

                for label, options in (("float32", {"INFERENCE_PRECISION_HINT": "f32"}), ("default", {})):
                    compiled = openvino.compile_model(graph, "CPU", {**options, "INFERENCE_NUM_THREADS": threads})
                    sides[f"openvino, {label}"] = lambda run=compiled: torch.from_numpy(run(images.numpy())[0])
        expected = sides["float32"]()
        cosines = {side: torch.cosine_similarity(work().float(), expected).min() for side, work in sides.items()}
        if min(cosines.values()) < 0.999:
            raise RuntimeError(f"the embeddings differ from those of float32: {cosines}")
        results = take_turns(sides, args.turns, seconds=args.seconds)
    cells = {
        side: f"{1000 * statistics.median(times) / batch:.1f} ({ratio(times, results['float32'])}, {cosines[side]:.5f})"
        for side, times in results.items()
    }
    return {"model": name, "pixels": size, "batch": batch, **cells}


def matrix_products(model: dinoreg.DinoVisionTransformer, batch: int, size: int):
    """A function that runs only the matrix products of the model's linear layers, and its number of operations."""
    rows = batch * (1 + model.num_register_tokens + (size // model.patch_size) ** 2)
    layers = [layer.weight.detach().T for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    widths = {width for weight in layers for width in weight.shape}
    inputs, outputs = ({width: layers[0].new_empty(rows, width).normal_() for width in widths} for _ in range(2))

    def work():
        for weight in layers:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    return work, 2 * rows * sum(weight.numel() for weight in layers)


def classifier(name: str) -> dinoreg.LinearClassifier:
    torch.manual_seed(0)
    return dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(dinoreg.CONFIGS[name]), 1000, layers=1).eval()


HF_PROCESS = """
from transformers import pipeline
print(pipeline("image-classification", model={!r})({!r}))
"""
OFFICIAL_PROCESS = f"""
import torch
from PIL import Image
from torchvision import transforms
model = torch.hub.load({str(OFFICIAL)!r}, "dinov2_vits14_reg_lc", source="local", layers=1, pretrained=False)
model.load_state_dict(torch.load({{!r}}))
model.eval()
steps = [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()]
normalize = transforms.Normalize({dinoreg.IMAGENET_MEAN}, {dinoreg.IMAGENET_STD})
with torch.inference_mode():
    image = transforms.Compose([*steps, normalize])(Image.open({{!r}}).convert("RGB"))
    print(model(image[None]).softmax(-1).topk(5))
"""
TIMM_PROCESS = """
import timm, torch
from PIL import Image
model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=1000, dynamic_img_size=True, checkpoint_path={!r})
transform = timm.data.create_transform(224, interpolation="bicubic", crop_pct=0.875)
model.eval()
with torch.inference_mode():
    print(model(transform(Image.open({!r}).convert("RGB"))[None]).softmax(-1).topk(5))
"""


def start(args: argparse.Namespace) -> None:
    print("One photo, the whole process, ViT-S/14 with registers: each process classifies the photo and prints the result")
    print("(timm: with a head on the CLS token only). Seconds, and peak resident memory in megabytes.\n")
    photo = str(PHOTOS[0])
    with tempfile.TemporaryDirectory() as folder:
        model = classifier("vits14_reg")
        dinoreg.save(model, f"{folder}/model.safetensors")
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "dinoreg": [sys.executable, "-m", "dinoreg", photo, "--weights", f"{folder}/model.safetensors"],
        }
        if OFFICIAL.is_dir() and find_spec("torchvision"):
            torch.save(model.state_dict(), f"{folder}/official.pth")
            commands["official"] = [sys.executable, "-c", OFFICIAL_PROCESS.format(f"{folder}/official.pth", photo)]
        if find_spec("transformers"):
            convert_weights.write(model, f"{folder}/hf", "hf")
            commands["transformers"] = [sys.executable, "-c", HF_PROCESS.format(f"{folder}/hf", photo)]
        if find_spec("timm"):
            with torch.no_grad():
                model.linear_head.weight[:, model.backbone.embed_dim :] = 0
            convert_weights.write(model, f"{folder}/timm.safetensors", "timm")
            commands["timm"] = [sys.executable, "-c", TIMM_PROCESS.format(f"{folder}/timm.safetensors", photo)]
        results = take_turns(commands, args.turns, whole_process)
    seconds, megabytes = ({name: [x[i] for x in values] for name, values in results.items()} for i in (0, 1))
    rows = [
        [
            name,
            f"{statistics.median(seconds[name]):.2f}",
            ratio(seconds[name], seconds["dinoreg"]),
            f"{statistics.median(megabytes[name]):.0f}",
        ]
        for name in commands
    ]
    table(["process", "seconds", "ratio", "peak MB"], rows)


LOAD = """
import sys, time, torch, dinoreg
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before, start = resident(), time.perf_counter()
model = dinoreg.load(sys.argv[1])
print(time.perf_counter() - start, resident() - before)
"""


def load(args: argparse.Namespace) -> None:
    print("Loading a model from a file: ViT-g/14 with registers, 4.5 GB of random weights.\n")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        with dinoreg._SkipInit():
            dinoreg.save(dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vitg14_reg"]), path)
        seconds, megabytes = zip(*(numbers_from([sys.executable, "-c", LOAD, path]) for _ in range(args.turns)))
    table(
        ["", "seconds", "resident MB more"],
        [["dinoreg.load", *(f"{statistics.median(x):.2f}" for x in (seconds, megabytes))]],
    )


def folder(args: argparse.Namespace) -> None:
    print("A folder of JPEG photographs, read and classified by ViT-S/14 with registers: milliseconds per image, and in")
    print("brackets the ratio to dinoreg. `--fast` decodes at reduced size, though not below that of the model's input (its")
    print("choice of a dtype is not part of this). `forward` is the model alone, `decode` reading alone on one core.\n")
    folders = {"16 of 4000 x 3000": (16, (4000, 3000)), "32 of 500 x 375": (32, (500, 375))}
    table_of_dicts(folder_row(args, name, *which) for name, which in folders.items())


@torch.inference_mode()
def folder_row(args: argparse.Namespace, name: str, count: int, size: tuple[int, int]) -> dict:
    with tempfile.TemporaryDirectory() as where:
        paths = [f"{where}/{i}.jpg" for i in range(count)]
        for i, path in enumerate(paths):
            Image.open(PHOTOS[0]).resize(size).rotate(i).save(path, quality=90)
        model, images = classifier("vits14_reg"), torch.randn(8, 3, 224, 224)
        model.backbone.fix_image_size(224, 224)
        sides = {
            "dinoreg": lambda: list(dinoreg.classify(model, paths, 224)),
            "dinoreg --fast": lambda: list(dinoreg.classify(model, paths, 224, fast=True)),
            "forward": lambda: [model(images).softmax(dim=-1) for _ in range(0, count, 8)],
            "decode": lambda: [dinoreg.preprocess(path, normalized=False) for path in paths],
        }
        if find_spec("transformers"):
            from transformers import pipeline

            convert_weights.write(model, f"{where}/hf", "hf")
            pipe = pipeline("image-classification", model=f"{where}/hf")
            sides["transformers pipeline"] = lambda: list(pipe(paths, batch_size=8))
        results = take_turns(sides, args.turns)
    cells = {
        side: f"{1000 * statistics.median(x) / count:.1f} ({ratio(x, results['dinoreg'])})" for side, x in results.items()
    }
    return {"JPEG files": name, **cells}


@torch.inference_mode()
def fast(args: argparse.Namespace) -> None:
    best = dinoreg.best_dtype(args.device)
    print(f"The error of `--fast` with the weights {Path(args.weights).name}: cosines between CLS tokens for a photo")
    print("decoded at full and at reduced size, and for the model in float32 and in bfloat16.")
    print(f"best_dtype({args.device!r}) is {best} here.\n")
    model, rows = dinoreg.load(args.weights), []
    half = dinoreg.load(args.weights, dtype=torch.bfloat16)
    for photo, size in itertools.product(PHOTOS, (98, 140, 224)):
        images = [dinoreg.preprocess(photo, size, fast=flag)[None] for flag in (False, True)]
        full, reduced = (model.embed(image) for image in images)
        rounded = half.embed(images[0]).float()
        with Image.open(photo) as image:
            pixels = f"{image.width} x {image.height}"
            image.draft("RGB", (size * 8 // 7,) * 2)
            decoded = f"{image.width} x {image.height}"
        cosines = (f"{torch.cosine_similarity(full, other).item():.5f}" for other in (reduced, rounded))
        rows.append([photo.name, pixels, decoded, size, *cosines])
    table(["photo", "pixels", "decoded at", "seen at", "cosine, reduced size", "cosine, bfloat16"], rows)

    random.seed(0)
    with tempfile.TemporaryDirectory() as where:
        crops = torch.stack([dinoreg.preprocess(path) for path in save_crops(Path(where), 96).iterdir()])
    nearest = []
    for side in (model, half):
        features = F.normalize(torch.cat([side.embed(batch).float() for batch in crops.split(16)]), dim=1)
        nearest.append((features @ features.T).fill_diagonal_(-1).argmax(dim=1))
    same = (nearest[0] == nearest[1]).sum()
    print(f"Of {len(crops)} random crops of these photos, {same} have the same nearest neighbour in float32 and bfloat16.\n")


GROWTH = """
import re, sys, time, torch, dinoreg
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
size, batch = map(int, sys.argv[1:])
model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vits14_reg"]).eval()
model.fix_image_size(size, size)
images = torch.randn(batch, 3, size, size)
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before, seconds = status("VmRSS"), []
with torch.inference_mode():
    for _ in range(4):
        start = time.perf_counter()
        model.forward_features(images)
        seconds.append(time.perf_counter() - start)
print(sorted(seconds[1:])[1], status("VmHWM") - before)
"""


def growth(args: argparse.Namespace) -> None:
    print(
        "Time and memory against image size and batch size, ViT-S/14 with registers, float32. On Linux, glibc returns freed"
    )
    print(
        "memory to the system after each layer. The command line prevents that; other programs, such as these measurements,"
    )
    print("can be started with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=1073741824 in their environment.\n")
    for label, which, points in (
        ("side of one image, pixels", 0, [(size, 1) for size in (224, 378, 518, 700, 868, 1036)]),
        ("images of 224 x 224 in a batch", 1, [(224, batch) for batch in (1, 2, 4, 8, 16, 32, 64)]),
    ):
        measured = ((point[which], *numbers_from([sys.executable, "-c", GROWTH, *map(str, point)])) for point in points)
        rows = ([x, f"{seconds:.2f}", f"{megabytes:.0f}"] for x, seconds, megabytes in measured)
        table([label, "seconds", "MB above the model"], rows)


PLAIN_LOOP = """
import sys, torch, common, dinoreg
weights, folder, output = sys.argv[1:]
model, paths = dinoreg.load(weights), dinoreg.find_images([folder])
model.fix_image_size(224, 224)
batches = common.read_ahead(lambda path: dinoreg.preprocess(path, normalized=False), common.split_batches(paths, 16))
with torch.inference_mode():
    features = [model.embed(dinoreg.normalize(torch.stack(batch))).half() for batch in batches]
dinoreg.write_tensors({"features": torch.cat(features)}, output, {})
"""


def corpus(args: argparse.Namespace) -> None:
    print("embed_corpus.py and a plain loop, whole processes with as many threads: ViT-S/14 with registers at 224 pixels,")
    print("batches of 16 JPEG files of 256 x 256 pixels. Images per hour are those of embed_corpus.py.\n")
    if not find_spec("ray"):
        raise RuntimeError('Ray is missing: pip install -e ".[ray]"')
    examples = Path(__file__).parent
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": f"{examples}:{examples.parent}"}
    environment["RAY_worker_niceness"] = "0"  # by default Ray's workers have a lower priority than the loop

    def seconds_of_process(command: list) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, env=environment)
        return time.perf_counter() - start

    def row(count: int) -> list:
        images, turn = save_crops(folder / str(count), count), itertools.count()
        sides = {
            "loop": lambda: ["-c", PLAIN_LOOP, weights, images, folder / "loop.safetensors"],
            "ray": lambda: [
                *(examples / "embed_corpus.py", images, "--model", weights, "--size", 224),
                *("--output", folder / f"{count}-{next(turn)}"),  # a new one, as an old one would be resumed
            ],
        }
        results = take_turns(sides, args.turns, lambda command: seconds_of_process(command()))
        loop, ray = (statistics.median(results[side]) for side in sides)
        return [count, f"{loop:.1f}", f"{ray:.1f}", ratio(results["ray"], results["loop"]), f"{3600 * count / ray:,.0f}"]

    with tempfile.TemporaryDirectory() as where:
        folder, weights = Path(where), f"{where}/model.safetensors"
        dinoreg.save(dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vits14_reg"]), weights)
        table(["images", "plain loop, s", "embed_corpus.py, s", "ratio", "images per hour"], map(row, args.images))


def save_crops(folder: Path, count: int) -> Path:
    """The folder, with so many random crops of 256 x 256 pixels of the photographs, as JPEG files."""
    folder.mkdir(exist_ok=True)
    photos = [Image.open(photo).convert("RGB") for photo in PHOTOS]
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = random.randrange(photo.width - 256), random.randrange(photo.height - 256)
        photo.crop((left, top, left + 256, top + 256)).save(folder / f"{i}.jpg", quality=90)
    return folder


PARTS = {part.__name__: part for part in (forward, lists, engines, start, load, folder, fast, growth, corpus)}


def processor() -> str:
    """The processor, and which of its instructions count here."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"model name\s*: (.+)", info)
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {unit} " in info]
    return f"{model[1] if model else platform.machine()} ({', '.join(units) or 'no AVX'}), {torch.get_num_threads()} threads"


def run(args: argparse.Namespace) -> int:
    device, where = torch.device(args.device), processor()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that `synchronize` waits for
        where = f"{torch.cuda.get_device_name()}; {where}"
    libraries = ("torch", "transformers", "timm", "onnxruntime", "openvino", "ray")
    versions = (f"{name} {metadata.version(name)}" for name in libraries if find_spec(name))
    print(f"# Benchmark\n\n{where}; {', '.join(versions)}. Written by\n")
    print(f"    python {' '.join(['examples/benchmark.py', *sys.argv[1:]])}\n\nwhose docstring says how it measures.\n")
    for part in args.parts or (
        [part for part in PARTS if part != "corpus"] if device.type == "cpu" else ["forward", "engines"]
    ):
        print(f"## {part}\n")
        PARTS[part](args)
    return 0


def main() -> int:
    """0 if all went well, 2 if something is missing or fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--turns", type=int, default=5, help="of each side, at least (default: %(default)s)")
    common.add_device(parser)
    of_forward = parser.add_argument_group("for `forward` and `engines`")
    models = [name for name in dinoreg.CONFIGS if name.endswith("_reg")]
    of_forward.add_argument("--models", nargs="+", choices=models, default=models[:2], help="default: %(default)s")
    of_forward.add_argument("--pixels", nargs="+", type=int, default=[224, 518], help="default: %(default)s")
    of_forward.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="default: %(default)s")
    of_forward.add_argument("--seconds", type=float, default=60, help="per row, at least (default: %(default)s)")
    of_corpus = parser.add_argument_group("for `corpus`")
    of_corpus.add_argument("--images", nargs="+", type=int, default=[500, 2000], help="default: %(default)s")
    weights = "trained weights for `fast`: an official backbone or a file (default: %(default)s)"
    parser.add_argument("--weights", default="vits14", metavar="FILE", help=weights)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if min(args.turns, *args.batches, *args.images, *args.pixels) < 1 or any(side % 14 for side in args.pixels):
        parser.error("--turns, --batches and --images must be at least 1, and --pixels multiples of 14")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
