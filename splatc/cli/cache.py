"""``splatc cache``: the compiled kernels on disk."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from splatc.cli.output import ago, console, fields, note, plural, print_json, size, table
from splatc.config import Config, parse_size
from splatc.errors import InvalidInput
from splatc.runtime.cache import Entry, KernelCache
from splatc.runtime.kernel import kernel_cache

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The compiled kernels on disk: list, show, clear, prune."
)

_AGE = {"min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

PRUNE_EXAMPLES = """\b
Examples:
  splatc cache prune --max-size 500MB
  splatc cache prune --older-than 30d"""


def _open() -> KernelCache:
    cache = kernel_cache(Config.from_env())
    if cache.root is None:
        raise InvalidInput("there is no cache: SPLATC_DISABLE_CACHE is set")
    return cache


@app.command("list", epilog="\b\nExamples:\n  splatc cache list\n  splatc cache list --json")
def list_entries(json: Annotated[bool, typer.Option("--json", help="A JSON array on stdout.")] = False) -> None:
    """The kernels in the cache, the most recently used first."""
    cache = _open()
    entries = cache.entries()
    if json:
        print_json([{**entry._asdict(), "path": str(entry.path), "name": entry.name} for entry in entries])
        return
    total = sum(entry.size for entry in entries)
    if entries:
        rows = [(e.name, e.target, size(e.size), ago(e.created), ago(e.last_used)) for e in entries]
        console().print(table(("kernel", "target", "size", "built", "last used"), rows, left=2))
    console().print(
        f"{plural(len(entries), 'kernel')}, {size(total)} of {size(cache.max_bytes)} in {cache.root}", soft_wrap=True
    )


@app.command(epilog="\b\nExamples:\n  splatc cache show attention_d64_float32_m64n64")
def show(
    name: Annotated[
        str, typer.Argument(help="The beginning of a kernel's name or key, as `splatc cache list` prints it.")
    ],
    json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """How a kernel was made, and its files."""
    entry, manifest = _open().show(name)
    if json:
        print_json({"path": str(entry.path), **manifest})
        return
    out = console()
    out.print(fields([("folder", entry.path), *_story(entry, manifest)]))
    files = manifest.get("files")
    if isinstance(files, dict):
        out.print(table(("file", "size"), [(n, size(int(f["size"]))) for n, f in files.items()]))


def _story(entry: Entry, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    made = [("built", f"{manifest.get('created', 'unknown')} by splatc {manifest.get('splatc', 'unknown')}")]
    made += [("last used", ago(entry.last_used)), ("size", size(entry.size))]
    keys = manifest.get("key_fields")
    return made + [(str(k), str(v)) for k, v in keys.items()] if isinstance(keys, dict) else made


@app.command(epilog="\b\nExamples:\n  splatc cache clear --yes")
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete all kernels; they are built again when they are needed."""
    cache = _open()
    entries = cache.entries()
    if entries and not yes:
        question = f"Delete {plural(len(entries), 'kernel')} ({size(sum(e.size for e in entries))}) in {cache.root}?"
        if not typer.confirm(question, err=True):
            raise typer.Exit(1)
    _report(cache.clear())


@app.command(epilog=PRUNE_EXAMPLES)
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", show_default="SPLATC_CACHE_SIZE", help="Keep at most this much: bytes, 500MB, 2GiB."
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", show_default=False, help="Drop what was not used for this long: 12h, 30d, 4w."),
    ] = None,
) -> None:
    """Delete the least recently used kernels."""
    cache = _open()
    age = None if older_than is None else _seconds(older_than)
    limit = (
        parse_size(max_size, name="--max-size") if max_size is not None else cache.max_bytes if age is None else None
    )
    _report(cache.prune(max_bytes=limit, older_than=age))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)", text.strip())
    if match is None:
        raise InvalidInput(f"--older-than={text!r} is not an age: write a number with min, h, d or w, such as 30d")
    return float(match[1]) * _AGE[match[2]]


def _report(gone: list[Entry]) -> None:
    for entry in gone:
        console().print(entry.name, soft_wrap=True)
    note(f"deleted {plural(len(gone), 'kernel')}, {size(sum(entry.size for entry in gone))}")
