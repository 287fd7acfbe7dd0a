"""Which of the pinned versions could be released.

    python -m benchmarks.pins [PACKAGE ...] [--work DIR] [--tests]

Dependencies in pyproject.toml that have an upper bound had a reason for it, which new releases may have removed. For
each of them this makes a virtual environment that lies over this one, installs the newest release there, whatever the
pin says, and runs a probe: a small flow on a server and on a schedule (`benchmarks.pins.probe`), or lmq's tests of what
the package is used for. `--tests` then runs the tests of a whole run of lmq too, which takes minutes more. Prints a
table and changes no pin. Environments and logs lie in a temporary folder, or in `--work`, which keeps them.
"""

from __future__ import annotations

import argparse
import subprocess
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_FLOW = ("-m", "benchmarks.pins.probe")
_TESTS = ("-m", "pytest", "-x")
PROBES: Mapping[str, tuple[str, ...]] = {
    "prefect": _FLOW,
    "fastapi": _FLOW,
    "sqlalchemy": _FLOW,
    "transformers": (*_TESTS, "tests/lmq/model"),
    "hqq": (*_TESTS, "tests/lmq/quantizers/test_quantizers.py", "tests/lmq/export/test_hqq.py"),
    "pulp": (*_TESTS, "tests/lmq/allocation"),
}
"""What Python runs to try a release of a package."""
_RUN = (*_TESTS, "tests/flows/run/test_quantize.py")
_LIMIT_S = 1800


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PROBES)} (default: all)")
    parser.add_argument("--work", type=Path, help="folder that keeps environments and logs")
    parser.add_argument("--tests", action="store_true", help="run the tests of a whole run of lmq too")
    options = parser.parse_args()
    if options.work and options.work.exists() and not options.work.is_dir():
        parser.error(f"--work {options.work}: is a file; name a folder, or one to be made")
    try:
        chosen = pins((ROOT / "pyproject.toml").read_text(), options.packages)
    except ValueError as error:
        parser.error(str(error))
    print("| package | allowed | tried | what happened | pin |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="pins-") as temporary:
        for pin in chosen:
            print(row(pin, *_try(pin, (options.work or Path(temporary)).resolve(), tests=options.tests)), flush=True)


def pins(project: str, packages: Sequence[str] = ()) -> list[Requirement]:
    """Dependencies with an upper bound in the text of a pyproject.toml: all, or those of `packages`.

    Raises ValueError for a package that is not one of them, and for one of them that has no probe.
    """
    dependencies = map(Requirement, tomllib.loads(project)["project"]["dependencies"])
    bounded = {
        each.name: each
        for each in dependencies
        if any(part.operator in {"<", "<=", "==", "~="} for part in each.specifier)
    }
    if unknown := sorted(set(packages) - bounded.keys()):
        raise ValueError(f"{', '.join(unknown)}: not pinned; pinned are {', '.join(bounded)}")
    if untried := sorted(bounded.keys() - PROBES.keys()):
        raise ValueError(f"{', '.join(untried)}: pinned without a probe; add one to PROBES")
    return [bounded[name] for name in packages or bounded]


def row(pin: Requirement, tried: str | None, failure: str | None) -> str:
    """A row of the table: the version that was installed and what went wrong, each None where there is none.

    A version that the pin allows is none that could release it.
    """
    if tried is not None and failure is None and pin.specifier.contains(tried, prereleases=True):
        happened, verdict = "not tried", "stays: nothing newer"
    elif failure is None:
        happened, verdict = "works", "can go"
    else:
        happened, verdict = failure.replace("|", "\\|"), "stays"
    return f"| {pin.name} | `{pin.specifier}` | {tried or 'none'} | {happened} | {verdict} |"


def last_line(log: str) -> str:
    """The last line of a log that says something; of pytest's the first that names a test."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["ended without a word"]
    return next((line for line in lines if line.startswith("FAILED ")), lines[-1])


def _try(pin: Requirement, work: Path, *, tests: bool) -> tuple[str | None, str | None]:
    """The version that was installed and what went wrong, each None where there is none."""
    folder = work / pin.name
    venv.create(folder, clear=True)
    python = str(folder / "bin" / "python")
    over = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
    # `addsitedir` also reads the .pth files there, of which one makes lmq importable. pip comes from there too.
    (over / "under.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    log = work / f"{pin.name}.log"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", pin.name)
    if failure := _run(python, install, log):
        return None, failure
    ask = f"from importlib.metadata import version; print(version({pin.name!r}))"
    tried = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    if pin.specifier.contains(tried, prereleases=True):
        return tried, None
    for arguments in (PROBES[pin.name], _RUN) if tests else (PROBES[pin.name],):
        if failure := _run(python, arguments, log):
            return tried, failure
    return tried, None


def _run(python: str, arguments: Sequence[str], log: Path) -> str | None:
    """The last line of what it printed, None where it ended well."""
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [python, *arguments], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no end within {_LIMIT_S} s"
    return last_line(log.read_text()) if done.returncode else None


if __name__ == "__main__":
    main()
