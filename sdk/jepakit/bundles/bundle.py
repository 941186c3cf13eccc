"""The bundle: one immutable folder that holds a backbone, how to feed it, and the means to verify it.

    bundle/
      manifest.json         the `Manifest` (manifest.py)
      weights.safetensors   a plain timm state dict of the backbone
      golden.npz            synthetic inputs and torch's vectors for them
      model.onnx            after export
      model.safetensors     the graph's tensors, if they exceed the 2 GB that model.onnx can hold

Digests catch damage: any changed byte in any file, the manifest included (but for its line ends), is an error naming
the file.
They do not catch replacement by someone who also rewrites the manifest: for that, note the bundle's
`digest` (printed at export) and pin it (`jepakit serve --expect DIGEST`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from jepakit._files import as_path, file_sha256, making_folder, prepare_place, reason_of, sha256
from jepakit.bundles.manifest import NAME_PATTERN, Described, Manifest, parse_manifest, render_manifest
from jepakit.errors import BundleError, WriteError

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP, errno.ENAMETOOLONG)

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.npz"
GRAPH = "model.onnx"
DATA = "model.safetensors"

_Taken = TypeVar("_Taken")


def name_for(folder: Path) -> str:
    """The folder's name as a model name: characters unsafe in a URL or a shell become `-`. Empty if no other is left."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).lstrip("._-")[:128]


def check_new(path: Path) -> None:
    """Raise BundleError if a new bundle's path already exists, ConfigError if nothing can be written there.

    Creates the parent folder.
    """
    _check_free(path)
    prepare_place(path)


def _check_free(path: Path) -> None:
    """Raise BundleError if a path already exists."""
    if os.path.lexists(path):  # true for a dangling link, too; False where we may not look: writing will fail
        if os.path.isdir(path) and not is_bundle(path):  # noqa: PTH112 (Path's raises where we may not look)
            raise BundleError(f"{path} is a folder, but not a bundle: name a new folder, such as {path / 'NAME'}")
        raise BundleError(f"{path} already exists, and a bundle is never overwritten: remove it or name another place")


def write_bundle(path: Path, manifest: Manifest, write_files: Callable[[Path], None]) -> Manifest:
    """Write a bundle atomically; returns the manifest as written, with `files` and `digest` filled in.

    `write_files(folder)` puts every file but the manifest into a temporary folder beside `path`; digests
    are computed, everything is flushed to disk, then the folder is renamed into place. A crash leaves
    either no bundle or a whole one. Raises the errors of `check_new`, and WriteError if the files cannot be written.
    """
    from safetensors import SafetensorError

    check_new(path)
    try:
        with making_folder(path) as folder:
            write_files(folder)
            files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
            text = render_manifest(manifest.model_copy(update={"files": files}))
            (folder / MANIFEST).write_text(text, encoding="utf-8")
            # safetensors writes with mode 0600; a service running as another user must be able to read it.
            for file in folder.iterdir():
                file.chmod(0o644)
            folder.chmod(0o755)
    except (OSError, SafetensorError) as error:
        _check_free(path)  # another export may have been faster
        raise WriteError(
            f"{path} cannot be written ({reason_of(error)}): make room in {path.parent}, and run the same command again"
        ) from error
    return parse_manifest(text, path / MANIFEST)


