"""Pure: why SLURM lets a job wait, in words, and what can be done: the list and --follow say the same.

why("QOSMaxNodePerUserLimit", "4711")   # Wait("the QOS allows you no more nodes at once", "...")
told(job, now)                          # "waits for nodes to become free, starts about 18:10 (in 0:59:00)"
"""

import re
from datetime import datetime, timedelta
from typing import NamedTuple

from launch.slurm import Job
from vitdist import faults


class Wait(NamedTuple):
    """Why a job waits."""

    words: str
    remedy: str = ""
    """What can be done; "": nothing but waiting."""


_SOONER = "fewer nodes or a shorter --time may start sooner"
_AGAIN = "cancel it, and resume it with what fits"

# Reasons of SLURM 20.11 to 25.05, as squeue's %r shows them: https://slurm.schedmd.com/job_reason_codes.html.
# ID stands for the job's id. The first pattern that matches from the beginning decides.
_REASONS: tuple[tuple[str, Wait], ...] = (
    (r"Resources$", Wait("waits for nodes to become free", _SOONER)),
    (r"Priority$", Wait("jobs of higher priority come first", _SOONER)),
    (
        r"BeginTime$",
        Wait("its start is set for later, as after a requeue", "scontrol update JobId=ID StartTime=now starts it now"),
    ),
    (r"DependencyNeverSatisfied", Wait("the job that it waits for has failed: it will never start", "cancel it")),
    (r"Dependency", Wait("waits for another job to end (--after)")),
    (r"JobHeldUser", Wait("held by its owner", "scontrol release ID")),
    (r"JobHeldAdmin", Wait("held by the cluster's keepers", "ask them why")),
    (
        r"(launch failed requeued held|JobLaunchFailure|Prolog ?Failed|NonZeroExitCode)",
        Wait("a node could not start it, and SLURM holds it", "scontrol release ID tries again"),
    ),
    (r"JobArrayTaskLimit", Wait("as many points of the sweep run as it allows at once (--parallel)")),
    (
        r"PartitionTimeLimit|(QOS|Assoc)MaxWallDuration|QOSTimeLimit|AssociationTimeLimit",
        Wait(
            "asks for more time than is allowed: it will never start",
            "cancel it, and resume it with a shorter --time",
        ),
    ),
    (r"PartitionNodeLimit", Wait("asks for more nodes than the partition has or allows: it will never start", _AGAIN)),
    (r"PartitionDown|PartitionInactive", Wait("its partition is closed", "sinfo -s lists those that are open")),
    (
        r"ReqNodeNotAvail|Nodes required for job are DOWN|NodeDown",
        Wait("nodes that it needs are down, drained or reserved", "sinfo -R says why"),
    ),
    (
        r"BadConstraints",
        Wait("no node has all that it asks for (constraint, GPUs, memory): it will never start", _AGAIN),
    ),
    (r"InvalidAccount|AccountNotAllowed", Wait("its account is not accepted", _AGAIN)),
    (r"InvalidQOS|QOSNotAllowed", Wait("its QOS is not accepted", _AGAIN)),
    (r"QOSUsageThreshold", Wait("the usage of its QOS is too high at present")),
    (r"(License|BurstBuffer)", Wait("waits for a licence or burst buffer")),
    (r"ReservationDeleted", Wait("its reservation is gone: it will never start", _AGAIN)),
    (r"Reservation", Wait("waits for its reservation to begin")),
    (r"Cleaning|Prolog$", Wait("nodes are made ready for it")),
    (r"DeadLine", Wait("its deadline has passed: it will never start", "cancel it")),
    (r"MaxMemPerLimit", Wait("asks for more memory than is allowed: it will never start", _AGAIN)),
    (r"Association(Job|Resource)?Limit|AssocResourceLimit", Wait("a limit of its account is reached")),
    (r"QOS(Job|Resource)?Limit", Wait("a limit of its QOS is reached")),
    (r"SystemFailure|FrontEndDown|PowerNotAvail|PowerReserved", Wait("the cluster has a fault", "ask its keepers")),
)
# QOSMaxNodePerUserLimit, AssocGrpGRESMinutes, MaxCpuPerAccount, QOSGrpCpuRunMinutesLimit ...
_LIMIT = re.compile(
    r"(?P<whose>QOS|Assoc|)(?P<kind>Grp|Max|Min)(?P<what>Cpu|GRES|Node|Mem|Jobs?|Submit|Billing|BB|License|Energy|Tres)s?"
    r"(?P<minutes>(Run)?Minutes)?(?P<per>Per(Job|Node|User|Account))?(Limit)?",
    re.IGNORECASE,
)
_THINGS = {
    "cpu": "cores",
    "gres": "GPUs",
    "node": "nodes",
    "mem": "memory",
    "submit": "jobs",
    "bb": "burst buffer",
    "billing": "billing units",
}


def why(reason: str, job_id: str) -> Wait:
    """SLURM's reason for a pending job in words; one that is not known here is shown as it is."""
    if reason in ("", "None"):
        return Wait("SLURM has not looked at it yet")
    for pattern, wait in _REASONS:
        if re.match(pattern, reason):
            names = re.search(r"UnavailableNodes:([\w.,\[\]-]+)", reason)
            words = f"{wait.words} ({names[1]})" if names else wait.words
            return Wait(words, re.sub(r"\bID\b", job_id, wait.remedy))
    if match := _LIMIT.match(reason):
        return _limit(match)
    return Wait(f"SLURM says {faults.one_line(reason, 100)}")


def _limit(match: re.Match[str]) -> Wait:
    whose = {"qos": "the QOS", "assoc": "your account"}.get(match["whose"].lower(), "the site")
    what = match["what"].lower()
    things = _THINGS.get(what) or {"job": "jobs", "jobs": "jobs"}.get(what, what)
    if match["minutes"]:
        return Wait(
            f"{whose} has used up its minutes of {things}", "sacctmgr show assoc or the site's keepers tell more"
        )
    if match["kind"].lower() == "min":
        return Wait(f"{whose} wants more {things} for a job than it asks for: it will never start", _AGAIN)
    if (match["per"] or "").lower() in ("perjob", "pernode"):
        return Wait(f"{whose} allows a job fewer {things}: it will never start", _AGAIN)
    if match["kind"].lower() == "grp":
        return Wait(f"the limit of {things} that all users of {whose} share is reached")
    return Wait(f"{whose} allows you no more {things} at once", "it starts when others of your jobs end")


def told(job: Job, now: datetime, countdown: bool = True) -> str:
    """Why `job` waits and when it is expected to start, without what can be done. `now`: local time."""
    words = why(job.reason, job.id).words
    if job.start is None or job.start < now:
        return words
    left = timedelta(seconds=round((job.start - now).total_seconds()))
    day = "" if job.start.date() == now.date() else f"{job.start:%Y-%m-%d} "
    return f"{words}; starts about {day}{job.start:%H:%M}" + (f" (in {left})" if countdown else "")
