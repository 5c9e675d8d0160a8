import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.config import load_config
from dpt.data.collate import collate, encode_batch
from dpt.rec_text import load_rec_text_encoder
from dpt.shapes.samples import ShapesSamples
from dpt.training.assembly import make_model
from dpt.training.settings import TrainConfig
from dpt.training.validation import measure, summarize


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    config = load_config(TrainConfig, "configs/shapes/probe.yaml")
    sd = load_stable_diffusion("shapes")
    rec_text = load_rec_text_encoder("clip", sd, with_model=True)
    torch.manual_seed(0)
    model = make_model(config, "probe", sd, rec_text, None)
    samples = ShapesSamples(sd, tmp_path_factory.mktemp("cache"), num_samples=10, split="val")
    return model, sd, rec_text, samples


def test_records_do_not_depend_on_batches_or_processes(parts):
    options = {"timesteps": [500], "num_samples": 10}
    for task in ("itm", "rec"):
        whole = measure(*parts, task=task, batch_size=10, **options)
        assert [record["id"] for record in whole] == list(range(10))
        assert whole == measure(*parts, task=task, batch_size=3, **options)
        several = measure(*parts, task=task, batch_size=3, timesteps=[100, 500], num_samples=10)
        assert [record for record in several if record["timestep"] == 500] == whole
        shares = [measure(*parts, task=task, batch_size=4, shard=(k, 2), **options) for k in range(2)]
        assert sorted(shares[0] + shares[1], key=lambda r: r["id"]) == whole
    few = measure(*parts, task="itm", timesteps=[500], num_samples=4, batch_size=4)
    assert [record["id"] for record in few] == [0, 3, 6, 9]


def test_what_is_compared_shares_its_noise(parts):
    """Scores of a sample whose negatives are the positive itself are equal, so neither wins."""
    model, sd, rec_text, samples = parts
    sample = samples.get(0, 0)
    sample.images[1] = sample.images[0]
    sample.captions = (sample.captions[0],) * 3
    inputs = encode_batch(collate([sample]), sd, rec_text, seed=0, timesteps=(500, 500))
    itm = model.eval().tasks[0]
    scores = itm.scores(model.adapter, model.queries(inputs, itm.measured), inputs)
    torch.testing.assert_close(scores, scores[:, :1].expand(-1, 3), rtol=1e-5, atol=1e-6)


def test_figures_are_keyed_by_sample_and_timestep():
    def row(number, timestep, **figures):
        return {"id": number, "timestep": timestep} | figures

    records = {
        "itm": [
            *(row(1, 500, text=True), row(2, 500, text=False), row(1, 500, text=True)),
            *(row(1, 100, text=False), row(2, 100, text=False)),
        ],
        "rec_refcoco": [row(1, 500, precision_at_1=True)],
    }
    figures = summarize(records, mean_over=[100, 500])
    assert figures["itm_text"] == 0.5  # the sample that two processes measured counts once
    assert figures["itm_text_mean"] == 0.25
    assert figures["itm_text_mean_low"] == 0
    assert figures["itm_text_mean_high"] == 0.5
    assert figures["rec_refcoco_precision_at_1"] == 1


def test_tuning_on_a_cpu_chooses_the_faster_attention(parts):
    _, _, rec_text, _ = parts
    sd = load_stable_diffusion("shapes")
    make_model(load_config(TrainConfig, "configs/shapes/tune.yaml"), "tune", sd, rec_text, None)
    kinds = {name: type(processor).__name__ for name, processor in sd.denoiser.attn_processors.items()}
    fused = {name for name, kind in kinds.items() if kind == "AttnProcessor2_0"}
    assert fused == {name for name in kinds if "attn1" in name and name.startswith(("down_blocks.0", "up_blocks.3"))}
    assert set(kinds.values()) == {"AttnProcessor", "AttnProcessor2_0"}
