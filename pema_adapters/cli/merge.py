"""`pema-merge`: base checkpoint + delta -> full checkpoint, streamed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-merge`. Returns the exit code: 0 done, 1 refused or failed; argparse exits with 2 on wrong usage."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.delta is None and not options.undo:
        parser.error("the following arguments are required: --delta")
    if options.in_place and (options.output or options.overwrite):
        parser.error("--in-place changes the base itself: it goes without --output and --overwrite")
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
    add("--overwrite", action="store_true", help="replace an output that an earlier merge wrote")
    add("--dry-run", action="store_true", help="check and plan everything, write nothing")
    add("--verify", action="store_true", help="read the output again and compare every byte with base and delta")
    add("--allow-base-mismatch", action="store_true", help="merge although the delta was trained on another base")
    add("--json", action="store_true", help="print the report as JSON")
    add("--quiet", action="store_true", help="print nothing but errors (and the report with --json)")
    return parser


def _merge(options: argparse.Namespace) -> None:
    from pema_adapters.merging.merge import merge_checkpoint

    report = merge_checkpoint(
        options.base,
        options.delta,
        options.output,
        adapter=options.adapter,
        revision=options.revision,
        dtype=options.dtype,
        fold=not options.no_fold,
        in_place=options.in_place,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        verify=options.verify,
        allow_base_mismatch=options.allow_base_mismatch,
        progress=False if options.quiet else None,
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not options.quiet:
        print(_summary(report, options))


def _undo(options: argparse.Namespace) -> None:
    from pema_adapters.merging.merge import undo_merge

    undo_merge(options.base)
    if not options.quiet:
        print(f"restored {options.base}")


def _summary(report: "MergeReport", options: argparse.Namespace) -> str:
    """The report for people; its first line says what happened, its last ones how to load the result."""
    done = "would write" if options.dry_run else "changed" if options.in_place else "wrote"
    lines = [
        f"{done} {report.output} ({report.bytes_written / 1e6:,.1f} MB in {report.seconds:.1f} s)",
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


def _kept(options: argparse.Namespace) -> str:
    if options.in_place:
        return "untouched"
    return "copied byte for byte" if options.dtype == "auto" else f"as they were, in {options.dtype}"


def _loading(report: "MergeReport") -> list[str]:
    """The two lines of Python that load both, where part of the delta stays an adapter."""
    lines = []
    for name in report.adapters_left:
        folder = Path(report.output, "adapters", name)
        if not folder.is_dir():
            return []
        load = "adapter" if (folder / "adapter_config.json").exists() else "head"
        active = "set_active=True, " if load == "adapter" else ""
        lines.append(f"  load both, in Python (import adapters, transformers):\n    {_model(report, folder)}")
        lines.append(f'    model.load_{load}("{folder}", {active}use_safetensors=True)')
    return lines


def _model(report: "MergeReport", adapter: Path) -> str:
    """The line that loads the checkpoint: as an adapter model where the head is flexible, else as its own class."""
    if (adapter / "head_config.json").exists():
        return f'model = adapters.AutoAdapterModel.from_pretrained("{report.output}")'
    name = _class(Path(report.output, "config.json"))
    return f'model = transformers.{name}.from_pretrained("{report.output}"); adapters.init(model)'


def _class(config: Path) -> str:
    """The Transformers class that config.json names; AutoModel where it names none."""
    found = json.loads(config.read_bytes()).get("architectures") if config.exists() else None
    name = found[0] if isinstance(found, list) and found else None
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else "AutoModel"
