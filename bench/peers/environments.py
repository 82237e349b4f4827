"""Gives every peer an environment of its own, since their dependencies exclude one another, and runs its script there.

    python bench/peers/environments.py [NAME ...]

makes those that are missing (all, where none is named) in bench/peers/.env, from the requirements in bench/peers/NAME.txt. What
is there and of the same requirements is left as it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = ("distilabel", "data_designer", "curator", "openai_gather")  # of the gateway
DUPLICATES = "duplicates"  # the environment of those that find duplicates
MARKER = "made-of.txt"  # written last: an environment without it is not whole
# At run time nothing may be asked for or told outside this machine, and nothing remembered.
QUIET = {
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "NEMO_TELEMETRY_ENABLED": "false",
    "TELEMETRY_ENABLED": "false",
    "CURATOR_DISABLE_CACHE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody listens there; the server that is asked speaks http
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def python_of(name: str) -> str:
    """The interpreter that runs a script: a peer's own, else this one."""
    return str(HERE / ".env" / name / "bin" / "python") if name in (*PEERS, DUPLICATES) else sys.executable


def make(name: str) -> None:
    """Make a peer's environment, unless it is there."""
    folder, wanted = HERE / ".env" / name, (HERE / f"{name}.txt").read_text()
    marker = folder / MARKER
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"installing {name} (a few minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python_of(name), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", HERE / f"{name}.txt"], check=True)
    marker.write_text(wanted)


def versions(name: str) -> dict[str, str]:
    """The versions of what a peer's requirements name, as installed."""
    asked = [line.split("=")[0].split(">")[0].split("[")[0].strip() for line in (HERE / f"{name}.txt").read_text().splitlines()]
    look = "import json, sys; from importlib.metadata import version; print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    told = subprocess.run([python_of(name), "-c", look, *asked], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(told)
    return found


def run(name: str, *arguments: str, cap_s: float) -> dict[str, Any]:
    """What `peer_NAME.py` printed.

    One that has not ended after `cap_s` seconds is killed with all that it started, and has no rows: what it was answered is
    then known to the server alone. One that fails has no rows either, and the end of what it said.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        places = {"PEER_FOLDER": scratch, "HOME": scratch, "XDG_CACHE_HOME": scratch, "CURATOR_CACHE_DIR": scratch}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            command = [python_of(name), str(HERE / f"peer_{name}.py"), *arguments]
            began = time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | QUIET | places,
                cwd=folder,
                start_new_session=True,
            )
            try:
                process.wait(cap_s)
                ended = True
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                _kill(process)
        seconds = time.monotonic() - began
        said = (folder / "stdout").read_text(errors="replace").strip().splitlines()
        for line in reversed(said):
            if line.startswith('{"rows"'):
                told: dict[str, Any] = json.loads(line)
                return told | {"ended": ended}
        cause = (folder / "stderr").read_text(errors="replace").strip().splitlines() or said
        return {
            "rows": 0,
            "wall_s": seconds,
            "ended": ended,
            "error": "\n".join(cause[-3:])[-500:] if ended else f"not ended after {cap_s:g} s",
        }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a script and all that it started, which is its own session."""
    with suppress(ProcessLookupError):  # none of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    for peer in sys.argv[1:] or PEERS:
        make(peer)
