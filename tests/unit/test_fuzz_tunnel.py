"""Every input that the tunnel fuzzer has kept, once more, without the fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzz_tunnel import STARTS, one_input

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "tunnel").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_a_kept_input_is_handled(path: Path) -> None:
    one_input(path.read_bytes())


def test_the_corpus_starts_everywhere() -> None:
    assert {path.read_bytes()[0] for path in CORPUS} == set(range(len(STARTS)))
