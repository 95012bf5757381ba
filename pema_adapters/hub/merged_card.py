"""The card of a merged checkpoint: what was trained, what was folded in, how it was made, how it is loaded."""

import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pema_adapters.formats.artifact import Delta
from pema_adapters.formats.checkpoint import CONFIG
from pema_adapters.hub.card import ADAPTERS_LIBRARY, LIBRARY, README, metadata, written
from pema_adapters.hub.provenance import hub_id, methods_of, origin
from pema_adapters.merging.merge import Inputs, Merge, Options
from pema_adapters.merging.others import ADAPTERS
from pema_adapters.merging.plan import PlannedFile
from pema_adapters.merging.report import MergeReport
from pema_adapters.merging.usage import LeftAdapter, loading_lines


def merged_card(existing: str, repo_id: str, inputs: Inputs, merge: Merge, options: Options) -> str:
    """README.md of a merged checkpoint. `existing`: the one in the repository, "" for none."""
    trained = metadata(_read(inputs.delta.folder))
    ours = {
        "library_name": LIBRARY,
        "base_model": hub_id(inputs.base_name, inputs.delta.config),
        "base_model_relation": "finetune",
        "tags": _tags(inputs.delta, merge.report),
        **{key: trained.get(key) for key in ("datasets", "metrics")},
    }
    inherited = metadata(_read(inputs.base_folder))
    return written(existing, repo_id, _section(repo_id, inputs, merge, options), ours, inherited)


def _tags(delta: Delta, report: MergeReport) -> list[str]:
    return [*methods_of(delta), *([ADAPTERS_LIBRARY] if report.adapters_left else [])]


def _section(repo_id: str, inputs: Inputs, merge: Merge, options: Options) -> str:
    lines = [
        "## Merged with pema_adapters",
        "",
        *_facts(inputs, merge.report, options.choices.dtype),
        "",
        "Load it:",
        "",
        "```python",
    ]
    lines += [*_loading(repo_id, merge), "```", "", "Made with:", "", "```", _command(inputs, options), "```", ""]
    return "\n".join([*lines, *origin(inputs.delta)])


def _facts(inputs: Inputs, report: MergeReport, dtype: str) -> list[str]:
    delta = inputs.delta
    base = hub_id(inputs.base_name, delta.config)
    what = (
        "full fine-tuning" if delta.kind == "full" else f"the adapter `{delta.name}` ({', '.join(methods_of(delta))})"
    )
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    facts = [f"A complete checkpoint{of}, fine-tuned: {what}.", ""]
    if report.rows_merged:
        facts.append(f"- {report.rows_merged:,} of {report.vocab_size:,} embedding rows were trained and written back.")
    if report.tensors_folded:
        facts.append(f"- The adapter's updates of {report.tensors_folded:,} weights were folded in.")
    how = "byte for byte" if dtype == "auto" else f"in {dtype}"
    facts.append(f"- {report.tensors_changed:,} tensors changed; {report.tensors_copied:,} are the base's, {how}.")
    return facts + [f"- `adapters/{name}` stays an adapter: load it as well." for name in report.adapters_left]


def _loading(repo_id: str, merge: Merge) -> list[str]:
    """The lines that load the model, or model and adapter."""
    files = {file.name: file for file in merge.plan.files}
    config = json.loads(files[CONFIG].read(0, files[CONFIG].size)) if CONFIG in files else {}
    left = {name: LeftAdapter.read(partial(_content, files, name)) for name in merge.report.adapters_left}
    lines = loading_lines(repo_id, config, left, lambda name: f'folder + "/{ADAPTERS}/{name}"')
    if not left:
        return ["import transformers", *lines]
    return ["import adapters, huggingface_hub, transformers",
            f'folder = huggingface_hub.snapshot_download("{repo_id}")', *lines]  # fmt: skip


def _content(files: Mapping[str, PlannedFile], adapter: str, name: str) -> bytes | None:
    found = files.get(f"{ADAPTERS}/{adapter}/{name}")
    return None if found is None else found.read(0, found.size)


def _command(inputs: Inputs, options: Options) -> str:
    """The command, without folders of the machine it ran on."""
    base = hub_id(inputs.base_name, inputs.delta.config) or Path(inputs.base_name).resolve().name
    delta = Path(inputs.delta_name).resolve().name if Path(inputs.delta_name).exists() else inputs.delta_name
    words = ["pema-merge", "--base", base, "--delta", delta]
    words += ["--adapter", options.adapter] if options.adapter else []
    words += ["--revision", options.revision] if options.revision else []
    words += ["--dtype", options.choices.dtype] if options.choices.dtype != "auto" else []
    words += [] if options.choices.fold else ["--no-fold"]
    words += ["--allow-base-mismatch"] if options.choices.allow_base_mismatch else []
    return shlex.join(words)


def _read(folder: Path) -> str:
    path = folder / README
    return path.read_text(errors="replace") if path.is_file() else ""
