"""Tiny wheels for tests, which pip finds without a network."""

import zipfile
from pathlib import Path


def make(folder: Path, name: str, version: str, *, needs: str = "", code: str = "") -> Path:
    """Writes a wheel of one module of that name to the folder, and gives its path."""
    info = f"{name}-{version}.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "".join(
            f"{path},,\n" for path in (f"{name}.py", f"{info}/METADATA", f"{info}/WHEEL")
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel
