"""Two replicas behind Ray on this machine, one of which is killed; see `scenario`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chat_model import make_chat_model

ROOT = Path(__file__).parents[3]

HAS_RAY = importlib.util.find_spec("ray") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_RAY, reason="ray is not installed; pip install finemoe[ray]"),
]


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FINEMOE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return os.environ | own | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def test_a_cluster_of_two_replicas(tmp_path: Path) -> None:
    """One test: a cluster is slow to start, and only one can run at a time."""
    folder = make_chat_model(tmp_path / "my-model")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.serving.ray.scenario", str(folder)],
        cwd=folder.parent,
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    document: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    for check in (
        requests_are_spread_over_both_replicas,
        a_killed_replica_is_replaced_and_only_its_requests_fail,
        a_new_replica_starts_warm,
        idle_threads_of_a_replica_sleep_soon,
        a_client_that_disconnects_ends_its_answer,
        a_replica_whose_model_thread_failed_is_unhealthy,
        a_deleted_replica_finishes_its_answer,
    ):
        check(document)


def requests_are_spread_over_both_replicas(observed: dict[str, Any]) -> None:
    assert all(each["status"] == 200 and each["complete"] for each in observed["spread"])
    assert {each["replica"] for each in observed["spread"]} == set(observed["before"])
    assert len(observed["before"]) == 2


def a_killed_replica_is_replaced_and_only_its_requests_fail(observed: dict[str, Any]) -> None:
    broken = {each["replica"] for each in observed["streams"] if not each["complete"]}
    assert len(broken) == 1
    assert {each["replica"] for each in observed["streams"] if each["complete"]} == set(observed["before"]) - broken
    assert all(each["status"] == 200 and each["complete"] for each in observed["during"])
    assert observed["third"] not in observed["before"]


def a_new_replica_starts_warm(observed: dict[str, Any]) -> None:
    assert len(observed["first"]) == len(observed["cold"])
    assert observed["third_hit_rate"] > observed["cold_hit_rate"] + 0.05


def idle_threads_of_a_replica_sleep_soon(observed: dict[str, Any]) -> None:
    assert int(observed["spins"]) <= 5000


def a_client_that_disconnects_ends_its_answer(observed: dict[str, Any]) -> None:
    assert observed["still_running"] == 0


def a_replica_whose_model_thread_failed_is_unhealthy(observed: dict[str, Any]) -> None:
    assert observed["health"] == ["healthy", "the model's thread has failed"]


def a_deleted_replica_finishes_its_answer(observed: dict[str, Any]) -> None:
    assert observed["drained"]["complete"]


def test_serve_run_refuses_an_unknown_argument_in_one_line(tmp_path: Path) -> None:
    command = "from ray.serve.scripts import cli; cli()"
    finished = subprocess.run(
        [sys.executable, "-c", command, "run", "finemoe.serving.ray:app", "replica=2"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == "Error: replica: is unknown; is it replicas?"
    assert "Traceback" not in finished.stderr
