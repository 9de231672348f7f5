"""How well the label audit finds wrong labels, beside cleanlab and a K-NN vote; and its time and memory.

python -m benchmarks.audit evidence RUNS --output benchmarks/results/audit.csv      of all trained runs under a folder
python -m benchmarks.audit features --features F.npy --labels L.npy --classes NAMES.txt    of features; else digits
python -m benchmarks.audit fit N D C      seconds and memory of the choice of sigma and of the ridge regression
python -m benchmarks.audit speed --output benchmarks/results/audit-speed.json
python -m benchmarks.audit review --features F.npy --labels L.npy --classes NAMES.txt    by n decisions; else digits
python -m benchmarks.audit findings F.npy L.npy --images FOLDER    made copies, odd images, divided and joined classes
python -m benchmarks.audit calibrate --scenes AID/    whether it knows when features cannot carry a rate; see there
python -m benchmarks.audit table                                                    Markdown of all
"""

from benchmarks.audit.tables import CALIBRATION, EVIDENCE, SPEED, table

__all__ = ["CALIBRATION", "EVIDENCE", "SPEED", "table"]