class Bundle(Described):
    """A bundle on disk whose manifest has been checked; `read` checks each file as it hands out its bytes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, name={self.name!r}, model_id={self.model_id!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """The verified bytes of one file of the bundle; BundleError names the file if they are wrong."""
        return self._verified(name, Path.read_bytes, sha256)

    def check(self, name: str) -> None:
        """Verify one file as `read` does, without holding it in memory."""
        self._verified(name, file_sha256, str)

    def require(self, name: str) -> None:
        """Raise BundleError if the bundle holds no such file: a graph comes with `jepakit export`."""
        if name not in self.manifest.files:
            hint = "; run `jepakit export` on it first" if self.manifest.graph is None else ""
            raise BundleError(f"bundle {self.path} has no {name}{hint}")

    def _verified(self, name: str, take: Callable[[Path], _Taken], digest: Callable[[_Taken], str]) -> _Taken:
        self.require(name)
        file = self.path / name
        try:
            _check_regular(file)
            taken = take(file)
        except OSError as error:
            remedy = (
                "let this user read it"
                if isinstance(error, PermissionError)
                else "the bundle is incomplete, copy it again"
            )
            raise BundleError(f"{file} cannot be read ({reason_of(error)}): {remedy}") from None
        if digest(taken) != self.manifest.files[name]:
            raise BundleError(
                f"{file} is damaged: its SHA-256 is not the manifest's {self.manifest.files[name][:12]}…; "
                "copy the bundle again or export it again"
            )
        return taken

    def verify(self) -> None:
        """Check every file; BundleError names the first one that is damaged, missing or extra."""
        for name in self.manifest.files:
            self.check(name)
        self._check_strangers()

    def read_all(self) -> dict[str, bytes]:
        """The verified bytes of every file except the weights, which are only checked (the graph holds them too).

        BundleError names the first file that is damaged, missing or extra.
        """
        files = {}
        for name in self.manifest.files:
            if name == WEIGHTS:
                self.check(name)
            else:
                files[name] = self.read(name)
        self._check_strangers()
        return files

    def _check_strangers(self) -> None:
        strangers = {file.name for file in self.path.iterdir()} - set(self.manifest.files) - {MANIFEST}
        if strangers:
            raise BundleError(
                f"{self.path / min(strangers)} does not belong to the bundle, as its manifest does not list it: remove it"
            )


def is_bundle(path: Path) -> bool:
    """Whether a path is a folder with a manifest, or one that we may not read: `open_bundle` then reports that.

    Raises OSError if that cannot be determined, as on a lost mount.
    """
    try:
        return _has_manifest(path)
    except PermissionError:
        return True


def _has_manifest(path: Path) -> bool:
    """Whether a path is a folder with a manifest. Raises OSError if that cannot be determined."""
    try:
        # Not `is_file`, which from Python 3.14 on returns False inside an unreadable folder.
        return stat.S_ISREG((path / MANIFEST).stat().st_mode)
    except ValueError:  # a path with a null byte
        return False
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise


def _check_regular(file: Path) -> None:
    """BundleError for a pipe or a device, which could be read forever. Raises OSError."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BundleError(f"{file} is not a regular file: do not use this bundle, jepakit did not make it")


class Inside(NamedTuple):
    """The contents of a folder of bundles, sorted by name."""

    bundles: list[Path]
    closed: dict[Path, str]
    """Folders that cannot be read, and why: another user's (such as `lost+found`), or a lost mount."""


def bundles_inside(folder: Path) -> Inside:
    """The bundles in a folder. Hidden folders, which are being written or removed, are skipped. Raises OSError."""
    inside = Inside([], {})
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        try:
            if _has_manifest(path):
                inside.bundles.append(path)
        except OSError as error:
            inside.closed[path] = f"{path} cannot be read: {reason_of(error)}"
    return inside


def open_bundle(path: Bundle | str | Path) -> Bundle:
    """Open a bundle, checking its manifest (not yet the other files; see `Bundle.verify`).

    Raises BundleError when `path` is not a bundle, or its manifest is damaged or of another schema version.
    """
    path = as_path(path, "path")
    file = path / MANIFEST
    try:
        _check_regular(file)
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            raise BundleError(f"{path} is not a bundle: there is no such folder") from None
        if is_bundle(path / "bundle"):
            raise BundleError(
                f"{path} is a run, not a bundle: for vectors, export it (jepakit export {path} --out bundles/{path.name}); as weights to "
                f"start from, give {path / 'bundle'}"
            ) from None
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {reason_of(error)}") from None
    manifest = parse_manifest(text, file)
    _check_files(manifest, file)
    return Bundle(path, manifest)


def _check_files(manifest: Manifest, file: Path) -> None:
    """BundleError if the manifest lists a file outside the bundle, itself, or a graph of which it says nothing."""
    strangers = [name for name in manifest.files if name == MANIFEST or not re.fullmatch(NAME_PATTERN, name)]
    if strangers:
        raise BundleError(
            f"{file} lists a file outside the bundle ({strangers[0][:80]!r}): do not use it, jepakit did not make it"
        )
    if GRAPH in manifest.files and manifest.graph is None:
        raise BundleError(f"{file} lists {GRAPH} and says nothing of its graph: do not use it, jepakit did not make it")
