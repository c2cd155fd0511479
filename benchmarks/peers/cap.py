"""Memory caps by cgroups (v1), which count the page cache that a process fills too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path("/sys/fs/cgroup/memory")
REACHED_SHARE = 0.95  # of the cap; from this peak on it counts as reached


class CapError(Exception):
    """Memory cgroups can't be used on this machine."""


@dataclass(frozen=True)
class CapUsage:
    """How close a process came to its cap."""

    limit_bytes: int
    peak_bytes: int  # of the group, including page cache
    refusals: int  # times that the limit was hit and memory was reclaimed; newer kernels leave it at 0

    @property
    def reached(self) -> bool:
        """Whether the cap was reached, or nearly."""
        return self.refusals > 0 or self.peak_bytes >= REACHED_SHARE * self.limit_bytes


class Cap:
    """A cgroup with a memory limit, below that of this process.

    Args:
        limit_bytes: the cap.
        name: of the group.
        at_once: in force from the start; otherwise once it is written to `limit_file`.

    Raises:
        CapError: there are no memory cgroups (v1), or this user may not create one.
    """

    def __init__(self, limit_bytes: int, name: str, root: Path = ROOT, *, at_once: bool = True) -> None:
        self.limit_bytes = limit_bytes
        self.folder = own_group(root) / name
        self.limit_file = self.folder / "memory.limit_in_bytes"
        try:
            self.folder.mkdir(exist_ok=True)
            if at_once:
                self.limit_file.write_text(str(limit_bytes))
                with suppress(OSError):  # kernels without swap accounting
                    (self.folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        except OSError as error:
            raise CapError(f"no memory cgroup can be made in {self.folder.parent} ({error.strerror})") from error

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, wrapped so that it runs in the group from its start."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def usage(self) -> CapUsage:
        """How close the group came to the cap."""
        peak, *refusals = (self._read(name) for name in ("max_usage_in_bytes", "failcnt", "memsw.failcnt"))
        return CapUsage(self.limit_bytes, peak, sum(refusals))

    def _read(self, name: str) -> int:
        with suppress(FileNotFoundError):  # kernels without swap accounting
            return int((self.folder / f"memory.{name}").read_text())
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(50):  # the last process may still be exiting
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)


def own_group(root: Path, cgroups: Path = Path("/proc/self/cgroup")) -> Path:
    """The folder of this process's memory cgroup.

    Raises:
        CapError: it is in no cgroup of version 1.
    """
    for line in cgroups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder = root / path.lstrip("/")
            return folder if folder.is_dir() else root  # within a container the path may be the host's
    raise CapError("this machine has no memory cgroups of version 1")
