"""Two replicas behind Ray on this machine: what clients see, also when one of them is killed. See `scenario`."""

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

ROOT = Path(__file__).parents[2]

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
    """One test, as a cluster takes a while to start, and no two run side by side."""
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
        a_killed_replica_is_replaced_and_only_what_ran_on_it_fails,
        a_new_replica_starts_warm,
        a_replica_s_idle_threads_sleep_soon,
        a_client_that_goes_away_ends_its_answer,
        a_replica_without_its_model_s_thread_is_not_healthy,
        a_replica_that_is_taken_away_finishes_its_answer,
    ):
        check(document)


def requests_are_spread_over_both_replicas(seen: dict[str, Any]) -> None:
    assert all(each["status"] == 200 and each["whole"] for each in seen["spread"])
    assert {each["replica"] for each in seen["spread"]} == set(seen["before"])
    assert len(seen["before"]) == 2


def a_killed_replica_is_replaced_and_only_what_ran_on_it_fails(seen: dict[str, Any]) -> None:
    broken = {each["replica"] for each in seen["streams"] if not each["whole"]}
    assert len(broken) == 1
    assert {each["replica"] for each in seen["streams"] if each["whole"]} == set(seen["before"]) - broken
    assert all(each["status"] == 200 and each["whole"] for each in seen["during"])
    assert seen["third"] not in seen["before"]


def a_new_replica_starts_warm(seen: dict[str, Any]) -> None:
    assert len(seen["first"]) == len(seen["cold"])
    assert seen["third_hit_rate"] > seen["cold_hit_rate"] + 0.05


def a_replica_s_idle_threads_sleep_soon(seen: dict[str, Any]) -> None:
    assert int(seen["spins"]) <= 5000


def a_client_that_goes_away_ends_its_answer(seen: dict[str, Any]) -> None:
    assert seen["still_running"] == 0


def a_replica_without_its_model_s_thread_is_not_healthy(seen: dict[str, Any]) -> None:
    assert seen["health"] == ["healthy", "the model's thread has failed"]


def a_replica_that_is_taken_away_finishes_its_answer(seen: dict[str, Any]) -> None:
    assert seen["drained"]["whole"]


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
