"""How long `gristmill --help` takes, as a whole process: what a user waits for before anything else.

python bench/startup.py [--runs 21] [--json out.json]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from factory.store import write_json


def main() -> None:
    """Run it often, print and write the median, minimum and maximum in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = [str(Path(sys.executable).with_name("gristmill")), "--help"]
    subprocess.run(command, check=True, capture_output=True)  # the first run compiles
    seconds = []
    for _ in range(options.runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    figures = {"runs": options.runs, "median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    print(
        f"gristmill --help: median {figures['median_s']:.3f} s, {figures['min_s']:.3f} to {figures['max_s']:.3f} s over {options.runs} runs"
    )
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
