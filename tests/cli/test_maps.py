"""`finemoe maps`, as a user meets it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from finemoe.cli import _silence_libraries, main
from finemoe.errors import FinemoeWarning
from finemoe.learned import read_maps
from tests.chat_model import make_chat_model
from tests.cli.test_commands import Capture, answered, refused
from tests.learned.make import make_file
from tests.sim.traces import LAYERS
from tests.sim.traces import make_trace as recorded_trace
from tests.trace.make import make_header, make_trace

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def one(tmp_path: Path) -> str:
    return str(make_file(tmp_path / "one", seeds=(0, 1)))


@pytest.fixture
def two(tmp_path: Path) -> str:
    return str(make_file(tmp_path / "two", seeds=(1, 2)))


def test_info_tells_what_a_file_holds(capsys: Capture, one: str) -> None:
    told = answered(capsys, "maps", "info", one, "--json")
    assert (told["policy"], told["maps"], told["active"], told["stretches"]) == ("finemoe", 10, 2, 2)
    assert told["bytes"] == Path(one).stat().st_size
    assert main(["maps", "info", one]) == 0
    output = capsys.readouterr().out
    assert "10 expert maps of --policy finemoe, in 2 stretches" in output
    assert "a-model (fingerprint 0123)" in output


def test_files_are_merged(capsys: Capture, one: str, two: str, tmp_path: Path) -> None:
    out = str(tmp_path / "both")
    told = answered(capsys, "maps", "merge", one, two, "--out", out, "--json")
    assert (told["maps"], told["maps_before"], told["stretches"]) == (15, 20, 3)
    assert "--out: " in refused(capsys, "maps", "merge", one, two, "--out", out)
    assert (
        answered(capsys, "maps", "merge", one, two, "--out", out, "--force", "--capacity", "4", "--json")["maps"] == 4
    )


def test_a_file_is_pruned_where_it_is_or_into_another(capsys: Capture, one: str, tmp_path: Path) -> None:
    out = str(tmp_path / "fewer")
    assert main(["maps", "prune", one, "--keep", "7", "--out", out]) == 0
    assert "kept 7 of 10 maps" in capsys.readouterr().out
    assert (len(read_maps(Path(one))), len(read_maps(Path(out)))) == (10, 7)
    assert answered(capsys, "maps", "prune", one, "--keep", "3", "--json")["maps"] == 3
    assert len(read_maps(Path(one))) == 3


@pytest.mark.parametrize("policy", ["finemoe", "expert-map"])
def test_a_trace_fills_a_file(capsys: Capture, tmp_path: Path, policy: str) -> None:
    make_trace(tmp_path / "t", header=make_header(("weights", "probs")))
    out = tmp_path / "maps"
    told = answered(capsys, "maps", "learn", str(tmp_path / "t"), "--out", str(out), "--policy", policy, "--json")
    assert (told["fingerprint"], told["layers"], told["experts"]) == ("0123456789abcdef", 3, 8)
    assert told["maps"] == {"finemoe": 12, "expert-map": 15}[policy]
    flags = "--capacity", "5", "--force", "--json"
    told = answered(capsys, "maps", "learn", str(tmp_path / "t"), "--out", str(out), "--policy", policy, *flags)
    assert told["maps"] == 5


def test_bad_input_is_refused_in_one_line(capsys: Capture, one: str, tmp_path: Path) -> None:
    make_trace(tmp_path / "t", header=make_header(()))
    other = str(make_file(tmp_path / "other", model="4567"))
    out = "--out", str(tmp_path / "out")
    for arguments, named in (
        (("info", str(tmp_path / "nowhere")), "nowhere: there is no such file"),
        (("merge", one, *out), "FILE: give at least two"),
        (("merge", one, other, *out), "other can't be merged with .*one: another model: 4567 there, 0123 here"),
        (("merge", one, one, *out, "--capacity", "0"), "--capacity: 0 is not at least 1"),
        (("prune", one, "--keep", "0"), "--keep: 0 is not at least 1"),
        (("prune", one), "--keep"),
        (("prune", one, "--keep", "3", "--out", one), "--out: .*exists"),
        (("prune", one, "--keep", "3", "--out", str(tmp_path)), "--out: .*is a folder"),
        (("learn", str(tmp_path / "t"), *out), "t: has no gate distributions"),
        (("learn", str(tmp_path / "t"), "--out", str(tmp_path / "no" / "out")), "--out: there is no folder .*no"),
        (("learn", str(tmp_path / "t"), *out, "--policy", "lru"), "--policy: lru learns no maps"),
        (("learn", str(tmp_path / "t"), *out, "--policy", "fifo"), "--policy: unknown policy 'fifo'"),
    ):
        assert re.search(named, refused(capsys, "maps", *arguments))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "no").exists()


def test_outputs_that_could_not_be_written_are_refused_before_the_work(
    capsys: Capture, one: str, two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trace(tmp_path / "t")
    monkeypatch.setattr("finemoe.system.os.access", lambda *_: False)
    monkeypatch.setattr("finemoe.learned.file.replace_file", lambda *_: pytest.fail("the work was done"))
    out = "--out", str(tmp_path / "out")
    for arguments, named in (
        (("merge", one, two, *out), "--out: .*out can't be written"),
        (("prune", one, "--keep", "3"), "FILE: .*one can't be written"),
        (("learn", str(tmp_path / "t"), *out), "--out: .*out can't be written"),
        (("show", str(tmp_path / "t"), "--request", "0", "--plot", str(tmp_path / "it.png")), "--plot: .*it.png can't"),
    ):
        assert re.search(named, refused(capsys, "maps", *arguments))


def test_generate_takes_a_store(capsys: Capture, tmp_path: Path) -> None:
    model = str(make_chat_model(tmp_path / "tiny"))
    path = tmp_path / "maps"
    flags = "--model", model, "--policy", "finemoe", "--max-new-tokens", "4", "--map-store", str(path), "--json"
    answered(capsys, "generate", "Hi", *flags)
    assert len(read_maps(path)) > 0
    assert "--map-store: --policy lru learns" in refused(
        capsys, "generate", "Hi", *flags[:2], "--policy", "lru", *flags[4:]
    )


def test_a_warning_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    _silence_libraries()
    assert warnings.formatwarning("x is y", FinemoeWarning, "file", 1) == "finemoe: warning: x is y\n"
    assert "file:1: UserWarning: x is y" in warnings.formatwarning("x is y", UserWarning, "file", 1)


def test_show_tells_and_draws_what_was_expected(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    trace = str(recorded_trace(tmp_path, requests=5).path)
    command = ("maps", "show", trace, "--request", "2")
    drawing = "--plot", str(tmp_path / "map.png")
    told = answered(capsys, *command, "--json", *drawing)
    assert 0 < told["recall"] <= 1
    assert len(told["recall_by_layer"]) == LAYERS
    assert (tmp_path / "map.png").stat().st_size > 0
    assert main([*command, "--iteration", "1", *drawing]) == 0
    output, errors = capsys.readouterr()
    assert "recall of finemoe" in output
    assert re.findall(r"layer +(\d+)", output) == [str(layer) for layer in range(LAYERS)]
    assert f"drawn to {drawing[1]}" in errors
    for wrong, culprit in (
        (("--iteration", "999"), "--iteration: 999"),
        (("--policy", "lru"), "--policy"),
        (("--policy", "promoe"), "--policy"),
        (("--request", "9"), "--request: 9"),
        (("--plot", str(tmp_path / "no" / "x.png")), "--plot"),
        (("--map-store", str(tmp_path / "none")), "no such file"),
    ):
        assert culprit in refused(capsys, *command, *wrong)
