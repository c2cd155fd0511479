"""What policies learn before a row is measured: requests that were recorded earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finemoe.errors import ConfigError
from finemoe.sim.evidence import Evidence
from finemoe.trace import open_trace


def teach(offload: Any, path: Path) -> None:
    """The policy of a loaded model takes in a trace, as the simulator's policies do.

    Args:
        offload: `model.finemoe`.

    Raises:
        ConfigError: the trace is of another shape of model.
        TraceError: the file is no trace.
    """
    with open_trace(path) as trace:
        header, layouts = trace.header, offload.catalog.layouts
        shape = len(layouts), max(layout.experts for layout in layouts)
        if (header.layers, header.experts) != shape:
            raise ConfigError(
                f"--store: {path} has {header.layers} MoE layers of {header.experts} experts, the model {shape[0]} of "
                f"{shape[1]}; record one with finemoe record"
            )
        offload.learn(Evidence(trace).recorded(range(len(trace))))
