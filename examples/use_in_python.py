"""A trained model in your own program: an image in, labels and probabilities out, drawn in the classes' colours.

python examples/use_in_python.py WORKDIR tile.png labels.png
"""

import argparse
import sys

import numpy as np
from PIL import Image

import ktda_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the workdir of a training, converted weights, or a .pth")
    parser.add_argument("image", help="8-bit RGB")
    parser.add_argument("output", help="the PNG to write")
    given = parser.parse_args()

    try:
        model = ktda_jax.load_pretrained(given.model)
        result = model.predict(given.image)  # or arrays: uint8 (H, W, 3), batches (B, H, W, 3)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    classes = model.classes or tuple(f"class {k}" for k in range(result.probabilities.shape[-1]))
    sure = result.probabilities.max(-1)  # float32 (H, W)
    for number, name in enumerate(classes):
        mine = result.labels == number
        if mine.any():
            print(f"{name:24} {mine.mean():7.1%} of the image, {sure[mine].mean():.2f} probable on average")
    drawn = Image.fromarray(result.labels)  # class numbers, shown in colours by any viewer
    if model.palette:
        drawn.putpalette(np.array(model.palette, np.uint8).tobytes())
    try:
        drawn.save(given.output)
    except (OSError, ValueError) as error:  # such as .jpg, which has no palette
        sys.exit(f"error: {given.output}: {error}")


if __name__ == "__main__":
    main()
