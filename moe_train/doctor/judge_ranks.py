"""Judgement of the ranks' facts: what differs between ranks and should not, and what a host lacks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_train.doctor.facts import Facts
from moe_train.doctor.finding import Finding, name_ranks

Judgement = tuple[list[Finding], list[Finding]]  # problems and warnings

_MOST_VALUES, _MOST_FIELDS, _MOST_CHARACTERS = 4, 12, 60
_BUSY_SHARE = 0.25  # share of a host's cores that other work uses; above it, measured times mean little
_SHARED_MEMORY_BYTES = 2**29  # for NCCL and data loaders; a container has 64 MiB by default
_GPU_TAKEN_BYTES = 2 * 2**30  # before training; a CUDA context alone takes half a GiB
_OPEN_FILES, _OPEN_FILES_A_RANK = 256, 16  # each process group opens connections to every rank
_CLOCK_SECONDS = 1.0


def host_names(facts: Sequence[Facts]) -> list[str]:
    """Name the host of each rank: its hostname, with the host's number if two hosts have the same hostname."""
    return _tell_apart([(fact.hostname, fact.node) for fact in facts])


def _tell_apart(hosts: Sequence[tuple[str, int]]) -> list[str]:
    nodes: dict[str, set[int]] = {}
    for name, node in hosts:
        nodes.setdefault(name, set()).add(node)
    return [name if len(nodes[name]) == 1 else f"{name}#{node}" for name, node in hosts]


def rank_names(facts: Sequence[Facts]) -> list[str]:
    """Name each rank together with its host: "rank 3 (a)"."""
    return [f"rank {rank} ({host})" for rank, host in enumerate(host_names(facts))]


def judge_facts(facts: Sequence[Facts]) -> Judgement:
    """Compare the facts of the ranks with each other and with what training needs.

    Args:
        facts: Facts of each rank.

    Returns:
        Problems and warnings.
    """
    problems, warnings = judge_software([vars(fact) for fact in facts]), list[Finding]()
    for judge in (_judge_equality, _judge_devices, _judge_hosts):
        more_problems, more_warnings = judge(facts)
        problems += more_problems
        warnings += more_warnings
    return problems, warnings


def can_be_measured(facts: Sequence[Facts]) -> bool:
    """Return whether the ranks can work together: different versions or code may make them hang or crash."""
    alike: tuple[Callable[[Facts], Any], ...] = (
        lambda fact: fact.digest,
        lambda fact: fact.versions["torch"],
        lambda fact: fact.versions.get("nccl"),
        lambda fact: fact.device["kind"],
        lambda fact: fact.options,
    )
    return all(len({str(value(fact)) for fact in facts}) == 1 for value in alike) and not _shared_devices(facts)


