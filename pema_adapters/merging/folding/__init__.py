"""Methods that change weights (LoRA, DoRA, (IA)^3, VeRA), folded into the base's matrices a block of rows at a time.

`adapter_layers` finds the linear layers that an adapter changes, `folded_weight` computes their weights. A new method
of this kind is added in these two modules.
"""
