"""A model's files on the Hugging Face hub, downloaded one by one.

Files are stored in the hub client's own cache folder, which all programs share. That client restarts an interrupted
download from the beginning, and some files have 10 GB. Therefore large files are downloaded here, into the same place,
and an interrupted download is resumed. The list of a commit's files never changes and is cached, so that a downloaded
model works without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from httpx2 import TransportError
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm  # type: ignore[attr-defined]

from shoal.errors import CheckpointError, UserError
from shoal.model.weights.disk_cache import load_or_compute
from shoal.model.weights.files import Files, LocalFiles, all_known
from shoal.model.weights.fingerprint import file_digests
from shoal.model.weights.safetensors_file import Header, TensorInfo, check_header, parse_header, read_all, read_header
from shoal.progress_log import ByteLines

if TYPE_CHECKING:
    from torch import Tensor

_MAX_PARALLEL_HEADERS = 8
"""Headers that are requested at once."""


class _HubUnreachable(UserError):
    """The hub does not answer, and the cache lacks something that is needed."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    size: int  # in bytes
    sha256: str | None  # None for small files, which the hub stores in git


@dataclass(frozen=True)
class HubFiles:
    """The files of one commit of a repository on the hub."""

    name: str
    commit: str
    entries: Mapping[str, HubFile] = field(repr=False)
    cache_dir: Path
    token: str | None = field(repr=False)
    local_files_only: bool = False

    @property
    def origin(self) -> str:
        return self.name

    def __contains__(self, file: object) -> bool:
        return file in self.entries

    def listing(self) -> Iterable[str]:
        return sorted(self.entries)

    def has(self, file: str) -> bool:
        return self._path_in_cache(file) is not None

    def path(self, file: str) -> Path:
        if (path := self._path_in_cache(file)) is not None:
            return path
        entry = self._entry(file)
        if self.local_files_only:
            raise _not_cached(f"{file} of {self.name}")
        with _translated_errors(self.name):
            # Files that are too large for plain HTTP are downloaded by the hub's client, which does not resume them.
            if entry.sha256 is not None and entry.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                self._fetch(file, size=entry.size, sha256=entry.sha256)
            path_of_link = hf_hub_download(
                self.name,
                file,
                revision=self.commit,
                cache_dir=self.cache_dir,
                token=self.token,
                tqdm_class=DownloadBar,
            )
            return Path(path_of_link)

    def headers(self, files: Sequence[str]) -> dict[str, Header]:
        """The headers of these safetensors files. A file that is not in the cache is not downloaded for its header."""
        with ThreadPoolExecutor(_MAX_PARALLEL_HEADERS) as pool:
            return dict(zip(files, pool.map(self._header, files), strict=True))

    def digests(self, files: Sequence[str]) -> list[str]:
        return [self._entry(file).sha256 or file_digests([self.path(file)])[0] for file in files]

    def known_digests(self, files: Sequence[str]) -> list[str] | None:
        return all_known(self._entry(file).sha256 for file in files)

    def has_tensors(self, file: str, names: Iterable[str]) -> bool:
        return self.has(file)

    def tensors(self, names_in: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        return read_all({self.path(file): names for file, names in names_in.items()})

    def _entry(self, file: str) -> HubFile:
        if file not in self.entries:
            raise CheckpointError(
                f"{self.name} has no file {file}", hint="the model's index names it: tell the authors of the model"
            )
        return self.entries[file]

    def _path_in_cache(self, file: str) -> Path | None:
        path = try_to_load_from_cache(self.name, file, cache_dir=self.cache_dir, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def _header(self, file: str) -> Header:
        entry = self._entry(file)
        if (path := self._path_in_cache(file)) is not None:
            return read_header(path)
        declared = load_or_compute(
            f"header of {file} of {self.name} at {self.commit}", lambda: self._fetch_header(file)
        )
        header = {
            name: TensorInfo(dtype, tuple(shape), nbytes, end) for name, (dtype, shape, nbytes, end) in declared.items()
        }
        check_header(header, file=f"{file} of {self.name}", size=entry.size)
        return header

    def _fetch_header(self, file: str) -> dict[str, Any]:
        if self.local_files_only:
            raise _not_cached(f"{file} of {self.name}")
        with _translated_errors(self.name):
            try:
                declared = HfApi().parse_safetensors_file_metadata(
                    self.name, file, revision=self.commit, token=self.token
                )
            except (AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
                raise SafetensorsParsingError(str(error)) from error  # the hub's client expects headers to be right
        text = json.dumps({name: asdict(tensor) for name, tensor in declared.tensors.items()})
        header = parse_header(text.encode(), file=f"{file} of {self.name}")
        return {name: [each.dtype, list(each.shape), each.nbytes, each.end] for name, each in header.items()}

    def _fetch(self, file: str, *, size: int, sha256: str) -> None:
        """Download a file into the hub client's cache, or the rest of it if a part is there already."""
        folder = repo_folder_name(repo_id=self.name, repo_type="model")
        blob = self.cache_dir / folder / "blobs" / sha256
        lock = self.cache_dir / ".locks" / folder / f"{sha256}.lock"
        for parent in (blob.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = blob.with_name(f"{sha256}.partial")
            with partial.open("ab") as out:
                http_get(
                    hf_hub_url(self.name, file, revision=self.commit),
                    out,
                    resume_size=out.tell(),
                    headers=build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"},
                    expected_size=size,
                    displayed_filename=file,
                    tqdm_class=DownloadBar,
                )
            if file_digests([partial]) != [sha256]:
                partial.unlink()
                raise CheckpointError(f"{file} of {self.name} was damaged during the download", hint="try again")
            partial.replace(blob)


class DownloadBar(tqdm):
    """The hub client's bar, which logs too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        task = f"Downloading {options.get('desc') or 'a file'}"
        self._lines = ByteLines(task, total=options.get("total") or 0, come=options.get("initial") or 0)

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` bytes."""
        self._lines.advance(n or 0)
        shown: bool | None = super().update(n)
        return shown


def _not_cached(what: str) -> _HubUnreachable:
    return _HubUnreachable(f"{what} is not in the cache", hint="leave out local_files_only to download it")


def open_repository(
    repo: str, *, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool = False
) -> Files:
    """The files of a model on the hub, at the commit that `revision` names now.

    With `local_files_only` the hub is not asked, and only files in the cache can be used. Raises `UserError`.
    """
    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    with _translated_errors(repo):
        try:
            commit = (
                HfApi()
                .resolve_revision(
                    repo, revision=revision, token=token, cache_dir=folder, local_files_only=local_files_only
                )
                .resolved
            )
        except RevisionResolutionError:
            if local_files_only:
                raise _not_cached(repo) from None
            raise
    try:
        with _translated_errors(repo):
            listing = load_or_compute(
                f"files of {repo} at {commit}", lambda: _list_files(repo, commit, token, local_files_only)
            )
    except _HubUnreachable:
        # Another program may have downloaded the model.
        snapshot = folder / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit
        if not snapshot.is_dir():
            raise
        return LocalFiles(snapshot, name=repo)
    entries = {name: HubFile(size, sha256) for name, (size, sha256) in listing.items()}
    return HubFiles(repo, commit, entries, folder, token, local_files_only)


def check_repository(repo: str, *, revision: str | None) -> None:
    """Ask the hub for a model of which the cache has nothing. Raises `UserError` if it has no such model."""
    if not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")).is_dir():
        open_repository(repo, revision=revision, token=None, cache_dir=None)


def _list_files(repo: str, commit: str, token: str | None, local_files_only: bool) -> dict[str, Any]:
    if local_files_only:
        raise _not_cached(repo)
    info = HfApi().model_info(repo, revision=commit, files_metadata=True, token=token)
    return {
        file.rfilename: [file.size or 0, file.lfs.sha256 if file.lfs is not None else None]
        for file in info.siblings or ()
    }


@contextmanager
def _translated_errors(repo: str) -> Iterator[None]:
    """Translate the errors of the hub's client into ours."""
    try:
        yield
    except HFValidationError:
        raise UserError(f"{repo!r} is neither a folder nor the id of a model on the hub") from None
    except GatedRepoError as error:
        raise UserError(
            f"{repo} requires that you accept its conditions",
            hint=f"accept them at {constants.ENDPOINT}/{repo}, then run `hf auth login` or set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model {repo} on the hub that you may see, and no folder of this name",
            hint="check its spelling; for a private model, run `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no such revision", hint=f"see {constants.ENDPOINT}/{repo}/commits") from error
    except (TransportError, OfflineModeIsEnabled, RevisionResolutionError, LocalEntryNotFoundError) as error:
        raise _HubUnreachable(
            f"cannot reach the hub at {constants.ENDPOINT} for {repo}: there is no folder of this name, and not all of "
            "it is in the cache",
            hint="check the network, or the path if you mean a folder; an interrupted download is resumed",
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} lacks a file that it lists", hint="try again: it may have changed") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"a file of {repo} is damaged: it is not a safetensors file") from error
    except HfHubHTTPError as error:
        raise _HubUnreachable(
            f"the hub answered {error.response.status_code} for {repo}",
            hint="try again later; an interrupted download is resumed",
        ) from error
    except OSError as error:
        raise UserError(f"cannot store {repo}: {error.strerror or error}") from error
