"""TIAToolbox: its data set and loader, or its DeepFeatureExtractor. Runs by itself, where dfx need not be."""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from tiatoolbox.models.dataset import WSIPatchDataset
from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor
from tiatoolbox.models.models_abc import ModelABC

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


class Net(ModelABC):
    """resnet18 of timm, in the form that TIAToolbox asks for."""

    def __init__(self, weights):
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=0)
        self.net.load_state_dict(load_file(weights))

    def forward(self, x):
        """Features."""
        return self.net(x)

    @staticmethod
    def preproc(image):
        """Bytes to normalised floats."""
        return (image.astype(np.float32) / 255 - MEAN) / STD

    @staticmethod
    def infer_batch(model, batch_data, *, device="cpu"):
        """Features of a batch, in a list as its own backbones give them."""
        model.eval()
        with torch.inference_mode():
            return [model(batch_data.to(device).type(torch.float32).permute(0, 3, 1, 2).contiguous()).cpu().numpy()]


def read(asked):
    """Time its loader with as many workers, started before the clock."""
    data = WSIPatchDataset(
        input_img=Path(asked["path"]),
        patch_input_shape=(asked["shape"],) * 2,
        stride_shape=(asked["shape"],) * 2,
        resolution=asked["mpp"],
        units="mpp",
        auto_get_mask=False,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=64, num_workers=asked["threads"])
    batches = iter(loader)
    n = len(next(batches)["image"])
    start, n = time.perf_counter(), 0
    for batch in batches:
        n += len(batch["image"])
        if n >= asked["patches"]:
            break
    return {"patches_per_s": n / (time.perf_counter() - start)}


def encode(asked):
    """Time its engine, planning and writing included."""
    extractor = DeepFeatureExtractor(
        Net(asked["weights"]), batch_size=64, num_workers=asked["threads"], device="cpu", verbose=False
    )
    mask = np.load(asked["mask"])
    start = time.perf_counter()
    out = extractor.run(
        [Path(asked["path"])],
        masks=[mask],
        patch_mode=False,
        patch_input_shape=(asked["shape"],) * 2,
        input_resolutions=[{"resolution": asked["mpp"], "units": "mpp"}],
        save_dir=Path(asked["out"]),
        output_type="zarr",
    )
    seconds = time.perf_counter() - start
    import zarr

    return {"patches_per_s": zarr.open(str(next(iter(out.values()))))["features"].shape[0] / seconds}


if __name__ == "__main__":
    logging.disable()
    asked = json.loads(sys.argv[1])
    print(json.dumps(encode(asked) if "weights" in asked else read(asked)))
