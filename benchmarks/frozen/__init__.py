"""Train a head on frozen features with wrong labels among them, by twelve losses, on a CPU.

python -m benchmarks.frozen run FEATURES.npy LABELS.npy --output FILE.csv --jobs 2
python -m benchmarks.frozen table FILE.csv
python -m benchmarks.frozen plot FIGURE.png FILE.csv

`ntdne embed AID/ --encoder efficientnet-lite0 --image-size 160` makes both files. Label-dependent noise needs the class
names of an archive that the authors have a map for, AID or NWPU-RESISC45; others have `--noise uniform`.

Images are split 70/10/20, their features projected on 256 principal components, and a head of two layers trained for
30 epochs. Each loss has the learning rate that is best on held-out images with wrong labels, and then all have the
same; three also train after an audit, its suspects left out or corrected (`--stages audited`). A row for each finished
run is appended to the file at once; what is there is not run again.
"""
