"""Embed a corpus of images into Parquet files: on this machine, or with Ray Data on a cluster.

    pip install -e ".[corpus]"                      # with Ray: ".[corpus,ray]"
    python examples/embed_corpus.py SOURCE --output FOLDER

SOURCE is a folder of images, a glob in quotes, or Parquet files with a column `uri` of unique URIs
or absolute paths. Their column `bytes`, if there is one, holds the image files; otherwise they are
read from their URIs. Any storage of fsspec works, s3:// with s3fs and gs:// with gcsfs installed.
Columns of the output:

    path            string: the path or URI of the image
    embedding       fixed-size list of D float16: the CLS token after the final norm;
                    null if the image could not be read
    patches         tensor (h, w, D) of float16, with --tokens patches:
                    the patch tokens after the final norm
    width, height   int32: the size of the image file in pixels
    error           string: why the image could not be read; null if it was read

A run that was killed continues where it stopped when it is started again; a later run embeds only
what is new, and does not retry errors. Paths are held in memory, 2.3 GB for 10 million: split
larger corpora into several runs.

Ray is used if --ray is given or if RAY_ADDRESS names a cluster, for the same rows. To start a
cluster:

    ray start --head                 # on one machine; all need the same Python environment
    ray start --address HEAD:6379    # on each of the others
    RAY_ADDRESS=ray://HEAD:10001 \
        python examples/embed_corpus.py s3://bucket/images --output s3://bucket/embeddings

The weights are needed on this machine only: workers get the model from Ray. If Ray reports a
missing authentication token, set RAY_AUTH_MODE=token as well. If the connection to ray:// breaks,
the run continues for 30 seconds: restart it after that.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import uuid
import warnings
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

BLOCK = 64  # images in a preprocessing task of Ray
# Rows in a Parquet file, at least; a killed run loses the work on those that are not written yet.
ROWS = 1024


def read_inputs(source: str) -> tuple[pa.Table, list[str]]:
    """The column `path` of all images, and the Parquet files that they are in; no files if they are
    files themselves.
    """
    import pyarrow.dataset

    filesystem, path = fsspec.url_to_fs(source)
    files = filesystem.glob(path) if "*" in path else filesystem.find(path)
    tables = [file for file in files if file.endswith(".parquet")]
    files = tables or [file for file in files if dinoreg.is_image_name(Path(file).name)]
    if not files:
        raise ValueError(f"{source}: no images, or no such folder")
    uris = [
        file if Path(file).is_absolute() else filesystem.unstrip_protocol(file) for file in files
    ]
    if not tables:
        return pa.table({"path": uris}), []
    rows = pyarrow.dataset.dataset(tables, filesystem=filesystem)
    if "uri" not in rows.schema.names:
        raise ValueError(f"{source}: Parquet files without a column `uri`")
    paths = rows.to_table(["uri"]).rename_columns(["path"])
    if not len(paths):
        raise ValueError(f"{source}: Parquet files without a row")
    if pc.count_distinct(paths["path"], "all").as_py() < len(paths):
        raise ValueError(f"{source}: a uri occurs more than once")
    return paths, uris if "bytes" in rows.schema.names else []


def read_output(folder: str, column: str) -> pa.Table | None:
    """A column of the rows written so far; None if there are no files yet.

    Deletes what a killed run left unfinished: files without a footer, which is written last.
    """
    filesystem, path = fsspec.url_to_fs(folder, use_listings_cache=False)

    def read(file: str) -> pa.Table | None:
        try:
            return pq.read_table(file, columns=[column], filesystem=filesystem)
        except pa.ArrowInvalid:
            return filesystem.rm(file)

    with ThreadPoolExecutor() as pool:
        tables = list(
            pool.map(read, (file for file in filesystem.find(path) if file.endswith(".parquet")))
        )
    tables = [table for table in tables if table is not None]
    return pa.concat_tables(tables) if tables else None


def output_schema(model: dinoreg.DinoVisionTransformer, args: argparse.Namespace) -> pa.Schema:
    """The columns of the output; the metadata tell which model embedded the images, and how."""
    weights = hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.contiguous().numpy())
    settings = {"model": Path(args.model).name, "weights": weights.hexdigest()}
    settings |= {"size": args.size, "dtype": args.dtype, "tokens": args.tokens}
    columns = {"path": pa.string(), "embedding": pa.list_(pa.float16(), model.embed_dim)}
    if args.tokens == "patches":
        columns["patches"] = pa.fixed_shape_tensor(
            pa.float16(), (*model.config.grid, model.embed_dim)
        )
    columns |= {"width": pa.int32(), "height": pa.int32(), "error": pa.string()}
    return pa.schema(columns.items(), {"dinoreg": json.dumps(settings)})


# --------------------------------------------------------------------------------------------------
# From paths to rows of the output, with and without Ray


def select(rows: pa.Table, todo: pa.Table) -> pa.Table:
    """The rows whose path is among those of todo."""
    return rows.filter(pc.is_in(rows["path"], todo["path"]))


def read_file(uri: str) -> bytes | Exception:
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        return filesystem.cat_file(path)
    except Exception as error:  # each storage has its own
        return error


def decode(path: str, file: bytes | Exception, transform: dinoreg.Transform) -> dict:
    """The row of an image file: path, width, height, error, pixels (3, H, W), uint8. Either error
    or the others are None.
    """
    row = {"path": path, "width": None, "height": None, "error": None, "pixels": None}
    try:
        if isinstance(file, Exception):
            raise OSError(dinoreg.reason(file))
        pixels = dinoreg.preprocess(file, normalized=False, transform=transform).numpy()
        width, height = Image.open(io.BytesIO(file)).size
        return row | {"width": width, "height": height, "pixels": pixels}
    except (OSError, ValueError) as error:
        # PIL calls the file <_io.BytesIO ...>.
        return row | {"error": re.sub(" <_io[^>]*>", "", dinoreg.reason(error))}


def to_table(rows: list[dict], transform: dinoreg.Transform) -> pa.Table:
    """Rows of `decode` as a table; pixels are lists of 3 * H * W, null where there is an error."""
    kinds = {"path": pa.string(), "width": pa.int32(), "height": pa.int32(), "error": pa.string()}
    table = pa.table(
        {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    )
    pixels = np.array([row["pixels"] for row in rows if row["error"] is None], np.uint8)
    return append(table, "pixels", pixels.reshape(-1, 3 * math.prod(transform.size)))


def append(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """The table with a column of lists, null where there is an error: values (n, L) are of the n
    rows without one.
    """
    valid = table["error"].is_null().to_numpy()
    full = np.zeros((len(valid), values.shape[1]), values.dtype)
    full[valid] = values
    lists = pa.FixedSizeListArray.from_arrays(full.ravel(), values.shape[1], mask=pa.array(~valid))
    return table.append_column(name, lists)


@torch.inference_mode()
def embed(rows: pa.Table, model: dinoreg.DinoVisionTransformer, tokens: str) -> pa.Table:
    """The rows with the embeddings of the images in place of their pixels."""
    pixels = torch.tensor(
        rows["pixels"].combine_chunks().flatten().to_numpy(), device=model.pos_embed.device
    )
    x = dinoreg.normalize(pixels.unflatten(0, (-1, 3, *model.transform.size)), model.transform)
    if tokens == "cls":
        columns = {"embedding": common.embed(model, x)}
    else:
        features = model.forward_features(x)
        columns = {
            "embedding": features["x_norm_clstoken"],
            "patches": features["x_norm_patchtokens"].flatten(1),
        }
    for name, values in columns.items():
        rows = append(rows, name, values.half().cpu().numpy())
    return rows.drop_columns("pixels")


# --------------------------------------------------------------------------------------------------
# The two ways to run


def plan(
    paths: pa.Table, model: dinoreg.DinoVisionTransformer, args: argparse.Namespace
) -> tuple[pa.Schema, pa.Table]:
    """The schema of the output and the paths that are not in it yet."""
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.batch_size = args.batch_size or (256 if args.device == "cuda" else 16)
    schema, earlier = output_schema(model, args), read_output(args.output, "path")
    if earlier is None:
        return schema, paths
    if earlier.schema.metadata != schema.metadata:
        raise ValueError(
            f"{args.output}: made with another --model, --size, "
            "--dtype or --tokens, or by another program"
        )
    return schema, paths.filter(pc.invert(pc.is_in(paths["path"], earlier["path"])))


def run_here(
    paths: pa.Table,
    files: list[str],
    model: dinoreg.DinoVisionTransformer,
    args: argparse.Namespace,
) -> None:
    """Embed what is not done in a loop; threads read the next batch while the model computes."""
    from tqdm import tqdm

    args.device = args.device or dinoreg.best_device()
    schema, todo = plan(paths, model, args)
    if not len(todo):
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    model = model.to(args.device, getattr(torch, args.dtype))
    filesystem, folder = fsspec.url_to_fs(args.output)
    filesystem.makedirs(folder, exist_ok=True)

    def find_images() -> Iterator[tuple[str, bytes | None]]:
        if not files:
            yield from ((path, None) for path in todo["path"].to_pylist())
            return
        import pyarrow.dataset

        storage, _ = fsspec.url_to_fs(files[0])
        tables = pyarrow.dataset.dataset(
            [fsspec.url_to_fs(file)[1] for file in files], filesystem=storage
        )
        for batch in tables.to_batches(["uri", "bytes"], batch_size=args.batch_size):
            rows = select(pa.table(batch.columns, ["path", "bytes"]), todo)
            yield from zip(rows["path"].to_pylist(), rows["bytes"].to_pylist())

    def read(image: tuple[str, bytes | None]) -> dict:
        path, file = image
        return decode(path, read_file(path) if file is None else file, model.transform)

    def write(tables: list[pa.Table]) -> None:
        table = pa.concat_tables(tables).select(schema.names).cast(schema)
        pq.write_table(table, f"{folder}/{uuid.uuid4().hex}.parquet", filesystem=filesystem)

    images, tables, bar = find_images(), [], tqdm(total=len(todo), unit="image", disable=None)
    batches = iter(lambda: list(itertools.islice(images, args.batch_size)), [])
    try:
        for rows in common.read_ahead(read, batches):
            tables.append(embed(to_table(rows, model.transform), model, args.tokens))
            bar.update(len(rows))
            if sum(map(len, tables)) >= ROWS:
                write(tables)
                tables = []
    finally:  # an interrupted run keeps what it has
        bar.close()
        if tables:
            write(tables)


def run_on_ray(
    paths: pa.Table,
    files: list[str],
    model: dinoreg.DinoVisionTransformer,
    args: argparse.Namespace,
) -> None:
    """Embed what is not done on the cluster of RAY_ADDRESS, or on one that Ray starts on this
    machine.
    """
    import ray
    import ray.util.client

    warnings.simplefilter("ignore")
    logging.disable()
    try:
        ray.init(
            runtime_env={"py_modules": [dinoreg.__file__, common.__file__]}, log_to_driver=False
        )
        args.cpus, args.gpus = (
            int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")
        )
        args.device = args.device or ("cuda" if args.gpus else "cpu")
        schema, todo = plan(paths, model, args)
        if not len(todo):
            return
        if ray.util.client.ray.is_connected():
            # Connected to ray://, from which Ray Data cannot be used but in a task.
            ray.get(ray.remote(num_cpus=0)(run_pipeline).remote(todo, files, model, schema, args))
        else:
            run_pipeline(todo, files, model, schema, args)
    except ray.exceptions.RayError as error:
        # It has the traceback of a worker in it, of which one line names the exception.
        raise RuntimeError(
            (re.findall(r"^[\w.]+: .+", str(error), re.MULTILINE) or [error])[0]
        ) from None
    finally:
        ray.shutdown()


def run_pipeline(
    todo: pa.Table,
    files: list[str],
    model: dinoreg.DinoVisionTransformer,
    schema: pa.Schema,
    args: argparse.Namespace,
) -> None:
    """Ray Data: tasks read and preprocess, actors embed, tasks write."""
    import ray.data

    if args.device == "cuda":
        actors, of_actor, of_task = args.gpus, {"num_gpus": 1}, {"num_cpus": 1}
    else:
        # Actors claim half of the processors and leave the rest to tasks; at the same share Ray
        # would fuse both.
        threads = args.threads or 1
        actors, of_actor, of_task = (
            args.cpus // threads,
            {"num_cpus": threads / 2},
            {"num_cpus": 0.25},
        )
    if not actors or args.cpus < 2:
        raise ValueError(
            f"too small a cluster: {args.cpus} CPUs (2 or more are needed), {args.gpus} GPUs"
        )
    todo_there, model_there, transform = ray.put(todo), ray.put(model), model.transform

    def keep(rows: pa.Table) -> pa.Table:
        return select(rows, ray.get(todo_there))

    def preprocess(rows: pa.Table) -> pa.Table:
        paths = rows["path"].to_pylist()
        with ThreadPoolExecutor(16) as pool:  # hides the latency of object storage
            images = rows["bytes"].to_pylist() if files else pool.map(read_file, paths)
            return to_table(
                [decode(path, image, transform) for path, image in zip(paths, images)], transform
            )

    class Embedder:
        """An actor, with a copy of the model."""

        def __init__(self):
            torch.set_num_threads(args.threads or 1)
            self.model = ray.get(model_there).to(args.device, getattr(torch, args.dtype))

        def __call__(self, rows: pa.Table) -> pa.Table:
            return embed(rows, self.model, args.tokens)

    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    if files:
        rows = (
            ray.data.read_parquet(files, **of_task)
            .select_columns(["uri", "bytes"])
            .rename_columns({"uri": "path"})
        )
        rows = rows.map_batches(keep, batch_size=None, batch_format="pyarrow", **of_task)
    else:
        rows = ray.data.from_arrow(
            [todo.slice(start, BLOCK) for start in range(0, len(todo), BLOCK)]
        )
    rows = rows.map_batches(preprocess, batch_size=BLOCK, batch_format="pyarrow", **of_task)
    pool = ray.data.ActorPoolStrategy(size=actors)
    rows = rows.map_batches(
        Embedder, compute=pool, batch_size=args.batch_size, batch_format="pyarrow", **of_actor
    )
    # A task killed while it writes is run again, to the same file name.
    filesystem, path = fsspec.url_to_fs(args.output)
    rows.write_parquet(
        path, filesystem=filesystem, min_rows_per_file=ROWS, schema=schema, ray_remote_args=of_task
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what is written to the terminal, except by Python to stderr: the progress of Ray
    Data.

    Ray prints errors of the cluster, such as the death of a worker whose task it repeats, even with
    log_to_driver=False, and its C++ part writes to the file descriptors. What matters is raised as
    an exception.
    """
    sys.stdout.flush()
    out, err = os.dup(1), os.dup(2)
    with (
        open(os.devnull, "w") as nothing,
        open(os.dup(2), "w") as terminal,
        contextlib.redirect_stderr(terminal),
    ):
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            for descriptor, original in [(1, out), (2, err)]:
                os.dup2(original, descriptor)
                os.close(original)


