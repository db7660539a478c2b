"""Which links are missing, dead, outdated or not ours: decided without a kernel."""

from __future__ import annotations

import pytest

from agent.bpfcall import LinkInfo
from agent.hooks import attach, source
from agent.hooks.attach import Act, Place, Wanted, plan, wanted_attachments
from agent.hooks.compile import explain
from agent.hooks.problem import Problem
from agent.hooks.source import PROGRAMS

ROOT = Place("/cg", "/", 1)
OWN = Place("/cg/agent", "/agent", 20)
IDS = {name: 100 + number for number, name in enumerate(PROGRAMS)}
WANTED = wanted_attachments(ROOT, OWN)


def link(wanted: Wanted, **changed: int) -> LinkInfo:
    facts = {"id": 7, "program": IDS[wanted.program], "cgroup": wanted.place.id, "attach_type": wanted.attach_type}
    return LinkInfo(**(facts | changed))


def acts(found: dict[str, LinkInfo], wanted: tuple[Wanted, ...] = WANTED) -> dict[str, Act]:
    return {step.pin: step.act for step in plan(wanted, found, IDS) if step.act is not Act.KEEP}


HEALTHY = {each.pin: link(each) for each in WANTED}


def test_everything_is_created_on_an_empty_host_and_capture_comes_last() -> None:
    assert acts({}) == dict.fromkeys(PROGRAMS, Act.CREATE)
    assert next(iter(acts({}))) == "sockops"
    assert list(acts({}))[-2:] == ["connect4", "connect6"]


def test_a_healthy_host_is_left_alone() -> None:
    assert acts(HEALTHY) == {}


@pytest.mark.parametrize(
    ("changed", "act"),
    [
        ({"program": 5}, Act.UPDATE),
        ({"cgroup": 0}, Act.REPLACE),
        ({"cgroup": 99}, Act.REPLACE),
        ({"cgroup": 0, "program": 5}, Act.REPLACE),
        ({"attach_type": 3}, Act.REPLACE),
    ],
    ids=["older program", "cgroup gone", "another cgroup", "both", "another hook"],
)
def test_a_link_that_is_not_right_is_put_right(changed: dict[str, int], act: Act) -> None:
    found = HEALTHY | {"connect4": link(WANTED[-2], **changed)}
    assert WANTED[-2].pin == "connect4"
    assert acts(found) == {"connect4": act}


def test_what_is_not_ours_stays() -> None:
    assert acts(HEALTHY | {"somebody": LinkInfo(1, 2, 3, 4)}) == {}


def test_an_attachment_of_ours_that_is_no_longer_wanted_goes() -> None:
    assert acts(HEALTHY | {"sockops@agent": LinkInfo(1, 2, 3, 4)}) == {"sockops@agent": Act.REMOVE}


@pytest.mark.parametrize("own", ["/bank/agent", "/bank/a/b"])
def test_an_agent_below_the_root_needs_nothing_of_its_own(own: str) -> None:
    wanted = wanted_attachments(Place("/cg/bank", "/bank", 2), Place("/cg" + own, own, 3))
    assert [each.pin for each in wanted] == list(PROGRAMS)


@pytest.mark.parametrize("own", ["/agent", "/bank2/agent", "/bank2"])
def test_an_agent_outside_of_the_root_is_attached_to_as_well(own: str) -> None:
    wanted = wanted_attachments(Place("/cg/bank", "/bank", 2), Place("/cg" + own, own, 3))
    extra = {each.pin: each.place.path for each in wanted if each.pin not in PROGRAMS}
    assert extra == {"sockops@agent": own, "connect4@agent": own, "connect6@agent": own}


@pytest.mark.parametrize(("root", "own"), [("/", "/"), ("/bank", "/"), ("/bank", "/bank"), ("/bank/apps", "/bank")])
def test_an_agent_that_would_exempt_the_whole_root_is_refused(root: str, own: str) -> None:
    with pytest.raises(Problem, match="nothing would be captured; start it in a cgroup of its own"):
        wanted_attachments(Place("/cg" + root, root, 2), Place("/cg" + own, own, 3))


def test_detaching_begins_with_capture() -> None:
    order = [name for name in attach.ours() if name in PROGRAMS]
    assert order[:2] == ["connect6", "connect4"]
    assert order[-1] == "sockops"


def test_names_of_pins_have_no_dot() -> None:
    """bpffs refuses them."""
    assert not [name for name in attach.ours() if "." in name]


def test_every_header_is_in_the_unit_once_and_lines_point_home() -> None:
    files = {"connect.c": '#include "a.h"\nint x;', "a.h": '#include "b.h"\n#include "b.h"\nint a;', "b.h": "int b;"}
    text = source.unit(lambda name: files.get(name, ""))
    assert text.count("int b;") == 1
    assert '#line 1 "b.h"\nint b;\n#line 2 "a.h"\n#line 3 "a.h"\nint a;\n#line 2 "connect.c"\nint x;' in text


def test_the_real_unit_has_no_include_left_and_every_program() -> None:
    text = source.unit()
    assert '#include "' not in text
    assert all(f"int {name}(struct bpf_" in text for name in PROGRAMS)


@pytest.mark.parametrize(
    ("status", "log", "text"),
    [
        (
            1,
            "x\nconnect.c:7:2: error: no such thing\nmore",
            "bpf/ does not compile: connect.c:7:2: error: no such thing",
        ),
        (1, "3: R1 invalid\nPermission denied", "the kernel did not take bpf/: 3: R1 invalid | Permission denied"),
        (1, "", "the kernel did not take bpf/: no message"),
        (-9, "", "the compiler of bpf/ was killed by signal 9; see whether the host is short of memory"),
    ],
)
def test_a_failed_compilation_is_one_sentence(status: int, log: str, text: str) -> None:
    assert explain(status, log) == text
