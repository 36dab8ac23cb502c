"""Embed a corpus of images into Parquet files: on this machine, or with Ray Data on a cluster.

    pip install -e ".[corpus]"                      # with Ray: ".[corpus,ray]"
    python examples/embed_corpus.py SOURCE --output FOLDER

SOURCE is a folder of images, a glob in quotes, or Parquet files with a column `uri` of unique URIs
or absolute paths. Their column `bytes`, if there is one, holds the image files; otherwise they are
read from their URIs. Any storage of fsspec works, s3:// with s3fs and gs:// with gcsfs installed.
Columns of the output:

    path            string: the path or URI of the image
    embedding       list of D float16: the CLS token after the final norm; null after an error
    patches         tensor (h, w, D) of float16, with --tokens patches: the normalized patch tokens
    width, height   int32: the size of the image file in pixels
    error           string: why the image has no embedding, or null

A run that was killed continues where it stopped when it is started again; a later run embeds only
what is new, and does not retry errors. Other files in FOLDER are left alone. Paths are held in
memory, 2.3 GB for 10 million: split larger corpora into several runs.

With --ray, or RAY_ADDRESS of a cluster, Ray computes the same rows. To start a cluster:

    ray start --head                 # on one machine; all need the same Python environment
    ray start --address HEAD:6379    # on each of the others
    RAY_ADDRESS=ray://HEAD:10001 python examples/embed_corpus.py s3://bucket/images -o s3://out

Workers get the model from Ray. If Ray reports a missing authentication token, set
RAY_AUTH_MODE=token as well. If the connection to ray:// breaks, restart the run after 30 seconds.
"""

import argparse
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

import common
import dinoreg
import features

BLOCK = 64  # images in a preprocessing task of Ray
ROWS = 1024  # in a Parquet file, at least; a killed run loses what it has not written yet


# What there is to do ------------------------------------------------------------------------------


