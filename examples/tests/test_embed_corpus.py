"""Tests of examples/embed_corpus.py, without Ray and on a local cluster of it.

Run them with `python -m pytest -m "" examples/tests/test_embed_corpus.py`.
"""

import contextlib
import json
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
from PIL import Image

import dinoreg

pytest.importorskip("fsspec")
pytest.importorskip("tqdm")
pa = pytest.importorskip("pyarrow")
ds = pytest.importorskip("pyarrow.dataset")
pq = pytest.importorskip("pyarrow.parquet")

import embed_corpus

HERE = Path(__file__).parents[1]
CONFIG = dinoreg.Config(embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=64)
UNREADABLE = "cannot identify image file"


def save_model(path, seed=0):
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(CONFIG)
    model.transform = dinoreg.Transform().at_size(64)
    dinoreg.save(model, path)
    return path


def save_images(folder, count):
    """Images of noise in subfolders; every 97th file is not an image."""
    generator, paths = np.random.default_rng(0), []
    for i in range(count):
        paths.append(folder / str(i % 7) / f"{i}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        if i % 97 == 5:
            paths[-1].write_text("no image")
        else:
            Image.fromarray(generator.integers(0, 256, (24, 20 + i % 3, 3), dtype=np.uint8)).save(
                paths[-1]
            )
    return paths


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model.safetensors")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the script in this process: (exit status, standard output, lines on standard error)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(source, output, model, *options):
        capsys.readouterr()
        try:
            status = embed_corpus.main(
                [*map(str, (source, "--output", output, "--model", model, *options))]
            )
        except SystemExit as exit:  # argparse's
            status = exit.code
        stdout, stderr = capsys.readouterr()
        return status, stdout, stderr.splitlines()

    return call


def read(folder):
    """The rows of an output folder, by path."""
    rows = ds.dataset(folder).to_table()
    assert len(set(rows["path"].to_pylist())) == len(rows)  # no duplicates
    return {row["path"]: row for row in rows.to_pylist()}


@torch.inference_mode()
def check(rows, paths, model):
    """The rows are those of the paths; each has the CLS token, or an error."""
    assert sorted(rows) == sorted(map(str, paths))
    broken = [path for path in paths if path.stat().st_size < 10]
    assert sorted(path for path, row in rows.items() if row["error"]) == sorted(map(str, broken))
    for path in broken:
        row = rows[str(path)]
        assert row.pop("error").startswith(UNREADABLE) and row.pop("path") == str(path)
        assert set(row.values()) == {None}
    good = [path for path in paths if path not in broken]
    images = torch.stack([dinoreg.preprocess(path, 64) for path in good])
    expected = torch.cat([dinoreg.load(model)(batch) for batch in images.split(100)])
    found = torch.tensor([rows[str(path)]["embedding"] for path in good], dtype=torch.float16)
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)
    for path in good[:3]:
        with Image.open(path) as image:
            assert (rows[str(path)]["width"], rows[str(path)]["height"]) == image.size


