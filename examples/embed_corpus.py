"""Embed a corpus of any size with Ray Data, on one machine or on a cluster, into Parquet files.

    pip install -e ".[ray]"
    python examples/embed_corpus.py SOURCE --output FOLDER

SOURCE is a folder of images, a glob in quotes, or Parquet files with a column `uri` of unique URIs or absolute paths. Their
column `bytes`, if there is one, holds the image files; otherwise they are read from their URIs. Any storage of fsspec works,
s3:// with s3fs and gs:// with gcsfs installed. Columns of the output:

    path            string: the path or URI of the image
    embedding       fixed-size list of D float16: what `model.embed` returns; null if the image could not be read
    patches         tensor (h, w, D) of float16, with --tokens patches: the patch tokens after the final norm
    width, height   int32: the size of the image file in pixels
    error           string: why the image could not be read; null if it was read

A run that was killed continues where it stopped when it is started again; a later run embeds only what is new, and does not
retry errors. Paths are held in memory, 2.3 GB for 10 million: split larger corpora into several runs. To start a cluster:

    ray start --head                                # on one machine; all need the same Python environment
    ray start --address HEAD:6379                   # on each of the others
    RAY_ADDRESS=ray://HEAD:10001 python examples/embed_corpus.py s3://bucket/images --output s3://bucket/embeddings

The weights are needed on this machine only: workers get the model from Ray. If Ray reports a missing authentication token,
set RAY_AUTH_MODE=token as well. If the connection to ray:// breaks, the run continues for 30 seconds: restart it after that.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
import ray.data
import ray.util.client
import torch
from PIL import Image

import common
import dinoreg

os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is raised as an exception
warnings.filterwarnings("ignore", module="ray")

BLOCK = 64  # images in a preprocessing task
ROWS = 1024  # rows in a Parquet file, at least; a killed run loses the work on those that are not written yet


def read_inputs(source: str) -> tuple[pa.Table, list[str]]:
    """The column `path` of all images, and the Parquet files that they are in; no files if they are files themselves."""
    filesystem, path = fsspec.url_to_fs(source)
    files = filesystem.glob(path) if "*" in path else filesystem.find(path)
    tables = [file for file in files if file.endswith(".parquet")]
    files = tables or [file for file in files if dinoreg.is_image_name(Path(file).name)]
    if not files:
        raise ValueError(f"{source}: no images, or no such folder")
    uris = [file if Path(file).is_absolute() else filesystem.unstrip_protocol(file) for file in files]
    if not tables:
        return pa.table({"path": uris}), []
    rows = pa.dataset.dataset(tables, filesystem=filesystem)
    if "uri" not in rows.schema.names:
        raise ValueError(f"{source}: Parquet files without a column `uri`")
    paths = rows.to_table(["uri"]).rename_columns(["path"])
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
        tables = list(pool.map(read, (file for file in filesystem.find(path) if file.endswith(".parquet"))))
    tables = [table for table in tables if table is not None]
    return pa.concat_tables(tables) if tables else None


def drop(rows: pa.Table, done: ray.ObjectRef) -> pa.Table:
    """The rows whose path is not done."""
    return rows.filter(pc.invert(pc.is_in(rows["path"], ray.get(done))))


def read_file(uri: str) -> bytes | Exception:
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        return filesystem.cat_file(path)
    except Exception as error:  # each storage has its own
        return error


def preprocess(rows: pa.Table, transform: dinoreg.Transform) -> pa.Table:
    """Rows (path, perhaps bytes) -> path, width, height, error, pixels (3 * size * size, uint8; null on error)."""
    if "bytes" in rows.column_names:
        files = rows["bytes"].to_pylist()
    else:
        with ThreadPoolExecutor(16) as pool:  # hides the latency of object storage
            files = list(pool.map(read_file, rows["path"].to_pylist()))
    images, facts = [], []
    for file in files:
        try:
            if isinstance(file, Exception):
                raise OSError(common.reason(file))
            images.append(dinoreg.preprocess(file, normalized=False, transform=transform).numpy())
            facts.append((*Image.open(io.BytesIO(file)).size, None))
        except (OSError, ValueError) as error:
            facts.append((None, None, common.reason(error).partition(" <_io")[0]))  # PIL calls the file that
    kinds = pa.int32(), pa.int32(), pa.string()
    width, height, error = (pa.array(values, kind) for values, kind in zip(zip(*facts), kinds))
    pixels = to_column(np.array(images, np.uint8).reshape(-1, 3 * math.prod(transform.size)), error)
    return pa.table({"path": rows["path"], "width": width, "height": height, "error": error, "pixels": pixels})


def to_column(values: np.ndarray, error: pa.Array) -> pa.FixedSizeListArray:
    """A column of lists, null where there is an error: the rows of values (n, L) are those of the n rows without one."""
    valid = error.is_null().to_numpy(zero_copy_only=False)
    full = np.zeros((len(valid), values.shape[1]), values.dtype)
    full[valid] = values
    return pa.FixedSizeListArray.from_arrays(full.ravel(), values.shape[1], mask=pa.array(~valid))


class Embedder:
    """Replaces the images of a batch by their embeddings. An actor has one, and with it a copy of the model."""

    def __init__(self, model: ray.ObjectRef, device: str, dtype: str, tokens: str, threads: int):
        torch.set_num_threads(threads)
        self.model = ray.get(model).to(device, getattr(torch, dtype))
        self.tokens = tokens

    @torch.inference_mode()
    def __call__(self, rows: pa.Table) -> pa.Table:
        pixels = torch.tensor(rows["pixels"].combine_chunks().flatten().to_numpy(), device=self.model.pos_embed.device)
        x = dinoreg.normalize(pixels.unflatten(0, (-1, 3, *self.model.transform.size)), self.model.transform)
        if self.tokens == "cls":
            columns = {"embedding": self.model.embed(x)}
        else:
            features = self.model.forward_features(x)
            columns = {"embedding": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"].flatten(1)}
        for name, values in columns.items():
            rows = rows.append_column(name, to_column(values.half().cpu().numpy(), rows["error"].combine_chunks()))
        return rows.drop_columns("pixels")


def output_schema(model: dinoreg.DinoVisionTransformer, args: argparse.Namespace) -> pa.Schema:
    """The columns of the output; the metadata tell which model embedded the images, and how."""
    weights = hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.contiguous().numpy())
    settings = {"model": Path(args.model).name, "weights": weights.hexdigest()}
    settings |= {"size": args.size, "dtype": args.dtype, "tokens": args.tokens}
    columns = {"path": pa.string(), "embedding": pa.list_(pa.float16(), model.embed_dim)}
    if args.tokens == "patches":
        columns["patches"] = pa.fixed_shape_tensor(pa.float16(), (*model.config.grid, model.embed_dim))
    columns |= {"width": pa.int32(), "height": pa.int32(), "error": pa.string()}
    return pa.schema(columns.items(), {"dinoreg": json.dumps(settings)})


def embed(
    paths: pa.Table,
    files: list[str],
    done: pa.Array,
    model: dinoreg.DinoVisionTransformer,
    schema: pa.Schema,
    args: argparse.Namespace,
) -> None:
    """Read what is not done, preprocess, embed and write it: the pipeline of Ray Data."""
    if args.device == "cuda":
        actors, of_actor, of_task = args.gpus, {"num_gpus": 1}, {"num_cpus": 1}
    else:  # actors claim half of the processors and leave the rest to tasks; at the same share Ray would fuse both
        actors, of_actor, of_task = args.cpus // args.threads, {"num_cpus": args.threads / 2}, {"num_cpus": 0.25}
    if not actors or args.cpus < 2:
        raise ValueError(f"too small a cluster: {args.cpus} CPUs (2 or more are needed), {args.gpus} GPUs")

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    done = ray.put(done)
    if files:
        rows = ray.data.read_parquet(files, **of_task).select_columns(["uri", "bytes"]).rename_columns({"uri": "path"})
        rows = rows.map_batches(drop, fn_args=[done], batch_size=None, batch_format="pyarrow", **of_task)
    else:
        paths = drop(paths, done)
        rows = ray.data.from_arrow([paths.slice(start, BLOCK) for start in range(0, len(paths), BLOCK)] or [paths])
    rows = rows.map_batches(preprocess, fn_args=[model.transform], batch_size=BLOCK, batch_format="pyarrow", **of_task)
    rows = rows.map_batches(
        Embedder,
        fn_constructor_args=[ray.put(model), args.device, args.dtype, args.tokens, args.threads],
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=args.batch_size or (256 if args.device == "cuda" else 16),
        batch_format="pyarrow",
        **of_actor,
    )
    filesystem, path = fsspec.url_to_fs(args.output)  # a task killed while it writes is run again, to the same file name
    rows.write_parquet(path, filesystem=filesystem, min_rows_per_file=ROWS, schema=schema, ray_remote_args=of_task)


def run(args: argparse.Namespace) -> int:
    model = common.load_backbone(args.model)
    H, W = common.set_size(model, args.size)
    if H != W:
        raise ValueError(f"--model makes images of {H} x {W} pixels, this needs square ones: give --size")
    args.size = H
    model.fix_image_size(H, W)
    try:
        paths, files = read_inputs(args.source)
        args.output = str(Path(args.output).resolve()) if "://" not in args.output else args.output
    except ImportError as error:  # of s3fs or the like
        raise ValueError(f"{args.source}: {error}") from None

    # RAY_ADDRESS names a cluster; without it, Ray starts one on this machine. Its workers import the two modules.
    modules = {"py_modules": [dinoreg.__file__, common.__file__]}
    ray.init(runtime_env=modules, log_to_driver=False, logging_level=logging.ERROR)
    args.cpus, args.gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    args.device = args.device or ("cuda" if args.gpus else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    schema = output_schema(model, args)
    earlier = read_output(args.output, "path")
    if earlier and earlier.schema.metadata != schema.metadata:
        raise ValueError(f"{args.output}: made with another --model, --size, --dtype or --tokens, or by another program")
    done = earlier["path"] if earlier else pa.array([], pa.string())
    arguments = paths, files, done, model, schema, args
    try:
        if ray.util.client.ray.is_connected():  # to ray://, from which Ray Data cannot be used but in a task
            ray.get(ray.remote(num_cpus=0)(embed).remote(*arguments))
        else:
            embed(*arguments)
    except ray.exceptions.RayError as error:  # has the traceback of a worker in it, of which one line names the exception
        raise RuntimeError((re.findall(r"^[\w.]+: .+", str(error), re.MULTILINE) or [error])[0]) from None
    errors = read_output(args.output, "error")["error"]
    failed = len(errors) - errors.null_count
    print(f"{args.output}: {len(errors)} images, {failed} of which could not be read")
    return 1 if failed else 0


def main() -> int:
    """0 if all went well, 1 if some images could not be read, 2 if it could not run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("source", help="a folder, a glob in quotes, or Parquet files with a column `uri` and perhaps `bytes`")
    add("-o", "--output", required=True, metavar="FOLDER", help="for Parquet files: a new one, or that of an earlier run")
    add("--model", default="vits14_reg", help="an official backbone, or a file (default: %(default)s)")
    add("--size", type=int, metavar="PIXELS", help="side of the central crop (default: the model's)")
    add("--tokens", choices=("cls", "patches"), default="cls", help="patches: write those, too (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if the cluster has GPUs, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (default: bfloat16 on cuda, else float32)")
    add("--batch-size", type=int, metavar="B", help="images in a forward pass (default: 256 on cuda, else 16)")
    add("--threads", type=int, default=1, help="of each copy of the model, on CPUs (default: %(default)s)")
    args = parser.parse_args()
    if min(args.threads, args.batch_size or 1, args.size or 1) < 1:
        parser.error("--threads, --batch-size and --size must be at least 1")
    return common.run(run, args)


if __name__ == "__main__":
    sys.exit(main())
