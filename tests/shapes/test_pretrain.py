import pytest
import torch
from diffusers import StableDiffusionPipeline

from dpt.shapes.pretrain import main

TINY = [
    "clip.width=32 clip.layers=1 clip.heads=2 clip.train.steps=2 clip.train.batch_size=8 clip.train.evaluate_every=10",
    "vae.decoder.steps=2 vae.decoder.batch_size=2 vae.decoder.evaluate_every=10",
    "vae.channels=[8,8,8,8] vae.train.steps=2 vae.train.batch_size=2 vae.train.evaluate_every=10",
    "unet.channels=[16,16,16,16] unet.heads=[1,1,1,1] unet.num_latents=96 unet.prompts_per_category=1",
    "unet.contrastive_batch_size=4 unet.wording_batch_size=4",
    "unet.train.steps=4 unet.train.batch_size=4 unet.train.save_every=2 unet.train.evaluate_every=4 threads=1",
]


def run(folder, *extra):
    overrides = " ".join([*TINY, f"folder={folder}/run", f"output={folder}/model", *extra]).split()
    return main(["configs/shapes/pretrain.yaml", *overrides])


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.slow
def test_all_stages_make_a_pipeline_and_resuming_changes_nothing(tmp_path):
    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "cut", "stages=[clip,vae]") == 0
    assert run(tmp_path / "cut", "unet.train.steps=4", "stages=[latents]") == 0

    # stop after the checkpoint of step 2, as a kill would
    import dpt.shapes.pretraining_stages as pretrain

    original = pretrain.denoising_losses

    def dies(sd, latents, world, step, **kwargs):
        if step == 5:  # the second of the third step
            raise KeyboardInterrupt
        return original(sd, latents, world, step, **kwargs)

    pretrain.denoising_losses = dies
    try:
        assert run(tmp_path / "cut") == 130
    finally:
        pretrain.denoising_losses = original
    assert run(tmp_path / "cut") == 0
    whole, cut = (torch.load(tmp_path / name / "run/unet.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    for name, tensor in whole["average"].items():
        assert torch.equal(tensor, cut["average"][name]), name

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole/model", safety_checker=None)
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 128, 128, 3)


def test_a_wrong_key_is_one_line_and_exit_code_2(capsys):
    assert main(["configs/shapes/pretrain.yaml", "unet.chanels=[1]"]) == 2
    assert "did you mean unet.channels?" in capsys.readouterr().err


def test_bad_starts_are_one_line_and_exit_code_2(tmp_path, capsys):
    for extra, message in (
        (["init_from=nowhere"], "nowhere"),
        (["stages=[unet]"], "clip"),
        (["stages=[draw]"], "stages names 'draw'"),
        (["unet.train.steps=0"], "steps is 0"),
        (["vae.train.parts=9"], "parts is 9; it must be at most batch_size, 2"),
        (["vae.channels=[8,-8]"], "vae.channels is -8"),
        (["unet.num_latents=-1"], "unet.num_latents is -1"),
        (["clip.hard_share=nan"], "clip.hard_share is nan"),
        (["threads=0"], "threads is 0"),
    ):
        assert run(tmp_path / "x", *extra) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


@pytest.mark.slow
def test_starting_from_a_model_trains_its_unet_on(tmp_path, capsys):
    start = ["init_from=ckpt/shapes", "clip.width=128", "vae.channels=[16,32,64,64]", "unet.channels=[48,96,128,128]"]
    start += ["unet.heads=[2,3,4,4]", "unet.train.steps=1", "unet.train.lr=1e-9", "unet.num_latents=8"]
    assert run(tmp_path, *start, "stages=[clip,vae,latents,unet,export]") == 0
    before, after = (
        StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        for folder in ("ckpt/shapes", tmp_path / "model")
    )
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (after, before))
        assert all(torch.allclose(value, theirs[name], atol=1e-3) for name, value in ours.items()), part
    assert run(tmp_path, *start, "unet.train.steps=2", "stages=[unet]") == 2
    assert "begun with other settings: unet.train.steps 1 (now 2)" in capsys.readouterr().err
