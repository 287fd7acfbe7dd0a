"""Benchmarks with their default settings: `make bench`.

`large_model` and `allocation_quality` take longer and are run alone.
"""

import subprocess
import sys

for name in ("frobenius", "sensitivity", "measuring", "allocation", "linear", "memory"):
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
