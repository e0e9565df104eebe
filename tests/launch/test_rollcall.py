"""All nodes meet before torchrun: sockets of this machine stand for those of a cluster."""

import socket
import threading
from typing import Any

import pytest

from launch import rollcall, torchrun
from launch.rollcall import Answer


def report(**changes: Any) -> dict[str, Any]:
    gpus = [{"name": "NVIDIA H100"}] * 2
    return {"faults": [], "warnings": [], "versions": {"torch": "2.15.0"}, "gpus": gpus} | changes


def test_nodes_that_are_well_and_alike_begin() -> None:
    assert rollcall.judge(["a", "b"], {0: report(), 1: report(skew=0.2)}, 300) == Answer()


@pytest.mark.parametrize(
    ("third", "word", "said"),
    [
        (report(faults=["7 of 8 GPUs", "/tmp: 3 MB free"]), "node_check_failed", "c: 7 of 8 GPUs, /tmp: 3 MB free"),
        (report(versions={"torch": "2.11.0"}), "software_missing", "packages differ: c has torch 2.11.0, a 2.15.0"),
        (report(versions={}), "software_missing", "packages differ: c has torch none, a 2.15.0"),
        (report(gpus=[{"name": "NVIDIA A100"}] * 2), "node_check_failed", "GPUs differ: c has GPU NVIDIA A100"),
    ],
)  # fmt: skip
def test_L5_a_node_that_is_ill_or_unlike_the_others_is_named(third: dict[str, Any], word: str, said: str) -> None:
    answer = rollcall.judge(["a", "b", "c"], {0: report(), 1: report(), 2: third}, 300)
    assert (answer.word, answer.hosts) == (word, ["c"])
    assert said in str(answer.fault)


def test_clocks_that_differ_are_told() -> None:
    answer = rollcall.judge(["a", "b"], {0: report(warnings=["4 cores"]), 1: report(skew=-61.0)}, 300)
    assert answer.fault is None
    assert answer.warnings == ["a: 4 cores", "b: its clock is -61 s off a's"]


@pytest.fixture
def ports() -> tuple[int, ...]:
    """Two that were free a moment ago."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(two.getsockname()[1])


def others(
    ports: tuple[int, ...], nodes: list[int], token: str = "t"
) -> tuple[list[threading.Thread], dict[int, Answer]]:
    """Nodes that report, and what they are answered."""
    answers: dict[int, Answer] = {}

    def one(node: int) -> None:
        answers[node] = rollcall.report(token, node, report(), "127.0.0.1", ports, 20)

    threads = [threading.Thread(target=one, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    return threads, answers


def test_four_nodes_meet_and_learn_the_same(ports: tuple[int, ...]) -> None:
    threads, answers = others(ports, [1, 2, 3])
    mine = rollcall.call("t", ["a", "b", "c", "d"], report(), ports, 20)
    for thread in threads:
        thread.join(20)
    assert mine == Answer(port=ports[0])
    assert answers == {1: mine, 2: mine, 3: mine}


def test_R1_a_node_that_never_comes_is_named_and_the_others_do_not_wait_on(ports: tuple[int, ...]) -> None:
    threads, answers = others(ports, [1])
    mine = rollcall.call("t", ["a", "b", "c"], report(), ports, 2)
    threads[0].join(20)
    assert (mine.fault, mine.word, mine.hosts) == ("c did not come in 2 s", "never_came", ["c"])
    assert answers[1] == mine


def test_R1_a_first_node_that_never_answers_is_named(ports: tuple[int, ...]) -> None:
    answer = rollcall.report("t", 1, report(), "127.0.0.1", ports, 0.3)
    assert answer.word == "never_came"
    assert "the first node (127.0.0.1, port" in str(answer.fault)


def test_R2_the_next_port_is_taken_and_found(ports: tuple[int, ...]) -> None:
    with socket.socket() as stranger:  # it listens and never speaks
        stranger.bind(("", ports[0]))
        stranger.listen()
        threads, answers = others(ports, [1])
        mine = rollcall.call("t", ["a", "b"], report(), ports, 30)
        threads[0].join(30)
    assert mine == Answer(port=ports[1])
    assert answers == {1: mine}


def test_strangers_are_not_heard(ports: tuple[int, ...]) -> None:
    """Other jobs' nodes, port scanners and nonsense neither count as a node nor stop the roll call."""
    threads, answers = others(ports, [1])

    def nonsense(text: bytes) -> None:
        deadline = threading.Event()
        while not deadline.wait(0.05):
            try:
                with socket.create_connection(("127.0.0.1", ports[0]), timeout=5) as line:
                    line.sendall(text)
                    line.recv(100)
                return
            except ConnectionRefusedError:
                continue
            except OSError:
                return

    texts = [
        b"GET / HTTP/1.0\r\n\r\n",
        b'{"token": "x", "node": 2, "report": {}}\n',
        b'{"token": "t", "node": 9}\n',
        b"",
    ]
    noise = [threading.Thread(target=nonsense, args=(text,), daemon=True) for text in texts]
    for thread in noise:
        thread.start()
    mine = rollcall.call("t", ["a", "b", "c"], report(), ports, 4)
    threads[0].join(30)
    assert mine.hosts == ["c"]
    assert answers[1] == mine


def test_a_wish_to_stop_ends_the_wait(ports: tuple[int, ...]) -> None:
    assert rollcall.call("t", ["a", "b"], report(), ports, 60, ended=lambda: True).hosts == ["b"]


def test_R2_candidates_for_the_port_differ() -> None:
    found = torchrun.ports("4711", 0)
    assert len(set(found)) == 4
    assert found[0] == torchrun.port("4711", 0)
    assert not set(found) & set(torchrun.ports("4712", 0))
