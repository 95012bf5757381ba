"""The process that merges mutated inputs, one case after another; its parent watches the time.

It says what it is about to do before it does it, so that a crash, a hang or a kill has a name.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz.expected import Escape
from fuzz.mutations import Options, make_case, order
from fuzz.oracle import check_inputs, check_message, check_output
from fuzz.pairs import Files, pairs, put
from fuzz.pickle_mutations import CANARY

MOST_MEMORY = 300 << 20
ADDRESS_SPACE = 1 << 30
UNTOUCHED = "untouched pairs"
Report = dict[str, Any]
DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: "refused", "merged" or "escaped", the message or failure, and a remark.

    fatal: the process cannot go on.
    """

    kind: str
    text: str = ""
    remark: str = ""
    fatal: bool = False


class Refused(Exception):
    """The merge was refused, with this message."""


def work(pipe: Connection, folder: Path, seed: int, family: str | None) -> None:
    """Answer case numbers with outcomes, until None comes. Begins with the outcomes of all untouched pairs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(folder)
    warnings.simplefilter("always")
    found, mutations = pairs(), order(seed, family)
    sound = {}
    for name, files in found.items():
        outcome = judge(folder / "case", files, Options(allow_base_mismatch="no fingerprint" in name))
        if outcome.kind == "merged":
            sound[name] = files
        else:
            pipe.send((UNTOUCHED, f"[{name}]", Outcome("escaped", f"not mutated, but {outcome.kind}: {outcome.text}")))
    limit = _address_space() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(("ready", len(mutations), peak_memory()))
    while (number := pipe.recv()) is not None:
        case = make_case(sound, mutations, seed, number)
        pipe.send(("started", case.mutation.family, case.name))
        pipe.send(("done", case.mutation.family, judge(folder / "case", case.files, case.options)))


def judge(root: Path, files: Files, options: Options) -> Outcome:
    """Merge the files, laid out below `root`, and say how it went."""
    shutil.rmtree(root, ignore_errors=True)
    put(root, files)
    before = peak_memory()
    try:
        outcome = _judge(root, files, options)
        if Path(CANARY).exists():
            raise Escape("code from a pickle was run")
        grown = peak_memory() - before
        if grown > MOST_MEMORY:
            return Outcome("escaped", f"memory grew by {grown >> 20} MB", fatal=True)
    except Escape as error:
        return Outcome("escaped", str(error))
    except Exception:
        return Outcome("escaped", "the oracle failed: " + traceback.format_exc())
    return outcome


def _judge(root: Path, files: Files, options: Options) -> Outcome:
    try:
        report = (_by_command if options.by_command else _by_call)(root, options)
    except Refused as error:
        check_inputs(root, files, set())
        check_message(root, "" if options.in_place else options.path, str(error))
        return Outcome("refused", str(error))
    if options.in_place:
        return Outcome("merged", remark=_check_in_place(root, files, report))
    check_inputs(root, files, {"out"})
    return Outcome("merged", remark=check_output(root, DTYPES[options.dtype], report))


def _check_in_place(root: Path, files: Files, report: Report) -> str:
    """Check a merge in place: as an output of a copy of the base, and against it after an undo."""
    from pema_adapters.merging.api import undo_merge

    (root / "base").rename(root / "out")
    put(root, {name: node for name, node in files.items() if name.startswith("base/")})
    check_inputs(root, files, {"out"})
    remark = check_output(root, None, report)
    undo_merge(root / "out")
    shutil.rmtree(root / "base")
    (root / "out").rename(root / "base")
    check_inputs(root, files, set())
    return remark


def _by_call(root: Path, options: Options) -> Report:
    from pema_adapters.errors import PemaError
    from pema_adapters.merging.api import merge_checkpoint

    try:
        done = merge_checkpoint(root / "base", root / "delta", None if options.in_place else root / "out",
                                progress=False, verify=options.verify, dtype=options.dtype, fold=options.fold,
                                allow_base_mismatch=options.allow_base_mismatch,
                                in_place=options.in_place)  # fmt: skip
        return done.to_dict()
    except PemaError as error:
        raise Refused(str(error)) from None
    except BaseException as error:
        raise Escape(_format_traceback(error)) from None


def _format_traceback(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "".join(lines[-3:])[-1500:]


def _by_command(root: Path, options: Options) -> Report:
    from pema_adapters.cli.merge import main

    command = ["--base", str(root / "base"), "--delta", str(root / "delta"), "--output", str(root / "out")]
    command += ["--verify"] * options.verify + ["--allow-base-mismatch"] * options.allow_base_mismatch
    command += [f"--dtype={options.dtype}"] * (options.dtype != "auto") + ["--no-fold"] * (not options.fold)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(command)
            out.flush()
    except BaseException as exception:
        raise Escape("from the command: " + _format_traceback(exception)) from None
    error.seek(0)
    said = error.read()
    if code == 0 and not said:
        return json.loads((root / "out" / "pema_merge.json").read_bytes())
    if code != 1 or said.count("\n") != 1 or not said.startswith("pema-merge: error: "):
        raise Escape(f"the command's exit code is {code}, and it says {said[-2000:]!r}")
    raise Refused(said.removeprefix("pema-merge: error: ").rstrip("\n"))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