def run(args: argparse.Namespace) -> int:
    model = common.load_backbone(args.model)
    args.size = common.set_square(model, args.size)
    model.fix_image_size(args.size, args.size)
    try:
        paths, files = read_inputs(args.source)
        args.output = str(Path(args.output).resolve()) if "://" not in args.output else args.output
    except ImportError as error:  # of s3fs or the like: fsspec says what to install
        raise ValueError(f"{args.source}: {error}") from None
    if args.ray or os.environ.get("RAY_ADDRESS"):
        with silence():
            run_on_ray(paths, files, model, args)
    else:
        run_here(paths, files, model, args)
    errors = read_output(args.output, "error")["error"]
    failed = len(errors) - errors.null_count
    print(f"{args.output}: {len(errors)} images, {failed} of which could not be read")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "source",
        help="a folder, a glob in quotes, or Parquet files with a column `uri` and perhaps `bytes`",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="for Parquet files: a new one, or that of an earlier run",
    )
    add(
        "--model",
        default="vits14_reg",
        help="an official backbone, or a file (default: %(default)s)",
    )
    add(
        "--size",
        type=common.positive,
        metavar="PIXELS",
        help="side of the central crop (default: the model's)",
    )
    add(
        "--tokens",
        choices=("cls", "patches"),
        default="cls",
        help="patches: write those, too (default: %(default)s)",
    )
    add(
        "--ray",
        action="store_true",
        help="use Ray, on this machine or the cluster of RAY_ADDRESS (default: if that is set)",
    )
    add(
        "--device",
        help=(
            "cpu, cuda, ... (default: the best available; "
            "with Ray: cuda if the cluster has GPUs, else cpu)"
        ),
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: bfloat16 on cuda, else float32)",
    )
    add(
        "--batch-size",
        type=common.positive,
        metavar="B",
        help="images in a forward pass (default: 256 on cuda, else 16)",
    )
    add(
        "--threads",
        type=common.positive,
        help="on CPUs (default: all; with Ray: 1, of each copy of the model)",
    )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
