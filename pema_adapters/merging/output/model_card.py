"""The card of a merged checkpoint: what was trained, what was folded in, how it was made, how it is loaded."""

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pema_adapters.formats.checkpoint import CONFIG
from pema_adapters.formats.delta import Delta
from pema_adapters.formats.json_object import decode_json
from pema_adapters.hub.card import ADAPTERS_LIBRARY, LIBRARY, has_pema_section, parse_metadata, read_card, render_card
from pema_adapters.hub.provenance import find_hub_id, format_versions, hub_link, render_provenance
from pema_adapters.io.escaping import escape_markdown, format_code_block, format_code_span, format_python_literal
from pema_adapters.merging.job import Inputs, Merge, MergeOptions
from pema_adapters.merging.load_snippet import RemainingAdapterFiles, load_snippet
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.planning.auxiliary_files import ADAPTERS
from pema_adapters.merging.report import MergeReport


def hub_card(existing: str, repo_id: str, inputs: Inputs, merge: Merge, options: MergeOptions) -> str:
    """Render README.md of a merged checkpoint on the Hub. `existing`: the one in the repository, "" for none."""
    start = ["import transformers"]
    if merge.report.adapters_left:
        snapshot = f"folder = huggingface_hub.snapshot_download({format_python_literal(repo_id)})"
        start = ["import adapters, huggingface_hub, transformers", snapshot]
    lines = _loading(repo_id, merge, lambda name: f"folder + {format_python_literal(f'/{ADAPTERS}/{name}')}")
    section = _section(inputs, merge.report, options, [*start, *lines], render_provenance(inputs.delta))
    return _card(existing, repo_id, section, inputs, merge.report)


def folder_card(folder: Path, inputs: Inputs, merge: Merge, options: MergeOptions) -> str:
    """Render README.md of a merged checkpoint in a folder; a card that an earlier merge wrote keeps its other text.

    The base's own card is not kept, because it tells of another model; its license and language are. The text does not
    depend on where the folder lies, nor on its name. Sums of the delta would take a pass over it, and are left out.
    """
    existing = read_card(folder)
    if not has_pema_section(existing):
        existing = f"# {escape_markdown(_base_name(inputs))}, fine-tuned"
    start = "import adapters, transformers" if merge.report.adapters_left else "import transformers"
    lines = _loading(".", merge, lambda name: format_python_literal(f"./{ADAPTERS}/{name}"))
    section = _section(inputs, merge.report, options, [f"{start}  # in this folder", *lines], [format_versions()])
    return _card(existing, str(folder), section, inputs, merge.report)


def _base_name(inputs: Inputs) -> str:
    """Return the base's Hub id, else the name of its folder."""
    return find_hub_id(inputs.base_name, inputs.delta) or Path(inputs.base_name).resolve().name


def _card(existing: str, name: str, section: str, inputs: Inputs, report: MergeReport) -> str:
    trained = parse_metadata(read_card(inputs.delta.folder))
    ours = {
        "library_name": LIBRARY,
        "base_model": find_hub_id(inputs.base_name, inputs.delta),
        "base_model_relation": "finetune",
        "tags": _tags(inputs.delta, report),
        **{key: trained.get(key) for key in ("datasets", "metrics")},
    }
    return render_card(existing, name, section, ours, parse_metadata(read_card(inputs.base_folder)))


def _tags(delta: Delta, report: MergeReport) -> list[str]:
    return [*delta.methods, *([ADAPTERS_LIBRARY] if report.adapters_left else [])]


def _section(
    inputs: Inputs, report: MergeReport, options: MergeOptions, loading: list[str], provenance: list[str]
) -> str:
    lines = [
        "## Merged with pema_adapters",
        "",
        *_facts(inputs, report, options.choices.dtype),
        "",
        "Load it:",
        "",
        *format_code_block(loading, "python"),
        "",
        "Made with:",
        "",
        *format_code_block([_command(inputs, options)]),
        "",
        *provenance,
    ]
    return "\n".join(lines)


def _facts(inputs: Inputs, report: MergeReport, dtype: str) -> list[str]:
    delta = inputs.delta
    base = find_hub_id(inputs.base_name, delta)
    methods = escape_markdown(", ".join(delta.methods))
    what = "full fine-tuning" if delta.kind == "full" else f"the adapter {format_code_span(delta.name)} ({methods})"
    of = f" of {hub_link(base)}" if base else ""
    facts = [f"A complete checkpoint{of}, fine-tuned: {what}.", ""]
    if report.rows_merged:
        facts.append(f"- {report.rows_merged:,} of {report.vocab_size:,} embedding rows were trained and written back.")
    if report.tensors_folded:
        facts.append(f"- The adapter's updates of {report.tensors_folded:,} weights were folded in.")
    how = "byte for byte" if dtype == "auto" else f"in {dtype}"
    facts.append(f"- {report.tensors_changed:,} tensors changed; {report.tensors_copied:,} are the base's, {how}.")
    left = (format_code_span(f"{ADAPTERS}/{name}") for name in report.adapters_left)
    return facts + [f"- {folder} stays an adapter: load it as well." for folder in left]


def _loading(checkpoint: str, merge: Merge, where: Callable[[str], str]) -> list[str]:
    """Return the lines that load the model, or model and adapter."""
    files = {file.name: file for file in merge.plan.files}
    config = decode_json(files[CONFIG].read(0, files[CONFIG].size), Path(CONFIG)) if CONFIG in files else {}
    left = {name: RemainingAdapterFiles.read(partial(_content, files, name)) for name in merge.report.adapters_left}
    return load_snippet(checkpoint, config, left, where)


def _content(files: Mapping[str, PlannedFile], adapter: str, name: str) -> bytes | None:
    found = files.get(f"{ADAPTERS}/{adapter}/{name}")
    return None if found is None else found.read(0, found.size)


def _command(inputs: Inputs, options: MergeOptions) -> str:
    """Return the command, without folders of the machine it ran on."""
    delta = Path(inputs.delta_name).resolve().name if Path(inputs.delta_name).exists() else inputs.delta_name
    words = ["pema-merge", "--base", _base_name(inputs), "--delta", delta]
    words += ["--adapter", options.adapter] if options.adapter else []
    words += ["--revision", options.revision] if options.revision else []
    words += ["--dtype", options.choices.dtype] if options.choices.dtype != "auto" else []
    words += [] if options.choices.fold else ["--no-fold"]
    words += ["--allow-base-mismatch"] if options.choices.allow_base_mismatch else []
    return shlex.join(words)
