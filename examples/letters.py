"""Images of letters, drawn in Pillow's own font, turned, shifted and noisy: data for image models without a download.

python examples/letters.py --output letters --images 100       # of each letter, to learn from; 25 to test on
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABEFGHKRSZ"
SIZE = 32  # pixels
TEST = 25  # images of a letter


def draw(letter: str, random: Random) -> Image.Image:
    """Draw a letter on a dark ground with random angle, place, brightness and noise."""
    image = Image.new("L", (SIZE, SIZE), random.randrange(60))
    font = ImageFont.load_default(size=random.randrange(16, 24))
    place = (SIZE // 2 + random.randrange(-3, 4), SIZE // 2 + random.randrange(-3, 4))
    ImageDraw.Draw(image).text(place, letter, random.randrange(140, 256), font, anchor="mm")
    noise = Image.frombytes("L", (SIZE, SIZE), random.randbytes(SIZE * SIZE))
    return Image.blend(image.rotate(random.uniform(-15, 15)), noise, 0.2).convert("RGB")


def images(count: int, seed: int) -> Dataset:
    """Draw `count` images of each letter; the letters are the classes."""
    random = Random(seed)
    labels = [label for label in range(len(LETTERS)) for _ in range(count)]
    columns = {"image": [draw(LETTERS[label], random) for label in labels], "label": labels}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[*LETTERS])})
    return Dataset.from_dict(columns, features=features)


def write(folder: Path, count: int) -> None:
    """Write the splits train and test as `datasets` saves them; FOLDER/SPLIT/CLASS/FILE.png would do as well."""
    DatasetDict(train=images(count, seed=0), test=images(TEST, seed=1)).save_to_disk(folder)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Draw images of letters.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--images", type=int, default=100, help="of a letter, to learn from (default: %(default)s)")
    args = parser.parse_args()
    write(args.output, args.images)
    print(f"{args.output}: {args.images + TEST} images of each of {len(LETTERS)} letters")


if __name__ == "__main__":
    main()
