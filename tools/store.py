"""Look after a store: what is in it, is it whole, what can be deleted, and the same as Parquet or Lance.

python tools/store.py info
python tools/store.py verify stores/elpv
python tools/store.py gc stores/elpv --delete
python tools/store.py export stores/elpv --to parquet elpv.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm_sg import cli
from ldm_sg.store import Store, export, gc, newest_store, verify
from ldm_sg.store.manifest import file_records
from ldm_sg.store.reader import open_files
from ldm_sg.store.remote import is_url

LONG_LIST = 8


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/store.py verify stores/elpv")
    commands = made.add_subparsers(dest="command", required=True, metavar="info|verify|gc|export")
    for name, text in (
        ("info", "show rows, columns and where they come from"),
        ("verify", "read every byte and compare it with the manifest; exit 2 if something is wrong"),
        ("gc", "list files that no reader needs; with --delete, delete them"),
        ("export", "write rows and columns as a table"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("store", nargs="?", help="folder or URL (gc: folder); default the newest in stores/")
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name == "gc":
            command.add_argument("--keep", type=int, default=gc.KEEP, metavar="N", help="newest generations; default 5")
            command.add_argument(
                "--grace", type=float, default=gc.GRACE_S / 3600, metavar="HOURS", help="younger files stay; default 24"
            )
            command.add_argument("--delete", action="store_true", help="delete them")
        else:
            command.add_argument("--generation", type=int, metavar="N", help="default the newest")
        if name == "export":
            command.add_argument("--to", nargs=2, required=True, metavar=("parquet|lance", "PATH"))
    return made.parse_args()


def size(num_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    unit = next(
        (unit for unit in ("B", "kB", "MB", "GB") if num_bytes < 1e3 or not (num_bytes := num_bytes / 1e3)), "TB"
    )
    return f"{num_bytes:.3g} {unit}"


def fields(about: dict[str, Any], indent: str) -> Iterator[str]:
    """Write settings or measurements, one a line; long lists as their length and range."""
    for name, value in about.items():
        if isinstance(value, list) and len(value) > LONG_LIST:
            numbers = all(isinstance(v, int | float) for v in value)
            value = f"{len(value)} values" + (f" from {min(value)} to {max(value)}" if numbers else "")
        yield f"{indent}{name}: {value}"


def info(args: argparse.Namespace) -> None:
    """Print what a generation holds and where it comes from."""
    store = Store.open(args.store, args.generation)
    manifest, bad = store.manifest, store.manifest.get("quarantine", {"count": 0, "images": []})
    total = sum(record["bytes"] for record in file_records(manifest))
    print(f"store {store.address}, generation {store.generation} of {manifest['created']}")
    print(f"{store.num_rows} rows in {len(manifest['shards'])} shards, {size(total)}, read with {store.access}")
    for name, tensor in manifest["schema"].items():
        print(f"  {name}: {tensor['dtype']} {'x'.join(map(str, tensor['shape']))}")
    first = f", the first: {': '.join(bad['images'][0])}" if bad["images"] else ""
    print(f"quarantine: {bad['count']} images without a row{first}")
    print("\n".join(["provenance of the rows", *fields(manifest.get("provenance", {}), "  ")]))
    for name, column in manifest["columns"].items():
        k = column["provenance"].get("num_clusters")
        clusters = f", K = {k}" if k else ""
        print(f"column {name}: {column['kind']} {column['dtype']}{clusters}, made {column['created']}")
        print("\n".join(["  provenance", *fields(column["provenance"], "    ")]))
        print("\n".join(["  report", *fields(column["report"], "    ")]))
    for name, asset in manifest["assets"].items():
        print(f"asset {name}: {size(asset['bytes'])}")


def check(args: argparse.Namespace) -> None:
    """Print one line for each problem and exit with 2, or say that there is none."""
    files = open_files(args.store)
    manifest = files.manifest(args.generation)
    records = list(file_records(manifest))
    with tqdm(total=sum(r["bytes"] for r in records), desc="verify", unit="B", unit_scale=True) as bar:
        problems = verify(files, manifest["generation"], bar.update)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        sys.exit(2)
    print(f"{files.address}, generation {manifest['generation']}: {len(records)} files are as they were written")


def collect(args: argparse.Namespace) -> None:
    """Print what can go and, if told, delete it."""
    if is_url(args.store):
        raise ValueError(f"got {args.store}, expected a folder: gc deletes local files only")
    act = gc.collect if args.delete else gc.leftovers
    found = act(args.store, args.keep, args.grace * 3600)
    for leftover in found:
        print(f"{leftover.name}: {size(leftover.bytes)}, {leftover.reason}")
    what = (
        "deleted" if args.delete else "can be deleted: the same command with --delete does it" if found else "to delete"
    )
    print(f"{len(found)} files, {size(sum(leftover.bytes for leftover in found))} {what}")


def write_table(args: argparse.Namespace) -> None:
    """Write a table and print its path."""
    to, path = args.to
    store = Store.open(args.store, args.generation)
    with tqdm(total=store.num_rows, desc="export", unit=" rows", delay=0.5) as bar:
        export.export(store, Path(path), to, bar.update)
    print(path)


def main(args: argparse.Namespace) -> None:
    """Do what the command says to the store given, or to the newest."""
    args.store = args.store or newest_store("stores")
    {"info": info, "verify": check, "gc": collect, "export": write_table}[args.command](args)


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)
