from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.certs.authority import BACKDATE_S, CertError, Issued, make_intermediate, make_leaf, make_root
from agent.certs.issuer import EmbeddedIssuer, Issuer, renew_at
from agent.certs.store import HostAuthority
from agent.certs.verify import alternative_names
from policy.identity import SpiffeId
from tests.unit.forge import LEDGER_A, NOW, TD, Mesh, make_mesh

YEAR = 365 * 86400


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh()


def parsed(issued: Issued) -> x509.Certificate:
    return x509.load_pem_x509_certificate(issued.certificate_pem)


def names(certificate: x509.Certificate) -> list[str]:
    return [str(name.value) for name in alternative_names(certificate)]


def test_root_may_sign_one_level_of_intermediates_for_ten_years(mesh: Mesh) -> None:
    root = parsed(mesh.root)
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 1)
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert names(root) == [f"spiffe://{TD}"]
    assert root.not_valid_after_utc.timestamp() == int(NOW + 10 * YEAR)


def test_intermediate_is_bound_to_its_host(mesh: Mesh) -> None:
    one = parsed(mesh.a)
    constraints = one.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    assert constraints.value.permitted_subtrees == [x509.DNSName(f"a.{TD}"), x509.UniformResourceIdentifier(TD)]
    assert one.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert names(one) == [f"spiffe://{TD}/a"]


def test_leaf_carries_one_identity_and_its_dns_form(mesh: Mesh) -> None:
    leaf = make_leaf(mesh.a, LEDGER_A, NOW, 3600)
    one, issuer = x509.load_pem_x509_certificates(leaf.chain_pem)
    usage = one.extensions.get_extension_for_class(x509.KeyUsage).value
    assert names(one) == [LEDGER_A.uri, LEDGER_A.server_name]
    assert issuer == parsed(mesh.a)
    assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (usage.digital_signature, usage.key_cert_sign) == (True, False)
    both = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert set(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == both
    assert (leaf.identity, leaf.serial) == (LEDGER_A, one.serial_number)


def test_every_certificate_has_both_key_identifiers(mesh: Mesh) -> None:
    leaf = x509.load_pem_x509_certificate(make_leaf(mesh.a, LEDGER_A, NOW, 60).chain_pem)
    for one in (parsed(mesh.root), parsed(mesh.a), leaf):
        one.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        assert one.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier


def test_leaf_starts_in_the_past_for_peers_whose_clock_is_behind(mesh: Mesh) -> None:
    leaf = make_leaf(mesh.a, LEDGER_A, NOW, 3600)
    assert (leaf.not_before, leaf.not_after) == (int(NOW - BACKDATE_S), int(NOW + 3600))


def test_nothing_outlives_its_issuer() -> None:
    root = make_root(TD, NOW, lifetime_s=100)
    intermediate = make_intermediate(root, TD, "a", NOW)
    assert parsed(intermediate).not_valid_after_utc == parsed(root).not_valid_after_utc
    assert make_leaf(intermediate, LEDGER_A, NOW, 3600).not_after == int(NOW + 100)


def test_expired_issuer_issues_nothing_and_says_how_to_renew() -> None:
    intermediate = make_intermediate(make_root(TD, NOW), TD, "a", NOW, lifetime_s=100)
    with pytest.raises(CertError, match=r"expired on .* renew it with `underpass ca`"):
        make_leaf(intermediate, LEDGER_A, NOW + 101, 3600)


def test_serials_and_keys_are_never_repeated(mesh: Mesh) -> None:
    leaves = [make_leaf(mesh.a, LEDGER_A, NOW, 60) for _ in range(20)]
    assert len({leaf.serial for leaf in leaves}) == len({leaf.key_pem for leaf in leaves}) == 20


def test_application_named_like_its_host_is_not_self_issued(mesh: Mesh) -> None:
    leaf, issuer = x509.load_pem_x509_certificates(make_leaf(mesh.a, SpiffeId(TD, "a", "a"), NOW, 60).chain_pem)
    assert leaf.subject != issuer.subject != issuer.issuer


def test_longest_possible_names_fit() -> None:
    domain, label = ".".join(["d" * 60] * 2), "h" * 61
    identity = SpiffeId(domain, label, "x" * 61)
    intermediate = make_intermediate(make_root(domain, NOW), domain, label, NOW)
    assert make_leaf(intermediate, identity, NOW, 60).identity == identity


@pytest.mark.parametrize(
    "make",
    [
        lambda root: make_root("Mesh.test", NOW),
        lambda root: make_root("", NOW),
        lambda root: make_intermediate(root, TD, "a.b", NOW),
        lambda root: make_intermediate(root, TD, "a/b", NOW),
        lambda root: make_intermediate(root, TD, "", NOW),
    ],
)
def test_names_that_are_no_labels_are_refused(mesh: Mesh, make: Callable[[Issued], Issued]) -> None:
    with pytest.raises(CertError, match="use lower-case letters, digits and dashes"):
        make(mesh.root)


def test_keys_never_show_in_a_repr(mesh: Mesh) -> None:
    assert "PRIVATE" not in repr(mesh.a) + repr(make_leaf(mesh.a, LEDGER_A, NOW, 60))


def embedded(mesh: Mesh, lifetime_s: float) -> Issuer:
    return EmbeddedIssuer(HostAuthority(TD, "a", mesh.root.certificate_pem, mesh.a, NOW + YEAR), lifetime_s)


def test_embedded_issuer_issues_for_its_own_host(mesh: Mesh) -> None:
    assert embedded(mesh, 120).issue(LEDGER_A, NOW).not_after == int(NOW + 120)


@pytest.mark.parametrize("identity", [SpiffeId(TD, "b", "ledger"), SpiffeId("other.test", "a", "ledger")])
def test_embedded_issuer_refuses_other_hosts_and_meshes(mesh: Mesh, identity: SpiffeId) -> None:
    with pytest.raises(CertError, match="issue it on its own host"):
        embedded(mesh, 120).issue(identity, NOW)


@pytest.mark.parametrize(("jitter", "expected"), [(0.0, 1800), (1.0, 2340), (0.5, 2070)])
def test_renewal_falls_between_half_and_two_thirds_of_the_lifetime(mesh: Mesh, jitter: float, expected: int) -> None:
    assert renew_at(make_leaf(mesh.a, LEDGER_A, NOW, 3600), jitter) - int(NOW) == pytest.approx(expected, abs=1)


def test_renewal_of_a_very_short_leaf_still_lies_ahead(mesh: Mesh) -> None:
    assert renew_at(make_leaf(mesh.a, LEDGER_A, NOW, 10), 0.0) > NOW
