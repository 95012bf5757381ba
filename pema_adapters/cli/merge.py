"""`pema-merge`: base checkpoint + delta -> full checkpoint, streamed."""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.cli._common import add_version, run
from pema_adapters.errors import PemaError
from pema_adapters.io.escaping import escape_terminal, format_python_literal
from pema_adapters.io.locking import check_platform

if TYPE_CHECKING:
    from pema_adapters.merging.report import MergeReport

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_LINE = 10_000
"""Characters of a line of the summary, so many that lines to paste are not cut."""
EPILOG = """\
examples:
  pema-merge --delta run/
  pema-merge --base xlm-v-base --delta run/ --checkpoint best
  pema-merge --base ./xlm-v-base --delta run/ --adapter task --output merged/ --verify
  pema-merge --base ./xlm-v-base --delta run/ --in-place
  pema-merge --base ./xlm-v-base --undo
  pema-merge --delta run/ --push-to-hub me/xlm-v-base-mood --private

exit codes:
  0  done; also where the checkpoint is complete, but the summary could not be printed
  1  refused or failed: one line on standard error says why
  2  wrong usage
"""
_UNDO_OPTIONS = {"base", "undo", "quiet"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-merge`. Returns the exit code: 0 done, 1 refused or failed; argparse exits with 2 on wrong usage."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    problem = _find_conflict(options, parser)
    if problem:
        parser.error(problem)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # the client has two lines for each try without network
    if options.undo:
        return run("pema-merge", lambda: _undo(options), is_done_before_printing=True)
    return run("pema-merge", lambda: _merge(options), is_done_before_printing=not options.dry_run)


def _find_conflict(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Why the options do not go together, "" if they do."""
    if options.undo:
        given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        others = [name for name in given if name not in _UNDO_OPTIONS]
        if others:
            return f"--undo takes --base and --quiet alone, found --{others[0].replace('_', '-')}"
    elif options.delta is None:
        return "the following arguments are required: --delta"
    if options.base is None and (options.undo or options.in_place):
        return f"--{'undo' if options.undo else 'in-place'} changes the base: name its folder with --base"
    if options.in_place and (options.overwrite or options.push_to_hub):
        return "--in-place changes the base itself: it goes without --output, --overwrite and --push-to-hub"
    if not options.push_to_hub and (options.private or options.create_pr or options.commit_message or options.token):
        return "--private, --create-pr, --commit-message and --token go with --push-to-hub"
    return ""


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-merge",
        usage="pema-merge [--base BASE] --delta DELTA [options]\n       pema-merge --base BASE --undo",
        description="Merge a delta (a PEMA adapter, or full fine-tuning with PEMA) into its base, and write the full "
        "checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    _add_inputs(parser.add_argument_group("what to merge"))
    _add_outputs(parser.add_argument_group("where to write it"))
    _add_hub(parser.add_argument_group("the Hugging Face Hub"))
    _add_checks(parser.add_argument_group("how to merge"))
    _add_reporting(parser.add_argument_group("what to print"))
    return parser


def _add_inputs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--base",
        help="folder of a checkpoint (safetensors or .bin, one file or shards), or a Hub id (default: the base that "
        "DELTA records; the last part of its name is enough)",
    )
    add("--delta", help="folder written by save_adapter, save_delta or a Trainer, or a Hub id")
    add("--adapter", metavar="NAME", help="the adapter to merge, if DELTA holds several")
    add(
        "--checkpoint",
        type=_parse_checkpoint,
        metavar="latest|best|STEP",
        help="the checkpoint to merge, if DELTA is the output folder of a Trainer",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a base on the Hub")


def _add_outputs(group: "argparse._ArgumentGroup") -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument("--output", metavar="DIR", help="folder to write (default: DELTA/merged)")
    either.add_argument(
        "--in-place", action="store_true", help="change the files of the base itself; --undo restores them"
    )
    either.add_argument(
        "--undo", action="store_true", help="restore a base that was merged in place, byte for byte, and stop"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an output of an earlier merge")


def _add_hub(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the result; without --output, no merged copy is written to the disk",
    )
    add("--private", action="store_true", help="make the repository private if it is new")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--commit-message", metavar="TEXT", help="message of the commit")
    add("--token", help="access token (default: the one of hf auth login, or HF_TOKEN)")


def _add_checks(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the output (default: that of the base)")
    add("--no-fold", action="store_true", help="keep LoRA, DoRA, (IA)^3 and VeRA as an adapter beside the checkpoint")
    add("--dry-run", action="store_true", help="check and plan everything, and write nothing")
    add("--verify", action="store_true", help="read the output back and compare every byte with base and delta")
    add("--allow-base-mismatch", action="store_true", help="merge even if the delta was trained on another base")


def _add_reporting(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--json", action="store_true", help="print the report as JSON")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors (with --json, the report too)")


def _parse_checkpoint(text: str) -> str:
    from pema_adapters.formats.trainer_checkpoints import is_checkpoint_choice

    if not is_checkpoint_choice(text):
        raise argparse.ArgumentTypeError(f"expected latest, best or the number of a step, found {text!r}")
    return text


def _merge(options: argparse.Namespace) -> str:
    """Merge; returns what to print."""
    check_platform()
    report = _push(options) if options.push_to_hub else _merge_to_disk(options)
    if options.json:
        return json.dumps(report.to_dict(), indent=2)
    return "" if options.quiet else _format_summary(report, options)


def _merge_to_disk(options: argparse.Namespace) -> "MergeReport":
    from pema_adapters.merging.api import merge_checkpoint

    return merge_checkpoint(
        options.base, options.delta, options.output, in_place=options.in_place, **_shared_arguments(options)
    )


def _push(options: argparse.Namespace) -> "MergeReport":
    from pema_adapters.publishing.push import push_merged_to_hub

    return push_merged_to_hub(
        options.base,
        options.delta,
        options.push_to_hub,
        options.output,
        private=options.private or None,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        token=options.token,
        **_shared_arguments(options),
    )


def _shared_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What merging and pushing share."""
    same = ("adapter", "checkpoint", "revision", "dtype", "overwrite", "dry_run", "verify", "allow_base_mismatch")
    taken = {name: getattr(options, name) for name in same}
    return {**taken, "fold": not options.no_fold, "progress": False if options.quiet else None}


def _undo(options: argparse.Namespace) -> str:
    check_platform()
    from pema_adapters.merging.api import undo_merge

    undo_merge(options.base)
    return "" if options.quiet else escape_terminal(f"restored {options.base}")


def _format_summary(report: "MergeReport", options: argparse.Namespace) -> str:
    """The report for people; its first line says what happened, its last ones how to load the result."""
    where = report.output or options.push_to_hub
    lines = [
        f"{_describe_outcome(options)} {where} ({report.bytes_written / 1e6:,.1f} MB in {report.seconds:.1f} s)",
        f"  rows:    {report.rows_merged:,} of {report.vocab_size:,} in the embedding matrix",
        f"  tensors: {report.tensors_changed:,} changed, {report.tensors_copied:,} {_describe_copied(options)}",
    ]
    if report.tensors_folded:
        lines.append(f"  folded:  the adapter's updates of {report.tensors_folded:,} weights")
    if report.max_rounding_error:
        lines.append(f"  casts:   largest rounding error {report.max_rounding_error:.3g}")
    if options.verify and not options.dry_run:
        lines.append("  verified: every byte is the base's or the delta's")
    lines += [f"  note:    {note}" for note in report.notes]
    return "\n".join(escape_terminal(line, MAX_LINE) for line in lines + _format_load_snippet(report))


def _describe_outcome(options: argparse.Namespace) -> str:
    if options.push_to_hub and not options.output:
        return "would push to" if options.dry_run else "pushed to"
    return "would write" if options.dry_run else "changed" if options.in_place else "wrote"


def _describe_copied(options: argparse.Namespace) -> str:
    if options.in_place:
        return "untouched"
    return "copied byte for byte" if options.dtype == "auto" else f"as they were, in {options.dtype}"


def _format_load_snippet(report: "MergeReport") -> list[str]:
    """The two lines of Python that load both, where part of the delta stays an adapter."""
    from pema_adapters.formats.checkpoint import CONFIG
    from pema_adapters.formats.json_object import read_json
    from pema_adapters.merging.load_snippet import LeftAdapter, loading_lines

    output = Path(report.output)
    left = {name: output / "adapters" / name for name in report.adapters_left}
    if not left or not all(folder.is_dir() for folder in left.values()):
        return []
    try:
        config = read_json(output / CONFIG) if (output / CONFIG).exists() else {}
        adapters = {name: LeftAdapter.read(partial(_read_file, folder)) for name, folder in left.items()}
    except (OSError, PemaError) as error:  # the merge is complete all the same
        return [escape_terminal(f"  the lines that load both cannot be given: {error}")]
    lines = loading_lines(report.output, config, adapters, lambda name: format_python_literal(str(left[name])))
    return ["  load both, in Python (import adapters, transformers):", *(f"    {line}" for line in lines)]


def _read_file(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None
