"""`pema-merge`: base checkpoint + delta -> full checkpoint, streamed."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.cli._run import run

if TYPE_CHECKING:
    from pema_adapters.merging.report import MergeReport

DTYPES = ("auto", "float32", "bfloat16", "float16")
EPILOG = """\
examples:
  pema-merge --base facebook/xlm-v-base --delta run/
  pema-merge --base ./xlm-v-base --delta run/ --adapter task --output merged/ --verify
  pema-merge --base ./xlm-v-base --delta run/ --in-place
  pema-merge --base ./xlm-v-base --undo
  pema-merge --base facebook/xlm-v-base --delta run/ --push-to-hub me/xlm-v-base-mood --private
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-merge`. Returns the exit code: 0 done, 1 refused or failed; argparse exits with 2 on wrong usage."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.delta is None and not options.undo:
        parser.error("the following arguments are required: --delta")
    if options.in_place and (options.output or options.overwrite or options.push_to_hub):
        parser.error("--in-place changes the base itself: it goes without --output, --overwrite and --push-to-hub")
    if not options.push_to_hub and (options.private or options.create_pr or options.commit_message or options.token):
        parser.error("--private, --create-pr, --commit-message and --token go with --push-to-hub")
    return run("pema-merge", lambda: _undo(options) if options.undo else _merge(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-merge",
        description="Write the full checkpoint that a base and a delta (a PEMA adapter, or full fine-tuning) make.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", required=True, help="folder with a checkpoint (safetensors or .bin, one file or shards), or a Hub id")
    add("--delta", help="what save_adapter, save_delta or a Trainer wrote, or a Hub id")
    add("--output", metavar="DIR", help="folder to write (default: DELTA/merged)")
    add("--adapter", metavar="NAME", help="which adapter, where DELTA holds several")
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub base")
    add("--dtype", choices=DTYPES, default="auto", help="of the output's numbers (default: the base's own)")
    add(
        "--no-fold", action="store_true", help="leave LoRA, DoRA, (IA)^3 and VeRA an adapter instead of folding them in"
    )
    add("--in-place", action="store_true", help="change the base's own files, with a journal to restore them from")
    add("--undo", action="store_true", help="restore a base that was merged in place, byte for byte")
    add("--push-to-hub", metavar="REPO_ID", help="push the result; without --output no merged copy lies on the disk")
    add("--private", action="store_true", help="make the repository private if it is new")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--commit-message", metavar="TEXT", help="of the commit that is pushed")
    add("--token", help="of the Hub (default: that of hf auth login, or HF_TOKEN)")
    add("--overwrite", action="store_true", help="replace an output that an earlier merge wrote")
    add("--dry-run", action="store_true", help="check and plan everything, write nothing")
    add("--verify", action="store_true", help="read the output again and compare every byte with base and delta")
    add("--allow-base-mismatch", action="store_true", help="merge although the delta was trained on another base")
    add("--json", action="store_true", help="print the report as JSON")
    add("--quiet", action="store_true", help="print nothing but errors (and the report with --json)")
    return parser


def _merge(options: argparse.Namespace) -> None:
    report = _pushed(options) if options.push_to_hub else _merged(options)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not options.quiet:
        print(_summary(report, options))


def _merged(options: argparse.Namespace) -> "MergeReport":
    from pema_adapters.merging.merge import merge_checkpoint

    return merge_checkpoint(options.base, options.delta, options.output, in_place=options.in_place, **_how(options))


def _pushed(options: argparse.Namespace) -> "MergeReport":
    from pema_adapters.hub.push import push_merged_to_hub

    return push_merged_to_hub(
        options.base,
        options.delta,
        options.push_to_hub,
        options.output,
        private=options.private or None,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        token=options.token,
        **_how(options),
    )


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """What merging and pushing share."""
    same = ("adapter", "revision", "dtype", "overwrite", "dry_run", "verify", "allow_base_mismatch")
    taken = {name: getattr(options, name) for name in same}
    return {**taken, "fold": not options.no_fold, "progress": False if options.quiet else None}


def _undo(options: argparse.Namespace) -> None:
    from pema_adapters.merging.merge import undo_merge

    undo_merge(options.base)
    if not options.quiet:
        print(f"restored {options.base}")


def _summary(report: "MergeReport", options: argparse.Namespace) -> str:
    """The report for people; its first line says what happened, its last ones how to load the result."""
    where = report.output or options.push_to_hub
    lines = [
        f"{_done(options)} {where} ({report.bytes_written / 1e6:,.1f} MB in {report.seconds:.1f} s)",
        f"  rows:    {report.rows_merged:,} of {report.vocab_size:,} in the embedding matrix",
        f"  tensors: {report.tensors_changed:,} changed, {report.tensors_copied:,} {_kept(options)}",
    ]
    if report.tensors_folded:
        lines.append(f"  folded:  the adapter's updates of {report.tensors_folded:,} weights")
    if report.max_rounding_error:
        lines.append(f"  casts:   largest rounding error {report.max_rounding_error:.3g}")
    if options.verify and not options.dry_run:
        lines.append("  verified: every byte is the base's or the delta's")
    lines += [f"  note:    {note}" for note in report.notes]
    return "\n".join(lines + _loading(report))


def _done(options: argparse.Namespace) -> str:
    if options.push_to_hub and not options.output:
        return "would push to" if options.dry_run else "pushed to"
    return "would write" if options.dry_run else "changed" if options.in_place else "wrote"


def _kept(options: argparse.Namespace) -> str:
    if options.in_place:
        return "untouched"
    return "copied byte for byte" if options.dtype == "auto" else f"as they were, in {options.dtype}"


def _loading(report: "MergeReport") -> list[str]:
    """The two lines of Python that load both, where part of the delta stays an adapter."""
    from pema_adapters.merging.usage import LeftAdapter, loading_lines

    output = Path(report.output)
    left = {name: output / "adapters" / name for name in report.adapters_left}
    if not left or not all(folder.is_dir() for folder in left.values()):
        return []
    config = json.loads((output / "config.json").read_bytes()) if (output / "config.json").exists() else {}
    adapters = {name: LeftAdapter.read(partial(_content, folder)) for name, folder in left.items()}
    lines = loading_lines(report.output, config, adapters, lambda name: f'"{left[name]}"')
    return ["  load both, in Python (import adapters, transformers):", *(f"    {line}" for line in lines)]


def _content(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None