def write_table(path, /, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------
# Without Ray


def test_the_script_runs_on_its_own(tmp_path, model, output):
    paths = save_images(tmp_path / "images", 7)
    command = [
        sys.executable,
        HERE / "embed_corpus.py",
        "images",
        "--output",
        "output",
        "--model",
        model,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout == f"{output}: 7 images, 1 of them without an embedding\n"
    check(read(output), paths, model)


def test_a_later_run_embeds_what_is_new_and_does_not_import_ray(
    call, tmp_path, model, output, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)  # an import would fail
    monkeypatch.setattr(embed_corpus, "ROWS", 64)
    paths = save_images(tmp_path / "images", 120)
    moved = tmp_path / "later.png"
    paths[30].rename(moved)
    assert call("images", output, model) == (
        1,
        f"{output}: 119 images, 2 of them without an embedding\n",
        [],
    )
    # Batches of 16 images are joined to files of 64 rows or more; the last file has the rest.
    assert sorted(pq.read_metadata(path).num_rows for path in output.iterdir()) == [55, 64]
    before = modification_times(output)

    with monkeypatch.context() as patches:  # nothing to do: no image is read, no model runs
        patches.setattr(embed_corpus, "decode", lambda path, *_: pytest.fail(path))
        assert call("images", output, model)[:2] == (
            1,
            f"{output}: 119 images, 2 of them without an embedding\n",
        )
    assert modification_times(output) == before
    moved.rename(paths[30])
    assert (
        call("images", output, model)[1]
        == f"{output}: 120 images, 2 of them without an embedding\n"
    )
    after = modification_times(output)
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    check(read(output), paths, model)


# The process kills itself while it writes its second file.
KILLED = """
import glob, os, signal, sys, embed_corpus, pyarrow.parquet as pq
def write(table, path, write_table=pq.write_table):
    write_table(table, path)
    if glob.glob("output/*.parquet"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
pq.write_table, embed_corpus.ROWS = write, 32
embed_corpus.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_loses_and_repeats_no_rows(call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 100)
    command = [sys.executable, "-c", KILLED, "images", "--output", output, "--model", model]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE), "RAY_ADDRESS": ""}
    )
    assert result.returncode == -signal.SIGKILL
    (complete,) = output.glob("*.parquet")  # the other one never had its name
    assert pq.read_metadata(complete).num_rows == 32
    time_of_complete = complete.stat().st_mtime_ns

    assert call("images", output, model) == (
        1,
        f"{output}: 100 images, 1 of them without an embedding\n",
        [],
    )
    assert complete.stat().st_mtime_ns == time_of_complete
    check(read(output), paths, model)


def test_an_interrupted_run_writes_its_finished_rows(call, tmp_path, model, output, monkeypatch):
    paths, embed = save_images(tmp_path / "images", 40), embed_corpus.embed

    def interrupted(rows, *arguments):
        if "/3/" in rows["path"][0].as_py():
            raise KeyboardInterrupt
        return embed(rows, *arguments)

    with monkeypatch.context() as patches:
        patches.setattr(embed_corpus, "embed", interrupted)
        assert call("images", output, model, "--batch-size", 4)[0] == 130
    assert 0 < len(read(output)) < 40
    call("images", output, model)
    check(read(output), paths, model)


def check_patches(output, paths, model):
    """The rows of images in Parquet, with patch tokens."""
    rows = read(output)
    patches = {path: row.pop("patches") for path, row in rows.items()}
    check(rows, paths, model)
    backbone = dinoreg.load(model)
    for path in (paths[0], paths[11]):
        with torch.inference_mode():
            features = backbone.forward_features(dinoreg.preprocess(path, 64)[None])
        found = torch.tensor(patches[str(path)]).reshape(64, 32)
        torch.testing.assert_close(found, features["x_norm_patchtokens"][0], atol=5e-3, rtol=1e-3)
    assert ds.dataset(output).schema.field("patches").type == pa.fixed_shape_tensor(
        pa.float16(), (8, 8, 32)
    )


def test_images_in_parquet_with_patch_tokens(call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 12)
    uris, files = list(map(str, paths)), [path.read_bytes() for path in paths]
    write_table(
        tmp_path / "tables" / "0.parquet", label=[3, 4, 5, 6], uri=uris[:4], bytes=files[:4]
    )
    arguments = ["tables/*.parquet", output, model, "--tokens", "patches", "--batch-size", 3]
    assert call(*arguments) == (0, f"{output}: 4 images, 0 of them without an embedding\n", [])
    first = set(output.iterdir())

    # More images, by the same command; a bad one is among them.
    write_table(tmp_path / "tables" / "1.parquet", bytes=files[4:], label=[7] * 8, uri=uris[4:])
    assert call(*arguments) == (1, f"{output}: 12 images, 1 of them without an embedding\n", [])
    assert first < set(output.iterdir())
    check_patches(output, paths, model)


def test_uris_in_parquet_and_another_size(call, tmp_path, model, output):
    paths = [path for path in save_images(tmp_path / "images", 30) if path.stat().st_size > 10]
    gone = tmp_path / "gone.jpg"
    write_table(tmp_path / "uris.parquet", uri=list(map(str, [*paths, gone])))
    assert call("uris.parquet", output, model, "--size", 48) == (
        1,
        f"{output}: 30 images, 1 of them without an embedding\n",
        [],
    )
    rows = read(output)
    assert rows[str(gone)]["error"] == "No such file or directory"
    schema = ds.dataset(output).schema
    assert schema.names == ["path", "embedding", "width", "height", "error"]
    assert schema.field("embedding").type == pa.list_(pa.float16(), 32)
    assert all(schema.field(name).type == pa.int32() for name in ("width", "height"))
    settings = json.loads(schema.metadata[b"dinoreg"])
    assert len(settings.pop("fingerprint")) == 64
    assert settings == {"size": [48, 48], "dtype": "float32", "tokens": "cls"}
    assert schema.metadata[b"model"] == b"model.safetensors"
    with torch.inference_mode():
        expected = dinoreg.load(model)(dinoreg.preprocess(paths[3], 48)[None])[0]
    found = torch.tensor(rows[str(paths[3])]["embedding"])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)

    other = save_model(tmp_path / "other.safetensors", 1)
    renamed = dinoreg.load(model)
    renamed.transform = dinoreg.Transform(mean=(0.5, 0.5, 0.5)).at_size(64)
    (tmp_path / "transform").mkdir()
    dinoreg.save(renamed, tmp_path / "transform" / model.name)
    for options in (
        [other, "--size", 48],
        [model],
        [model, "--size", 48, "--dtype", "bfloat16"],
        [tmp_path / "transform" / model.name, "--size", 48],
    ):
        status, stdout, stderr = call("uris.parquet", output, *options)
        assert (status, stdout) == (2, ""), stderr
        assert len(stderr) == 1 and "made with other weights, another transform" in stderr[0]
    assert read(output).keys() == rows.keys()
    # The name of the file does not matter.
    model.rename(tmp_path / "renamed.safetensors")
    assert call("uris.parquet", output, tmp_path / "renamed.safetensors", "--size", 48)[0] == 1


def test_sources(tmp_path):
    paths = save_images(tmp_path / "images", 8)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    for source, expected in [
        (tmp_path / "images", sorted(paths)),
        (f"file://{tmp_path}/images", sorted(paths)),
        (f"{tmp_path}/images/0/*.png", [paths[0], paths[7]]),
        (paths[2], [paths[2]]),
    ]:
        rows, files = embed_corpus.read_inputs(str(source), str(tmp_path / "output"))
        assert sorted(rows["path"].to_pylist()) == sorted(map(str, expected)) and files == []


@pytest.mark.parametrize("ray", [[], ["--ray"]])
def test_bad_input_ends_in_one_error_message(call, tmp_path, model, output, monkeypatch, ray):
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "names.parquet", name=["a.jpg"])
    write_table(tmp_path / "none.parquet", uri=pa.array([], pa.string()))
    write_table(tmp_path / "twice.parquet", uri=["/a.jpg", "/b.jpg", "/a.jpg"])
    write_table(tmp_path / "numbers.parquet", uri=[1, 2])
    write_table(tmp_path / "paths.parquet", uri=["/a.jpg"], bytes=["/b.jpg"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(
        embed_corpus, "run_on_ray", lambda *_: pytest.fail("the cluster is not needed to see this")
    )
    for source, options, message in [
        ("nowhere", [], "no such folder"),
        ("empty", [], "no images"),
        ("names.parquet", [], "need a column `uri`"),
        ("none.parquet", [], "need rows"),
        ("twice.parquet", [], "a `uri` of its own"),
        ("numbers.parquet", [], "need a column `uri` of strings"),
        ("paths.parquet", [], "`bytes`, if any, must be binary"),
        ("empty", ["--output", ""], "must name a folder"),
        (output, [], "must be another folder than the source"),
        ("empty/../output/", [], "must be another folder than the source"),
        ("broken.parquet", [], "Parquet"),
        ("nosuch://bucket/images", [], "nosuch"),
        (".", ["--model", tmp_path / "nothing.pth"], "no such file"),
        (".", ["--size", "15"], "multiple"),
        (".", ["--size", "0"], "--size: must be at least 1"),
        (".", ["--threads", "0"], "--threads: must be at least 1"),
    ]:
        status, stdout, stderr = call(source, output, model, *options, *ray)
        assert (
            (status, stdout) == (2, "")
            and message in stderr[-1]
            and "Traceback" not in "".join(stderr)
        ), stderr
        assert "error: " in stderr[-1] or (
            stderr[-1].startswith("embed_corpus: ") and len(stderr) == 1
        )
    assert not output.exists()


def test_the_error_without_ray_says_what_to_install(call, tmp_path, model, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    save_images(tmp_path / "images", 1)
    for options, address in [(["--ray"], ""), ([], "ray://127.0.0.1:10001")]:
        monkeypatch.setenv("RAY_ADDRESS", address)
        status, stdout, (line,) = call("images", output, model, *options)
        assert (status, stdout) == (2, "") and "ray" in line and "what to install" in line, line


def test_a_batch_without_a_readable_image(tmp_path):
    model = dinoreg.DinoVisionTransformer(CONFIG).eval()
    model.transform = dinoreg.Transform().at_size(16)
    model.fix_image_size(16, 16)
    (tmp_path / "bad.png").write_text("no image")
    files = [str(tmp_path / "bad.png"), str(tmp_path / "gone.png")]
    rows = [embed_corpus.decode(file, None, model.transform) for file in files]
    for tokens in ("cls", "patches"):
        found = embed_corpus.embed(
            embed_corpus.to_table(rows, model.transform), model, tokens
        ).to_pydict()
        assert found.pop("path") == files
        unreadable, gone = found.pop("error")
        assert unreadable.startswith(UNREADABLE) and gone == "No such file or directory"
        assert all(values == [None, None] for values in found.values()) and len(found) == (
            3 if tokens == "cls" else 4
        )


def test_other_files_in_the_output_folder_are_left_alone(call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 3)
    write_table(output / "labels.parquet", id=[1])
    write_table(output / "scores.parquet", path=["/p"], score=[1.0])
    before = {path: path.read_bytes() for path in output.iterdir()}
    for _ in range(2):
        assert call("images", output, model)[:2] == (
            0,
            f"{output}: 3 images, 0 of them without an embedding\n",
        )
    assert {path: path.read_bytes() for path in before} == before
    (rows,) = set(output.iterdir()) - set(before)
    check(read(rows), paths, model)

    (output / "damaged.parquet").write_bytes(rows.read_bytes()[:-9])
    status, stdout, (line,) = call("images", output, model)
    assert (status, stdout) == (2, "") and str(output / "damaged.parquet") in line
    assert (output / "damaged.parquet").exists()


def test_a_folder_of_images_can_hold_the_output(call, tmp_path, model):
    save_images(tmp_path / "images", 3)
    for _ in range(2):
        status, stdout, _ = call("images", tmp_path / "images" / "rows", model)
        assert status == 0 and "3 images" in stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_names_that_are_not_utf8_and_pipes(call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 2)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    write_table(tmp_path / "uris.parquet", uri=[*map(str, paths), f"{tmp_path}/images/pipe.png"])
    assert call("uris.parquet", output, model)[0] == 1
    assert read(output)[f"{tmp_path}/images/pipe.png"]["error"] == "not a regular file"
    os.rename(os.fsencode(paths[0]), os.fsencode(tmp_path / "images") + b"/\xff.png")
    status, stdout, _ = call("images", tmp_path / "other", model)
    assert status == 1 and "3 images, 2 of them" in stdout
    rows = read(tmp_path / "other")
    assert rows[f"{tmp_path}/images/\\udcff.png"]["error"] == "No such file or directory"


def test_features_that_are_not_finite_are_errors(call, tmp_path, output):
    save_images(tmp_path / "images", 2)
    torch.manual_seed(0)
    model = dinoreg.DinoVisionTransformer(CONFIG)
    model.transform = dinoreg.Transform().at_size(64)
    model.blocks[1].mlp.fc2.weight.data[0, 0] = float("nan")
    dinoreg.save(model, tmp_path / "nan.safetensors")
    assert call("images", output, tmp_path / "nan.safetensors")[0] == 1
    for row in read(output).values():
        assert row["error"] == "the model returns NaN or infinity" and row["embedding"] is None


# --------------------------------------------------------------------------------------------------
# With Ray: a cluster of two CPUs for all tests


@pytest.fixture(scope="module")
def cluster():
    """Starts a cluster for all tests: the environment of a process that uses it. The cluster has a
    folder of its own, whose name is short because it contains sockets."""
    pytest.importorskip("ray.data")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        )
        log = stack.enter_context(open(Path(folder, "start.log"), "w+"))
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        port, client_port = (one.getsockname()[1] for one in sockets)
        for one in sockets:
            one.close()
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            "--num-gpus=0",
        ]
        command += [
            f"--port={port}",
            f"--ray-client-server-port={client_port}",
            f"--temp-dir={folder}",
        ]
        command += [
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=false",
            f"--object-store-memory={200 << 20}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "RAY_USAGE_STATS_ENABLED": "0"}
        environment["RAY_worker_niceness"] = "0"  # in step with the test that watches the workers
        # Otherwise Ray kills workers when others fill the machine's memory.
        environment["RAY_memory_monitor_refresh_ms"] = "0"
        # With a token, it is nobody else's cluster.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(
                lambda: (
                    process.poll() is not None
                    or "Ray runtime started" in Path(log.name).read_text()
                )
            )
            assert process.poll() is None, Path(log.name).read_text()
            addresses = {
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "RAY_CLIENT": f"ray://127.0.0.1:{client_port}",
            }
            yield {**environment, **addresses, "SESSION": str(process.pid)}
        finally:
            while running := session_processes(process.pid):
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()  # or it would stay as a zombie
                time.sleep(0.1)


def session_processes(session, name=""):
    """The processes of a session whose command line begins with name, or with one of several."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_text()  # empty for a zombie
            if command and command.startswith(name) and os.getsid(int(path.name)) == session:
                found.append(int(path.name))
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def start(cluster, source, output, model, *options):
    command = [
        sys.executable,
        HERE / "embed_corpus.py",
        source,
        "--output",
        output,
        "--model",
        model,
        *options,
    ]
    command += ["--threads", "2"]  # a single actor, so that fewer processes import torch
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [str(part) for part in command], env=cluster, cwd=output.parent, **pipes
    )


def finish(process):
    """(exit status, standard output, lines on standard error)."""
    try:
        stdout, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, stdout, stderr.splitlines()


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.slow
@needs_proc
def test_ray_continues_a_plain_run_and_survives_a_killed_worker(
    cluster, call, tmp_path, model, output
):
    paths = save_images(tmp_path / "images", 100)
    (tmp_path / "later").mkdir()
    for path in paths[40:]:
        path.rename(tmp_path / "later" / path.name)
    assert (
        call("images", output, model)[1] == f"{output}: 40 images, 1 of them without an embedding\n"
    )
    before = modification_times(output)
    for path in paths[40:]:
        (tmp_path / "later" / path.name).rename(path)

    process = start(cluster, "images", output, model)
    actor, *_ = wait_for(
        lambda: session_processes(
            int(cluster["SESSION"]), "ray::MapWorker(MapBatches(Embedder)).submit"
        )
    )
    os.kill(actor, signal.SIGKILL)
    status, stdout, _ = finish(process)  # Ray reports the death of its worker, and repeats the task
    assert status == 1
    assert stdout.splitlines()[-1] == f"{output}: 100 images, 1 of them without an embedding"
    assert before.items() <= modification_times(output).items()
    check(read(output), paths, model)


@pytest.mark.slow
@needs_proc
def test_a_plain_run_continues_a_killed_ray_job(cluster, call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 120)
    code = "import embed_corpus; embed_corpus.ROWS = 16; embed_corpus.main()"
    command = [
        sys.executable,
        "-c",
        code,
        tmp_path / "images",
        "--output",
        output,
        "--model",
        model,
        "--threads",
        "2",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command)], env=cluster, cwd=HERE, **pipes)
    wait_for(lambda: list(output.glob("*.parquet")))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    # They end with the job.
    wait_for(lambda: not session_processes(int(cluster["SESSION"]), ("ray::Map", "ray::Write")))
    complete = [path for path in output.glob("*.parquet") if path.read_bytes()[-4:] == b"PAR1"]
    before = {path: path.stat().st_mtime_ns for path in complete}

    assert call("images", output, model) == (
        1,
        f"{output}: 120 images, 2 of them without an embedding\n",
        [],
    )
    assert before.items() <= modification_times(output).items()
    check(read(output), paths, model)


@pytest.mark.slow
def test_a_remote_cluster_writes_the_rows_of_a_plain_run(cluster, call, tmp_path, model, output):
    paths = save_images(tmp_path / "images", 12)
    uris, files = list(map(str, paths)), [path.read_bytes() for path in paths]
    write_table(
        tmp_path / "tables" / "0.parquet", label=[3, 4, 5, 6], uri=uris[:4], bytes=files[:4]
    )
    write_table(tmp_path / "tables" / "1.parquet", label=[7] * 8, uri=uris[4:], bytes=files[4:])
    arguments = ["tables", output, model, "--tokens", "patches", "--batch-size", 3]
    remote = {**cluster, "RAY_ADDRESS": cluster["RAY_CLIENT"]}
    assert finish(start(remote, *arguments)) == (
        1,
        f"{output}: 12 images, 1 of them without an embedding\n",
        [],
    )
    check_patches(output, paths, model)

    arguments[1] = tmp_path / "loop"
    call(*arguments)
    assert ds.dataset(output).schema.equals(
        ds.dataset(tmp_path / "loop").schema, check_metadata=True
    )
    check_patches(tmp_path / "loop", paths, model)
