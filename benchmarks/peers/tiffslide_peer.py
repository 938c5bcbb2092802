"""tiffslide, a read a patch, a handle a thread. Runs by itself, where dfx need not be."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import tiffslide


def main(asked):
    """Time reading."""
    opened = tiffslide.TiffSlide(asked["path"])
    shape = asked["shape"]
    size = round(shape * asked["mpp"] / float(opened.properties["tiffslide.mpp-x"]))
    width, height = opened.dimensions
    corners = [(x, y) for y in range(0, height, size) for x in range(0, width, size)]
    corners = sorted(corners, key=lambda c: (c[0] // size // 16, c[1], c[0]))[: asked["patches"]]

    def some(part):
        slide = tiffslide.TiffSlide(asked["path"])
        for corner in part:
            image = slide.read_region(corner, 0, (size, size), as_array=True)
            if size != shape:
                cv2.resize(image, (shape, shape), interpolation=cv2.INTER_AREA)

    start = time.perf_counter()
    with ThreadPoolExecutor(asked["threads"]) as pool:
        list(pool.map(some, [corners[i :: asked["threads"]] for i in range(asked["threads"])]))
    return {"patches_per_s": len(corners) / (time.perf_counter() - start)}


print(json.dumps(main(json.loads(sys.argv[1]))))
