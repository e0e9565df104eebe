"""File systems as the login node sees them: shared with the nodes or not, and what is free, by quota too.

mount = mount_of(Path("/scratch/me/runs"), mounts())     # Mount("/scratch", "lustre", "mds1:/scratch")
mount.shared                                             # True; None where its kind does not tell
free(Path("/scratch/me/runs"))                           # Room(bytes=..., files=...)
quotas(mount, "me", 10.0)                                # what `quota` and `lfs quota` say is left
"""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Kinds of /proc/mounts that other machines see under the same path, as far as sites use them for home and scratch.
_SHARED = re.compile(
    r"nfs4?|lustre|gpfs|beegfs(_nodev)?|ceph|cephfs|cifs|smb3|smbfs|panfs|wekafs|orangefs|pvfs2|afs|glusterfs|vastnfs|"
    r"fuse\.(ceph|cephfs|glusterfs|juicefs|beegfs|s3fs|gcsfuse|rclone|sshfs|dfuse|weka|quobyte|moosefs|lizardfs|cvmfs)|"
    r"fuse\.(.*mfs|.*nfs)|quobyte|prl_fs|daos|pfs|ocfs2|gfs2"
)
# Disks and memory of this machine alone.
_LOCAL = re.compile(r"ext[234]|xfs|btrfs|f2fs|jfs|reiserfs|zfs|bcachefs|overlay|overlayfs|aufs|vfat|exfat|ntfs3?")
_MEMORY = re.compile(r"tmpfs|ramfs|devtmpfs|hugetlbfs")


class Mount(NamedTuple):
    """A line of /proc/mounts."""

    point: str
    kind: str
    device: str

    @property
    def shared(self) -> bool | None:
        """Whether other machines see it; None for a kind that is not known here."""
        if _SHARED.fullmatch(self.kind):
            return True
        return False if _LOCAL.fullmatch(self.kind) or self.in_memory else None

    @property
    def in_memory(self) -> bool:
        return _MEMORY.fullmatch(self.kind) is not None


def mounts() -> list[Mount]:
    """What is mounted here; [] where the kernel does not tell."""
    try:
        return read_mounts(Path("/proc/mounts").read_text(errors="replace"))
    except OSError:
        return []


def read_mounts(text: str) -> list[Mount]:
    """/proc/mounts: device, place, kind; blanks in names are written as \\040."""
    found = []
    for line in text.splitlines():
        parts = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), part) for part in line.split()]
        if len(parts) >= 3:
            found.append(Mount(parts[1], parts[2], parts[0]))
    return found


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that `path`, which need not exist yet, lies or would lie on."""
    real = os.path.realpath(path)
    over = [m for m in mounts if real == m.point or real.startswith(m.point.rstrip("/") + "/")]
    # The later of two on one place lies above the other.
    return max(enumerate(over), key=lambda item: (len(item[1].point), item[0]))[1] if over else None


def existing(path: Path) -> Path:
    """The nearest of `path` and its parents that is there."""
    return next(place for place in (path, *path.parents) if place.exists() or place == place.parent)


class Room(NamedTuple):
    """What can be written; None: not limited, or not told."""

    bytes: int | None
    files: int | None


def free(path: Path) -> Room:
    """Free for this user on the file system of `path`. Raises OSError."""
    told = os.statvfs(existing(path))
    # Some (btrfs, Lustre without limits) count no inodes.
    return Room(told.f_bavail * told.f_frsize, told.f_favail if told.f_files else None)


def quotas(mount: Mount, user: str, patience_s: float) -> list[Room]:
    """What is left of the user's quotas on a mount; [] where there are none, or nothing that tells them in time."""
    # -w: a line each, -p: numbers in every column; exit code 1 says that one is used up.
    text = _say(["quota", "-w", "-p", "-u", user], patience_s)
    found = [room for device, room in read_quotas(text) if device in (mount.device, mount.point)]
    if mount.kind == "lustre":
        lustre = read_quotas(_say(["lfs", "quota", "-q", "-u", user, mount.point], patience_s))
        found += [room for place, room in lustre if place == mount.point]
    return found


def _say(command: list[str], patience_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout


# place, then twice: used, soft limit, hard limit, grace. In KB and files. Used up: 123*; not sure (Lustre): [123].
_NUMBER = r"\[?(\d+)[*\]]*"
_GRACE = r"(?:-|\d+|none|[\dwdhms:]+(?:days?)?)"
_QUOTA = re.compile(rf"(\S+)\s+{_NUMBER}\s+(\d+)\s+(\d+)\s+{_GRACE}\s+{_NUMBER}\s+(\d+)\s+(\d+)\s+{_GRACE}(?=\s|$)")


def read_quotas(text: str) -> list[tuple[str, Room]]:
    """(device or place, what is left) from `quota -w -p` or `lfs quota -q`; long names stand on a line of their own."""
    found = []
    for match in _QUOTA.finditer(text):
        kb, soft_kb, hard_kb, files, soft_files, hard_files = (int(number) for number in match.groups()[1:])
        left = (
            (limit - used) if (limit := hard or soft) else None
            for used, soft, hard in ((kb, soft_kb, hard_kb), (files, soft_files, hard_files))
        )
        left_kb, left_files = left
        found.append((match[1], Room(None if left_kb is None else max(0, left_kb) * 1024, left_files)))
    return found
