"""The command `finemoe simulate`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest

from finemoe.cli import INTERRUPTED, main
from finemoe.policy import BOUNDS, FACTORIES
from finemoe.sim.config import MACHINE_FIELDS, SimulateConfig
from tests.cli.test_commands import Capture, answered, refused
from tests.sim.by_hand import request, write_trace
from tests.sim.traces import EXPERTS, LAYERS, make_trace

pytestmark = pytest.mark.usefixtures("own_process")

CONTRACT = {
    "policy", "expert_memory", "link_ratio", "hit_rate", "late_rate", "miss_rate", "stall_per_layer", "time_per_layer",
    "transfers_per_layer", "wasted_per_layer", "precision",
}  # fmt: skip
ALONE = "--workers", "1"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_trace(tmp_path_factory.mktemp("traces")).path)


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    ids = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    path = tmp_path_factory.mktemp("traces") / "ids.trace"
    return str(write_trace(path, [request(ids) for _ in range(4)]).path)


def test_json_is_the_only_output(capsys: Capture, trace: str) -> None:
    document = answered(capsys, "simulate", trace, "--policy", "lru,oracle", "--json", "-", *ALONE)
    assert set(document) == {"trace", "model", "layers", "experts", "settings", "left_out", "rows"}
    assert (document["trace"], document["layers"], document["experts"]) == (trace, LAYERS, EXPERTS)
    assert document["settings"]["policy"] == "lru,oracle"
    assert [row["policy"] for row in document["rows"]] == ["lru", "oracle"]
    assert answered(capsys, "simulate", trace, "--policy", "lru,oracle", *ALONE, "--json") == document
    for row in document["rows"]:
        assert set(row) >= CONTRACT
        assert row["hit_rate"] + row["late_rate"] + row["miss_rate"] == pytest.approx(1)
        assert row["time_per_layer"] >= 1 + row["stall_per_layer"] - 1e-9


def test_json_goes_to_a_file_and_the_table_to_standard_output(capsys: Capture, trace: str, tmp_path: Path) -> None:
    out = tmp_path / "it.json"
    out.write_text("the old one")
    assert main(["simulate", trace, "--json", str(out), *ALONE]) == 0
    output = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [each.name for each in tmp_path.iterdir()] == ["it.json"]
    assert [line.split()[0] for line in output.splitlines()] == ["policy", *(row["policy"] for row in rows)]


def test_rows_are_ordered_by_budget_link_ratio_and_policy(capsys: Capture, trace: str) -> None:
    flags = "--policy", "lfu,lru", "--expert-memory", "50%,25%", "--link-ratio", "4,1", "--json"
    rows = answered(capsys, "simulate", trace, *flags, *ALONE)["rows"]
    assert [(row["expert_memory"], row["link_ratio"], row["policy"]) for row in rows] == [
        (share, ratio, policy) for share in (0.5, 0.25) for ratio in (4, 1) for policy in ("lfu", "lru")
    ]


def test_rows_depend_on_the_seed_only(capsys: Capture, trace: str) -> None:
    rows = [
        answered(capsys, "simulate", trace, "--store-split", "0.5", "--seed", seed, "--json", *ALONE)["rows"]
        for seed in ("1", "1", "2")
    ]
    assert rows[0] == rows[1] != rows[2]


def test_policies_without_their_inputs_are_left_out(capsys: Capture, ids_only: str) -> None:
    assert main(["simulate", ids_only, "--policy", "all", "--json", *ALONE]) == 0
    output, errors = capsys.readouterr()
    document = json.loads(output)
    assert set(document["left_out"]) == {name for name, kind in (FACTORIES | BOUNDS).items() if kind.needs}
    assert "mixtral-offloading is left out: this trace has no lookahead (--gate-recall emulates it)" in errors
    assert {row["policy"] for row in document["rows"]} == {
        name for name, kind in (FACTORIES | BOUNDS).items() if not kind.needs
    }
    assert "lacks what each" in refused(capsys, "simulate", ids_only, "--policy", "expert-map", *ALONE)


def test_a_machine_preset_gives_the_link_ratio(capsys: Capture, trace: str) -> None:
    for flag in ("--machine", "--hardware"):
        flags = flag, "rtx3090-pcie4", "--shape", "mixtral-8x7b", "--policy", "lru", *ALONE
        assert main(["simulate", trace, *flags, "--json"]) == 0
        output, errors = capsys.readouterr()
        assert json.loads(output)["rows"][0]["link_ratio"] == pytest.approx(16.74, abs=0.01)
        assert "mixtral-8x7b on rtx3090-pcie4: link ratio 16.7" in errors


MACHINE = {
    "link_ratio": 1.25, "chunks": 4, "tokens_per_unit": 2, "before_gate": 0.4, "gap": 1, "lag": 0.3, "begin_lag": None,
    "prefetch_slowdown": 1.5, "compute_spread": 0.1, "link_spread": 0.2, "lag_spread": 0.3,
}  # fmt: skip
AS_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in MACHINE.items() if value is not None]


def test_a_machine_file_equals_its_flags(capsys: Capture, trace: str, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    given = {name: value for name, value in MACHINE.items() if value is not None}
    (tmp_path / "machine.toml").write_text("".join(f"{name} = {value}\n" for name, value in given.items()))
    flags = "--policy", "lru,finemoe", "--json", *ALONE
    expected = answered(capsys, "simulate", trace, *flags, *AS_FLAGS)
    assert set(MACHINE) == set(MACHINE_FIELDS)
    for name in ("machine.json", "machine.toml"):
        assert answered(capsys, "simulate", trace, *flags, "--machine", str(tmp_path / name)) == expected
    assert {name: expected["settings"][name] for name in given} == given | {"link_ratio": "1.25"}


def test_a_flag_overrides_the_machine_file(capsys: Capture, trace: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE))
    for flags, ratio in (
        (["--link-ratio", "3"], 3),
        (["--hardware", "rtx3090-pcie4", "--shape", "mixtral-8x7b"], pytest.approx(16.74, abs=0.01)),
    ):
        given = ["--machine", str(path), "--gap", "0", "--policy", "lru", *flags, "--json", *ALONE]
        (row,) = answered(capsys, "simulate", trace, *given)["rows"]
        assert (row["link_ratio"], row["gap"], row["before_gate"]) == (ratio, 0, 0.4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "can't be read as JSON"),
        ("[1]", "is not an object of link_ratio"),
        ('{"speed": 1}', "'speed' is not one of link_ratio"),
        ('{"seed": 1}', "'seed' is not one of"),
        ('{"gap": "long"}', "gap: 'long' is not a number"),
        ('{"gap": true}', "gap: True is not a number"),
        ('{"chunks": 2.5}', "chunks: 2.5 is not a whole number"),
        ('{"gap": -1}', "--gap: -1 is not a number of at least 0"),
        ('{"link_ratio": NaN}', "--link-ratio: 'nan' is not a number"),
    ],
)
def test_a_bad_machine_file_is_refused_in_one_line(
    capsys: Capture, trace: str, text: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    message = refused(capsys, "simulate", trace, "--machine", str(path), *ALONE)
    assert f"--machine: {path}" in message
    assert named in message


def test_a_plot_is_drawn(capsys: Capture, trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "it.png"
    assert main(["simulate", trace, "--policy", "lru,oracle", "--plot", str(out), *ALONE]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir()] == ["it.png"]
    assert f"drawn to {out}" in capsys.readouterr().err


def test_every_setting_is_a_flag_with_its_default(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help-all"])
    output = " ".join(capsys.readouterr().out.split())
    for field in fields(SimulateConfig):
        assert "--" + field.name.replace("_", "-") in output
        if field.default not in {None, False}:
            assert f"(default: {field.default})" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "TRACE"),
        (["/no/where"], "no such trace"),
        (["PROMPTS"], "not a finemoe trace"),
        (["TRACE", "--policy", "fifo"], "--policy: unknown policy 'fifo'"),
        (["TRACE", "--policy", ","], "--policy: nothing given"),
        (["TRACE", "--expert-memory", "0%"], "--expert-memory"),
        (["TRACE", "--expert-memory", "101%"], "--expert-memory"),
        (["TRACE", "--expert-memory", "often"], "--expert-memory"),
        (["TRACE", "--expert-memory", "2GiB"], "give shares"),
        (["TRACE", "--expert-memory", "25%,1%"], "1% of 32 experts is less than one per device; 3.2% is"),
        (["TRACE", "--expert-memory", "25%", "--devices", "9"], "28.2% is"),
        (["TRACE", "--devices", "0"], "--devices"),
        (["TRACE", "--devices", "257"], "--devices"),
        (["TRACE", "--link-ratio", "-1"], "--link-ratio"),
        (["TRACE", "--link-ratio", "inf"], "--link-ratio"),
        (["TRACE", "--link-ratio", "nan"], "--link-ratio"),
        (["TRACE", "--link-ratio", "fast"], "--link-ratio"),
        (["TRACE", "--link-ratio", ""], "--link-ratio: nothing given"),
        (["TRACE", "--store-split", "1"], "--store-split"),
        (["TRACE", "--store-split", "-0.1"], "--store-split"),
        (["TRACE", "--store-split", "nan"], "--store-split"),
        (["TRACE", "--store-split", "0.99"], "--store-split: none of the 4 requests"),
        (["TRACE", "--store", "/no/where"], "no such trace"),
        (["TRACE", "--store", "IDS"], "--store"),
        (["TRACE", "--requests", "0"], "--requests"),
        (["TRACE", "--interleave", "0"], "--interleave"),
        (["TRACE", "--seed", "-1"], "--seed"),
        (["TRACE", "--chunks", "-1"], "--chunks"),
        (["TRACE", "--tokens-per-unit", "0"], "--tokens-per-unit"),
        (["TRACE", "--gate-recall", "1.1"], "--gate-recall"),
        (["TRACE", "--gate-recall", "0.8,often"], "--gate-recall"),
        (["TRACE", "--gate-recall", ","], "--gate-recall"),
        (["TRACE", "--before-gate", "-0.1"], "--before-gate: -0.1 is not a share"),
        (["TRACE", "--gap", "-1"], "--gap: -1.0 is not a number of at least 0"),
        (["TRACE", "--gap", "nan"], "--gap"),
        (["TRACE", "--link-spread", "-1"], "--link-spread: -1.0 is not a number from 0 to 3"),
        (["TRACE", "--compute-spread", "1000"], "--compute-spread: 1000.0 is not a number from 0 to 3"),
        (["TRACE", "--lag-spread", "nan"], "--lag-spread"),
        (["TRACE", "--store", "TRACE", "--store-split", "0.7"], "--store-split: contradicts --store"),
        (["TRACE", "--prefetch-slowdown", "0"], "--prefetch-slowdown: 0.0 is not a number above 0"),
        (["TRACE", "--workers", "0"], "--workers"),
        (["TRACE", "--machine", "abacus"], "--machine: 'abacus' is neither a file nor one of rtx3090-pcie4"),
        (["TRACE", "--machine", "."], "--machine: . can't be read"),
        (["TRACE", "--machine", "h100-pcie5"], "--shape"),
        (["TRACE", "--machine", "disk", "--hardware", "disk", "--shape", "gpt-oss-20b"], "--hardware: contradicts"),
        (["TRACE", "--machine", "h100-pcie5", "--shape", "gpt-oss-20b", "--link-ratio", "1"], "--link-ratio"),
        (["TRACE", "--hardware", "h100-pcie5"], "--shape"),
        (["TRACE", "--shape", "gpt-oss-20b"], "--hardware"),
        (["TRACE", "--hardware", "abacus", "--shape", "gpt-oss-20b"], "--hardware"),
        (["TRACE", "--hardware", "h100-pcie5", "--shape", "round"], "--shape"),
        (["TRACE", "--hardware", "h100-pcie5", "--shape", "gpt-oss-20b", "--link-ratio", "1"], "--link-ratio"),
        (["TRACE", "--json", "/no/where/it.json"], "--json: there is no folder"),
        (["TRACE", "--json", "."], "--json: "),
        (["TRACE", "--plot", "/no/where/it.png"], "--plot: there is no folder"),
        (["TRACE", "--plot", "it.nonsense"], "--plot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(
    capsys: Capture,
    trace: str,
    ids_only: str,
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"question": "Why?"}\n')
    files = {"TRACE": trace, "IDS": ids_only, "PROMPTS": "prompts.jsonl"}
    assert named in refused(capsys, "simulate", *(files.get(each, each) for each in arguments))
    assert [each.name for each in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: Capture, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    message = refused(capsys, "simulate", trace, "--plot", str(tmp_path / "it.png"))
    assert "pip install 'finemoe[plots]'" in message


def test_an_unwritable_file_leaves_nothing_behind(
    capsys: Capture, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["simulate", trace, "--json", str(tmp_path / "it.json"), *ALONE]) == 2
    output, errors = capsys.readouterr()
    assert output.startswith("policy"), "the rows are lost"
    assert "it.json can't be written (No space left on device)" in errors
    assert not list(tmp_path.iterdir())


def test_the_command_imports_no_torch(trace: str) -> None:
    command = f"main(['simulate', {trace!r}, '--workers', '1'])"
    check = f"import sys; from finemoe.cli import main; {command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


PROGRAM = "import sys; from finemoe.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True], ids=["kill", "terminal"])
def test_ctrl_c_ends_a_run_and_its_processes_quietly(tmp_path: Path, to_group: bool) -> None:
    """A terminal signals every process of the group, `kill` only one."""
    path = make_trace(tmp_path, requests=4, iterations=20_000).path
    flags = ["--policy", "expert-map,deepspeed", "--expert-memory", "25%,50%", "--workers", "2", "--store-split", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "simulate", str(path), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(workers) < 2:
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        workers = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    time.sleep(0.3)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, errors
    assert output == ""
    assert errors.endswith("finemoe: interrupted\n")
    assert "Traceback" not in errors
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=5)[1]
