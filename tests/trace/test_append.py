"""Traces are replaced atomically: appending, errors, kills and interrupts damage nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.errors import TraceError
from finemoe.trace import TraceWriter, open_trace
from finemoe.trace import writer as writing
from finemoe.trace.spool import pending_requests, spool_folder
from tests.trace.make import equal, make_header, make_request, make_trace

ROOT = Path(__file__).parents[2]
ENDLESS = """
import sys
import numpy as np
from finemoe.trace import TraceWriter
from tests.trace.make import make_header
from tests.trace.make import make_request
writer = TraceWriter(sys.argv[1], make_header(), append=True, commit_every_s=0)
rng = np.random.default_rng(1)
while True:
    writer.add(make_request(make_header(), rng))
    print(flush=True)
"""


def requests_of(path: Path) -> int:
    with open_trace(path) as trace:
        return len(trace)


def killed_while_adding(path: Path, after: int) -> None:
    """Starts a process that appends endlessly, and kills it after `after` requests."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    for _ in range(after):
        assert process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_appending_keeps_existing_requests(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    first = make_trace(path)
    more = make_request(make_header(), np.random.default_rng(9))
    opened_before = open_trace(path)
    with TraceWriter(path, make_header(), append=True) as writer:
        writer.add(more)
        assert len(writer) == 4
        assert requests_of(path) == 3  # until the writer closes
    with open_trace(path) as trace:
        assert all(equal(one, other) for one, other in zip(trace, [*first, more], strict=True))
    assert all(equal(one, other) for one, other in zip(opened_before, first, strict=True))
    assert [each.name for each in tmp_path.iterdir()] == ["it.trace"]


def test_being_killed_keeps_the_trace_and_the_finished_requests(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    make_trace(path)
    before = path.read_bytes()
    killed_while_adding(path, after=5)
    assert path.read_bytes() == before
    assert pending_requests(path) >= 5
    with TraceWriter(path, make_header(), append=True) as writer:
        pending = len(writer) - 3
    assert pending >= 5
    rng = np.random.default_rng(1)
    with open_trace(path) as trace:
        assert len(trace) == 3 + pending
        assert all(equal(trace.request(3 + n), make_request(make_header(), rng)) for n in range(pending))
    assert not spool_folder(path).exists()


def test_a_new_trace_survives_being_killed_too(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    killed_while_adding(path, after=2)
    assert not path.exists()
    with pytest.raises(TraceError, match=r"interrupted recording.*--append.*--force"):
        TraceWriter(path, make_header())
    with TraceWriter(path, make_header(), overwrite=True) as writer:
        writer.add(make_request(make_header(), np.random.default_rng(0)))
    assert requests_of(path) == 1


def test_an_interrupted_request_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rng = tmp_path / "it.trace", np.random.default_rng(0)
    made = [make_request(make_header(), rng) for _ in range(3)]
    write, calls = os.pwrite, [0]

    def interrupted(file: int, data: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] == 4:  # between two columns of the second request
            raise KeyboardInterrupt
        return write(file, data, offset)

    with TraceWriter(path, make_header(), commit_every_s=60) as writer:
        writer.add(made[0])
        calls[0] = 0
        monkeypatch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.add(made[1])
    with TraceWriter(path, make_header(), append=True) as writer:
        writer.add(made[2])
    with open_trace(path) as trace:
        assert len(trace) == 2
        assert equal(trace.request(0), made[0])
        assert equal(trace.request(1), made[2])


def test_no_request_is_added_twice_after_a_kill_between_rename_and_cleanup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.trace"
    make_trace(path)
    writer = TraceWriter(path, make_header(), append=True)
    writer.add(make_request(make_header(), np.random.default_rng(0)))
    with monkeypatch.context() as patch:
        patch.setattr("finemoe.trace.spool.shutil.rmtree", lambda *_, **__: None)  # the process ends here
        writer.close()
    assert spool_folder(path).exists()
    assert requests_of(path) == 4
    with TraceWriter(path, make_header(), append=True) as writer:
        writer.add(make_request(make_header(), np.random.default_rng(1)))
    assert requests_of(path) == 5


def test_requests_whose_rows_were_lost_are_dropped(tmp_path: Path) -> None:
    path, rng = tmp_path / "it.trace", np.random.default_rng(0)
    made = [make_request(make_header(), rng) for _ in range(4)]
    killed = TraceWriter(path, make_header(), commit_every_s=0)
    for request in made[:3]:
        killed.add(request)
    killed._spool.close()  # the process ends here, and the disk loses the last two requests' rows
    rows = spool_folder(path) / "rows"
    rows.write_bytes(rows.read_bytes()[: 4 * len(made[0])])
    with TraceWriter(path, make_header(), append=True, commit_every_s=0) as writer:
        writer.add(made[3])
    with open_trace(path) as trace:
        assert len(trace) == 2
        assert equal(trace.request(0), made[0])
        assert equal(trace.request(1), made[3])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.trace"
    make_trace(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = TraceWriter(path, make_header(), append=True)
    writer.add(make_request(make_header(), np.random.default_rng(0)))
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_copy", full)
        with pytest.raises(TraceError, match=r"No space left.*--append"):
            writer.close()
    assert path.read_bytes() == before
    TraceWriter(path, make_header(), append=True).close()
    assert requests_of(path) == 4


def test_an_existing_trace_is_not_replaced_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    make_trace(path)
    with pytest.raises(TraceError, match=r"exists.*--append.*--force"):
        TraceWriter(path, make_header())
    with TraceWriter(path, make_header(experts=9), overwrite=True) as writer:
        assert requests_of(path) == 3
        writer.add(make_request(make_header(experts=9), np.random.default_rng(0)))
    assert requests_of(path) == 1


def test_overwriting_deletes_the_spool_of_a_writer_with_another_header(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    killed_while_adding(path, after=1)
    other = make_header(("weights", "probs"))
    with pytest.raises(TraceError, match=r"another interrupted recording \(fields"):
        TraceWriter(path, other, append=True)
    assert pending_requests(path)
    with TraceWriter(path, other, overwrite=True) as writer:
        writer.add(make_request(other, np.random.default_rng(0)))
    assert requests_of(path) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [({"experts": 9}, "experts"), ({"fingerprint": "other"}, "fingerprint"), ({"model": "b"}, "model")],
)
def test_another_models_requests_are_not_appended(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "it.trace"
    own = make_header(fingerprint=None) if named == "model" else make_header()
    make_trace(path, header=own)
    before = path.read_bytes()
    with pytest.raises(TraceError, match=rf"can't be appended to \({named}: "):
        TraceWriter(path, make_header(**({"fingerprint": own.fingerprint} | change)), append=True)
    assert path.read_bytes() == before
    assert not spool_folder(path).exists()


def test_the_same_model_under_another_path_is_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    make_trace(path)
    with TraceWriter(path, make_header(model="another/path"), append=True) as writer:
        writer.add(make_request(make_header(), np.random.default_rng(0)))
    assert requests_of(path) == 4


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    with TraceWriter(path, make_header()) as writer:
        for flags in ({"append": True}, {"overwrite": True}):
            with pytest.raises(TraceError, match="another process"):
                TraceWriter(path, make_header(), **flags)
        writer.add(make_request(make_header(), np.random.default_rng(0)))
    assert requests_of(path) == 1


def test_the_spool_of_a_writer_killed_before_its_first_request_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "it.trace"
    abandoned = TraceWriter(path, make_header(experts=9), overwrite=True)
    abandoned._spool.close()  # the process ends here
    assert spool_folder(path).exists()
    with TraceWriter(path, make_header()) as writer:
        writer.add(make_request(make_header(), np.random.default_rng(0)))
    assert requests_of(path) == 1


def test_no_file_is_written_without_a_request(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "it.trace", make_header()).close()
    writer = TraceWriter(tmp_path / "it.trace", make_header())
    writer.add(make_request(make_header(), np.random.default_rng(0)))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no folder"):
        TraceWriter(tmp_path / "none" / "it.trace", make_header())
