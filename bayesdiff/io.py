"""Atomic writes."""
import os, tempfile
from contextlib import contextmanager
from pathlib import Path
@contextmanager
def atomic_path(path):
    path = Path(path)
    tmp = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
