"""Files that are whole or not there: atomic writes, and result lines that are appended whole or not at all."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: processes that write to the same file have to be kept apart by hand
    fcntl = None

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".tif", ".tiff", ".gif")  # that are read
OWN_CODE = {}  # {(option, value): file} of the defenses and triggers that are not this project's
NOTED = set()  # lines that were complained about


def write_atomically(path, write):
    """Call ``write(file)`` on a temporary binary file in the folder of ``path``, flush it, and rename it to ``path``.

    A crash leaves the old file or the new one. Raises ``OSError`` and removes the temporary file if writing fails.
    """
    path = Path(path)
    for old in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while writing
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def is_image(name):
    """Whether a file called ``name`` is taken for an image: by its ending, unless it is hidden."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def images_below(folder):
    """The paths of the images anywhere below ``folder``, relative to it and sorted."""
    return sorted(os.path.relpath(os.path.join(place, name), folder)
                  for place, _, names in os.walk(folder, followlinks=True) for name in filter(is_image, names))


def listing_hash(root):
    """A hash of the names, sizes and times of the images anywhere below the folder ``root``; '' without one."""
    found = []
    for path in images_below(root):
        with contextlib.suppress(OSError):  # gone by now
            info = os.stat(os.path.join(root, path))
            found.append((path, info.st_size, info.st_mtime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


def umask():
    """The process's umask, which ``mkstemp`` ignores."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(path, wait=True):
    """Hold the lock file ``path`` and give its descriptor; if another one holds it, wait, or give None."""
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def append_line(path, record):
    """Append ``record`` as one line of JSON to ``path``, whole or not at all, safe beside other processes.

    A line that something else left unfinished is closed first. Raises ``OSError``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with open(path, "ab+", buffering=0) as f:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX)
        size = f.seek(0, os.SEEK_END)
        if size:
            f.seek(size - 1)
            if f.read(1) != b"\n":
                line = b"\n" + line
        try:
            written = f.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device", str(path))
            os.fsync(f.fileno())
        except OSError:
            f.truncate(size)
            raise


def read_lines(path, needs=None):
    """The records in a result file, oldest first; a line that is none, or one without the field ``needs``, is left out,
    with a note of its number."""
    records, path = [], Path(path)
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and (needs is None or needs in record):
            records.append(record)
        elif line.strip() and (str(path), number, line) not in NOTED:
            NOTED.add((str(path), number, line))
            print(f"note: {path}:{number} is no result line, it is left out", file=sys.stderr)
    return records
