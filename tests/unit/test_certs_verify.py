from __future__ import annotations

from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from agent.certs.authority import Issued, make_leaf
from agent.certs.verify import Reason, Refusal, verify_peer
from policy.identity import SpiffeId
from tests.unit.forge import LEDGER_A, NOW, TD, TELLER_B, der, dns, forge, make_mesh, uri

MESH = make_mesh()
GOOD = [uri(LEDGER_A.uri), dns(LEDGER_A.server_name)]
HOST_A = f"spiffe://{TD}/a"


def reason(chain: Sequence[bytes]) -> Reason | SpiffeId:
    answer = verify_peer(chain, TD)
    return answer.reason if isinstance(answer, Refusal) else answer


def under_a(*names: x509.GeneralName, ca: bool = False) -> list[bytes]:
    return der(forge(MESH.a, names, ca=ca), MESH.a, MESH.root)


def test_honest_chain_gives_the_identity() -> None:
    assert verify_peer(der(make_leaf(MESH.a, LEDGER_A, NOW, 60).chain_pem, MESH.root), TD) == LEDGER_A


def test_dns_name_is_optional() -> None:
    assert verify_peer(under_a(uri(LEDGER_A.uri)), TD) == LEDGER_A


@pytest.mark.parametrize(
    "text",
    [
        f"spiffe://{TD}/a/ledger\0",
        f"spiffe://{TD}/a/ledger\0.b",
        f"spiffe://{TD}/a/led%67er",
        f"spiffe://{TD}/a/Ledger",
        f"spiffe://{TD.upper()}/a/ledger",
        f"SPIFFE://{TD}/a/ledger",
        f"spiffe://{TD}/a/ledger/",
        f"spiffe://{TD}/a/ledger\n",
        f"spiffe://{TD}//ledger",
        f"spiffe://{TD}/a/../ledger",
        f"spiffe://{TD}/a/b/ledger",
        f"spiffe://{TD}/a",
        f"spiffe://{TD}:443/a/ledger",
        f"spiffe://user@{TD}/a/ledger",
        f"spiffe://{TD}/a/ledger?x",
        f"spiffe://{TD}/a/ledger#x",
        f"spiffe://{TD}/a/*",
        f"https://{TD}/a/ledger",
        f" spiffe://{TD}/a/ledger",
        "",
    ],
)
def test_uri_that_is_not_exactly_an_identity_is_refused(text: str) -> None:
    assert reason(under_a(uri(text))) is Reason.NOT_AN_IDENTITY


def test_non_ascii_uri_is_refused_as_unreadable() -> None:
    leaf, *rest = under_a(uri(LEDGER_A.uri))
    assert reason([leaf.replace(b"/a/ledger", b"/a/l\xe9dger"), *rest]) is Reason.UNREADABLE


def test_other_trust_domain_is_refused() -> None:
    assert reason(under_a(uri("spiffe://mesh.test.evil/a/ledger"))) is Reason.TRUST_DOMAIN
    assert reason(under_a(uri("spiffe://test/a/ledger"))) is Reason.TRUST_DOMAIN


@pytest.mark.parametrize(
    "names",
    [
        [],
        [dns(LEDGER_A.server_name)],
        [uri(LEDGER_A.uri), uri(f"spiffe://{TD}/a/teller")],
        [uri(LEDGER_A.uri), uri(LEDGER_A.uri)],
        [uri(LEDGER_A.uri), uri("https://bank.test/")],
        [dns(LEDGER_A.uri)],
        [x509.RFC822Name(LEDGER_A.uri)],
        [*GOOD, x509.RFC822Name(f"spiffe://{TD}/b/teller")],
        [*GOOD, x509.OtherName(NameOID.COMMON_NAME, b"\x0c\x01x")],
        [*GOOD, x509.RegisteredID(NameOID.COMMON_NAME)],
        [*GOOD, x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, LEDGER_A.uri)]))],
    ],
)
def test_leaf_without_exactly_one_uri_or_with_other_kinds_of_names_is_refused(names: list[x509.GeneralName]) -> None:
    assert reason(under_a(*names)) is Reason.NAMES


@pytest.mark.parametrize("names", [[TELLER_B.server_name], ["*.a.mesh.test"], [LEDGER_A.server_name, "x.a.mesh.test"]])
def test_dns_name_of_anything_else_is_refused(names: list[str]) -> None:
    assert reason(under_a(uri(LEDGER_A.uri), *(dns(name) for name in names))) is Reason.SERVER_NAME


@pytest.mark.parametrize("text", [f"spiffe://{TD}/b", f"spiffe://{TD}/a/", f"spiffe://{TD}", "spiffe://x.test/a", "\0"])
def test_intermediate_of_another_name_vouches_for_nobody_here(text: str) -> None:
    intermediate = forge(MESH.root, [uri(text)], ca=True)
    assert reason(der(forge(intermediate, GOOD), intermediate, MESH.root)) is Reason.FOREIGN_HOST


@pytest.mark.parametrize("uris", [[], [HOST_A, f"spiffe://{TD}/b"], [HOST_A, HOST_A]])
def test_intermediate_must_name_exactly_one_host(uris: list[str]) -> None:
    intermediate = forge(MESH.root, [uri(text) for text in uris], ca=True)
    assert reason(der(forge(intermediate, GOOD), intermediate, MESH.root)) is Reason.INTERMEDIATE_NAME


def test_leaf_that_can_sign_is_refused() -> None:
    assert reason(under_a(*GOOD, ca=True)) is Reason.LEAF_IS_CA


def chain_of(count: int) -> list[Issued]:
    leaf = forge(MESH.a, GOOD)
    return [leaf, MESH.a, MESH.root, MESH.root][:count]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_chain_of_another_length_is_refused(count: int) -> None:
    assert reason(der(*chain_of(count)) if count else []) is Reason.CHAIN_LENGTH


def test_details_are_one_short_line_of_printable_ascii() -> None:
    for text in (f"spiffe://{TD}/a/\x1b[2J\n", "x" * 5000, "\0"):
        answer = verify_peer(under_a(uri(text)), TD)
        assert isinstance(answer, Refusal)
        assert answer.detail.isprintable()
        assert answer.detail.isascii()
        assert len(answer.detail) < 400


HONEST = der(make_leaf(MESH.a, LEDGER_A, NOW, 60).chain_pem, MESH.root)


@given(st.integers(0, len(HONEST[0]) - 1), st.integers(0, 255), st.integers(0, 1))
def test_damaged_certificate_is_an_answer_and_never_an_exception(place: int, byte: int, which: int) -> None:
    chain = list(HONEST)
    damaged = bytearray(chain[which])
    damaged[place % len(damaged)] = byte
    chain[which] = bytes(damaged)
    assert isinstance(verify_peer(chain, TD), SpiffeId | Refusal)


@given(st.lists(st.binary(max_size=64), min_size=3, max_size=3))
def test_garbage_is_refused(chain: list[bytes]) -> None:
    assert reason(chain) is Reason.UNREADABLE
