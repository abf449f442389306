"""The lock of a run's folder: who gets it, who loses it, and that two starts of one command never both write."""

import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_train.checkpoint.files import verify_files
from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.writer import CheckpointWriter, Retention
from moe_train.config.errors import UsageError
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.host.process_identity import ProcessIdentity
from moe_train.launch.fork_server import ForkedRank, wait_for_all
from moe_train.train.checkpoint_hold import hold_checkpoints
from moe_train.train.run_lock import Holder, LockLost, RunLock, acquire_together
from moe_train.train.telemetry.writer import MetricsWriter
from tests.ranks import RankPool
from tests.train.runs import ROOT, SMALL, records, start_forked, train_forked

OWN = ProcessIdentity.own()
DEAD = replace(OWN, started=OWN.started - 1)
ELSEWHERE = replace(OWN, host="elsewhere", pid=7, job="4711")
RUN = (*SMALL, "--train.sample_tokens=0", "--data.validation_fraction=0", "--telemetry.tensorboard=false")
STEPS = 40


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    """A lock that the test may acquire; it is released at the end."""
    one = RunLock(tmp_path, beat_seconds=0.05)
    yield one
    one.release()


def leave(run_dir: Path, number: int, identity: ProcessIdentity | None, age: float = 0.0) -> Path:
    """Leave the lock file of another run behind, which was touched `age` seconds ago."""
    path = run_dir / "lock" / f"{number:08d}"
    path.parent.mkdir(exist_ok=True)
    path.write_text("" if identity is None else json.dumps(identity.as_dict()))
    os.utime(path, (time.time() - age,) * 2)
    return path


def files_of(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "lock"))


