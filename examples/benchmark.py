"""Measure dinoreg beside the official code, transformers, timm, onnxruntime and openvino: whichever of them are there.

    pip install -e ".[examples,parity]"
    python -c "import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14_reg', pretrained=False)"
    python examples/benchmark.py                        # everything, as Markdown tables
    python examples/benchmark.py forward start          # or some parts: forward start load folder fast growth corpus

All sides have the same random weights and take turns, in an order that is drawn anew for each. What is short is run for
half a second in each turn, and its fastest run counts. A figure is the median of its turns, and a ratio the median of the
ratios within each turn: above 1, dinoreg is faster. On a GPU (bfloat16, CUDA events) only `forward` is measured. `fast`
needs the official weights of ViT-S/14, and downloads them.
"""

import argparse
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import convert_weights
import dinoreg

PHOTOS = sorted(Path(__file__).with_name("images").glob("*.jpg"))
OFFICIAL = Path(torch.hub.get_dir(), "facebookresearch_dinov2_main")  # where torch.hub keeps its clone
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns


def seconds_of(work) -> float:
    """The fastest of the runs that begin within half a second."""
    times = []
    while sum(times) < 0.5:
        times.append(seconds_of_run(work))
    return min(times)


def seconds_of_run(work) -> float:
    if not CUDA:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(sides: dict, turns: int, measure=seconds_of, seconds: float = 0) -> dict[str, list]:
    """What each side measures in each turn, after one turn that does not count: for so many turns and seconds at least."""
    results, start = {name: [] for name in sides}, time.perf_counter()
    for turn in tqdm(itertools.count(), unit="turn", leave=False, disable=None):
        for name, work in random.sample(list(sides.items()), len(sides)):
            results[name].append(measure(work))
        if turn >= turns and time.perf_counter() - start > seconds:
            return {name: values[1:] for name, values in results.items()}


def ratio(others: list[float], ours: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(others, ours)):.2f}"


def table(header: list[str], rows: Iterable[list]) -> None:
    """Print a table, each row as soon as it is there."""
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print("|", " | ".join(map(str, row)), "|", flush=True)
    print()


