"""The packages that users install, and the image: they hold everything that the commands need."""

from __future__ import annotations

import email
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).parents[2]
SECONDS = 300.0
"""The limit for a build that never ends."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built by what is installed here."""
    folder = tmp_path_factory.mktemp("packages")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tracked(folder: str) -> set[str]:
    """The files of the repository below a folder, relative to it, without those that are not committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    return {str(PurePosixPath(each).relative_to(folder)) for each in listed.split("\0") if each}


def in_wheel(packages: Path) -> zipfile.ZipFile:
    (path,) = packages.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package(packages: Path) -> None:
    with in_wheel(packages) as wheel:
        names = {name.removeprefix("shoal/") for name in wheel.namelist() if name.startswith("shoal/")}
    assert names >= tracked("src/shoal")
    models = {f"bundled/{folder}/model.safetensors" for folder in ("stories", "stories_draft")}
    assert {"py.typed", "gateway/page/files/index.html", *models} <= names


def test_the_wheel_has_nothing_but_the_package_its_licence_and_its_command(packages: Path) -> None:
    with in_wheel(packages) as wheel:
        others = {name for name in wheel.namelist() if not name.startswith("shoal/")}
        (entry_points,) = (name for name in others if name.endswith("entry_points.txt"))
        assert "shoal = shoal.__main__:main" in wheel.read(entry_points).decode()
    assert {name.partition(".dist-info/")[2] for name in others} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"),
    }


def test_the_wheel_names_the_versions_of_python_that_the_script_tests(packages: Path) -> None:
    with in_wheel(packages) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(wheel.read(path))
    assert metadata["Requires-Python"] == ">=3.11"
    versions = {each.rpartition(" ")[2] for each in metadata.get_all("Classifier", []) if ":: 3." in each}
    script = (REPOSITORY / "scripts" / "versions").read_text()
    assert versions == {"3.11", "3.12", "3.13"}
    assert all(version in script for version in versions - {"3.11"})


def test_the_source_distribution_holds_what_a_wheel_is_made_from_and_the_tests(packages: Path) -> None:
    (path,) = packages.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"src/shoal/{each}" for each in tracked("src/shoal")}
    assert names >= {f"tests/{each}" for each in tracked("tests")} | {"pyproject.toml", "constraints.txt", "LICENSE"}


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_installs_pytorch_in_the_version_of_the_constraints_and_then_the_rest_from_them_all() -> None:
    torch, rest = [text for name, text in dockerfile() if name == "RUN" and "pip install" in text]
    assert torch.split("&&")[0].split() == ["grep", "'^torch=='", "constraints.txt", ">", "torch.txt"]
    assert "--constraint torch.txt torch" in torch
    assert rest.endswith("pip install --constraint constraints.txt .")
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(pinned) == 1


def test_the_image_copies_what_is_there_and_what_is_not_ignored() -> None:
    copied = [text.split()[:-1] for name, text in dockerfile() if name == "COPY" and "--from" not in text]
    sources = {source for each in copied for source in each}
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all((REPOSITORY / source).exists() for source in sources)
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored


def test_the_image_starts_shoal_without_root_and_without_a_shell() -> None:
    last = dockerfile()
    last = last[max(index for index, (name, _) in enumerate(last) if name == "FROM") :]
    said = dict(last)
    assert json.loads(said["ENTRYPOINT"]) == ["shoal"]  # no shell, which would keep the signal
    assert (said["USER"], said["STOPSIGNAL"], said["VOLUME"], said["EXPOSE"]) == ("shoal", "SIGTERM", "/data", "31337")
    assert "SHOAL_CACHE=/data/" in said["ENV"]
