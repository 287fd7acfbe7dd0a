"""All benchmarks with their default settings: `make bench`."""

import subprocess
import sys

for name in ("frobenius", "sensitivity", "measuring", "allocation", "memory", "large_model"):
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
