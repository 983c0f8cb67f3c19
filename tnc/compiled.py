"""C code built once for this processor, on first use, and found again in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from torch import Tensor

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")


def cache_folder() -> Path:
    """Where this machine's own data lie: ``$TNC_CACHE``, else ``tnc`` in the user's cache folder."""
    named = os.environ.get("TNC_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnc"


@lru_cache(maxsize=8)
def library(source: str, *more: str) -> ctypes.CDLL | str:
    """A C file of this package, such as ``kernels/qlr_cpu.c``, as a loaded library, or why there is none.

    Built in about a second by ``$CC`` (``cc`` by default) and kept in `cache_folder` under a name made of the source,
    the flags and the processor. ``more`` are flags besides the usual ones.
    """
    text, flags = files("tnc").joinpath(source).read_bytes(), (*_FLAGS, *more)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "it is built by a C compiler on first use, and there is none ($CC, cc)"
    key = hashlib.sha256(b"\0".join([text, " ".join((compiler, *flags)).encode(), _processor()])).hexdigest()[:16]
    target = cache_folder() / f"{Path(source).stem}-{key}.so"
    try:
        if not target.exists():
            _build((compiler, *flags), text, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not build it: {said.strip().splitlines()[0] if said.strip() else error!r}"


def missing(source: str, *more: str) -> str | None:
    """Why there is no such `library`, or ``None``; builds it."""
    found = library(source, *more)
    return found if isinstance(found, str) else None


def call(found: ctypes.CDLL | str, name: str, tensors: Sequence[Tensor], *sizes: int) -> None:
    """Call a function of a `library` that is there: the memory of contiguous CPU tensors, then sizes as int64."""
    assert not isinstance(found, str), found
    getattr(found, name)(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_int64, sizes))


def _build(compiler: tuple[str, ...], text: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, built = Path(folder) / "source.c", Path(folder) / "built.so"
        source.write_bytes(text)
        command = [*compiler, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(built, target)


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)]).encode()
