"""Rights: never more than the rules give, and no less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.cube.access import Caller
from memfs.cube.acl import Who
from memfs.operation.governance import GRANTED, Context, Governed, denial

ANN, BEN, STAFF = 70001, 70002, 70010
AGENT = Context("agent.service")

CALLERS = st.builds(
    Caller,
    st.sampled_from([0, ANN, BEN, 70003]),
    st.frozensets(st.sampled_from([STAFF, 70011])),
    st.sampled_from([None, "agent.service", "other.service"]),
)
WHO = st.sampled_from([Who("user", BEN), Who("group", STAFF), Who("user", STAFF), AGENT, None])
GIVEN = st.dictionaries(st.sampled_from([*GRANTED, "read"]), st.frozensets(WHO))
CUBES = st.builds(Governed, st.just(ANN), st.booleans(), st.none() | GIVEN)


@given(CALLERS, st.sampled_from(GRANTED), CUBES)
def test_the_rules(caller: Caller, right: str, cube: Governed) -> None:
    may = denial(caller, right, cube) is None
    if not cube.readable:
        assert not may, "everything needs read"
    elif caller.uid in (0, ANN):
        assert may
    elif cube.granted is None:
        assert not may
    elif right not in cube.granted:
        assert may
    else:
        named = cube.granted[right]
        assert may == bool(
            Who("user", caller.uid) in named
            or any(Who("group", gid) in named for gid in caller.gids)
            or (caller.context is not None and Context(caller.context) in named)
        )


@given(CALLERS, st.sampled_from(GRANTED), GIVEN, st.sampled_from(GRANTED), WHO)
def test_one_more_entry_takes_nothing_from_whom_it_names(
    caller: Caller,
    right: str,
    given_to: dict[str, frozenset[Who | Context | None]],
    other: str,
    who: Who,
) -> None:
    before = Governed(ANN, True, given_to)
    after = Governed(ANN, True, {**given_to, other: given_to.get(other, frozenset()) | {who}})
    if right != other:
        assert denial(caller, right, before) == denial(caller, right, after)
    elif right in given_to and denial(caller, right, before) is None:
        assert denial(caller, right, after) is None


@pytest.mark.parametrize(
    ("caller", "why"),
    [
        (Caller(BEN, frozenset()), None),
        (Caller(70003, frozenset({STAFF})), None),
        (Caller(70003, frozenset(), "agent.service"), None),
        (Caller(STAFF, frozenset()), "its access list gives mount to others"),
        (Caller(70003, frozenset({BEN}), "agent.servic"), "its access list gives mount to others"),
    ],
)
def test_examples(caller: Caller, why: str | None) -> None:
    named = frozenset({Who("user", BEN), Who("group", STAFF), AGENT, None})
    assert denial(caller, "mount", Governed(ANN, True, {"mount": named})) == why