def numbers_from(command: list) -> list[float]:
    """The numbers that a command prints."""
    return [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


# A process counts as its own what its parent had in memory when it began: this one has little.
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
    """The same model in other libraries: functions without arguments that compute the CLS tokens (B, D), all other tokens,
    too, and normalise all. The graphs of onnxruntime and openvino may leave out what CLS does not need."""
    sides = {}
    if OFFICIAL.is_dir():
        official = torch.hub.load(str(OFFICIAL), f"dinov2_{name}", source="local", pretrained=False)
        official.load_state_dict(model.state_dict())
        official = official.to(DEVICE, DTYPE).eval()
        sides["official"] = lambda: official.forward_features(images)["x_norm_clstoken"]
    if find_spec("transformers"):
        from transformers import AutoModel

        convert_weights.write(model, folder / "hf", "hf")
        hf = AutoModel.from_pretrained(folder / "hf").to(DEVICE, DTYPE).eval()
        sides["transformers"] = lambda: hf(images).last_hidden_state[:, 0]
    if find_spec("timm"):
        import timm

        arch = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}[name[:4]]
        other = timm.create_model(f"vit_{arch}_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True)
        other.load_state_dict(convert_weights.from_official(model, "timm"))
        other = other.to(DEVICE, DTYPE).eval()
        sides["timm"] = lambda: other.forward_features(images)[:, 0]
    if CUDA or not find_spec("onnxruntime") or not find_spec("onnxscript"):
        return sides

    import onnxruntime

    dinoreg.save(model, folder / "model.safetensors")
    script, side = Path(__file__).with_name("export_onnx.py"), str(images.shape[-1])
    command = [sys.executable, script, folder / "model.safetensors", "-o", folder / "model.onnx", "--size", side]
    subprocess.run(command, check=True, capture_output=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    sides["onnxruntime"] = lambda: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if find_spec("openvino"):
        import openvino

        # float32 is to be asked for: on some processors bfloat16 is its choice.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.compile_model(folder / "model.onnx", "CPU", options)
        sides["openvino"] = lambda: torch.from_numpy(compiled(images.numpy())[0])
    return sides


def forward(args: argparse.Namespace) -> None:
    print(
        "Forward, milliseconds per image. All tokens are computed and normalised, but `embed`, onnxruntime and openvino give"
    )
    print(
        "CLS alone. `compile` is `torch.compile(model)`. Matrix products are those of the model's linear layers and nothing"
    )
    print("else, and GFLOP/s is their rate.\n")
    rows = (forward_row(args, *which) for which in itertools.product(args.models, args.pixels, args.batches))
    first = next(rows)
    table(list(first), (list(row.values()) for row in itertools.chain([first], rows)))


@torch.inference_mode()
def forward_row(args: argparse.Namespace, name: str, size: int, batch: int) -> dict:
    """The cells of a row, by the names of their columns."""
    model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS[name]).to(DEVICE, DTYPE).eval()
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
    sides = {"dinoreg": lambda: model.forward_features(images)["x_norm_clstoken"], "embed": lambda: model.embed(images)}
    if CUDA or shutil.which("c++"):
        torch.compiler.reset()
        fixed = dinoreg.from_state_dict(model.state_dict(), model.config)
        fixed.fix_image_size(size, size)
        sides["compile"] = torch.compile(lambda: fixed.forward_features(images)["x_norm_clstoken"])
    with tempfile.TemporaryDirectory() as folder:
        sides |= peers(model, images, name, Path(folder))
        cls = sides["dinoreg"]().float()
        for side, work in sides.items():
            if torch.cosine_similarity(work().float(), cls).min() < 0.999:
                raise RuntimeError(f"{side} computes something else")
        sides["matrix products"], operations = matrix_products(model, batch, size)
        results = take_turns(sides, args.turns, seconds=args.seconds)
    medians = {side: statistics.median(times) for side, times in results.items()}
    cells = {side: f"{1000 * medians[side] / batch:.1f} ({ratio(results[side], results['dinoreg'])})" for side in sides}
    rate = operations / medians["matrix products"] / 1e9
    return {"model": name, "pixels": size, "batch": batch, **cells, "GFLOP/s": f"{rate:.0f}"}


def matrix_products(model: dinoreg.DinoVisionTransformer, batch: int, size: int):
    """A function that does the products of the model's linear layers and nothing else, and its floating-point operations."""
    rows = batch * (1 + model.num_register_tokens + (size // model.patch_size) ** 2)
    layers = [layer.weight.detach().T for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    widths = {width for weight in layers for width in weight.shape}
    inputs, outputs = ({width: torch.randn(rows, width, device=DEVICE, dtype=DTYPE) for width in widths} for _ in range(2))

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
    print(
        "One photo, the whole process, ViT-S/14 with registers: each classifies and prints (timm with a head that sees CLS"
    )
    print("alone). Seconds, and peak megabytes of resident memory.\n")
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
    print("From a file to a usable model: ViT-g/14 with registers, 4.5 GB of random weights.\n")
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
    print(
        "A folder of 16 photographs of 12 megapixels (JPEG), decoded and classified by ViT-S/14 with registers: seconds per"
    )
    print("image. `--fast` lets the JPEG decoder shrink the image, as far as it stays above the size that is seen.\n")
    with tempfile.TemporaryDirectory() as where:
        paths = [f"{where}/{i}.jpg" for i in range(16)]
        for i, path in enumerate(paths):
            Image.open(PHOTOS[0]).resize((4000, 3000)).rotate(i).save(path, quality=90)
        model = classifier("vits14_reg")
        sides = {
            "dinoreg": lambda: list(dinoreg.classify(model, paths, 224)),
            "dinoreg --fast": lambda: list(dinoreg.classify(model, paths, 224, fast=True)),
        }
        if find_spec("transformers"):
            from transformers import pipeline

            convert_weights.write(model, f"{where}/hf", "hf")
            pipe = pipeline("image-classification", model=f"{where}/hf")
            sides["transformers pipeline"] = lambda: list(pipe(paths, batch_size=8))
        results = take_turns(sides, args.turns)
    rows = [[name, f"{statistics.median(x) / 16:.3f}", ratio(x, results["dinoreg"])] for name, x in results.items()]
    table(["", "seconds", "ratio"], rows)


@torch.inference_mode()
def fast(args: argparse.Namespace) -> None:
    print("What `--fast` costs: cosines between CLS tokens of ViT-S/14 for a photo decoded in full and at reduced size, and")
    print(f"for the model in float32 and in bfloat16. best_dtype({DEVICE!r}) is {dinoreg.best_dtype(DEVICE)} here.\n")
    model, rows = dinoreg.load("vits14"), []
    half = dinoreg.load("vits14", dtype=torch.bfloat16)
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


GROWTH = """
import re, sys, time, torch, dinoreg
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
size, batch = map(int, sys.argv[1:])
model = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vits14_reg"]).eval()
model.fix_image_size(size, size)
images = torch.randn(batch, 3, size, size)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, seconds = status("VmRSS"), []
with torch.inference_mode():
    for _ in range(4):
        start = time.perf_counter()
        model.forward_features(images)
        seconds.append(time.perf_counter() - start)
print(sorted(seconds[1:])[1], status("VmHWM") - before)
"""


def growth(args: argparse.Namespace) -> None:
    print("How time and memory grow, ViT-S/14 with registers: growth.png\n")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, label, points in (
        (panels[0], "side of one image, pixels", [(size, 1) for size in (224, 378, 518, 700, 868, 1036)]),
        (panels[1], "images of 224 x 224 in a batch", [(224, batch) for batch in (1, 2, 4, 8, 16, 32, 64)]),
    ):
        x = [size if panel is panels[0] else batch for size, batch in points]
        commands = [[sys.executable, "-c", GROWTH, *map(str, point)] for point in points]
        seconds, megabytes = zip(*(numbers_from(command) for command in tqdm(commands, leave=False, disable=None)))
        panel.plot(x, seconds, "o-", color="tab:blue")
        panel.set(xlabel=label, ylim=0)
        panel.set_ylabel("seconds", color="tab:blue")
        memory = panel.twinx()
        memory.plot(x, megabytes, "s--", color="tab:orange")
        memory.set(ylim=0)
        memory.set_ylabel("MB above the model", color="tab:orange")
        rows = [[i, f"{s:.2f}", f"{m:.0f}"] for i, s, m in zip(x, seconds, megabytes)]
        table([label, "seconds", "MB above the model"], rows)
    figure.savefig("growth.png", dpi=120)


PLAIN_LOOP = """
import sys, torch, common, dinoreg
weights, size, folder, output = sys.argv[1:]
model, paths = dinoreg.load(weights), dinoreg.find_images([folder])
batches = common.read_ahead(lambda path: dinoreg.preprocess(path, int(size)), common.split_batches(paths, 16))
with torch.inference_mode():
    features = [model.embed(torch.stack(batch)).half() for batch in batches]
dinoreg.write_tensors({"features": torch.cat(features)}, output, {})
"""


def corpus(args: argparse.Namespace) -> None:
    print(
        "embed_corpus.py beside a plain loop, whole processes, as many threads: ViT-S/14 with registers, batches of 16 JPEG"
    )
    print("files of 256 x 256 pixels. A ratio above 1 is the cost of Ray; images per hour are those of embed_corpus.py.\n")
    if not find_spec("ray"):
        raise RuntimeError('Ray is missing: pip install -e ".[ray]"')
    examples = Path(__file__).parent
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": f"{examples}:{examples.parent}"}
    environment["RAY_worker_niceness"] = "0"  # by default Ray gives way to other processes, the loop does not

    def run(command: list) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, env=environment)
        return time.perf_counter() - start

    def rows() -> Iterable[list]:
        for count, size in itertools.product(args.images, args.sides):
            save_crops(folder / str(count), count)
            loop, ray = [], []
            for turn in range(args.turns):
                of_loop = ["-c", PLAIN_LOOP, weights, size, folder / str(count), folder / "loop.safetensors"]
                of_ray = [examples / "embed_corpus.py", folder / str(count), "--model", weights, "--size", size]
                of_ray += ["--output", folder / f"{count}-{size}-{turn}"]
                for times, command in random.sample([(loop, of_loop), (ray, of_ray)], 2):
                    times.append(run(command))
            seconds = [statistics.median(loop), statistics.median(ray)]
            yield [count, size, *(f"{x:.1f}" for x in seconds), ratio(ray, loop), f"{3600 * count / seconds[1]:,.0f}"]

    with tempfile.TemporaryDirectory() as where:
        folder, weights = Path(where), f"{where}/model.safetensors"
        dinoreg.save(dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vits14_reg"]), weights)
        table(["images", "pixels", "plain loop, s", "embed_corpus.py, s", "ratio", "images per hour"], rows())


def save_crops(folder: Path, count: int) -> None:
    """As many squares of 256 x 256 pixels from the photographs, as JPEG files."""
    folder.mkdir(exist_ok=True)
    photos = [Image.open(photo).convert("RGB") for photo in PHOTOS]
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = random.randrange(photo.width - 256), random.randrange(photo.height - 256)
        photo.crop((left, top, left + 256, top + 256)).save(folder / f"{i}.jpg", quality=90)


PARTS = {part.__name__: part for part in (forward, start, load, folder, fast, growth, corpus)}


def main() -> int:
    """0 if all went well, 2 if something that is needed is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--turns", type=int, default=5, help="at least (default: %(default)s)")
    of_forward = parser.add_argument_group("for `forward`")
    models = [name for name in dinoreg.CONFIGS if name.endswith("_reg")]
    of_forward.add_argument("--models", nargs="+", choices=models, default=models[:2], help="default: %(default)s")
    of_forward.add_argument("--pixels", nargs="+", type=int, default=[224, 518], help="default: %(default)s")
    of_forward.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="default: %(default)s")
    of_forward.add_argument("--seconds", type=float, default=60, help="for a row, at least (default: %(default)s)")
    of_corpus = parser.add_argument_group("for `corpus`")
    of_corpus.add_argument("--images", nargs="+", type=int, default=[500, 2000, 8000], help="default: %(default)s")
    of_corpus.add_argument("--sides", nargs="+", type=int, default=[224], help="pixels that are seen (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    sides = [*args.pixels, *args.sides]
    if min(args.turns, *args.batches, *args.images, *sides) < 1 or any(side % 14 for side in sides):
        parser.error("--turns, --batches and --images must be at least 1, --pixels and --sides multiples of 14")
    libraries = ("torch", "transformers", "timm", "onnxruntime", "openvino", "ray")
    versions = {name: metadata.version(name) for name in libraries if find_spec(name)}
    where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n")
    try:
        for part in args.parts or (["forward"] if CUDA else PARTS):
            PARTS[part](args)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:  # a file, the network, a device
        print("benchmark:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
