"""Write the tables of tools/README.md and recipes/README.md from the result files in tools/results.

    python tools/render_results.py [--check]

A table stands in a block, `<!-- results: NAME begin -->` to `<!-- results: NAME end -->`, and comes from
tools/results/NAME.json. `--check` writes nothing, and exits with 1 where a page is not what it would write.
"""

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.results import RECONSTRUCTED, RESULTS, ROOT, read_results
from harness.tables import format_table

sys.path.append(str(ROOT / "recipes"))

PAGES = (ROOT / "tools" / "README.md", ROOT / "recipes" / "README.md")
BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+) begin -->\n).*?(?P<end><!-- results: (?P=name) end -->)", re.S
)
RENDERERS = {
    "compatibility-auto": ("compatibility", "render_auto"),
    "glue": ("runs.table", "render"),
    "xnli": ("runs.table", "render"),
}
"""Module and function that render a result file, where they are not `render` of the tool that wrote it."""
SHOWN_VERSIONS = ("python", "torch", "transformers", "adapters")


def render_page(text: str) -> str:
    """Return the text of a page with the content of all of its blocks written anew."""
    return BLOCK.sub(lambda found: f"{found['begin']}{render_block(found['name'])}\n{found['end']}", text)


def render_block(name: str) -> str:
    """Return table and origin of a result file."""
    saved = read_results(RESULTS / f"{name}.json")
    if RECONSTRUCTED in saved:
        table = saved.get("markdown") or format_table(saved["table"]["header"], saved["table"]["rows"])
        return "\n\n".join(
            filter(None, [saved.get("caption"), table, saved.get("remark"), describe_reconstruction(saved)])
        )
    module, function = RENDERERS.get(name, (saved["tool"], "render"))
    table = getattr(import_module(module), function)(saved["figures"])
    return f"{table}\n\n{describe_origin(saved)}"


def describe_origin(saved: dict[str, Any]) -> str:
    """Say when, where and how a result was measured."""
    machine = saved["machine"]
    versions = ", ".join(f"{name} {saved['versions'][name]}" for name in SHOWN_VERSIONS if name in saved["versions"])
    memory = f"{machine['memory_bytes'] / 1e9:.0f} GB" if machine["memory_bytes"] else "unknown memory"
    threads = machine.get("omp_num_threads")
    limit = f", OMP_NUM_THREADS={threads}" if threads else ""
    changed = ", with uncommitted changes" if saved["dirty"] else ""
    return (
        f"Measured on {saved['date'][:10]} at commit {(saved['commit'] or 'unknown')[:7]}{changed}: {machine['cpu']}, "
        f"{machine['cores']} cores, {memory}{limit}, load {machine['load'][0]} at the end; {versions}. "
        f"Reproduce: `{saved['command']}`"
    )


def describe_reconstruction(saved: dict[str, Any]) -> str:
    """Say where a table comes from that no result file was written for."""
    return (
        f"Not measured anew: reconstructed from {saved[RECONSTRUCTED]}, where it stands since commit "
        f"{saved['commit'][:7]} of {saved['date'][:10]}; single rounds and versions were not kept. "
        f"Reproduce: `{saved['command']}`"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a page is stale")
    options = parser.parse_args()
    stale = [page for page in PAGES if update(page, is_check=options.check)]
    for page in stale:
        print(
            f"{page.relative_to(ROOT)}: {'stale: run python tools/render_results.py' if options.check else 'written'}"
        )
    return 1 if options.check and stale else 0


def update(page: Path, *, is_check: bool) -> bool:
    """Write a page unless `is_check`. Returns whether it was stale."""
    text = page.read_text(encoding="utf-8")
    new = render_page(text)
    if new != text and not is_check:
        page.write_text(new, encoding="utf-8")
    return new != text


if __name__ == "__main__":
    sys.exit(main())
