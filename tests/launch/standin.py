"""A torchrun and a trainer without torch, with the same flags, exit codes, signals and run folder.

    python -m standin --nnodes 2 --node-rank 0 ... -m vitdist.train RUN_DIR --attempt 0

STANDIN in the environment says what the ranks do, as JSON:

    {"steps": 8}                                    how many there are
    {"fail": {"rank": 2, "message": "..."}}         or {"rank": 2, "signal": 9}
    {"refuse": "..."}                               rank 0 refuses the settings
    {"until_asked": true}                           no end but by a signal
    {"hang": true}                                  a rank that has lost another waits for ever, as NCCL does
    {"deaf": true}                                  signals are not heard
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from vitdist import rundir, stop
from vitdist.rundir import Attempt, RunDir

STEP_S = 0.02


def agent() -> int:
    """As torchrun: a child per rank; the first that fails ends the others and turns into exit code 1."""
    parser = argparse.ArgumentParser()
    for flag in ("--nnodes", "--node-rank", "--nproc-per-node", "--master-port", "--max-restarts", "--attempt"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("run")
    args = parser.parse_args()
    assert args.module == "vitdist.train"
    assert args.max_restarts == 0
    workers: dict[int, subprocess.Popen[bytes]] = {}
    for local in range(args.nproc_per_node):
        rank = args.node_rank * args.nproc_per_node + local
        ranks = {"RANK": rank, "WORLD_SIZE": args.nnodes * args.nproc_per_node, "GROUP_RANK": args.node_rank}
        env = os.environ | {name: str(value) for name, value in ranks.items()}
        command = [sys.executable, __file__, "worker", args.run, str(args.attempt)]
        workers[rank] = subprocess.Popen(command, env=env, start_new_session=True)
    while True:
        codes = {rank: worker.poll() for rank, worker in workers.items()}
        failed = {rank: code for rank, code in codes.items() if code}
        if failed:
            break
        if all(code == 0 for code in codes.values()):
            return 0
        time.sleep(STEP_S)
    for rank, worker in workers.items():
        if codes[rank] is None:
            worker.terminate()
            try:
                worker.wait(3)
            except subprocess.TimeoutExpired:
                worker.kill()
    print("Root Cause (first observed failure):")
    for rank, code in failed.items():
        now = datetime.fromtimestamp(int(time.time())).isoformat(sep="_")
        print(f"[0]:\n  time      : {now}\n  host      : here\n  rank      : {rank} (local_rank: 0)")
        print(f"  exitcode  : {code} (pid: {workers[rank].pid})\n  error_file: <N/A>\n  traceback : -", flush=True)
    return 1


def worker(run: RunDir, attempt: Attempt) -> int:
    """As vitdist.train: rank 0 keeps the record; the others leave when it has ended."""
    orders = json.loads(os.environ.get("STANDIN", "{}"))
    stopping = stop.StopRequest() if orders.get("deaf") else stop.install()
    rank, node = int(os.environ["RANK"]), int(os.environ["GROUP_RANK"])
    log = attempt.rank_log(node, rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    print("here am I", os.getcwd(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])
    fault = orders.get("fail", {})
    lost = attempt.path / "lost"
    if rank == 0:
        return _first(run, attempt, stopping, orders)
    while True:
        time.sleep(STEP_S)
        if stopping and not lost.exists():  # without the lost rank nothing can be agreed
            (run.path / "asked").touch()
        record = rundir.read_json(attempt.train) or {}
        if fault.get("rank") == rank and record.get("step", 0) >= 2:
            lost.touch()
            if "signal" in fault:
                os.kill(os.getpid(), fault["signal"])
            print(
                f"Traceback (most recent call last):\n  ...\nValueError: {fault['message']}\n[W socket.cpp] a warning"
            )
            return 1
        if lost.exists() and not orders.get("hang"):
            print("RuntimeError: Connection closed by peer [127.0.0.1]:1234")
            return 1
        if record.get("state") in ("done", "stopped", "failed"):
            return {"done": 0, "stopped": rundir.EXIT_STOPPED, "failed": 1}[record["state"]]


def _first(run: RunDir, attempt: Attempt, stopping: stop.StopRequest, orders: dict) -> int:
    saved = run.path / "checkpoints" / "step"
    step = int(saved.read_text()) if saved.exists() else 0
    total = orders.get("steps", 8)
    record = {"attempt": attempt.number, "started": rundir.now(), "total_steps": total, "resumed_from": step or None}
    (run.path / "asked").unlink(missing_ok=True)
    deadline = time.monotonic() + 20
    while len(list(attempt.path.glob("logs/*/rank-*.log"))) < int(os.environ["WORLD_SIZE"]):
        assert time.monotonic() < deadline, "not all ranks have come"
        time.sleep(STEP_S)

    def publish(state: str, **more: object) -> None:
        rundir.publish_json(attempt.train, record | {"state": state, "step": step} | more)

    if message := orders.get("refuse"):
        error = {"type": "ValueError", "message": message, "rank": 0, "step": 0}
        publish("refused", error=error)
        return rundir.EXIT_REFUSED
    with rundir.only_writer(run):
        while step < total or orders.get("until_asked"):
            step += 1
            publish("running")
            with open(run.metrics, "a") as rows:
                rows.write(
                    json.dumps({"attempt": attempt.number, "train/global_step": step, "train/loss": 1 / step}) + "\n"
                )
            time.sleep(STEP_S)
            if stopping or (run.path / "asked").exists():
                saved.parent.mkdir(exist_ok=True)
                saved.write_text(str(step))
                (saved.parent / f"step-{step:08d}").mkdir(exist_ok=True)
                publish("stopped", reason=stopping.reason)
                return rundir.EXIT_STOPPED
            while (attempt.path / "lost").exists():
                if not orders.get("hang"):
                    error = {"type": "RuntimeError", "message": "Connection closed by peer", "rank": 0, "step": step}
                    publish("failed", error=error)
                    return 1
                (attempt.path / "hangs").touch()
                time.sleep(STEP_S)
        publish("done", summary={"top1": 0.96, "macro_f1": 0.95, "images_per_s": 1234.5, "seconds": 61.0})
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.argv[1] == "worker":
        folder = RunDir(Path(sys.argv[2]))
        sys.exit(worker(folder, folder.attempt(int(sys.argv[3]))))
    sys.exit(agent())
