"""Link ratios from published sizes and rates."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest

from finemoe.sim.config import SimulateConfig
from finemoe.sim.hardware import HARDWARE, SHAPES, link_ratio
from finemoe.sim.speed_forecast import link_ratios


def test_mixtral_on_a_3090_by_hand() -> None:
    # an expert is 3 matrices of 4096 x 14336 in bfloat16: 352,321,536 bytes; 10 us + that at 25 GB/s is 14.10286 ms.
    # A token reads two of them and 83,886,080 bytes of attention at 936 GB/s: 842.445 us
    expert = SHAPES["mixtral-8x7b"].expert_bytes
    assert expert == 352_321_536
    assert SHAPES["mixtral-8x7b"].dense_bytes == 83_886_080
    assert link_ratio(SHAPES["mixtral-8x7b"], HARDWARE["rtx3090-pcie4"]) == pytest.approx(16.7404, rel=1e-4)


def test_gpt_oss_on_an_h100_by_hand() -> None:
    # an expert is 3 matrices of 2880 x 2880 at 4.25 bits: 13,219,200 bytes; 10 us + 264.384 us. A token reads four of
    # them and 53,084,160 bytes of attention at 3350 GB/s: 31.6301 us
    assert SHAPES["gpt-oss-20b"].expert_bytes == 13_219_200
    assert SHAPES["gpt-oss-20b"].dense_bytes == 53_084_160
    assert link_ratio(SHAPES["gpt-oss-20b"], HARDWARE["h100-pcie5"]) == pytest.approx(8.6748, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_ratios_are_ordered_as_the_machines_are(shape: str) -> None:
    slow, fast, newer = (link_ratio(SHAPES[shape], HARDWARE[name]) for name in HARDWARE)
    assert all(isfinite(ratio) and ratio > 0 for ratio in (slow, fast, newer))
    assert slow < fast, "the same link with faster memory"
    assert newer < fast, "a link twice as fast with memory less than twice as fast"


def test_a_faster_link_and_more_work_a_token_lower_the_ratio() -> None:
    machine, model = HARDWARE["a100-pcie4"], SHAPES["gpt-oss-20b"]
    assert link_ratio(model, replace(machine, link_bytes_s=2 * machine.link_bytes_s)) < link_ratio(model, machine)
    assert link_ratio(replace(model, active=model.active + 1), machine) < link_ratio(model, machine)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_plausible(shape: str) -> None:
    model = SHAPES[shape]
    assert 0 < model.active <= model.experts
    assert model.expert_bytes > 1 << 20


def test_a_configuration_names_hardware_and_shape_or_ratios() -> None:
    named = SimulateConfig(hardware="rtx3090-pcie4", shape="mixtral-8x7b")
    assert link_ratios(named) == (link_ratio(SHAPES["mixtral-8x7b"], HARDWARE["rtx3090-pcie4"]),)
    assert link_ratios(SimulateConfig(link_ratio="0.25, 1,4,1")) == (0.25, 1, 4)
    assert link_ratios(SimulateConfig()) == (1,)


def test_the_disk_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rates:
        memory_bytes_s, disk_bytes_s = 20e9, 1e9

    monkeypatch.setattr("finemoe.sim.speed_forecast.measure", Rates)
    (ratio,) = link_ratios(SimulateConfig(hardware="disk", shape="gpt-oss-20b"))
    assert ratio == pytest.approx(13_219_200 / 1e9 / ((53_084_160 + 4 * 13_219_200) / 20e9))
