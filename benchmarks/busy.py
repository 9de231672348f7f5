"""Processes that keep cores busy, as the workers of a DataLoader do beside a training step.

Each augments made images without an end, one after the other on one thread: a random crop, which is flipped, scaled to
[0, 1] and normalised. Like a worker it is an ordinary process of the same niceness, which computes in its cache and
waits for nothing.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SIDE, CROP = 256, 224


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy: all are before the block begins, and have ended after it, also after an error."""
    command = [sys.executable, "-m", "benchmarks.busy", str(os.getpid())]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):  # a group of their own: Ctrl-C is for this process, which then ends them
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, process_group=0))
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("a busy process ended before it was busy")
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def beside(count: int) -> str:
    """What the name of a case says about them."""
    return f", beside {count} busy process{'' if count == 1 else 'es'}" if count else ""


def augment(image: np.ndarray, source: np.random.Generator) -> np.ndarray:
    """A random crop (CROP, CROP, 3) of an image of bytes, in half of the cases flipped, as float32 around 0."""
    top, left = source.integers(SIDE - CROP, size=2)
    crop = image[top : top + CROP, left : left + CROP]
    if source.random() < 0.5:
        crop = crop[:, ::-1]
    scaled = crop.astype(np.float32) / 255
    normal: np.ndarray = (scaled - scaled.mean(axis=(0, 1))) / scaled.std(axis=(0, 1))
    return normal


def main(parent: int) -> None:
    """Augment until the parent has gone, however it ended, and print a line once at it."""
    source = np.random.default_rng(0)
    images = source.integers(256, size=(16, SIDE, SIDE, 3), dtype=np.uint8)
    augment(images[0], source)
    print("busy", flush=True)
    while os.getppid() == parent:
        augment(images[source.integers(len(images))], source)


if __name__ == "__main__":
    main(int(sys.argv[1]))
