"""python tests/sheet.py: draws tests/synthetic.png, the README's sheet of synthetic charts.  Needs Pillow, which matplotlib brings."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import selfmis

PANELS = (("NORM", "old", "normal"), ("PMI", "acute", "posterior"), ("IMI", "acute", "inferior"), ("IMI", "old", "inferior"), ("ASMI", "acute", "anteroseptal"), ("ASMI", "old", "anteroseptal"))
WIDTH, COLUMNS = 860, 2


def chart(kind: str, stage: str, word: str, folder: str) -> Image.Image:
    ecg = selfmis.synthesize(1, 11, first=172, types=kind, stage=stage, severity=None if kind == "NORM" else 1.0, noise=0.4, heart_rate=66)[0][0]
    title = f"{kind} {word}" + (f" infarct, {stage}" if kind in selfmis.MI_TYPES else "")
    selfmis.plot_ecg(ecg, f"{folder}/chart.png", title=title)
    picture = Image.open(f"{folder}/chart.png").convert("RGB")
    return picture.resize((WIDTH, picture.height * WIDTH // picture.width), Image.LANCZOS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        panels = [chart(*panel, folder) for panel in PANELS]
    height = panels[0].height
    sheet = Image.new("RGB", (COLUMNS * WIDTH, -(-len(panels) // COLUMNS) * height), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel, (k % COLUMNS * WIDTH, k // COLUMNS * height))
    sheet.quantize(24, dither=Image.Dither.NONE).save(Path(__file__).with_name("synthetic.png"), optimize=True)
