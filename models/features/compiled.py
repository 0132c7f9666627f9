"""Kernels as modules on disk, so that numba keeps what it compiled from one process to the next.

The folder is LIFTYARD_CACHE, else ~/.cache/liftyard; only this user may write to it, as its files
are run.
"""

import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from models.features.shape import Shape
from models.features.source import source
from models.features.spec import FeatureSpec

_LOADED: dict[Path, ModuleType] = {}
_LOCK = threading.Lock()


def folder() -> Path:
    """Where kernels are kept; made if it isn't there.

    Raises:
        PermissionError: others may write to it.
    """
    given = os.environ.get("LIFTYARD_CACHE")
    path = (Path(given) if given else Path.home() / ".cache" / "liftyard") / "features"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.stat().st_mode & 0o022:
        raise PermissionError(
            f"{path} can be written to by others, and its files are run; "
            "take that right away (chmod go-w), or set LIFTYARD_CACHE to another folder"
        )
    return path


def kernel(spec: FeatureSpec, made: Shape, device: str = "cpu") -> Callable[..., Any]:
    """The compiled form of a declaration, from memory, from disk or made now.

    Args:
        spec: the declaration.
        made: its shape.
        device: "cpu" or "cuda".

    Returns:
        The module's `run`: numba compiles it at its first call, or loads what it compiled before.
    """
    text = source(spec, made, device)
    made_by = f"{version('numba')} {version('numpy')} {platform.machine()}"
    name = f"{device}_{blake2b(f'{made_by} {text}'.encode(), digest_size=12).hexdigest()}"
    path = folder() / f"{name}.py"
    with _LOCK:
        if path not in _LOADED:
            # numba tells whether its own files are stale by this one's time and size.
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                aside = path.with_suffix(f".{os.getpid()}")
                aside.write_text(text, encoding="utf-8")
                aside.replace(path)
            found = importlib.util.spec_from_file_location(f"liftyard_{name}", path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            # What numba keeps names the module, and loads it by that name.
            sys.modules[found.name] = module
            found.loader.exec_module(module)
            _LOADED[path] = module
    run: Callable[..., Any] = _LOADED[path].run
    return run
