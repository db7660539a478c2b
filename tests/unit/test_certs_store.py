from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.certs.authority import CertError, make_intermediate, make_root
from agent.certs.commands import ca_host, ca_init
from agent.certs.store import load_host, write_host
from tests.unit.forge import NOW, TD, forge, uri

DAY = 86400
MESH_ROOT = make_root(TD, NOW)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The directory of host `a`, as `underpass ca` makes it."""
    ca_init(tmp_path / "ca", TD, NOW)
    ca_host(tmp_path / "ca", "a", tmp_path / "a", NOW)
    return tmp_path / "a"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_made_files_load_and_have_tight_modes(host: Path) -> None:
    loaded = load_host(host, "a", TD, NOW)
    assert (loaded.host, loaded.trust_domain) == ("a", TD)
    assert loaded.roots_pem == (host / "root.pem").read_bytes()
    assert loaded.intermediate.key_pem == (host / "host.key").read_bytes()
    assert loaded.not_after == int(NOW + 365 * DAY)
    assert {path.name: mode(path) for path in host.iterdir()} == {
        "root.pem": 0o644,
        "host.pem": 0o644,
        "host.key": 0o600,
    }
    assert mode(host) == 0o700
    assert {path.name for path in (host.parent / "ca").iterdir()} == {"root.pem", "root.key"}
    assert mode(host.parent / "ca" / "root.key") == 0o600


def test_commands_say_what_they_made_and_what_is_next(tmp_path: Path) -> None:
    assert any("keep root.key offline" in line for line in ca_init(tmp_path / "ca", TD, NOW))
    assert any(f"host a of {TD}" in line for line in ca_host(tmp_path / "ca", "a", tmp_path / "a", NOW))


def test_existing_keys_are_never_replaced_and_nothing_else_is_touched(host: Path) -> None:
    ca = host.parent / "ca"
    before = {path: path.read_bytes() for directory in (host, ca) for path in directory.iterdir()}
    with pytest.raises(CertError, match=r"root.key exists already .* choose an empty directory"):
        ca_init(ca, TD, NOW)
    with pytest.raises(CertError, match=r"host.key exists already .* choose an empty directory"):
        ca_host(ca, "a", host, NOW)
    assert {path: path.read_bytes() for directory in (host, ca) for path in directory.iterdir()} == before


def test_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(CertError, match="other users can write"):
        ca_init(tmp_path / "open", TD, NOW)


def test_second_root_is_trusted_during_a_change_of_root(host: Path) -> None:
    new, path = make_root(TD, NOW), host / "root.pem"
    path.write_bytes("# côté: new root first\n".encode() + new.certificate_pem + path.read_bytes())
    roots = load_host(host, "a", TD, NOW).roots_pem
    assert roots.count(b"BEGIN CERTIFICATE") == 2
    roots.decode("ascii")  # comments are gone: OpenSSL takes PEM as ASCII text


def test_host_command_signs_with_the_root_it_has_the_key_of(host: Path) -> None:
    path = host.parent / "ca" / "root.pem"
    path.write_bytes(MESH_ROOT.certificate_pem + path.read_bytes())
    ca_host(path.parent, "b", host.parent / "b", NOW)
    assert load_host(host.parent / "b", "b", TD, NOW).roots_pem.count(b"BEGIN CERTIFICATE") == 2


def replace_host(directory: Path, root_host: str, trust_domain: str = TD) -> None:
    made = make_intermediate(make_root(trust_domain, NOW), trust_domain, root_host, NOW)
    (directory / "host.pem").write_bytes(made.certificate_pem)
    (directory / "host.key").write_bytes(made.key_pem)


def encrypt(path: Path) -> None:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, form, serialization.BestAvailableEncryption(b"secret")))


def rsa_key(path: Path) -> None:
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key = rsa.generate_private_key(65537, 2048)
    path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))


def use_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def leaf_as_host(directory: Path) -> None:
    forged = forge(MESH_ROOT, [uri(f"spiffe://{TD}/a")], ca=False)
    (directory / "host.pem").write_bytes(forged.certificate_pem)
    (directory / "host.key").write_bytes(forged.key_pem)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no root": (lambda d: (d / "root.pem").unlink(), r"root.pem is missing: make it with `underpass ca host a`"),
    "no certificate": (lambda d: (d / "host.pem").unlink(), r"host.pem is missing"),
    "no key": (lambda d: (d / "host.key").unlink(), r"host.key is missing"),
    "key not a file": (lambda d: use_directory(d / "host.key"), r"cannot read .*host.key \(Is a directory\)"),
    "certificate not a file": (lambda d: use_directory(d / "host.pem"), r"cannot read .*host.pem \(Is a directory\)"),
    "key for the group": (lambda d: (d / "host.key").chmod(0o640), r"open to other users \(mode 640\): chmod 600"),
    "key for others": (lambda d: (d / "host.key").chmod(0o604), r"open to other users \(mode 604\): chmod 600"),
    "root others can write": (lambda d: (d / "root.pem").chmod(0o646), r"open to other users \(mode 646\): chmod 644"),
    "certificate not PEM": (lambda d: (d / "host.pem").write_text("x"), r"host.pem is not a PEM certificate"),
    "root empty": (lambda d: (d / "root.pem").write_text(""), r"root.pem is not a PEM certificate"),
    "key not PEM": (lambda d: (d / "host.key").write_text("x"), r"host.key is not a PEM key"),
    "key with password": (lambda d: encrypt(d / "host.key"), r"host.key is not a PEM key without password"),
    "key of another kind": (lambda d: rsa_key(d / "host.key"), r"host.key is not an elliptic-curve key"),
    "key of another": (
        lambda d: (d / "host.key").write_bytes(MESH_ROOT.key_pem),
        r"host.key is not the key of .*renew",
    ),
    "two certificates": (lambda d: (d / "host.pem").write_bytes((d / "host.pem").read_bytes() * 2), r"2 certificates"),
    "other root": (lambda d: replace_host(d, "a"), r"not signed by a root in root.pem"),
    "other host": (lambda d: replace_host(d, "b"), r"is for 'spiffe://mesh.test/b', not spiffe://mesh.test/a"),
    "other mesh": (lambda d: replace_host(d, "a", "x.test"), r"is for 'spiffe://x.test/a', not spiffe://mesh.test/a"),
    "no intermediate": (leaf_as_host, r"is no host intermediate: make one with `underpass ca host a`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory_is_refused_in_one_line_that_helps(host: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(host)
    with pytest.raises(CertError, match=message) as caught:
        load_host(host, "a", TD, NOW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (NOW + 366 * DAY, r"host.pem expired on \d{4}-\d\d-\d\d .* renew it with `underpass ca host a`"),
        (NOW - DAY, r"not valid before \d{4}-\d\d-\d\d .*clock"),
        (NOW + 11 * 365 * DAY, r"root.pem expired on .* make a new root with `underpass ca init`"),
    ],
)
def test_dates_are_checked_and_shown(host: Path, when: float, message: str) -> None:
    with pytest.raises(CertError, match=message):
        load_host(host, "a", TD, when)


def test_host_command_needs_the_key_of_a_mesh_root(host: Path, tmp_path: Path) -> None:
    ca = host.parent / "ca"
    with pytest.raises(CertError, match=r"root.pem expired"):
        ca_host(ca, "b", tmp_path / "b", NOW + 11 * 365 * DAY)
    with pytest.raises(CertError, match=r"root.key is missing: make it with `underpass ca init`"):
        ca_host(host, "b", tmp_path / "b", NOW)
    (ca / "root.pem").write_bytes(MESH_ROOT.certificate_pem)
    with pytest.raises(CertError, match=r"root.key is the key of no root"):
        ca_host(ca, "b", tmp_path / "b", NOW)
    assert not (tmp_path / "b").exists()


def test_intermediate_is_not_taken_for_a_root(host: Path, tmp_path: Path) -> None:
    (host / "host.key").rename(host / "root.key")
    (host / "host.pem").rename(host / "root.pem")
    with pytest.raises(CertError, match="names no trust domain"):
        ca_host(host, "b", tmp_path / "b", NOW)


def test_failed_write_leaves_no_key_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CertError, match=r"cannot write .*host.key \(No space left on device\)"):
        write_host(tmp_path / "a", MESH_ROOT.certificate_pem, make_intermediate(MESH_ROOT, TD, "a", NOW))
    assert list((tmp_path / "a").iterdir()) == []
