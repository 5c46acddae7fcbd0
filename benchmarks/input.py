"""The input pipeline alone: training images a second, ours against torch's DataLoader with OpenCV.

    pip install -e '.[test]'        # brings torch
    python benchmarks/input.py --root=DIR    # img_dir/train and ann_dir/train; without it, 256 px tiles are generated

Both read the same files with the augmentations of the grass setting (crop 256, flip, photometric distortion), or with
--everything all that there are (quarter turns, crops of half to twice the scale, CutMix in every other row), in
batches of 4, with as many workers as cores. The peer is written as mmsegmentation 1.2 does it: cv2.imread, float32
arithmetic for brightness, contrast and saturation, each worker a process. The files are in the page cache.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
from PIL import Image

CROP, BATCH = 256, 4
ZOOM, CUTMIX = (0.5, 2.0), 0.5  # of --everything


def generate(root: pathlib.Path, tiles: int) -> pathlib.Path:
    """Meadow tiles in the published form: RGB TIFF without compression, grey PNG labels."""
    from data_builders.meadow.generate import generate_tile

    for kind in ("img_dir", "ann_dir"):
        (root / kind / "train").mkdir(parents=True)
    for index in range(tiles):
        image, label = generate_tile(0, index, CROP)
        Image.fromarray(image).save(root / "img_dir" / "train" / f"{index}.tif")
        Image.fromarray(label).save(root / "ann_dir" / "train" / f"{index}.png")
    return root


def ours(root: pathlib.Path, workers: int, everything: bool):
    from ktda_jax.data.augment import Augmentation
    from ktda_jax.data.pipeline import train_iterator
    from ktda_jax.data.sources import FolderSource

    source = FolderSource(root, "train", num_classes=5)
    more = dict(rotate=True, zoom=ZOOM, cutmix=CUTMIX) if everything else {}
    how = Augmentation((CROP, CROP), **more)
    return train_iterator(source, augmentation=how, batch_size=BATCH, seed=0, num_threads=workers)


def peer(root: pathlib.Path, workers: int, everything: bool):
    import torch

    images = sorted((root / "img_dir" / "train").iterdir())
    labels = sorted((root / "ann_dir" / "train").iterdir())

    def convert(image, alpha=1.0, beta=0.0):
        return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def distort(image):
        rng = np.random
        if rng.randint(2):
            image = convert(image, beta=rng.uniform(-32, 32))
        first = rng.randint(2)
        if first and rng.randint(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        if rng.randint(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[:, :, 1] = convert(image[:, :, 1], alpha=rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        if rng.randint(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[:, :, 0] = (image[:, :, 0].astype(int) + rng.randint(-18, 18)) % 180
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        if not first and rng.randint(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        return image

    class Tiles(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def crop(self, index):
            image = cv2.imread(str(images[index]), cv2.IMREAD_COLOR)
            label = np.array(Image.open(labels[index]))  # mmseg reads labels with Pillow, as OpenCV expands palettes
            side = CROP
            if everything:
                factor = np.exp(np.random.uniform(*np.log(ZOOM)))
                side = min(round(CROP / factor), *label.shape)
            top = np.random.randint(image.shape[0] - side + 1)
            left = np.random.randint(image.shape[1] - side + 1)
            image, label = (x[top : top + side, left : left + side] for x in (image, label))
            if side != CROP:
                how = cv2.INTER_AREA if side > CROP else cv2.INTER_LINEAR
                image = cv2.resize(image, (CROP, CROP), interpolation=how)
                label = cv2.resize(label, (CROP, CROP), interpolation=cv2.INTER_NEAREST)
            if np.random.rand() < 0.5:
                image, label = cv2.flip(image, 1), cv2.flip(label, 1)
            if everything:
                turns = np.random.randint(4)
                image, label = (np.ascontiguousarray(np.rot90(x, turns)) for x in (image, label))
            return image, label

        def __getitem__(self, index):
            image, label = self.crop(index)
            if everything and np.random.rand() < CUTMIX:
                other, truth = self.crop(np.random.randint(len(images)))
                half = CROP * np.sqrt(np.random.rand()) / 2
                middles = np.random.randint(CROP, size=2)
                part = tuple(slice(round(max(m - half, 0)), round(min(m + half, CROP))) for m in middles)
                image, label = image.copy(), label.copy()
                image[part], label[part] = other[part], truth[part]
            image = cv2.cvtColor(distort(image), cv2.COLOR_BGR2RGB)
            return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(label.copy())

    def start(_):
        cv2.setNumThreads(0)

    loader = torch.utils.data.DataLoader(
        Tiles(), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=start,
        drop_last=True,
    )  # fmt: skip
    cv2.setNumThreads(0)
    while True:
        yield from loader


def measure(
    kind: str, root: pathlib.Path, workers: int, seconds: float, repeats: int, everything: bool
) -> list[float]:  # fmt: skip
    """Images a second in each repeat, after everything has been read once."""
    batches = {"ours": ours, "peer": peer}[kind](root, workers, everything)
    count = len(list((root / "img_dir" / "train").iterdir()))
    for _ in range(count // BATCH + 1):
        next(batches)
    rates = []
    for _ in range(repeats):
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            images += BATCH
        rates.append(images / (time.perf_counter() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--tiles", type=int, default=400, help="how many to generate without --root")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--everything", action="store_true", help="all augmentations that there are")
    parser.add_argument("--kind", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args.root, args.workers, args.seconds, args.repeats, args.everything)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or generate(pathlib.Path(scratch), args.tiles)
        medians = {}
        for kind in ("ours", "peer"):  # each in a process of its own
            command = [sys.executable, __file__, f"--kind={kind}", f"--root={root}", f"--workers={args.workers}"]
            command += [f"--seconds={args.seconds}", f"--repeats={args.repeats}", *["--everything"] * args.everything]
            rates = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            medians[kind] = statistics.median(rates)
            each = medians[kind] / max(args.workers, 1)
            print(f"{kind}: {medians[kind]:.0f} images/s ({min(rates):.0f} to {max(rates):.0f}), {each:.0f} a core")
        print(f"ours / peer: {medians['ours'] / medians['peer']:.2f}")


if __name__ == "__main__":
    main()
