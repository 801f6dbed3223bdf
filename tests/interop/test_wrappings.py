"""What training programs put around weights: the same denoiser is read through each of it."""

import pytest
import torch
from safetensors.torch import save_file

from diffdistill.interop import ForeignFileError, Hints, read_foreign
from diffdistill.models import OpenAIUNet
from tests.interop.test_adm import TINY, filled

HINTS = Hints(image_size=8, head_channels=32)


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPERS = {
    "DataParallel": lambda s: prefixed("module.", s),
    "torch.compile": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: prefixed("module._orig_mod.", s),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "Lightning": lambda s: {"state_dict": prefixed("net.", s), "optimizer_states": [], "global_step": 5},
    "ema beside": lambda s: {"model": halved(s), "ema": s, "step": 7},
    "ema_model beside": lambda s: {"model": halved(s), "ema_model": prefixed("module.", s)},
    "ema in ema": lambda s: {"ema": {"state_dict": prefixed("_orig_mod.", s)}, "state_dict": halved(s)},
    "ema by prefix": lambda s: {
        **prefixed("online_model.", halved(s)),
        **prefixed("ema_model.", s),
        "initted": torch.ones(1),
        "step": torch.zeros(1),
    },
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "unet": lambda s: {"unet": prefixed("module.", s)},
}


def halved(state):
    return {name: value / 2 for name, value in state.items()}


@pytest.fixture(scope="module")
def network():
    return filled(OpenAIUNet(img_resolution=8, img_channels=3, **TINY))


def denoised(path):
    denoiser = read_foreign(path, HINTS).denoiser
    x, sigma = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 4.0])
    with torch.no_grad():
        return denoiser(x, sigma)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_in_what_is_around_them(wrapper, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    torch.save(WRAPPERS[wrapper](network.state_dict()), tmp_path / "wrapped.pt")
    assert torch.equal(denoised(tmp_path / "wrapped.pt"), denoised(tmp_path / "plain.pt"))


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_weights_of_8_bits_are_multiplied_by_their_scales(end, network, tmp_path):
    state, expected = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, value in network.state_dict().items():
        if value.ndim < 2:
            state[name] = expected[name] = value
            continue
        scale = value.abs().max() / 448
        state[name] = (value / scale).to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('.weight')}.{end}"] = scale
        state[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(())
        expected[name] = state[name].float() * scale
    save_file(state, tmp_path / "scaled.safetensors")
    torch.save(expected, tmp_path / "expected.pt")
    torch.testing.assert_close(denoised(tmp_path / "scaled.safetensors"), denoised(tmp_path / "expected.pt"))
    save_file({**state, "nowhere.scale_weight": torch.ones(())}, tmp_path / "scaled.safetensors")
    with pytest.raises(ForeignFileError, match=r"nowhere.scale_weight is the scale of a weight that the file does not"):
        denoised(tmp_path / "scaled.safetensors")
    some = next(name for name in state if name.endswith(end))
    save_file({**state, some: torch.ones(3)}, tmp_path / "scaled.safetensors")
    with pytest.raises(ForeignFileError, match="is not one number"):
        denoised(tmp_path / "scaled.safetensors")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gguf_holds_the_weights_that_its_package_decodes(kind, network, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer, expected = gguf.GGUFWriter(tmp_path / "model.gguf", "adm"), {}
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in network.state_dict().items():
        array, stored = value.numpy(), gguf.GGMLQuantizationType.F32
        if value.ndim > 1 and value.numel() % 32 == 0:
            if array.shape[-1] % 32:  # as programs store convolutions
                writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in array.shape])
                array = array.reshape(-1, 32)
            stored = quantized
        data = gguf.quantize(array, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        expected[name] = torch.from_numpy(gguf.dequantize(data, stored)).float().reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    torch.save(expected, tmp_path / "expected.pt")
    torch.testing.assert_close(denoised(tmp_path / "model.gguf"), denoised(tmp_path / "expected.pt"))
    (tmp_path / "short.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:2000])
    with pytest.raises(ForeignFileError, match="damaged file of GGUF"):
        read_foreign(tmp_path / "short.gguf", HINTS)
