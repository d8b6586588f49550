"""Files of text and JSON: reading tells what is wrong with them, writing is never half done."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from safetensors import SafetensorError

from tinylm.errors import InputError


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


UNEXPECTED = (
    ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError
)  # fmt: skip


@contextmanager
def expected(path: Path, what: str) -> Iterator[None]:
    """Raises InputError where a file of ours turns out to hold something else."""
    try:
        yield
    except UNEXPECTED as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not {what} ({why}): move it away") from None


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, JSON object) of a file of JSON lines, "line 3", or of one JSON array, "row 3"."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    decoder, at, line, row = json.JSONDecoder(), 0, 1, 0
    array = text.lstrip().startswith("[")
    between = re.compile(r"[\s,\[\]]*" if array else r"\s*")
    while True:
        begin = between.match(text, at).end()
        line += text.count("\n", at, begin)
        if begin == len(text):
            break
        row += 1
        place = f"row {row}" if array else f"line {line}"
        try:
            content, at = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, {place}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}, {place}: expected a JSON object, got {text[begin:at]:.60}")
        yield place, content
        line += text.count("\n", begin, at)
    if array and not text.rstrip().endswith("]"):
        raise InputError(f"{path}: cut off, for there is no ] at the end of its array")
    if not row:
        raise InputError(f"{path}: there are no rows in it")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let write(temporary path) make the file, then put it in place of path by one rename.

    File and directory are synced. Raises InputError where the disk is full or not writable; the
    old file is untouched then. The file is made in a folder of its own, so that whatever a kill
    leaves behind, a library's own temporary files too, is gone after the next time.
    """
    folder = path.with_name(f".{path.name}.partial")
    temporary = folder / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); what was saved before is intact: "
            "make room or mend the permissions, then run it again, a stage with --resume"
        ) from error
    finally:
        rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """In UTF-8; a lone surrogate becomes its escape, which in JSON says the same."""
    raw = text.encode("utf-8", "backslashreplace")
    replace_file(path, lambda temporary: temporary.write_bytes(raw))


def in_json(value):
    """What JSON can say: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: in_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
