"""Identities: one spelling each, and nothing that only looks like one."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.identity import LABEL, SpiffeId, parse_server_name, parse_uri

LEDGER = SpiffeId("demo.bank", "a", "ledger")
LABELS = st.from_regex(LABEL, fullmatch=True).filter(lambda text: len(text) <= 30)


def test_an_identity_has_three_forms() -> None:
    assert LEDGER.uri == "spiffe://demo.bank/a/ledger"
    assert LEDGER.short == "a/ledger"
    assert LEDGER.server_name == "ledger.a.demo.bank"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe://demo.bank",
        "spiffe://demo.bank/a",
        "spiffe://demo.bank/a/",
        "spiffe://demo.bank//ledger",
        "spiffe://demo.bank/a/ledger/",
        "spiffe://demo.bank/a/ledger/x",
        "spiffe://demo.bank/a/ledger?x=1",
        "spiffe://demo.bank/a/ledger#x",
        "spiffe://demo.bank/a/led%67er",
        "spiffe://demo.bank/../ledger",
        "spiffe://demo.bank/a/Ledger",
        "spiffe://DEMO.bank/a/ledger",
        "spiffe://demo.bank:443/a/ledger",
        "spiffe://user@demo.bank/a/ledger",
        "spiffe://demo..bank/a/ledger",
        "spiffe://.demo.bank/a/ledger",
        "spiffe://demo.bank./a/ledger",
        "SPIFFE://demo.bank/a/ledger",
        "https://demo.bank/a/ledger",
        " spiffe://demo.bank/a/ledger",
        "spiffe://demo.bank/a/ledger\n",
        "spiffe://demo.bank/a/ledgér",
        "spiffe://demo.bank/a/-ledger",
        "spiffe://demo.bank/a/ledger-",
        "spiffe://demo.bank/a/*",
        f"spiffe://demo.bank/a/{'x' * 64}",
        f"spiffe://{'.'.join(['d' * 63] * 4)}/a/ledger",
    ],
)
def test_a_uri_of_any_other_form_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not an identity"):
        parse_uri(uri)


@pytest.mark.parametrize(
    "name",
    [
        *("", "ledger", "ledger.a", "demo.bank", "a.demo.bank", "ledger.a.other.bank", "x.ledger.a.demo.bank"),
        *("ledger.a.demo.bank.", "Ledger.a.demo.bank", ".a.demo.bank", "*.a.demo.bank", "ledger.a.demo.bank\0"),
    ],
)
def test_a_server_name_of_any_other_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_server_name(name, "demo.bank")


@settings(max_examples=100, deadline=None)
@given(st.lists(LABELS, min_size=1, max_size=3).map(".".join), LABELS, LABELS)
def test_both_forms_lead_back_to_the_same_identity(domain: str, host: str, application: str) -> None:
    identity = SpiffeId(domain, host, application)
    assert parse_uri(identity.uri) == identity
    assert parse_server_name(identity.server_name, domain) == identity


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_text_raises_anything_but_value_error(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://demo.bank/a/{text}"):
        with suppress(ValueError):
            assert parse_uri(candidate).uri == candidate
