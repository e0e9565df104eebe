"""All nodes of a job meet before torchrun: who is there, in what state, and whether they are alike.

    answer = call(token, hosts, mine, ports)               # on the first node, which decides
    answer = report(token, node, mine, master, ports)      # on the others

torchrun's own rendezvous waits 15 minutes for a node that does not come and does not say which one it was. Here the
first node listens on the port that torchrun will take next, the first of some that is free, so the way to it is tried
as well, and clocks are compared without a shared file. Files would be late: an NFS client may not see one for half a
minute (acdirmax).
"""

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

JOIN_S = 300.0
"""For the last node to come: prologs and a busy shared file system make minutes of difference."""
HEAR_S = 1.0
"""For a caller to say who it is, which a node does at once: a stranger that is silent holds up the others as long."""
ACK_S = 5.0
"""For the first node to say that it has heard."""
RETRY_S = 0.1
LARGEST = 1 << 20
"""Bytes of a message at most."""
SKEW_S = 5.0
"""Clocks further apart than this are told: time limits, logs and fences compare them."""


@dataclass(frozen=True)
class Answer:
    """What the first node found."""

    fault: str | None = None
    """Why nobody begins; None: all do."""
    word: str | None = None
    """node_check_failed, never_came, software_missing."""
    hosts: list[str] = field(default_factory=list)
    """Nodes that the fault points at."""
    warnings: list[str] = field(default_factory=list)
    port: int = 0
    """That torchrun shall take."""


def call(
    token: str,
    hosts: Sequence[str],
    mine: dict[str, Any],
    ports: Sequence[int],
    join_s: float = JOIN_S,
    ended: Callable[[], bool] = lambda: False,
) -> Answer:
    """On the first node: hear the others, decide, tell them. Raises OSError where none of the ports can be used.

    `hosts`: SLURM's names by node number. `mine`: this node's report, as `vitdist.nodecheck` prints it.
    `ended`: asked while waiting; true ends the wait.
    """
    reports: dict[int, dict[str, Any]] = {0: mine}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(ports, len(hosts)))
        port = int(listener.getsockname()[1])
        callers: list[socket.socket] = []
        deadline = time.monotonic() + join_s
        while len(reports) < len(hosts) and time.monotonic() < deadline and not ended():
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                continue
            stack.enter_context(caller)
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a stranger, or one that was ended
                told = _receive(caller, stack.enter_context(caller.makefile("rb")), HEAR_S)
                number = int(told["node"])
                if told["token"] == token and 0 < number < len(hosts):
                    skew = float(told["report"]["now"]) - time.time()
                    _send(caller, {"token": token})
                    reports[number] = told["report"] | {"skew": skew}
                    callers.append(caller)
        answer = dataclasses.replace(judge(hosts, reports, join_s), port=port)
        for caller in callers:
            with contextlib.suppress(OSError):
                _send(caller, dataclasses.asdict(answer))
    return answer


def _listen(ports: Sequence[int], backlog: int) -> socket.socket:
    """A listening socket on the first port that is free. Raises OSError for the last one if none is."""
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # torch's store listens here next
        try:
            listener.bind(("", port))
            listener.listen(backlog)
        except OSError:
            listener.close()
            if port == ports[-1]:
                raise
        else:
            listener.settimeout(RETRY_S)
            return listener
    raise ValueError("no port is given")


def report(
    token: str,
    node: int,
    mine: dict[str, Any],
    master: str,
    ports: Sequence[int],
    join_s: float = JOIN_S,
    ended: Callable[[], bool] = lambda: False,
) -> Answer:
    """On another node: report to the first one, wait for its answer."""
    # The first node may have begun later than this one, and waits as long for the last.
    deadline, why = time.monotonic() + 2 * join_s, "no answer"
    while time.monotonic() < deadline and not ended():
        for port in ports:  # at one there may be a stranger
            try:
                with (
                    socket.create_connection((master, port), timeout=ACK_S) as line,
                    line.makefile("rb") as reader,
                ):
                    _send(line, {"token": token, "node": node, "report": mine | {"now": time.time()}})
                    if _receive(line, reader, ACK_S).get("token") == token:
                        return Answer(**_receive(line, reader, max(1.0, deadline - time.monotonic()) + ACK_S))
            except (OSError, ValueError, TypeError) as error:
                why = str(error) or type(error).__name__
        time.sleep(RETRY_S)
    told = f"the first node ({master}, port {' or '.join(map(str, ports))}) did not answer in {2 * join_s:.0f} s: {why}"
    return Answer(told, "never_came")


def judge(hosts: Sequence[str], reports: dict[int, dict[str, Any]], join_s: float) -> Answer:
    """Pure: the reports by node number -> whether all begin."""
    absent = [host for number, host in enumerate(hosts) if number not in reports]
    if absent:
        return Answer(f"{_names(absent)} did not come in {join_s:.0f} s", "never_came", absent)
    bad = {hosts[number]: each["faults"] for number, each in sorted(reports.items()) if each["faults"]}
    if bad:
        told = "; ".join(f"{host}: {', '.join(faults[:3])}" for host, faults in bad.items())
        return Answer(told, "node_check_failed", list(bad))
    for what, of in (("packages", _packages), ("GPUs", _cards)):
        if odd := _odd(hosts, reports, of):
            return Answer(
                f"{what} differ: {odd[0]}", "software_missing" if what == "packages" else "node_check_failed", odd[1]
            )
    warnings = [f"{hosts[number]}: {text}" for number, each in sorted(reports.items()) for text in each["warnings"]]
    late = {hosts[n]: each["skew"] for n, each in sorted(reports.items()) if abs(each.get("skew", 0.0)) > SKEW_S}
    warnings += [f"{host}: its clock is {skew:+.0f} s off {hosts[0]}'s" for host, skew in late.items()]
    return Answer(warnings=warnings)


def _packages(report: dict[str, Any]) -> dict[str, str]:
    return dict(report["versions"])


def _cards(report: dict[str, Any]) -> dict[str, str]:
    return {"GPU": ", ".join(sorted({gpu["name"] for gpu in report["gpus"]}))}


def _odd(
    hosts: Sequence[str], reports: dict[int, dict[str, Any]], of: Callable[[dict[str, Any]], dict[str, str]]
) -> tuple[str, list[str]] | None:
    """(what differs, the nodes that differ from most), or None."""
    kinds: dict[str, list[int]] = {}
    for number, each in sorted(reports.items()):
        kinds.setdefault(json.dumps(of(each), sort_keys=True), []).append(number)
    if len(kinds) < 2:
        return None
    usual, *others = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kinds[kind]))
    normal, other = json.loads(usual), json.loads(others[0])
    name = next(name for name in sorted(normal | other) if normal.get(name) != other.get(name))
    odd = [hosts[number] for kind in others for number in kinds[kind]]
    host = hosts[kinds[others[0]][0]]
    text = f"{host} has {name} {other.get(name) or 'none'}, {hosts[kinds[usual][0]]} {normal.get(name) or 'none'}"
    return text, odd


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _receive(line: socket.socket, reader: BinaryIO, patience_s: float) -> dict[str, Any]:
    """One message. Raises OSError, also after `patience_s`, and ValueError for what is none.

    `reader`: the socket's own file, one for all its messages, since it may hold the next one already.
    """
    line.settimeout(patience_s)
    text = reader.readline(LARGEST)
    if not text.endswith(b"\n"):
        raise ConnectionError("the other side has gone")
    told = json.loads(text)
    if not isinstance(told, dict):
        raise ValueError("no message")
    return told
