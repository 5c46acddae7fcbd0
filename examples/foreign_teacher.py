"""Features of a teacher that is not ours, for a student to learn from: any PyTorch model that gives tokens.

    python examples/foreign_teacher.py DIR/img_dir/train features/mine --views=2
    python -m ktda_jax.main --config=... --config.data.root=DIR \
        --config.teacher.mode=precomputed --config.teacher.features=features/mine

Put your model in `teacher`; this one has random weights, which teach nothing. Its files may have other bands than the
student's, in another folder under the same names. Format and --views: ktda_jax/data/foreign_writer.py.
"""

import argparse
import pathlib

import numpy as np
import rasterio
import torch
import transformers

from ktda_jax.data.foreign_writer import ForeignWriter, view
from ktda_jax.data.gdal import orientation_of, upright

PATCH, TAPS = 16, (2, 4)  # px; layers, as many as you like


def teacher(bands: int) -> torch.nn.Module:
    size = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.ViTConfig(num_channels=bands, patch_size=PATCH, **size)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


@torch.no_grad()
def features(model: torch.nn.Module, image: np.ndarray) -> list[np.ndarray]:
    """image: float (H, W, bands) -> of each tap a map (h, w, C)."""
    h, w = (-(-side // PATCH) for side in image.shape[:2])
    padding = [(0, n * PATCH - side) for n, side in zip((h, w), image.shape[:2], strict=True)]
    pixels = torch.tensor(np.pad(image, [*padding, (0, 0)]), dtype=torch.float32).permute(2, 0, 1)[None]
    states = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return [states[layer][0, 1:].reshape(h, w, -1).numpy() for layer in TAPS]  # without the class token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=pathlib.Path, help="the training tiles, or what the teacher sees of them")
    parser.add_argument("features", help="the folder to write")
    parser.add_argument("--views", type=int, default=1, choices=(1, 2, 8))
    given = parser.parse_args()
    paths, model = [path for path in sorted(given.images.iterdir()) if path.suffix in (".tif", ".png", ".jpg")], None
    named = [f"layer {layer}" for layer in TAPS]
    with ForeignWriter(given.features, name="ViT of random weights", taps=named, patch=PATCH, views=given.views) as out:
        for path in paths:
            with rasterio.open(path) as file:
                pixels = upright(file.read(), orientation_of(file))
            image = np.moveaxis(pixels, 0, -1) / 127.5 - 1  # normalise as your teacher was trained
            model = model or teacher(image.shape[-1])
            out.write(path.stem, *(features(model, view(image, number)) for number in range(given.views)))


if __name__ == "__main__":
    main()
