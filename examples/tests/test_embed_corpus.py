"""Tests of examples/embed_corpus.py on a local Ray cluster, and of examples/search.py on what it writes."""

import contextlib
import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinoreg

pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")
ds = pytest.importorskip("pyarrow.dataset")
pq = pytest.importorskip("pyarrow.parquet")

HERE = Path(__file__).parents[1]
# Large enough for 2,000 images to take some seconds.
CONFIG = dinoreg.Config(embed_dim=128, depth=8, num_heads=4, patch_size=8, image_size=64)


@pytest.fixture(scope="module")
def cluster():
    """The environment of a process that uses a cluster of two CPUs. The cluster has a folder of its own, whose name is short
    because sockets are in it, and ends with the tests."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        log = stack.enter_context(open(Path(folder, "start.log"), "w+"))
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        port, client_port = (one.getsockname()[1] for one in sockets)
        for one in sockets:
            one.close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
        command += [f"--port={port}", f"--ray-client-server-port={client_port}", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--object-store-memory={500 << 20}"]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "RAY_USAGE_STATS_ENABLED": "0"}
        environment["RAY_worker_niceness"] = "0"  # in step with the test that watches the workers
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}  # nobody else's cluster
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: process.poll() is not None or "Ray runtime started" in Path(log.name).read_text())
            assert process.poll() is None, Path(log.name).read_text()
            addresses = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_CLIENT": f"ray://127.0.0.1:{client_port}"}
            yield {**environment, **addresses, "SESSION": str(process.pid)}
        finally:
            while running := session_processes(process.pid):
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()  # or it would stay as a zombie
                time.sleep(0.1)


def session_processes(session, name=""):
    """The processes of a session whose command line begins with name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_text()  # empty for a zombie
            if command and command.startswith(name) and os.getsid(int(path.name)) == session:
                found.append(int(path.name))
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def start(cluster, source, output, model, *options):
    command = [sys.executable, HERE / "embed_corpus.py", source, "--output", output, "--model", model, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=cluster, cwd=output.parent, **pipes)


def finish(process):
    """(exit status, standard output, lines on standard error but the one in which Ray tells its log level)."""
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, stdout, [line for line in stderr.splitlines() if "log level" not in line]


def read(folder):
    """The rows of an output folder, by path."""
    rows = ds.dataset(folder).to_table()
    assert len(set(rows["path"].to_pylist())) == len(rows)  # none twice
    return {row["path"]: row for row in rows.to_pylist()}


def save_model(path, seed=0):
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(CONFIG)
    model.transform = dinoreg.Transform().at_size(64)
    dinoreg.save(model, path)
    return path