def judge_software(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Find versions and code that differ between ranks.

    Args:
        facts: Facts of each rank, as `Facts.as_dict` returns them; another version of moe_train may have other fields.

    Returns:
        Problems.
    """
    hosts = _tell_apart([(fact.get("hostname", "?"), fact.get("node", 0)) for fact in facts])
    given = [fact.get("versions", {}) for fact in facts]
    held = [
        ("versions", name, [versions.get(name) for versions in given], "install the same environment on all hosts")
        for name in dict.fromkeys(name for versions in given for name in versions)
    ]
    if len({fact.get("digest") for fact in facts}) > 1:
        commits = [fact.get("commit") for fact in facts]
        codes = [
            f"{fact.get('digest')}{f' (commit {commit[:12]})' if commit else ''}"
            for fact, commit in zip(facts, commits, strict=True)
        ]
        held.append(("code", "the code of moe_train", codes, "bring the same checkout to all hosts"))
    found = []
    for kind, name, values, remedy in held:
        difference = describe_difference(values, hosts)
        if difference is not None:
            where, text = difference
            found.append(Finding(kind, where, f"{name} differs: {text}", remedy))
    return found


def _judge_equality(facts: Sequence[Facts]) -> Judgement:
    problems, warnings = list[Finding](), list[Finding]()

    def hold(kind: str, name: str, values: Sequence[Any], remedy: str, found: list[Finding]) -> None:
        difference = describe_difference(values, host_names(facts))
        if difference is not None:
            where, text = difference
            found.append(Finding(kind, where, f"{name} differs: {text}", remedy))

    failures = [fact.failure or None for fact in facts]
    if any(failures):
        remedy = "give all ranks the same file and options, and all hosts the same devices"
        hold("configuration", "what keeps ranks from their configuration or device", failures, remedy, problems)
    else:
        names = dict.fromkeys(name for fact in facts for name in fact.fields)
        given = {name: [fact.fields.get(name) for fact in facts] for name in names}
        differing = [name for name in names if len(set(given[name])) > 1]
        remedy = "give all ranks the same file and options"
        for name in differing[:_MOST_FIELDS]:
            hold("configuration", name, given[name], remedy, problems)
        if len(differing) > _MOST_FIELDS:
            more = f"{len(differing) - _MOST_FIELDS} more fields differ"
            problems.append(Finding("configuration", "the ranks above", more, remedy))
    for name in dict.fromkeys(name for fact in facts for name in fact.options):
        remedy = "start all ranks with the same command"
        hold("configuration", f"the doctor's --{name}", [fact.options.get(name) for fact in facts], remedy, problems)
    for name in dict.fromkeys(name for fact in facts for name in fact.environment):
        # Each host has its own names for interfaces and adapters.
        found = warnings if name.endswith(("_IFNAME", "_HCA", "_NET_DEVICES")) else problems
        remedy = f"set {name} alike on all hosts (deepspeed: in .deepspeed_env; mpirun: -x; srun: --export)"
        hold("environment", name, [fact.environment.get(name) for fact in facts], remedy, found)
    return problems, warnings


def describe_difference(values: Sequence[Any], hosts: Sequence[str]) -> tuple[str, str] | None:
    """Describe which ranks differ from the majority, and which ranks have which value.

    Args:
        values: Value of each rank.
        hosts: Host name of each rank.

    Returns:
        Names of the ranks that differ, and a text of the values; None if all ranks have the same value.
    """
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return None
    by_number = sorted(ranks.items(), key=lambda item: -len(item[1]))  # stable: with two halves, rank 0's comes first
    texts = [f"{_shown(value)} on {place_ranks(who, hosts)}" for value, who in by_number[:_MOST_VALUES]]
    more = [f"and {len(by_number) - _MOST_VALUES} other values"] if len(by_number) > _MOST_VALUES else []
    others = [rank for _, who in by_number[1:] for rank in who]
    return place_ranks(others, hosts), ", ".join(texts + more)


def place_ranks(ranks: list[int], hosts: Sequence[str]) -> str:
    """Name ranks together with their hosts: "ranks 2-3 (b)"."""
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks)))
    shown = ", ".join(names[:_MOST_VALUES]) + (f" and {len(names) - _MOST_VALUES} more" if names[_MOST_VALUES:] else "")
    return f"{name_ranks(ranks)} ({shown})"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS * 3 else f"{text[: _MOST_CHARACTERS * 3]}..."


def _shared_devices(facts: Sequence[Facts]) -> dict[str, list[int]]:
    """Find GPUs that several ranks use; the ranks by UUID."""
    ranks: dict[str, list[int]] = {}
    for fact in facts:
        if fact.device["uuid"]:
            ranks.setdefault(fact.device["uuid"], []).append(fact.rank)
    return {uuid: who for uuid, who in ranks.items() if len(who) > 1}


def _judge_devices(facts: Sequence[Facts]) -> Judgement:
    problems, warnings = list[Finding](), list[Finding]()
    hosts = host_names(facts)
    for uuid, who in _shared_devices(facts).items():
        message = f"{len(who)} ranks have the same GPU ({uuid})"
        remedy = "one process a GPU: look at CUDA_VISIBLE_DEVICES and at what the launcher says LOCAL_RANK is"
        problems.append(Finding("device", place_ranks(who, hosts), message, remedy))
    for name, unit in (("kind", ""), ("name", ""), ("memory", " bytes")):
        # Hosts with the same processor may differ a little in memory.
        if name == "memory" and facts[0].device["kind"] == "cpu":
            continue
        difference = describe_difference([f"{fact.device[name]}{unit}" for fact in facts], hosts)
        if difference is not None:
            where, text = difference
            found = problems if name == "kind" else warnings
            remedy = "a step is as slow as the slowest device, and memory as large as the smallest"
            found.append(Finding("device", where, f"the devices' {name} differs: {text}", remedy))
    for fact in facts:
        taken = fact.device["memory"] - fact.device["free"]
        if fact.device["kind"] == "cuda" and taken > _GPU_TAKEN_BYTES:
            message = f"{taken / 2**30:.1f} GiB of the GPU's memory are taken already"
            remedy = "end what else runs there (nvidia-smi shows it)"
            warnings.append(Finding("device", place_ranks([fact.rank], hosts), message, remedy))
        if fact.kernel_failure:
            message = f"Triton's kernels do not run ({fact.kernel_failure}): all ranks will take slower ones"
            remedy = "install triton, a C compiler and Python.h (Debian and Ubuntu: apt install gcc python3-dev)"
            warnings.append(Finding("device", place_ranks([fact.rank], hosts), message, remedy))
    return problems, warnings


def _judge_hosts(facts: Sequence[Facts]) -> Judgement:
    warnings, hosts = list[Finding](), host_names(facts)
    counts: dict[str, int] = {}
    for host in hosts:
        counts[host] = counts.get(host, 0) + 1
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} on {host}" for host, count in counts.items())
        warnings.append(Finding("host", "all hosts", f"not all have as many ranks: {text}", "give each host as many"))
    for fact, host in zip(facts, hosts, strict=True):
        if fact.local_rank != 0:
            continue
        if fact.infiniband_obstacles:
            message = f"NCCL will take TCP, not InfiniBand: {', '.join(fact.infiniband_obstacles)}"
            remedy = (
                "install libibverbs1, ibverbs-providers and librdmacm1; in a container pass /dev/infiniband, "
                "--cap-add IPC_LOCK and --ulimit memlock=-1"
            )
            warnings.append(Finding("host", host, message, remedy))
        num_threads = sum(other.threads for other, name in zip(facts, hosts, strict=True) if name == host)
        if num_threads > fact.cores and fact.device["kind"] == "cpu":
            message = f"{counts[host]} ranks have {num_threads} threads for {fact.cores} cores"
            warnings.append(Finding("host", host, message, "fewer ranks, or parallel.threads_per_rank"))
        if fact.busy_cores is not None and fact.busy_cores > _BUSY_SHARE * fact.host_cores:
            message = f"{fact.busy_cores:.1f} of {fact.host_cores} cores are at work for something else"
            warnings.append(Finding("host", host, message, "end it, or do not trust the times below"))
        if fact.shared_memory < _SHARED_MEMORY_BYTES and counts[host] > 1:
            message = f"/dev/shm has {fact.shared_memory / 2**20:.0f} MiB"
            warnings.append(Finding("host", host, message, "start the container with --ipc=host or --shm-size=8g"))
        needed = _OPEN_FILES + _OPEN_FILES_A_RANK * len(facts)
        if fact.open_files < needed:
            message = f"a process may have {fact.open_files} open files; {len(facts)} ranks need about {needed}"
            warnings.append(Finding("host", host, message, f"ulimit -n {max(65536, needed)} before the launcher"))
    return [], warnings


def judge_clocks(clocks: Sequence[tuple[str, float, float]]) -> list[Finding]:
    """Find hosts whose clocks differ from the first host's.

    Args:
        clocks: For each host except the first: its name, the seconds that its clock is ahead of the first host's, and
            the error of that number in seconds.

    Returns:
        Warnings.
    """
    return [
        Finding(
            "clock",
            host,
            f"its clock is {abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the first host's +-{error:.1g} s",
            "run chrony or ntpd: logs and file times of the hosts will not fit together",
        )
        for host, ahead, error in clocks
        if abs(ahead) - error > _CLOCK_SECONDS
    ]
