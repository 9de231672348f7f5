"""How the loss scales with the bank, with ranks and with pieces, against the model of `benchmarks.cost`.

python -m benchmarks.scale measure       about ten minutes; into benchmarks/results/scale.json, --part for some of it
python -m benchmarks.scale table         Markdown: measured, modelled, and predicted for machines that nobody ran it on

`measure` times steps, `model` has the machines that the model is applied to, `tables` compares the two.
"""

from benchmarks.scale.tables import table

__all__ = ["table"]
