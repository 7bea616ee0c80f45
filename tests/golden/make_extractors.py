"""Makes inception.npz and dinov2.npz: features of random networks by PyTorch implementations that are not ours.

Runs where torch, torchvision 0.28, pytorch-fid 0.3.0 and transformers (4.57 or 5) are, from this folder; the tests take
:func:`numbers` and :func:`images` from here.
"""

import pathlib
import zlib
from unittest import mock

import numpy as np

HERE = pathlib.Path(__file__).parent
# Of the random ViTs.
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def numbers(name, shape):
    """A parameter as its name says, such that activations stay near 1."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) == 1:
        factor = name.endswith((".weight", ".running_var", ".lambda1"))
        values = random.uniform(0.5, 1.5, shape) if factor else 0.1 * random.standard_normal(shape)
    elif name.startswith("embeddings.") and len(shape) == 3:  # position embeddings, the class token
        values = 0.5 * random.standard_normal(shape)
    else:
        gain = 2 if ".conv." in name else 1  # before a ReLU
        values = random.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
    return values.astype(np.float32)


def images(channels, height, width, count=2):
    """[count, height, width, channels] uint8, smooth and noisy parts."""
    random = np.random.RandomState(channels * height + width)
    coarse = random.uniform(0, 255, (count, 4, 4, channels)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
    noise = random.normal(0, 20, (count, height, width, channels))
    return np.clip(coarse[:, :height, :width] + noise, 0, 255).astype(np.uint8)


INCEPTION_INPUTS = {"rgb": (3, 32, 32), "grey": (1, 40, 36), "large": (3, 310, 330)}
DINOV2_INPUTS = {"rgb": (3, 32, 32), "grey": (1, 28, 40), "large": (3, 256, 300)}


def bilinear(image, size):
    """[H, W, C] -> [size, size, C] float64: the source of row i is row i * H / size, likewise columns."""
    for axis in (0, 1):
        image = np.moveaxis(image, axis, 0)
        at = np.arange(size) * (len(image) / size)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, len(image) - 1)
        weight = (at - low)[:, None, None]
        image = np.moveaxis(image[low] * (1 - weight) + image[high] * weight, 0, axis)
    return image


def make_inception():
    import pytorch_fid.inception as fid
    import torch

    with mock.patch.object(fid, "load_state_dict_from_url"), mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = fid.fid_inception_v3().eval().requires_grad_(False)  # without the weights of the Internet
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(numbers(name, value.shape)))
    pooled = {}
    network.avgpool.register_forward_hook(lambda _, __, y: pooled.update(y=y.flatten(1)))
    out = {}
    for key, shape in INCEPTION_INPUTS.items():
        x = np.stack([bilinear(np.float64(image), 299) for image in images(*shape)])
        x = ((x - 128) / 128).repeat(3 // shape[0], -1).transpose(0, 3, 1, 2)
        logits = network(torch.from_numpy(x.astype(np.float32))) - network.fc.bias
        out |= {f"{key}/features": pooled["y"].numpy(), f"{key}/logits": logits.numpy()}
        print(key, {name: (value.mean(), value.std(axis=0).mean()) for name, value in out.items() if key in name})
    np.savez(HERE / "inception.npz", **out)


def dinov2(swiglu=False, image_size=518):
    """The network of transformers with the weights of the file that it would write."""
    import tempfile

    import safetensors.torch
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**TINY, image_size=image_size, use_swiglu_ffn=swiglu)
    with tempfile.TemporaryDirectory() as folder:
        Dinov2Model(config).save_pretrained(folder)
        path = pathlib.Path(folder, "model.safetensors")
        state = safetensors.torch.load_file(path)
        state = {name: torch.from_numpy(numbers(name, value.shape)) for name, value in state.items()}
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        return Dinov2Model.from_pretrained(folder).eval().requires_grad_(False), state


def make_dinov2():
    import PIL.Image
    import torch

    def pixels(shape):
        """As dgm-eval (Stein et al. 2023) prepares them."""
        x = [PIL.Image.fromarray(image.squeeze()).convert("RGB") for image in images(*shape)]
        x = np.stack([np.asarray(image.resize((224, 224), PIL.Image.Resampling.BICUBIC)) for image in x])
        x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return torch.from_numpy(x.astype(np.float32).transpose(0, 3, 1, 2))

    out = {}
    for name in ("transformers", "swiglu", "original"):
        network, state = dinov2(swiglu=name == "swiglu")
        if name == "original":  # scales by (16 + 0.1) / 37; a network for 224 pixels takes the result as it is
            network, _ = dinov2(image_size=224)
            first, rest = state["embeddings.position_embeddings"].split([1, 37 * 37], dim=1)
            rest = rest.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
            factor = (16 + 0.1) / 37
            rest = torch.nn.functional.interpolate(rest, scale_factor=(factor, factor), mode="bicubic")
            positions = torch.cat([first, rest.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
            network.embeddings.position_embeddings.copy_(positions)
        for key, shape in DINOV2_INPUTS.items():
            out[f"{name}/{key}"] = network(pixels(shape)).pooler_output.numpy()
            print(name, key, out[f"{name}/{key}"].std(), np.abs(out[f"{name}/{key}"]).max())
    np.savez(HERE / "dinov2.npz", **out)


if __name__ == "__main__":
    make_inception()
    make_dinov2()