def find_files(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """The files in a folder or of a glob, without hidden ones, which may be unfinished."""
    files = filesystem.glob(path) if "*" in path else filesystem.find(path)
    start = max(0, len(path.partition("*")[0]) - 1)
    return [file for file in files if "/." not in file[start:]]


def read_inputs(source: str, output: str) -> tuple[pa.Table, list[str]]:
    """The column `path` of all images, and the Parquet files that hold them, if any. What is in the
    output folder is not an input."""
    filesystem, path = fsspec.url_to_fs(source)
    here, folder = fsspec.url_to_fs(output)
    if filesystem == here and folder in (path, os.path.realpath(path)):
        raise ValueError(f"{output}: the output must be another folder than the source")
    files = find_files(filesystem, path)
    if filesystem == here:
        files = [file for file in files if not file.startswith(f"{folder}/")]
    tables = [file for file in files if file.endswith(".parquet")]
    files = tables or [file for file in files if dinoreg.is_image_name(Path(file).name)]
    if not files:
        raise ValueError(f"{source}: no images, or no such folder")
    if not Path(files[0]).is_absolute():
        files = [filesystem.unstrip_protocol(file) for file in files]
    if not tables:
        # A name that is not UTF-8 is escaped, and then no such file: an error of that image alone.
        names = [file.encode(errors="backslashreplace").decode() for file in files]
        return pa.table({"path": names}), []
    from pyarrow import dataset  # takes long

    rows = dataset.dataset(tables, filesystem=filesystem)
    kinds = {field.name: str(field.type).removeprefix("large_") for field in rows.schema}
    if kinds.get("uri") != "string" or kinds.get("bytes", "binary") != "binary":
        text = "Parquet files need a column `uri` of strings; `bytes`, if any, must be binary"
        raise ValueError(f"{source}: {text}")
    paths = rows.to_table(["uri"]).rename_columns(["path"])
    if not len(paths) or pc.count_distinct(paths["path"]).as_py() < len(paths):
        raise ValueError(f"{source}: Parquet files need rows, each with a `uri` of its own")
    return paths, files if "bytes" in kinds else []


def read_output(folder: str, columns: list[str]) -> tuple[dict, pa.Table]:
    """The settings of the rows written so far, {} without any, and some of their columns. Raises a
    ValueError if the settings differ."""
    filesystem, path = fsspec.url_to_fs(folder, use_listings_cache=False)

    def read(file: str) -> tuple[dict, pa.Table] | None:
        with dinoreg.naming(file):
            schema = pq.read_schema(file, filesystem=filesystem)
            if b"dinoreg" not in (schema.metadata or {}):
                return None  # of somebody else
            settings = json.loads(schema.metadata[b"dinoreg"])
            return settings, pq.read_table(file, columns=columns, filesystem=filesystem)

    with ThreadPoolExecutor() as pool:
        files = [file for file in find_files(filesystem, path) if file.endswith(".parquet")]
        parts = [part for part in pool.map(read, files) if part]
    if not parts:
        return {}, pa.table({name: pa.array([], pa.string()) for name in columns})
    settings, tables = zip(*parts)
    if any(other != settings[0] for other in settings):
        raise ValueError(f"{folder}: holds embeddings of several models or settings")
    return settings[0], pa.concat_tables(tables)


def plan(paths: pa.Table, model, args: argparse.Namespace, device: str):
    """The schema of the output, whose metadata tell how images are embedded, and the paths that are
    not in it yet. Sets the options that depend on the device."""
    args.device = args.device or device
    on_gpu = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.batch_size = args.batch_size or (256 if on_gpu else 16)

    settings = {"fingerprint": args.fingerprint, "size": [*model.transform.size]}
    settings |= {"dtype": args.dtype, "tokens": args.tokens}
    columns = {"path": pa.string(), "embedding": pa.list_(pa.float16(), model.embed_dim)}
    if args.tokens == "patches":
        shape = (*model.to_grid(*model.transform.size), model.embed_dim)
        columns["patches"] = pa.fixed_shape_tensor(pa.float16(), shape)
    columns |= {"width": pa.int32(), "height": pa.int32(), "error": pa.string()}
    metadata = {"dinoreg": json.dumps(settings), "model": Path(args.model).name}

    earlier, done = read_output(args.output, ["path"])
    if earlier not in ({}, settings):
        other = "other weights, another transform, --size, --dtype or --tokens"
        raise ValueError(f"{args.output}: made with {other}; give another folder")
    todo = paths.filter(pc.invert(pc.is_in(paths["path"], done["path"])))
    return pa.schema(columns.items(), metadata), todo


# From paths to rows of the output, with and without Ray -------------------------------------------


def select(rows: pa.Table, todo: pa.Table) -> pa.Table:
    """The rows whose path is among those of todo."""
    return rows.filter(pc.is_in(rows["path"], todo["path"]))


def decode(path: str, file: bytes | None, transform: dinoreg.Transform) -> dict:
    """The row of an image: path, width, height, error, pixels (3, H, W), uint8; either error or the
    others are None. Without a file it is read from the path."""
    row = {"path": path, "width": None, "height": None, "error": None, "pixels": None}
    try:
        if file is None:
            filesystem, name = fsspec.url_to_fs(path)
            if "file" in filesystem.protocol and os.path.exists(name) and not os.path.isfile(name):
                raise OSError("not a regular file")  # reading a pipe would wait forever
            file = filesystem.cat_file(name)
        pixels = dinoreg.preprocess(file, normalized=False, transform=transform).numpy()
        width, height = Image.open(io.BytesIO(file)).size
        return row | {"width": width, "height": height, "pixels": pixels}
    except Exception as error:  # each storage has its own
        # PIL calls the file <_io.BytesIO ...>.
        return row | {"error": re.sub(" <_io[^>]*>", "", dinoreg.reason(error))}


def to_table(rows: list[dict], transform: dinoreg.Transform) -> pa.Table:
    """Rows of `decode` as a table; pixels are lists of 3 * H * W, null where there is an error."""
    kinds = {"path": pa.string(), "width": pa.int32(), "height": pa.int32(), "error": pa.string()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    pixels = np.array([row["pixels"] for row in rows if row["error"] is None], np.uint8)
    return append(pa.table(columns), "pixels", pixels.reshape(-1, 3 * math.prod(transform.size)))


def append(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """The table with a column of lists, null after an error: values (n, L) of the n other rows."""
    valid = table["error"].is_null().to_numpy()
    full = np.zeros((len(valid), values.shape[1]), values.dtype)
    full[valid] = values
    lists = pa.FixedSizeListArray.from_arrays(full.ravel(), values.shape[1], mask=pa.array(~valid))
    return table.append_column(name, lists)


@torch.inference_mode()
def embed(rows: pa.Table, model: dinoreg.DinoVisionTransformer, tokens: str) -> pa.Table:
    """The rows with the embeddings of the images in place of their pixels."""
    pixels = torch.tensor(rows["pixels"].combine_chunks().flatten().to_numpy())
    pixels = pixels.to(model.pos_embed.device).unflatten(0, (-1, 3, *model.transform.size))
    x = dinoreg.normalize(pixels, model.transform)
    if tokens == "cls":
        outputs = [features.embed(model, x)]
    else:
        part = model.forward_features(x)
        outputs = [part["x_norm_clstoken"], part["x_norm_patchtokens"].flatten(1)]
    columns = [values.half().cpu().numpy() for values in outputs]

    # An image of which the model returns NaN or infinity has an error instead.
    finite = np.logical_and.reduce([np.isfinite(x).all(axis=1) for x in columns])
    errors = rows["error"].to_numpy().copy()
    errors[np.flatnonzero(rows["error"].is_null())[~finite]] = features.NOT_FINITE
    errors = pa.array(errors, pa.string())
    rows = rows.drop_columns(["pixels", "error"]).append_column("error", errors)
    for name, values in zip(("embedding", "patches"), columns):
        rows = append(rows, name, values[finite])
    return rows


def write(rows: pa.Table, folder: str, schema: pa.Schema) -> pa.Table:
    """Write rows to a file named by their paths, so that a task that Ray repeats replaces its file.
    Returns their number, which is a row for Ray."""
    filesystem, path = fsspec.url_to_fs(folder)
    name = hashlib.sha256("\n".join(rows["path"].to_pylist()).encode()).hexdigest()[:32]
    table = rows.select(schema.names).cast(schema)
    filesystem.makedirs(path, exist_ok=True)
    if "file" in filesystem.protocol:
        with dinoreg.atomic(Path(path, f"{name}.parquet")) as part:
            pq.write_table(table, part)
    else:  # object storage: a file appears when it is complete
        pq.write_table(table, f"{path}/{name}.parquet", filesystem=filesystem)
    return pa.table({"rows": [len(rows)]})


# The two ways to run ------------------------------------------------------------------------------


def read_bytes(files: list[str], todo: pa.Table) -> Iterator[tuple[str, bytes]]:
    """The paths of todo that are in Parquet files, each with its image file."""
    for file in files:
        filesystem, path = fsspec.url_to_fs(file)
        for batch in pq.ParquetFile(path, filesystem=filesystem).iter_batches(BLOCK):
            rows = select(pa.table([batch["uri"], batch["bytes"]], ["path", "bytes"]), todo)
            yield from zip(rows["path"].to_pylist(), rows["bytes"].to_pylist())


def run_here(paths: pa.Table, files: list[str], model, args: argparse.Namespace) -> None:
    """Embed what is not done in a loop; threads read the next batch while the model computes."""
    schema, todo = plan(paths, model, args, dinoreg.best_device())
    torch.set_num_threads(args.threads or torch.get_num_threads())
    model = model.to(args.device, getattr(torch, args.dtype))

    paths = ((path, None) for path in todo["path"].to_pylist())
    images = read_bytes(files, todo) if files else paths
    batches = iter(lambda: list(itertools.islice(images, args.batch_size)), [])
    read = features.read_ahead(lambda image: decode(*image, model.transform), batches)
    tables: list[pa.Table] = []
    try:
        with features.progress(None, total=len(todo), unit="image") as bar:
            for rows in read:
                tables.append(embed(to_table(rows, model.transform), model, args.tokens))
                bar.update(len(rows))
                if sum(map(len, tables)) >= ROWS:
                    write(pa.concat_tables(tables), args.output, schema)
                    tables = []
    finally:  # an interrupted run keeps what it has
        if tables:
            write(pa.concat_tables(tables), args.output, schema)


def run_on_ray(paths: pa.Table, files: list[str], model, args: argparse.Namespace) -> None:
    """Embed what is not done on the cluster of RAY_ADDRESS, or on one that Ray starts here."""
    import ray
    import ray.util.client

    logging.disable()  # of what is done; errors are raised
    try:
        modules = [dinoreg.__file__, common.__file__, features.__file__]
        ray.init(runtime_env={"py_modules": modules}, log_to_driver=False)
        resources = ray.cluster_resources()
        args.cpus, args.gpus = (int(resources.get(kind, 0)) for kind in ("CPU", "GPU"))
        schema, todo = plan(paths, model, args, "cuda" if args.gpus else "cpu")
        if not len(todo):
            return
        if ray.util.client.ray.is_connected():
            # Connected to ray://, from which Ray Data cannot be used but in a task.
            ray.get(ray.remote(num_cpus=0)(run_pipeline).remote(todo, files, model, schema, args))
        else:
            run_pipeline(todo, files, model, schema, args)
    except ray.exceptions.RayError as error:
        # It has the traceback of a worker in it, of which one line names the exception.
        lines = re.findall(r"^[\w.]+: .+", str(error), re.MULTILINE) or [str(error)]
        raise RuntimeError(lines[0]) from None
    finally:
        ray.shutdown()


def run_pipeline(todo: pa.Table, files: list[str], model, schema: pa.Schema, args) -> None:
    """Ray Data: tasks read and preprocess, actors embed, tasks write."""
    import ray.data

    if torch.device(args.device).type == "cuda":
        actors, of_actor, of_task = args.gpus, {"num_gpus": 1}, {"num_cpus": 1}
    else:
        # Actors claim half of the processors and leave the rest to tasks; at the same share Ray
        # would fuse both.
        threads = args.threads or 1
        of_actor, of_task = {"num_cpus": threads / 2}, {"num_cpus": 0.25}
        actors = args.cpus // threads
    if not actors or args.cpus < 2:
        raise ValueError(f"the cluster needs 2 CPUs or more, it has {args.cpus}; {args.gpus} GPUs")
    todo_there, model_there, transform = ray.put(todo), ray.put(model), model.transform

    def keep(rows: pa.Table) -> pa.Table:
        return select(rows, ray.get(todo_there))

    def preprocess(rows: pa.Table) -> pa.Table:
        paths = rows["path"].to_pylist()
        images = rows["bytes"].to_pylist() if files else [None] * len(paths)
        with ThreadPoolExecutor(16) as pool:  # hides the latency of object storage
            decoded = pool.map(lambda *image: decode(*image, transform), paths, images)
            return to_table(list(decoded), transform)

    class Embedder:  # an actor, with a copy of the model
        def __init__(self):
            torch.set_num_threads(args.threads or 1)
            self.model = ray.get(model_there).to(args.device, getattr(torch, args.dtype))

        def __call__(self, rows: pa.Table) -> pa.Table:
            return embed(rows, self.model, args.tokens)

    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    of_task["batch_format"] = of_actor["batch_format"] = "pyarrow"
    if files:
        rows = ray.data.read_parquet(files, num_cpus=of_task["num_cpus"])
        rows = rows.select_columns(["uri", "bytes"]).rename_columns({"uri": "path"})
        rows = rows.map_batches(keep, batch_size=None, **of_task)
    else:
        blocks = [todo.slice(start, BLOCK) for start in range(0, len(todo), BLOCK)]
        rows = ray.data.from_arrow(blocks)

    pool = ray.data.ActorPoolStrategy(size=actors)
    rows = rows.map_batches(preprocess, batch_size=BLOCK, **of_task)
    rows = rows.map_batches(Embedder, compute=pool, batch_size=args.batch_size, **of_actor)
    rows = rows.map_batches(write, fn_args=(args.output, schema), batch_size=ROWS, **of_task)
    rows.materialize()


def run(args: argparse.Namespace) -> int:
    if not args.output:
        raise ValueError("--output must name a folder")
    model = common.load_backbone(args.model, size=args.size)
    args.fingerprint = features.fingerprint(model)
    model.fix_image_size(*model.transform.size)
    try:
        args.output = str(Path(args.output).resolve()) if "://" not in args.output else args.output
        paths, files = read_inputs(args.source, args.output)
    except ImportError as error:  # of s3fs or the like: fsspec says what to install
        raise ValueError(f"{args.source}: {error}") from None
    if args.ray or os.environ.get("RAY_ADDRESS"):
        run_on_ray(paths, files, model, args)
    else:
        run_here(paths, files, model, args)
    _, rows = read_output(args.output, ["error"])
    failed = len(rows) - rows["error"].null_count
    print(f"{args.output}: {len(rows)} images, {failed} of them without an embedding")
    return 1 if failed else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "a folder, a glob in quotes, or Parquet files with a column `uri` and perhaps `bytes`"
    add("source", help=text)
    text = "of Parquet files: a new one, or that of an earlier run"
    add("-o", "--output", required=True, metavar="FOLDER", help=text)
    common.add_model(parser)
    common.add_size(parser)
    text = "patches: write those as well (default: %(default)s)"
    add("--tokens", choices=("cls", "patches"), default="cls", help=text)
    text = "use Ray, on this machine or the cluster of RAY_ADDRESS (default: if that is set)"
    add("--ray", action="store_true", help=text)
    text = "cpu, cuda, ... (default: the best; with Ray cuda if the cluster has GPUs, else cpu)"
    add("--device", help=text)
    text = "of the model (default: bfloat16 on cuda, else float32)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    text = "images in a forward pass (default: 256 on cuda, else 16)"
    add("--batch-size", type=common.positive, metavar="B", help=text)
    text = "on CPUs (default: all; with Ray: 1, of each copy of the model)"
    add("--threads", type=common.positive, help=text)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
