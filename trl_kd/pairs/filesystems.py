"""File systems on which a write-ahead log does not work."""

import os
from pathlib import Path


# Besides every `fuse.*`. Some of these do support shared memory, which WAL needs; a rollback journal is right on all of them
_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "panfs"),
    *("pvfs2", "orangefs", "wekafs", "9p", "virtiofs", "vboxsf"),
}


def is_network_folder(folder: str | Path, mounts: str | Path = "/proc/mounts") -> bool:
    """Whether a folder lies on a network or user-space file system, by the kernel's list of mounts (`False` without one)."""
    path = os.path.realpath(folder)
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    longest, kind = "", ""
    for line in lines:
        point, filesystem = (part.encode().decode("unicode_escape") for part in line.split()[1:3])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(longest):  # of two mounts at one point the later is on top
            longest, kind = point, filesystem
    return kind in _NETWORK or kind.startswith("fuse.")
