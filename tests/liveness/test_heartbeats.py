"""Silence, as an observer counts it that may itself have been stopped."""

from moe_train.liveness.heartbeats import Absence, Heartbeats, first_absence


def listen(heartbeats: Heartbeats, begin: int, end: int, living: list[int]) -> None:
    """Seconds in which some ranks give signs."""
    for now in range(begin, end):
        heartbeats.look(now)
        heartbeats.hear({rank: str(now) for rank in living}, now)


def test_a_silent_rank_is_absent_and_its_seconds_grow() -> None:
    heartbeats = Heartbeats([1, 2], 0)
    listen(heartbeats, 0, 3, [1, 2])  # last signs at 2
    listen(heartbeats, 3, 9, [1])
    assert heartbeats.absences(4) == []
    assert heartbeats.absences(5) == [Absence(2, 3)] and not Absence(2, 3).is_certain
    assert heartbeats.absences(8) == [Absence(2, 6)] and Absence(2, 6).is_certain
    assert Absence(2, 6).describe() == "rank 2 has given no sign of life for 6 s"
    heartbeats.hear({2: "back"}, 9)
    assert heartbeats.absences(9) == []


def test_a_rank_that_never_gave_a_sign_is_absent() -> None:
    heartbeats = Heartbeats([1], 10)
    listen(heartbeats, 10, 16, [])
    assert heartbeats.absences(15) == [Absence(1, 5)]


def test_a_delayed_observer_accuses_nobody_but_those_still_silent_later() -> None:
    heartbeats = Heartbeats([1, 2], 0)
    listen(heartbeats, 0, 3, [1, 2])
    heartbeats.look(100)  # the whole job was stopped, or the host slept
    heartbeats.hear({1: "2", 2: "2"}, 100)  # nobody had time to write anything
    assert heartbeats.absences(100) == []
    listen(heartbeats, 101, 107, [1])
    assert heartbeats.absences(106) == [Absence(2, 6)]


def test_a_failure_keeps_its_reason_and_its_time_through_a_delay() -> None:
    heartbeats = Heartbeats([1, 2], 0)
    heartbeats.hear({1: "failed: ValueError: x", 2: "left"}, 1)
    heartbeats.look(50)
    assert heartbeats.absences(50) == [Absence(1, 49, "failed: ValueError: x")]
    assert heartbeats.absences(50)[0].describe() == "rank 1 failed: ValueError: x"
    assert heartbeats.num_present() == 0


def test_a_closed_connection_counts_unless_the_rank_had_left_or_said_why() -> None:
    for word, expected in (("7", "is gone"), ("left", None), ("failed: y", "failed: y")):
        heartbeats = Heartbeats([0], 0)
        heartbeats.hear({0: word}, 1)
        heartbeats.lose(0, "is gone")
        assert [absence.reason for absence in heartbeats.absences(2)] == ([expected] if expected else [])


def test_the_first_to_go_is_the_culprit() -> None:
    assert first_absence([]) is None
    assert first_absence([Absence(0, 1, "failed: lost rank 2"), Absence(2, 5), Absence(1, 3)]) == Absence(2, 5)
    # A silent rank that may have been first holds back the accusation of one that failed after it.
    found = first_absence([Absence(0, 1, "failed: connection closed"), Absence(2, 3)])
    assert found == Absence(2, 3) and not found.is_certain
