"""Kills for lack of memory, as files of control groups tell them."""

from pathlib import Path

import pytest

from moe_train.host.control_groups import count_memory_kills


@pytest.mark.parametrize(
    ("membership", "file", "text", "expected"),
    [
        ("0::/job/step", "job/step/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n", 2),
        ("0::/", "memory.events", "oom 1\noom_kill 1\n", 1),  # in a container
        ("4:cpu,memory:/job", "memory,cpu/job/unread", "", None),
        ("4:memory:/job", "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("4:memory:/job", "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),  # before 4.13
        ("0::/other", "job/memory.events", "oom_kill 1\n", None),
    ],
)
def test_kills_of_the_own_group(tmp_path: Path, membership: str, file: str, text: str, expected: int | None) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert count_memory_kills(tmp_path, tmp_path / "cgroup") == expected
