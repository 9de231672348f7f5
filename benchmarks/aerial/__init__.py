"""Train an encoder from random weights on wrong labels, by several losses, in minutes on one GPU.

python -m benchmarks.aerial ARCHIVE --rate 0.5 --output FILE.csv
python -m benchmarks.aerial ARCHIVE --rate 0.5 --output FILE.csv --methods cross-entropy NTDNE-paper@0.5 --jobs 3

ARCHIVE is what `ntdne train` takes, or a .zip with one such folder of class folders. Split, noise, first weights,
schedule, augmentation and metrics are those of `ntdne train`, and so are the losses, except for cross-entropy, GCE and
NTDNE-unit-slope. What differs makes it quick: the images are on the device as bytes and a batch is augmented there as a
whole, the encoder trains in bfloat16 on a GPU, an incomplete last batch is left out, and several losses train side by
side in processes of their own.

A row for each loss and evaluated epoch is appended to the file at once, so that a killed run keeps what it has found.
Started again, the command trains the unfinished runs from their beginning.
"""
