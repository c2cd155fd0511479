"""Tries the installed wheel from outside the checkout: `smoke.py FOLDER`, which has `venv` and a model `tiny`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CONTENTS = """
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
import sys
import finemoe
assert Path(finemoe.__file__).is_relative_to(sys.prefix), finemoe.__file__
assert finemoe.__version__ == version("finemoe")
assert files("finemoe").joinpath("py.typed").is_file()
assert files("finemoe.model.reference").joinpath("bundle.safetensors").is_file()
assert callable(finemoe.load)
"""


def main(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    binaries = folder / "venv" / "bin"

    def run(*command: str) -> str:
        print("$", *(part if len(part) < 80 else "..." for part in command), flush=True)
        done = subprocess.run(
            [binaries / command[0], *command[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    run("python", "-c", CONTENTS)
    version = run("finemoe", "--version")
    assert version.startswith("finemoe ") or version[0].isdigit(), version
    assert "generate" in run("finemoe", "--help")
    generate = "finemoe", "generate", "Hello", "--model", "tiny", "--max-new-tokens", "8"
    replies = [json.loads(run(*generate, "--expert-memory", memory, "--json")) for memory in ("50%", "all")]
    small, whole = replies
    assert small["tokens"] > 0
    assert small["text"] == whole["text"], "the answer depends on the expert memory"
    assert small["expert_memory_bytes"] < whole["expert_memory_bytes"]
    assert small["hit_rate"] + small["late_rate"] + small["miss_rate"] > 0.999


main(Path(sys.argv[1]).resolve())
print("The installed wheel works.")
