"""Collects what a machine with PyTorch, and without a network, lacks to run shoal and its tests.

    python -m benchmarks.gpu.wheels FOLDER [PYTHON_VERSION]

The wheel of shoal is built here, and the wheels of all that it needs are downloaded in the versions that are installed
here, with Transformers, because older ones lack what shoal needs of it; without PyTorch, and without what only
quantization, simulations and browsers need.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from shoal.host.processes import interruptible

MAX_BYTES = 64 << 20
"""What may be carried to such a machine."""
ROOTS = ("shoal", "pytest", "hypothesis")
THERE = frozenset({"torch", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "numpy", "scipy"})
"""Packages that such a machine has, with all that they need, and bitsandbytes, which is large and only quantizes."""
UNUSED = frozenset({"grpcio", "grpcio-tools", "hf-xet", "setuptools"})
"""Packages that others name, and that nothing imports here: to compile protocols, to download, to build."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> dict[str, str]:
    """The packages by name, with the versions that are installed here."""
    found: dict[str, str] = {}
    waiting = [*ROOTS]
    while waiting:
        name = normalized(waiting.pop())
        if name in found or name in THERE | UNUSED:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # for another system, or an extra that is not wanted
            continue
        for requirement in requires(name) or ():
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    return found


@interruptible()
def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    folder, python = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "3.12"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    own = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(own, check=True)
    packages = {name: each for name, each in needed().items() if name != "shoal"}
    platforms = [option for each in PLATFORMS for option in ("--platform", each)]
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    download += ["--python-version", python, "--implementation", "cp", *platforms]
    missing = []
    for name, each in sorted(packages.items()):
        wanted = f"{name}=={each}"
        if subprocess.run([*download, wanted], stderr=subprocess.DEVNULL, check=False).returncode:
            with tempfile.TemporaryDirectory() as built:  # some of plain Python have no wheels
                subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", built, wanted], check=False)
                plain = list(Path(built).glob("*-none-any.whl"))
                for wheel in plain:
                    shutil.copy(wheel, folder)
            missing += [] if plain else [name]
    num_bytes = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(packages) + 1 - len(missing)} wheels, {num_bytes / 2**20:.1f} MiB of {MAX_BYTES >> 20}")
    if missing:
        print(f"there are no wheels of {', '.join(missing)} for Python {python}: build them on such a machine")
    if num_bytes > MAX_BYTES:
        raise SystemExit("they are too large together")


if __name__ == "__main__":
    main()
