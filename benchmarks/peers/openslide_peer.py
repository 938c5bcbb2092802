"""OpenSlide, a read a patch, a handle a thread. Runs by itself, where dfx need not be."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
from PIL import Image


def grid(opened, shape, mpp):
    """Size of a patch on level 0, and the corners of all in rows of strips, as dfx reads them."""
    size = round(shape * mpp / float(opened.properties["openslide.mpp-x"]))
    width, height = opened.dimensions
    corners = [(x, y) for y in range(0, height, size) for x in range(0, width, size)]
    return size, sorted(corners, key=lambda c: (c[0] // size // 16, c[1], c[0]))


def main(asked):
    """Time reading."""
    try:
        opened = openslide.OpenSlide(asked["path"])
    except openslide.OpenSlideError:  # a compression that it does not read
        return None
    shape = asked["shape"]
    size, corners = grid(opened, shape, asked["mpp"])
    corners = corners[: asked["patches"]]

    def some(part):
        slide = openslide.OpenSlide(asked["path"])
        for corner in part:
            image = slide.read_region(corner, 0, (size, size)).convert("RGB")
            if size != shape:
                image = image.resize((shape, shape), Image.Resampling.BOX)
            np.asarray(image)

    start = time.perf_counter()
    with ThreadPoolExecutor(asked["threads"]) as pool:
        list(pool.map(some, [corners[i :: asked["threads"]] for i in range(asked["threads"])]))
    return {"patches_per_s": len(corners) / (time.perf_counter() - start)}


print(json.dumps(main(json.loads(sys.argv[1]))))