def test_one_holds_it_and_the_next_gets_it_after_the_release(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None
    lock.check()
    holder = RunLock(tmp_path).try_acquire()
    assert isinstance(holder, Holder) and holder.identity == OWN and holder.seconds < 5
    lock.release()
    assert files_of(tmp_path) == ["00000001.released"]
    with pytest.raises(LockLost, match="not held by this run"):
        lock.check()
    after = RunLock(tmp_path)
    assert after.try_acquire() is None and files_of(tmp_path) == ["00000002"]
    after.release()


@pytest.mark.parametrize(
    ("identity", "age", "is_free"),
    [
        (DEAD, 0, True),  # on this host, and gone
        (OWN, 0, False),
        (OWN, 61, True),  # suspended
        (ELSEWHERE, 0, False),
        (ELSEWHERE, 55, False),
        (ELSEWHERE, 61, True),
        (replace(DEAD, pid_namespace="pid:[1]"), 0, False),  # a container's pid
        (replace(DEAD, boot="before"), 61, True),  # the host was started anew
        (None, 0, False),  # killed before it wrote who it is
        (None, 61, True),
    ],
)
def test_a_lock_is_taken_over_if_its_owner_is_dead_or_silent(
    lock: RunLock, tmp_path: Path, identity: ProcessIdentity | None, age: float, is_free: bool
) -> None:
    leave(tmp_path, 3, identity, age)
    holder = lock.try_acquire()
    assert (holder is None) == is_free
    assert files_of(tmp_path) == (["00000004"] if is_free else ["00000003"])
    assert holder is None or abs(holder.seconds - age) < 5


def test_the_clock_of_this_host_does_not_matter(lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, 1, ELSEWHERE)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert lock.try_acquire() is not None


def test_an_owner_touches_its_file(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None and lock.path is not None
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 10
    while lock.path.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_start_that_judged_long_ago_takes_nothing_over(lock: RunLock, tmp_path: Path) -> None:
    leave(tmp_path, 3, DEAD)
    numbers, slow = lock._numbers, RunLock(tmp_path)
    first = [{3}]  # what `slow` has seen before two others came and went
    slow._numbers = lambda: first.pop() if first else numbers()  # type: ignore[method-assign]
    leave(tmp_path, 5, ELSEWHERE)
    (tmp_path / "lock" / "00000003.released").touch()
    holder = slow.try_acquire()
    assert holder is not None and holder.identity == ELSEWHERE
    assert "00000005" in files_of(tmp_path) and "00000004" not in files_of(tmp_path)


def test_a_start_that_comes_after_a_release_leaves_no_lock_behind(lock: RunLock, tmp_path: Path) -> None:
    """Between its look at the folder and its own lock, another start comes and goes under the same number."""
    other, slow = RunLock(tmp_path), RunLock(tmp_path)
    numbers, looks = lock._numbers, [1]

    def look() -> set[int]:
        found = numbers()
        if looks:
            looks.pop()
            assert other.try_acquire() is None
            other.release()
        return found

    slow._numbers = look  # type: ignore[method-assign]
    assert slow.try_acquire() is None
    assert files_of(tmp_path) == ["00000002"]
    assert lock.try_acquire() is not None
    slow.release()


def begin_in_a_new_folder(run_dir: str, connection: multiprocessing.connection.Connection) -> None:
    shutil.rmtree(Path(run_dir, "lock"))
    lock = RunLock(Path(run_dir), beat_seconds=100)
    connection.send(lock.try_acquire() is None)
    connection.recv()
    lock.check()
    lock.release()


def test_a_folder_that_was_removed_belongs_to_the_run_that_locks_it_next(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None and lock.held is not None and lock.path is not None
    member = RunLock(tmp_path)  # another rank
    member.join(lock.held)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=begin_in_a_new_folder, args=(str(tmp_path), there))
    process.start()
    assert here.recv()
    os.utime(lock.path, (0, 0))
    time.sleep(0.5)  # ten signs of life
    assert lock.path.stat().st_mtime == 0
    for each in (lock, member):
        with pytest.raises(LockLost, match=rf"was removed, and another run holds .*pid {process.pid};"):
            each.check()
    lock.release()
    assert files_of(tmp_path) == ["00000001"]
    here.send(None)
    process.join(20)
    assert process.exitcode == 0 and files_of(tmp_path) == ["00000001.released"]


def test_a_removed_folder_is_locked_again_for_all_ranks(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None and lock.held is not None
    member = RunLock(tmp_path)
    member.join(lock.held)
    shutil.rmtree(tmp_path / "lock")
    member.check()
    lock.check()
    member.check()
    assert files_of(tmp_path) == ["00000001"]


def test_what_was_taken_over_is_not_written_any_more(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None and lock.path is not None
    writer = MetricsWriter(tmp_path, 0, {}, print, lock.writing)
    writer.write(1, {"a": 1.0})
    checkpoints = CheckpointWriter(tmp_path / "checkpoints", 0, None, Retention(1), lock.writing)
    leave(tmp_path, 2, ELSEWHERE)
    lock.path.unlink()
    with pytest.raises(LockLost, match=r"taken over .host elsewhere, pid 7, job 4711; .*writes nothing more"):
        writer.write(2, {"a": 2.0})
    assert [record["step"] for record in records(tmp_path)] == [1]
    other = tmp_path / "checkpoints" / "step_00000001.part" / "rank_00000.safetensors"  # the new owner saves
    other.parent.mkdir(parents=True)
    other.write_text("the other's")
    checkpoints._save(None, {"step": 1})  # type: ignore[arg-type]  # it does not come to the state
    outcome = checkpoints.wait()
    assert outcome is not None and "taken over" in str(outcome.error) and other.read_text() == "the other's"
    with pytest.raises(LockLost):
        lock.check_known()
    lock.release()
    assert files_of(tmp_path) == ["00000002"]


def test_the_loss_is_known_without_a_write(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None and lock.path is not None
    leave(tmp_path, 2, ELSEWHERE)
    lock.path.unlink()
    deadline = time.monotonic() + 10
    with pytest.raises(LockLost):
        while time.monotonic() < deadline:
            lock.check_known()
            time.sleep(0.01)


def test_a_folder_that_is_moved_is_locked_anew(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = RunLock(run_dir)
    assert lock.try_acquire() is None
    run_dir.rename(tmp_path / "moved")
    lock.check()
    assert files_of(run_dir) == ["00000001"] and RunLock(run_dir).try_acquire() is not None
    lock.release()


def contend(run_dir: str, start: float, results: multiprocessing.SimpleQueue, rounds: int) -> None:
    """Acquire and release; count the times at which two held the lock at once."""
    lock, num_held, num_doubles = RunLock(Path(run_dir)), 0, 0
    time.sleep(max(0.0, start - time.time()))
    while num_held < rounds:
        lock = RunLock(Path(run_dir))
        if lock.try_acquire() is not None:
            time.sleep(0.001)
            continue
        mark = Path(run_dir, "mark")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            time.sleep(random.uniform(0, 0.002))
            lock.check()
            mark.unlink()
        except (FileExistsError, LockLost):
            num_doubles += 1
        num_held += 1
        lock.release()
    results.put((num_held, num_doubles))


def test_of_many_starts_at_the_same_moment_one_holds_it(tmp_path: Path) -> None:
    leave(tmp_path, 1, DEAD)  # all want to take it over
    context = multiprocessing.get_context("fork")
    results, start = context.SimpleQueue(), time.time() + 0.5
    processes = [context.Process(target=contend, args=(str(tmp_path), start, results, 20)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [results.get() for _ in processes] == [(20, 0)] * 6


def refused_on_all_ranks(rank: int, world_size: int, run_dir: str, wait_seconds: float) -> tuple[str, list[str]]:
    said: list[str] = []
    try:
        acquire_together(RunLock(Path(run_dir)), rank, wait_seconds, said.append)
    except UsageError as error:
        return str(error), said
    return "", said


@pytest.mark.parametrize("wait_seconds", [0.0, 1.2])
def test_every_rank_learns_of_a_refusal(tmp_path: Path, wait_seconds: float) -> None:
    leave(tmp_path, 1, ELSEWHERE)
    with RankPool(2) as pool:
        (first, said), (second, silent) = pool.run(refused_on_all_ranks, str(tmp_path), wait_seconds)
        assert first == second and "host elsewhere, pid 7, job 4711" in first and "train.lock_wait_seconds" in first
        assert len(said) == (1 if wait_seconds else 0) and not silent
        leave(tmp_path, 1, DEAD)
        assert pool.run(refused_on_all_ranks, str(tmp_path), wait_seconds) == [("", []), ("", [])]


def test_tools_do_not_remove_the_checkpoints_of_a_run_at_work(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None
    with pytest.raises(UsageError, match=f"in use by a run .host {OWN.host}, pid {OWN.pid}"):
        with hold_checkpoints(tmp_path / "checkpoints"):
            pass
    lock.release()
    with hold_checkpoints(tmp_path / "checkpoints"):
        assert RunLock(tmp_path).try_acquire() is not None
    assert RunLock(tmp_path).try_acquire() is None


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_links_lead_to_the_lock(lock: RunLock, tmp_path: Path, is_elsewhere: bool) -> None:
    (tmp_path / "config.yaml").touch()
    checkpoints = tmp_path / "checkpoints"
    if is_elsewhere:  # on a larger disk
        (tmp_path / "disk" / "checkpoints").mkdir(parents=True)
        checkpoints.symlink_to("disk/checkpoints")
    else:
        checkpoints.mkdir()
    links = [tmp_path / name for name in ("first", "second")]
    links[0].symlink_to("checkpoints")
    links[1].symlink_to(links[0])
    assert lock.try_acquire() is None
    for path in (checkpoints, *links):
        with pytest.raises(UsageError, match=re.escape(f"{str(tmp_path)!r} is in use by a run")):
            with hold_checkpoints(path):
                pass
    lock.release()
    for path in (checkpoints, *links):
        with hold_checkpoints(path):
            assert RunLock(tmp_path).try_acquire() is not None
    assert not (tmp_path / "disk" / "lock").exists()


def wait_until(condition: Callable[[], bool], *ranks: ForkedRank) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.005)


def check_whole(run_dir: Path, last: int) -> None:
    """Every step is recorded once and in order, and every checkpoint that is there is whole."""
    assert [record["step"] for record in records(run_dir)] == list(range(1, last + 1))
    manifests = [read_manifest(folder) for folder in list_checkpoints(run_dir / "checkpoints")]
    for manifest in manifests:
        verify_files(manifest, manifest.files)
    assert manifests[-1].step == last and not list((run_dir / "checkpoints").glob("*.part"))


def options(run_dir: Path, wait_seconds: float, steps: int = STEPS) -> list[str]:
    return [
        *RUN,
        f"--train.run_dir={run_dir}",
        f"--train.steps={steps}",
        "--checkpoint.every=5",
        f"--train.lock_wait_seconds={wait_seconds}",
    ]


@pytest.mark.parametrize("wait_seconds", [0, 60])
def test_two_starts_at_once_are_one_run(tmp_path: Path, wait_seconds: float) -> None:
    """The second ends with code 2: after its wait, or as the first has left it nothing to do."""
    both = [start_forked(1, *options(tmp_path, wait_seconds))[0] for _ in range(2)]
    results = wait_for_all(both, 120)
    assert sorted(result.returncode for result in results) == [0, 2], results
    refused = next(result for result in results if result.returncode)
    assert f"host {OWN.host}, pid " in refused.stderr
    check_whole(tmp_path, STEPS)


def logs_of(run_dir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run_dir / "logs").iterdir()}


def test_a_refused_start_leaves_the_logs_of_the_run_at_work_alone(tmp_path: Path) -> None:
    leave(tmp_path, 1, ELSEWHERE)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00000.log").write_text("the other's\n")
    (refused,) = wait_for_all(start_forked(1, *options(tmp_path, 0)), 60)
    assert refused.returncode == 2 and "is in use by another run" in refused.stderr, refused
    assert logs_of(tmp_path) == {"rank_00000.log": "the other's\n"}


def test_a_signal_ends_a_start_that_waits_at_once(tmp_path: Path) -> None:
    leave(tmp_path, 1, ELSEWHERE)
    (rank,) = start_forked(1, *options(tmp_path, 50))
    wait_until(lambda: "waiting up to 50 s" in rank.output()[0], rank)
    rank.kill(signal.SIGTERM)
    (result,) = wait_for_all([rank], 20)
    assert result.returncode == 75 and "SIGTERM: ended at once, as no step is under way" in result.stderr, result
    assert "is finished and saved" not in result.stderr


def test_a_start_that_is_killed_while_it_waits_has_a_log_of_its_own(tmp_path: Path) -> None:
    """Its sentinel writes there. The next run takes the text into its log."""
    lock = leave(tmp_path, 1, ELSEWHERE)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00000.log").write_text("the other's\n")
    environment = {**os.environ, **local_rank_environments(1)[0], "TORCHELASTIC_RUN_ID": "x"}
    words = [sys.executable, "-m", "moe_train", "train", *options(tmp_path, 100)]
    with (tmp_path / "terminal").open("w") as file:
        rank = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: "waiting up to 100 s" in (tmp_path / "terminal").read_text())
    finally:
        rank.kill()
    wait_until(lambda: "signal 9 (SIGKILL" in (tmp_path / "terminal").read_text())
    (name,) = logs_of(tmp_path).keys() - {"rank_00000.log"}
    wait_until(lambda: "signal 9 (SIGKILL" in logs_of(tmp_path)[name])
    assert name == f"start_00000_{OWN.host}_{rank.pid}.log" and logs_of(tmp_path)["rank_00000.log"] == "the other's\n"
    rank.wait()
    lock.write_text(json.dumps(DEAD.as_dict()))
    assert train_forked(1, *options(tmp_path, 0, 2)).returncode == 0
    assert logs_of(tmp_path).keys() == {"rank_00000.log"}
    text = logs_of(tmp_path)["rank_00000.log"]
    assert text.startswith("the other's\n") and f"rank 0 (pid {rank.pid} on" in text


@pytest.mark.slow
def test_two_starts_at_once_twenty_times_also_with_a_kill(tmp_path: Path) -> None:
    draw, num_kills = random.Random(0), 0
    for attempt in range(20):
        run_dir = tmp_path / str(attempt)
        both = [start_forked(1, *options(run_dir, 60))[0] for _ in range(2)]
        if attempt % 2:  # the one that holds the lock dies within its work; the other takes over and goes on
            moment = draw.randint(1, STEPS - 10)
            metrics = run_dir / "metrics.jsonl"
            wait_until(lambda m=metrics, at=moment: m.exists() and len(m.read_text().splitlines()) >= at, *both)
            owner = json.loads(next((run_dir / "lock").glob("????????")).read_text())["pid"]
            os.kill(owner, signal.SIGKILL)
            num_kills += 1
        codes = sorted(result.returncode for result in wait_for_all(both, 120))
        assert codes == ([-signal.SIGKILL, 0] if attempt % 2 else [0, 2]), (attempt, codes)
        check_whole(run_dir, STEPS)
    assert num_kills == 10


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_that_was_suspended_for_long_stops_before_it_writes(tmp_path: Path, num_ranks: int) -> None:
    first = start_forked(num_ranks, *options(tmp_path, 0, 4000))
    wait_until(lambda: bool(list_checkpoints(tmp_path / "checkpoints")), *first)
    for rank in first:
        rank.kill(signal.SIGSTOP)
    lock = next((tmp_path / "lock").glob("????????"))
    os.utime(lock, (time.time() - 61,) * 2)  # as after a minute
    step = read_manifest(list_checkpoints(tmp_path / "checkpoints")[-1]).step
    second = train_forked(num_ranks, *options(tmp_path, 0, step + 40))
    assert second.returncode == 0, second
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for rank in first:
        rank.kill(signal.SIGCONT)
    results = wait_for_all(first, 60)
    assert {result.returncode for result in results} == {70}, results
    assert "was taken over" in results[0].stderr and "writes nothing more" in results[0].stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    check_whole(tmp_path, step + 40)
