"""The demonstration model that ships with the library, and the text it was trained on.

The model is a byte-level Llama of 1.4 M parameters, small enough to travel in the package and trained well
enough that compression has something to lose. Its text is the source of the Python standard library, read
from the user's own interpreter; twelve modules and their tests are held out of training.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tnc.errors import TextError

# Modules of every Python from 3.10 to 3.14; each held-out split has more than 300 kB in all of them.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "calibration": ("calendar", "configparser", "dataclasses", "imaplib", "shutil", "tarfile", "textwrap"),
    "evaluation": ("argparse", "difflib", "ipaddress", "mailbox", "statistics"),
}
SPLITS = ("train", *HELD_OUT)

# Installed packages are no part of the library; lib2to3 and idlelib hold files broken on purpose and are not
# in every distribution.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "lib2to3", "idlelib", "__pycache__"})


def demo_model_path() -> Path:
    """Folder of the demonstration model, in Hugging Face layout.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it without a network.
    One token is one UTF-8 byte; the context is 512 bytes.
    """
    return Path(__file__).resolve().parent / "demo_model"


def demo_text(split: str, *, library: Path | None = None) -> str:
    """Text of one split of the Python standard library's source.

    The held-out splits are the modules of `HELD_OUT`. ``"train"`` is every other ``.py`` file in UTF-8, sorted by
    path, without the tests of held-out modules: about 28 MB, or 10 MB where the library comes without its tests.

    Args:
        split: one of ``"train"``, ``"calibration"``, ``"evaluation"``.
        library: folder of a Python standard library; ``None`` is that of the running interpreter.

    Returns:
        The files of the split, one after the other, lines ending in a newline on every system.

    Raises:
        TextError: if there is no such split, or the folder does not hold the library's sources.
    """
    if split not in SPLITS:
        raise TextError(f"demo_text({split!r}): there is no such split; use one of {', '.join(map(repr, SPLITS))}.")
    folder = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    _check_sources(folder, split)
    if split in HELD_OUT:
        return "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in HELD_OUT[split])
    return "".join(_training_files(folder))


def _check_sources(folder: Path, split: str) -> None:
    """Raise `TextError` unless every held-out module has its source file in ``folder``."""
    wanted = [f"{name}.py" for names in HELD_OUT.values() for name in names]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise TextError(
            f"demo_text({split!r}) reads the source of the Python standard library, and {folder} lacks "
            f"{', '.join(missing)}; expected .py files, which a zipped or stripped Python does not have. "
            "Pass a text of your own, or run a Python that was installed with its library sources."
        )


def _training_files(folder: Path) -> Iterator[str]:
    """Text of each training file of the library in ``folder``, sorted by path, without files not in UTF-8."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name, path in sorted(paths.items()):
        if _is_training_file(name):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # test data in other encodings
                continue


def _is_training_file(name: str) -> bool:
    """Whether the file at path ``name`` in the library is outside the folders left out and the held-out modules.

    A test belongs to a module when a part of its path begins with ``test_`` and the module's name:
    ``test/test_tarfile.py``, ``test/test_dataclasses/__init__.py``.
    """
    parts = name.split("/")
    modules = [module for modules in HELD_OUT.values() for module in modules]
    tests = tuple(f"test_{module}" for module in modules)
    return (
        _LEFT_OUT.isdisjoint(parts)
        and name not in {f"{module}.py" for module in modules}
        and not any(part.startswith(tests) for part in parts)
    )
