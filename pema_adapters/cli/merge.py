"""`pema-merge`: merge a delta into its base, and write the full checkpoint as a stream."""

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pema_adapters.cli._common import add_version, run
from pema_adapters.cli._merge_format import format_summary
from pema_adapters.io.escaping import escape_terminal
from pema_adapters.io.locking import check_platform

if TYPE_CHECKING:
    from pema_adapters.merging.report import MergeReport

DTYPES = ("auto", "float32", "bfloat16", "float16")
EPILOG = """\
examples:
  pema-merge --delta run/
  pema-merge --base xlm-v-base --delta run/ --checkpoint best
  pema-merge --base ./xlm-v-base --delta run/ --adapter task --output merged/ --verify
  pema-merge --base ./xlm-v-base --delta run/ --in-place
  pema-merge --base ./xlm-v-base --undo
  pema-merge --delta run/ --push-to-hub me/xlm-v-base-mood --private

exit codes:
  0  done (even if the summary could not be printed)
  1  refused or failed: one line on standard error says why
  2  wrong usage
"""
_UNDO_OPTIONS = {"base", "undo", "quiet"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-merge` and return its exit code: 0 done, 1 refused or failed. argparse exits with 2 on wrong usage."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    problem = _find_conflict(options, parser)
    if problem:
        parser.error(problem)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # the client logs two lines for each try without network
    if options.undo:
        return run("pema-merge", lambda: _undo(options), is_done_before_printing=True)
    return run("pema-merge", lambda: _merge(options), is_done_before_printing=not options.dry_run)


def _find_conflict(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Return why the options cannot be combined, "" if they can."""
    if options.undo:
        given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        others = [name for name in given if name not in _UNDO_OPTIONS]
        if others:
            return f"--undo can only be combined with --base and --quiet, found --{others[0].replace('_', '-')}"
    elif options.delta is None:
        return "the following arguments are required: --delta"
    if options.base is None and (options.undo or options.in_place):
        return f"--{'undo' if options.undo else 'in-place'} modifies the base: give its folder with --base"
    if options.in_place and (options.overwrite or options.push_to_hub):
        return "--in-place modifies the base itself: it cannot be combined with --output, --overwrite or --push-to-hub"
    if not options.push_to_hub and (options.private or options.create_pr or options.commit_message or options.token):
        return "--private, --create-pr, --commit-message and --token need --push-to-hub"
    return ""


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-merge",
        usage="pema-merge [--base BASE] --delta DELTA [options]\n       pema-merge --base BASE --undo",
        description="Merge a delta (a PEMA adapter, or full fine-tuning with PEMA) into its base model, and write the "
        "full checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    _add_inputs(parser.add_argument_group("inputs"))
    _add_outputs(parser.add_argument_group("output"))
    _add_hub(parser.add_argument_group("Hugging Face Hub"))
    _add_checks(parser.add_argument_group("merging"))
    _add_reporting(parser.add_argument_group("printing"))
    return parser


def _add_inputs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--base",
        help="base checkpoint: a folder (safetensors or .bin, sharded or not) or a Hub id (default: the base recorded "
        "in DELTA, for which the last part of its name is enough)",
    )
    add("--delta", help="delta: a folder written by save_adapter, save_delta or a Trainer, or a Hub id")
    add("--adapter", metavar="NAME", help="adapter to merge, if DELTA holds several")
    add(
        "--checkpoint",
        type=_parse_checkpoint,
        metavar="latest|best|STEP",
        help="checkpoint to merge, if DELTA is the output folder of a Trainer",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a base on the Hub (default: its main branch)")


def _add_outputs(group: "argparse._ArgumentGroup") -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument("--output", metavar="DIR", help="output folder (default: DELTA/merged)")
    either.add_argument(
        "--in-place", action="store_true", help="modify the files of the base itself; --undo restores them"
    )
    either.add_argument("--undo", action="store_true", help="restore a base that was merged in place, byte for byte")
    group.add_argument("--overwrite", action="store_true", help="replace the output of an earlier merge")


def _add_hub(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the result to this repository; without --output, no copy of it is written to disk",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--create-pr", action="store_true", help="open a pull request instead of committing to the main branch")
    add("--commit-message", metavar="TEXT", help="commit message")
    add("--token", help="Hub access token (default: HF_TOKEN, or that of hf auth login)")


def _add_checks(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the output (default: auto, that of the base)")
    add(
        "--no-fold",
        action="store_true",
        help="save LoRA, DoRA, (IA)^3 and VeRA as an adapter beside the checkpoint, instead of folding them into its "
        "weights",
    )
    add("--dry-run", action="store_true", help="check and plan everything, but write nothing")
    add("--verify", action="store_true", help="read the output back and compare every byte with base and delta")
    add("--allow-base-mismatch", action="store_true", help="merge even if the delta was trained on another base")


def _add_reporting(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--json", action="store_true", help="print the report as JSON")
    group.add_argument("--quiet", action="store_true", help="print only errors (and, with --json, the report)")


def _parse_checkpoint(text: str) -> str:
    from pema_adapters.formats.trainer_checkpoints import is_checkpoint_choice

    if not is_checkpoint_choice(text):
        raise argparse.ArgumentTypeError(f"expected latest, best or the number of a step, found {text!r}")
    return text


def _merge(options: argparse.Namespace) -> str:
    """Merge, and return the text to print."""
    check_platform()
    report = _push(options) if options.push_to_hub else _merge_to_disk(options)
    if options.json:
        return json.dumps(report.to_dict(), indent=2)
    return "" if options.quiet else format_summary(report, options)


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
    """Return the keyword arguments that merging and pushing share."""
    same = ("adapter", "checkpoint", "revision", "dtype", "overwrite", "dry_run", "verify", "allow_base_mismatch")
    taken = {name: getattr(options, name) for name in same}
    return {**taken, "fold": not options.no_fold, "progress": False if options.quiet else None}


def _undo(options: argparse.Namespace) -> str:
    check_platform()
    from pema_adapters.merging.api import undo_merge

    undo_merge(options.base)
    return "" if options.quiet else escape_terminal(f"restored {options.base}")
