"""From base and delta to a plan: names are matched, shapes checked, and every output file is laid out.

`planner.plan_merge` is the way in; `weight_files.plan_weight_files` plans the tensors, `config_files` the JSON files,
`auxiliary_files` all others. Everything that can be refused is refused here, before the first byte is written.
"""
