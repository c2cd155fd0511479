"""A Ray cluster on this machine, in its own process: two replicas, one of which is killed, and a cold one.

Prints one JSON document on standard output: what clients observed.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from ray import serve

from finemoe.serving.ray import app
from finemoe.serving.ray.replica import Replica

PROMPTS = ("The cat sat on the mat", "Experts come and go", "A long way home", "Rivers run to the sea")
NAME = "my-model"
FIRST = 6  # requests to a new replica that are compared
TIMEOUT_S = 90.0
_TITLE = re.compile(r"ray::ServeReplica:warm:finemoe(\.|\s|$)")


@dataclass
class Answer:
    """What a client observed of one request; `complete`: the stream ended with `[DONE]`."""

    prompt: str
    status: int
    replica: str
    complete: bool


class Client:
    """A client of one application.

    Args:
        port: of Ray's proxy.
        prefix: of the application's routes.
    """

    def __init__(self, port: int, prefix: str = "") -> None:
        self._port = port
        self._prefix = prefix
        self._prompts = cycle(PROMPTS)

    def ask(self, prompt: str = "", *, max_tokens: int = 12, started: list[str] | None = None) -> Answer:
        """Streams an answer, by default to the next prompt; `started` gets the replica's id with the first byte."""
        prompt = prompt or next(self._prompts)
        body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        status, replica, content = 0, "", b""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{self._prefix}/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            status, replica = response.status, response.getheader("x-finemoe-replica", "")
            while piece := response.read1():
                content += piece
                if started is not None and not started:
                    started.append(replica)
        except (http.client.HTTPException, OSError):
            pass
        finally:
            connection.close()
        return Answer(prompt, status, replica, b"data: [DONE]" in content)

    def disconnect(self) -> float:
        """Disconnects after the first byte of a long answer; returns how many answers still run soon after."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        body = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 2000, "temperature": 0, "stream": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{self._prefix}/v1/completions", json.dumps(body), headers)
        connection.getresponse().read1()
        connection.close()
        running, deadline_s = 1.0, time.monotonic() + 5
        while running and time.monotonic() < deadline_s:
            running = float(re.findall(r"finemoe_answers_running ([\d.]+)", self._metrics()[0])[0])
        return running

    def hit_rate(self, replica: str) -> float:
        """The hit rate of one replica since its start; repeats requests until that replica answers."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            text, answered_by = self._metrics()
            if answered_by == replica:
                found = re.findall(r'finemoe_expert_accesses_total{result="(\w+)"} ([\d.]+)', text)
                accesses = {result: float(count) for result, count in found}
                return accesses["hit"] / sum(accesses.values())
        raise TimeoutError(f"{replica} does not answer")

    def _metrics(self) -> tuple[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        connection.request("GET", f"{self._prefix}/metrics")
        response = connection.getresponse()
        text, answered_by = response.read().decode(), response.getheader("x-finemoe-replica", "")
        connection.close()
        return text, answered_by


def run(folder: str) -> dict[str, Any]:
    """Runs the scenario; returns the document."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    settings = {
        "model": folder, "policy": "finemoe", "expert_memory": "25%", "cpus_per_replica": 0.1, "share_every_s": 0.5,
        "cache_bytes": "16MiB", "drain_timeout_s": 20, "health_check_period_s": 1,
    }  # fmt: skip
    serve.run(app(settings | {"replicas": 2}), name="warm", route_prefix="/")
    client = Client(port)
    spread = [client.ask() for _ in range(16)]
    time.sleep(2)  # for both replicas to publish
    found: dict[str, Any] = {"spread": [asdict(each) for each in spread]} | _kill(client)
    first = [each for each in found["during"] if each["replica"] == found["third"]]
    while len(first) < FIRST:
        first += [asdict(answer) for answer in [client.ask()] if answer.replica == found["third"]]
    found["third_hit_rate"] = client.hit_rate(found["third"])
    serve.run(app(settings | {"shared_maps": "none"}), name="cold", route_prefix="/cold")
    cold = Client(port, "/cold")
    answers = [cold.ask(each["prompt"]) for each in first]
    found |= {
        "cold_hit_rate": cold.hit_rate(answers[0].replica),
        "still_running": cold.disconnect(),
        "health": _health(),
    }
    return found | {"first": first, "cold": [asdict(each) for each in answers]} | _drain(cold)


def _kill(client: Client) -> dict[str, Any]:
    """Kills a replica while both answer, and sends requests until a new one answers."""
    before: set[str] = set()
    streams: list[Answer] = []
    threads = []
    while len(before) < 2:
        started: list[str] = []
        ask = lambda started=started: streams.append(client.ask(max_tokens=250, started=started))  # noqa: E731
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        while threads[-1].is_alive() and not started:
            time.sleep(0.01)
        before |= set(started)
    victim = _replica()
    spins = psutil.Process(victim).environ().get("GOMP_SPINCOUNT")
    os.kill(victim, signal.SIGKILL)
    during: list[Answer] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s and {each.replica for each in during} <= before:
        during.append(client.ask())
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return {
        "before": sorted(before),
        "streams": [asdict(each) for each in streams],
        "during": [asdict(each) for each in during],
        "third": during[-1].replica,
        "spins": spins,
    }


def _drain(client: Client) -> dict[str, Any]:
    """Deletes an application while it answers."""
    started: list[str] = []
    streams: list[Answer] = []
    thread = threading.Thread(target=lambda: streams.append(client.ask(max_tokens=200, started=started)))
    thread.start()
    while thread.is_alive() and not started:
        time.sleep(0.01)
    serve.delete("cold")
    thread.join()
    return {"drained": asdict(streams[0])}


def _health() -> list[str]:
    """The health of a replica while its model thread runs, and after it has failed."""
    health = []
    for failure in (None, "the model's thread has failed"):
        worker = SimpleNamespace(failure=lambda failure=failure: failure)
        replica: Any = SimpleNamespace(_service=SimpleNamespace(worker=worker))
        try:
            asyncio.run(Replica.check_health(replica))
            health.append("healthy")
        except RuntimeError as error:
            health.append(str(error))
    return health


def _replica() -> int:
    """The process id of one of the replicas."""
    for process in psutil.Process().children(recursive=True):
        if any(_TITLE.match(part) for part in process.cmdline()):
            return process.pid
    raise LookupError("no replica among the processes")


if __name__ == "__main__":
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        document = json.dumps(run(sys.argv[1]))
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.stdout.write(f"{document}\n")
