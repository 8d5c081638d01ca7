"""Small generated texts."""

import random
from pathlib import Path

WORDS = "the loss of a step is summed over tokens and divided by their number é 😀 42".split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 5 to 60 words, all different."""
    draw = random.Random(seed)
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for n in range(count)]


def write_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text)
    return folder
