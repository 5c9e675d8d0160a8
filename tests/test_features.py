import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dpt.backbones.blocks import block_channels, parse_feature
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features


def close(actual, expected, rtol=1e-5):
    expected = torch.as_tensor(expected)
    return torch.allclose(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.fixture(scope="module")
def unet(golden):
    return UNet2DConditionModel.from_pretrained(golden / "sd21/unet").eval().requires_grad_(False)


@pytest.mark.parametrize("file", ["unet_features", "unet_features_odd"])
def test_golden_features_of_all_blocks(golden, unet, file):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / f"{file}.npz").items()}
    inputs = (arrays["latent"], arrays["t"], Conditioning(arrays["context"]))
    blocks = parse_feature("all", unet.config)
    together, noise_pred = denoiser_features(unet, blocks, *inputs, with_noise_pred=True)
    assert close(noise_pred, arrays["noise_pred"])
    for block, feature in zip(blocks, together, strict=True):
        assert close(feature, arrays["feat_" + block.replace("down", "bottom")]), block
        assert feature.shape[1] == block_channels(block, unet.config)
        (alone,), nothing = denoiser_features(unet, (block,), *inputs)
        assert torch.equal(alone, feature), block
        assert nothing is None
    assert len(unet.up_blocks) == 4  # the twin's cuts leave the U-Net whole
    assert not any(module._forward_hooks for module in unet.modules())


def test_concatenation_stops_after_the_last_block(golden, unet):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / "unet_features.npz").items()}
    ran = []
    handle = unet.up_blocks[1].register_forward_hook(lambda *_: ran.append(1))
    inputs = (arrays["latent"], arrays["t"], Conditioning(arrays["context"]))
    down, up = denoiser_features(unet, parse_feature("down1+up0", unet.config), *inputs)[0]
    handle.remove()
    assert not ran
    assert close(down, arrays["feat_bottom1"])
    assert close(up, arrays["feat_up0"])


@pytest.mark.parametrize(
    ("feature", "message"),
    [("up4", "its blocks must be among"), ("bottom1", "must be among"), ("", "must be among"), ("up1+up1", "twice")],
)
def test_features_that_the_unet_lacks(unet, feature, message):
    with pytest.raises(ValueError, match=message):
        parse_feature(feature, unet.config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_a_hook(unet, dtype, golden):
    half = UNet2DConditionModel.from_pretrained(golden / "sd21/unet", torch_dtype=dtype).eval()
    context = Conditioning(torch.randn(2, 77, 32, dtype=dtype))
    inputs = (torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([5, 500]), context)
    (early,), _ = denoiser_features(half, ("up1",), *inputs)
    (whole,), _ = denoiser_features(half, ("up1",), *inputs, with_noise_pred=True)
    assert torch.equal(early, whole)


def test_gradients_through_checkpointing_are_the_same(golden):
    gradients = []
    for checkpointing in (False, True):
        unet = UNet2DConditionModel.from_pretrained(golden / "sd21/unet").train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        latents, context = torch.linspace(-1, 1, 2048).view(2, 4, 16, 16), Conditioning(torch.ones(2, 77, 32))
        inputs = (latents, torch.tensor([5, 500]), context)
        (feature,), _ = denoiser_features(unet, ("up1",), *inputs)
        feature.square().mean().backward()
        gradients.append({n: p.grad for n, p in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        later = name.startswith(("up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"))
        assert (gradient is None) == later, name
        if gradient is not None:
            assert torch.equal(gradient, gradients[1][name]), name


def test_up1_costs_55_percent_of_a_full_pass_of_sd21():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
        )
        inputs = (torch.empty(1, 4, 64, 64), torch.empty(1), Conditioning(torch.empty(1, 77, 1024)))
        counts = []
        for with_noise_pred in (False, True):
            with FlopCounterMode(display=False) as counter:
                denoiser_features(unet, ("up1",), *inputs, with_noise_pred=with_noise_pred)
            counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] == pytest.approx(0.5465, abs=1e-4)
