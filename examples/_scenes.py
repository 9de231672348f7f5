"""A small made archive, for examples that are run without a folder of images."""

import math
import tempfile
from pathlib import Path

import torch
from PIL import Image

CLASSES = ("field", "forest", "roofs", "runway", "water")
WRONG = 6  # every sixth image lies in the folder of another class


def make_scenes(per_class: int = 30, size: int = 32) -> Path:
    """Write an archive of striped images in class folders, and return its folder.

    Each class has its own colour and direction of stripes. One image in `WRONG` lies in the folder of the next class;
    its name says which class it shows, as in forest/wrong-field-6.png.
    """
    folder = Path(tempfile.mkdtemp(prefix="scenes-"))
    source = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    for c, name in enumerate(CLASSES):
        colour = torch.rand(3, 1, 1, generator=source)
        for i in range(per_class):
            angle = math.pi * c / len(CLASSES) + 0.1 * float(torch.randn((), generator=source))
            phase = 2 * math.pi * float(torch.rand((), generator=source))
            stripes = torch.sin(40 * (x * math.cos(angle) + y * math.sin(angle)) + phase)
            pixels = 0.5 * colour + 0.25 + 0.2 * stripes + 0.05 * torch.randn(3, size, size, generator=source)
            image = Image.fromarray((255 * pixels.clamp(0, 1)).byte().permute(1, 2, 0).numpy())
            wrong = i % WRONG == 0
            into = CLASSES[(c + 1) % len(CLASSES)] if wrong else name
            (folder / into).mkdir(exist_ok=True)
            image.save(folder / into / f"{'wrong-' if wrong else ''}{name}-{i}.png")
    print(f"no folder was given: {len(CLASSES) * per_class} made images are in {folder}")
    return folder
