"""Do the tests notice? Small changes of the library, one at a time in a copy, each with the test that must fail.

    make mutants      (or: python tests/mutants/run.py [words of a file or a test])

The changes stand in `changes.toml`. A change that its test lets pass has survived: a number could become wrong and
nobody would know. The exit status is 0 if all are caught, else 1.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# each test runs in a process of its own, forked from one that has these, but not the library
HEAVY = (
    "pytest hypothesis pandas peft scipy.stats torch._dynamo transformers.models.gpt2.modeling_gpt2 "
    "transformers.models.llama.modeling_llama"
).split()
SECONDS = 600  # for one run of pytest, on a busy machine
VERDICTS = {0: "survived", 1: "caught"}  # pytest's exit status -> what it says about the change


def load_changes() -> list[dict[str, str]]:
    """The changes, in the order of the file."""
    text = Path(__file__).with_name("changes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["change"]


def stale(change: dict[str, str], root: Path = ROOT) -> str:
    """Say why a change cannot be made any more; empty if it can."""
    path = root / "minicpt" / change["file"]
    if not path.is_file():
        return f"{change['file']} is no more"
    found = path.read_text(encoding="utf-8").count(change["old"])
    return "" if found == 1 else f"{change['file']} holds {change['old']!r} {found} times, not once"


def verdict(
    change: dict[str, str] | None, tests: Sequence[str], root: Path = ROOT
) -> tuple[str, str]:
    """Run tests in a copy with the change (None: as it is); "caught", "survived" or "broken", and pytest's output."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("minicpt", "tests"):
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", copy)
        if change:
            path = copy / "minicpt" / change["file"]
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(change["old"], change["new"]), encoding="utf-8")
        (copy / "output").touch()
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_tests, args=(folder, tests)
        )
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        output = (copy / "output").read_text(encoding="utf-8", errors="replace")
        return VERDICTS.get(process.exitcode, "broken"), output


def _run_tests(folder: str, tests: Sequence[str]) -> None:
    """In a process of its own: pytest in the copy, its output in a file, its exit status the process's."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of notebooks take seconds to import
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    # whoever started the server first may have preloaded the library; only the copy is to be tested
    for name in list(sys.modules):
        if name.partition(".")[0] == "minicpt":
            del sys.modules[name]
    output = os.open("output", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "words", nargs="?", default="", help="only changes whose file or test holds them"
    )
    parser.add_argument("--workers", type=int, default=2, help="tests that run at once")
    args = parser.parse_args()
    changes = [c for c in load_changes() if args.words in c["file"] or args.words in c["test"]]
    for change in changes:
        if reason := stale(change):
            sys.exit(
                f"A change is out of date: {reason}. Write it anew in tests/mutants/changes.toml."
            )
    # for the processes of the tests
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    multiprocessing.set_forkserver_preload(HEAVY)
    started = time.perf_counter()
    print(f"First their tests without any change, then {len(changes)} changes.", flush=True)
    said, output = verdict(None, sorted({change["test"] for change in changes}))
    if said != "survived":
        sys.exit(f"{output}\nThe tests fail without any change; mend that first.")
    caught = 0
    with ThreadPoolExecutor(args.workers) as pool:
        verdicts = pool.map(lambda change: verdict(change, [change["test"]]), changes)
        for number, (change, (said, output)) in enumerate(zip(changes, verdicts), 1):
            caught += said == "caught"
            print(f"{number:2d}  {said:8}  {change['file']:20}  {change['wrong']}", flush=True)
            if said != "caught":
                print(f"    {change['old']!r} -> {change['new']!r}, {change['test']}\n{output}")
    seconds = time.perf_counter() - started
    print(f"{caught} of {len(changes)} changes caught, in {seconds:.0f} seconds.")
    return int(caught < len(changes))


if __name__ == "__main__":
    sys.exit(main())
