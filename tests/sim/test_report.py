"""The plot of a sweep: written atomically, with clear errors."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from finemoe.errors import ConfigError
from finemoe.sim.report import check_plot, draw
from finemoe.sim.sweep import SweepRow


def row(policy: str, expert_memory: float, link_ratio: float) -> SweepRow:
    numbers = {field.name: 1 for field in dataclasses.fields(SweepRow)}
    stall = {"lru": 2.0, "oracle": 0.5}.get(policy, 1.0) * (1 - expert_memory)
    chosen = {"policy": policy, "expert_memory": expert_memory, "link_ratio": link_ratio, "stall_per_layer": stall}
    return SweepRow(**numbers | chosen | {"emulated": "lookahead" if policy == "mixtral-offloading" else None})  # type: ignore[arg-type]


ROWS = [
    row(policy, share, ratio)
    for policy in ("lru", "mixtral-offloading", "belady", "oracle")
    for share in (0.25, 0.5)
    for ratio in (0.25, 1, 4)
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [each for each in ROWS if each.policy != "oracle"]])
def test_a_plot_is_written_and_nothing_else(tmp_path: Path, rows: list[SweepRow]) -> None:
    pytest.importorskip("matplotlib")
    draw(rows, "a title", tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir()] == ["it.png"]


def test_an_existing_plot_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def full(_: object, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "it.png").write_text("the old one")
    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(ConfigError, match=r"--plot: .*it.png can't be written \(No space left on device\)"):
        draw(ROWS, "a title", tmp_path / "it.png")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("it.png", "the old one")]


def test_an_unknown_extension_is_refused_with_the_known_ones_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("it.nonsense", "it"):
        with pytest.raises(ConfigError, match=r"--plot: can't draw to 'it.*ends in .*png"):
            check_plot(tmp_path / name)


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="--plot: there is no folder /no/where"):
        check_plot(Path("/no/where/it.png"))


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"--plot: .* pip install 'finemoe\[plots\]'"):
        check_plot(tmp_path / "it.png")