def save_images(folder, count):
    """Noisy images in sub-folders; every 97th is no image."""
    generator, paths = np.random.default_rng(0), []
    for i in range(count):
        paths.append(folder / str(i % 7) / f"{i}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        if i % 97 == 5:
            paths[-1].write_text("no image")
        else:
            Image.fromarray(generator.integers(0, 256, (24, 20 + i % 3, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@torch.inference_mode()
def check(rows, paths, model):
    """The rows are those of the paths, each with what `embed` gives for it, or with an error."""
    assert sorted(rows) == sorted(map(str, paths))
    broken = [path for path in paths if path.stat().st_size < 10]
    assert sorted(path for path, row in rows.items() if row["error"]) == sorted(map(str, broken))
    for path in broken:
        row = rows[str(path)]
        assert row.pop("error") == "cannot identify image file" and row.pop("path") == str(path)
        assert set(row.values()) == {None}
    good = [path for path in paths if path not in broken]
    images = torch.stack([dinoreg.preprocess(path, 64) for path in good])
    expected = torch.cat([dinoreg.load(model).embed(batch) for batch in images.split(100)])
    found = torch.tensor([rows[str(path)]["embedding"] for path in good], dtype=torch.float16)
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)
    for path in good[:3]:
        with Image.open(path) as image:
            assert (rows[str(path)]["width"], rows[str(path)]["height"]) == image.size


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_is_lost_or_twice_when_a_worker_and_then_the_job_are_killed(cluster, tmp_path):
    model, output = save_model(tmp_path / "model.safetensors"), tmp_path / "output"
    paths = save_images(tmp_path / "images", 2000)
    process = start(cluster, "images", output, model)
    actor, *_ = wait_for(
        lambda: session_processes(int(cluster["SESSION"]), "ray::MapWorker(MapBatches(Embedder)).submit"), 90
    )
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: list(output.glob("*.parquet")), 90)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    complete = [path for path in output.glob("*.parquet") if path.read_bytes()[-4:] == b"PAR1"]
    before = sum(pq.read_metadata(path).num_rows for path in complete)
    assert before < 2000
    (output / "unfinished.parquet").write_bytes(b"PAR1 some rows")

    status, stdout, stderr = finish(start(cluster, "images", output, model))
    assert (status, stderr) == (1, []), stderr
    assert stdout == f"{output}: 2000 images, 21 of which could not be read\n"
    check(read(output), paths, model)
    assert {path: path.stat().st_mtime_ns for path in complete}.keys() <= set(output.iterdir())


def write_table(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_images_in_parquet_with_patch_tokens(cluster, tmp_path):
    model, output = save_model(tmp_path / "model.safetensors"), tmp_path / "output"
    paths = save_images(tmp_path / "images", 12)
    uris, files = list(map(str, paths)), [path.read_bytes() for path in paths]
    write_table(tmp_path / "tables" / "0.parquet", label=[3, 4, 5, 6], uri=uris[:4], bytes=files[:4])
    arguments = ["tables/*.parquet", output, model, "--tokens", "patches", "--batch-size", 3]
    assert finish(start(cluster, *arguments)) == (0, f"{output}: 4 images, 0 of which could not be read\n", [])
    first = {path.name for path in output.iterdir()}

    # More images, by the same command, on a ray:// cluster; a bad one is among them.
    write_table(tmp_path / "tables" / "1.parquet", label=[7] * 8, uri=uris[4:], bytes=files[4:])
    remote = {**cluster, "RAY_ADDRESS": cluster["RAY_CLIENT"]}
    assert finish(start(remote, *arguments)) == (1, f"{output}: 12 images, 1 of which could not be read\n", [])
    assert first < {path.name for path in output.iterdir()}
    rows = read(output)
    patches = {path: row.pop("patches") for path, row in rows.items()}
    check(rows, paths, model)
    backbone = dinoreg.load(model)
    for path in (paths[0], paths[11]):
        with torch.inference_mode():
            features = backbone.forward_features(dinoreg.preprocess(path, 64)[None])
        found = torch.tensor(patches[str(path)]).reshape(64, 128)
        torch.testing.assert_close(found, features["x_norm_patchtokens"][0], atol=5e-3, rtol=1e-3)
    (column,) = [field for field in ds.dataset(output).schema if field.name == "patches"]
    assert column.type == pa.fixed_shape_tensor(pa.float16(), (8, 8, 128))


def test_uris_and_search(cluster, tmp_path):
    model, output = save_model(tmp_path / "model.safetensors"), tmp_path / "output"
    paths = [path for path in save_images(tmp_path / "images", 30) if path.stat().st_size > 10]
    gone = tmp_path / "gone.jpg"
    write_table(tmp_path / "uris.parquet", uri=list(map(str, [*paths, gone])))
    arguments = ["uris.parquet", output, model, "--size", 48]
    status, stdout, stderr = finish(start(cluster, *arguments))
    assert (status, stderr) == (1, []) and stdout.endswith("30 images, 1 of which could not be read\n")
    rows = read(output)
    assert rows.pop(str(gone))["error"] == "No such file or directory"
    schema = ds.dataset(output).schema
    assert schema.field("embedding").type == pa.list_(pa.float16(), 128)
    assert all(schema.field(name).type == pa.int32() for name in ("width", "height"))

    status, stdout, stderr = finish(
        start(cluster, *arguments[:2], save_model(tmp_path / "other.safetensors", 1), "--size", 48)
    )
    assert (status, stdout) == (2, "") and len(stderr) == 1 and "another --model" in stderr[0], stderr
    assert read(output).keys() == {*rows, str(gone)}

    for module in ("matplotlib", "tqdm"):
        pytest.importorskip(module)
    features = F.normalize(torch.tensor([row["embedding"] for row in rows.values()]), dim=1)
    cosines = features @ features[list(rows).index(str(paths[3]))]
    expected = [list(rows)[i] for i in cosines.argsort(descending=True)[1:4]]
    for source in (output, *output.glob("*.parquet")):
        command = [sys.executable, HERE / "search.py", source, "--query", paths[3], "--top", "3", "--model"]
        result = subprocess.run([*command, model], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert [line.split("  ")[1] for line in result.stdout.splitlines()[:-1]] == expected
        assert (tmp_path / "nearest.png").stat().st_size > 1000
    result = subprocess.run([*command, tmp_path / "other.safetensors"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "embedded by model.safetensors" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("embed_corpus")


def test_sources(module, tmp_path):
    paths = save_images(tmp_path / "images", 8)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    for source, expected in [
        (tmp_path / "images", sorted(paths)),
        (f"file://{tmp_path}/images", sorted(paths)),
        (f"{tmp_path}/images/0/*.png", [paths[0], paths[7]]),
        (paths[2], [paths[2]]),
    ]:
        rows, files = module.read_inputs(str(source))
        assert sorted(rows["path"].to_pylist()) == sorted(map(str, expected)) and files == []


def test_says_what_is_wrong_in_a_line(module, tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "names.parquet", name=["a.jpg"])
    write_table(tmp_path / "twice.parquet", uri=["/a.jpg", "/b.jpg", "/a.jpg"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(module.ray, "init", lambda **_: pytest.fail("the cluster is not needed to see this"))
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "no images"),
        ([tmp_path / "names.parquet"], "without a column `uri`"),
        ([tmp_path / "twice.parquet"], "a uri occurs more than once"),
        ([tmp_path / "broken.parquet"], "Parquet"),
        (["nosuch://bucket/images"], "nosuch"),
        ([tmp_path, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([tmp_path, "--size", "15"], "must be multiples of 8"),
        ([tmp_path, "--threads", "0"], "must be at least 1"),
    ]:
        command = ["embed_corpus.py", "--model", model, "--output", tmp_path / "output", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        try:
            status = module.main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        error = capsys.readouterr().err
        assert status == 2 and message in error.splitlines()[-1] and "Traceback" not in error, error
    assert not (tmp_path / "output").exists()


def test_a_batch_may_have_no_image(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module.ray, "get", lambda model: model)
    model = dinoreg.DinoVisionTransformer(CONFIG).eval()
    model.transform = dinoreg.Transform().at_size(16)
    model.fix_image_size(16, 16)
    (tmp_path / "bad.png").write_text("no image")
    rows = module.preprocess(
        pa.table({"path": [str(tmp_path / "bad.png"), str(tmp_path / "gone.png")]}), dinoreg.Transform().at_size(16)
    )
    for tokens in ("cls", "patches"):
        found = module.Embedder(model, "cpu", "float32", tokens, 1)(rows).to_pydict()
        assert found.pop("path") and found.pop("error") == ["cannot identify image file", "No such file or directory"]
        assert all(values == [None, None] for values in found.values()) and len(found) == (3 if tokens == "cls" else 4)


def test_benchmark_of_a_corpus():
    command = [sys.executable, HERE / "benchmark.py", "corpus", "--images", "4", "--turns", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    assert result.returncode == 0, result.stderr
    *_, row = [line for line in result.stdout.splitlines() if line.startswith("|")]
    count, loop, ray, ratio, per_hour = (float(cell.replace(",", "")) for cell in row.strip("| ").split(" | "))
    assert (
        count == 4 and ratio == pytest.approx(ray / loop, rel=0.05) and per_hour == pytest.approx(4 * 3600 / ray, rel=0.05)
    )
