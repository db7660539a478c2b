"""Read and write certificate and key files so that neither a crash nor another user can come between. No X.509 here."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from agent.certs.authority import CertError

KEY_MODE, CERTIFICATE_MODE, DIRECTORY_MODE = 0o600, 0o644, 0o700


def read_key(path: Path, if_missing: str) -> bytes:
    return _read(path, stat.S_IRWXG | stat.S_IRWXO, if_missing)


def read_certificates(path: Path, if_missing: str) -> bytes:
    # Whoever can write a certificate file can add a root of their own, so that is refused like a readable key.
    return _read(path, stat.S_IWGRP | stat.S_IWOTH, if_missing)


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise CertError(f"cannot make {directory} ({error.strerror}): choose another directory") from None
    if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CertError(f"other users can write in {directory}: chmod 700 it, or choose another directory")


def write_key(path: Path, pem: bytes) -> None:
    """Create `path`; never replaces a key, because what the old one signed or decrypts may still be needed."""
    temporary = _write_beside(path, pem, KEY_MODE)
    try:
        # A link, not a rename: it fails where the name exists, so no key is ever replaced, not even in a race.
        os.link(temporary, path)
    except FileExistsError:
        raise CertError(f"{path} exists already and is not replaced: choose an empty directory") from None
    finally:
        temporary.unlink()
    _sync_directory(path.parent)


def write_certificate(path: Path, pem: bytes) -> None:
    _write_beside(path, pem, CERTIFICATE_MODE).replace(path)
    _sync_directory(path.parent)


def _read(path: Path, forbidden: int, if_missing: str) -> bytes:
    try:
        with path.open("rb") as file:
            # The mode of the file that is read, not of whatever has its name by now.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & forbidden:
                raise CertError(f"{path} is open to other users (mode {mode:o}): chmod {mode & ~forbidden:o} it")
            return file.read()
    except FileNotFoundError:
        raise CertError(f"{path} is missing: {if_missing}") from None
    except OSError as error:
        raise CertError(f"cannot read {path} ({error.strerror}): check owner, mode and that it is a file") from None


def _write_beside(path: Path, content: bytes, mode: int) -> Path:
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600 from the start
    except OSError as error:
        raise CertError(f"cannot write in {path.parent} ({error.strerror}): check its owner and mode") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
    except OSError as error:
        os.unlink(name)
        raise CertError(f"cannot write {path} ({error.strerror}): make room, then try again") from None
    return Path(name)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
