"""Settings: their bounds, and what becomes of what is typed."""

import pytest

import train_probe
from dpt.config import AdapterConfig, DPTConfig, load_config, save_config
from dpt.evaluation.plan import Experiment
from dpt.shapes.settings import PretrainConfig
from dpt.training.settings import TrainConfig


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(
    "name",
    [
        *("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries_itm", "num_queries_rec"),
        *("contrastive_dim", "fusion_dim", "fusion_size", "text_dim", "rec_text_dim"),
    ],
)
def test_sizes_of_an_adapter_are_bounded_on_both_sides(name):
    """A file's config may say anything, and memory is taken for it."""
    for value in (-1, 0, 10**7, 10**400):
        with pytest.raises(ValueError, match=f"adapter.{name} is {value}; it must be"):
            AdapterConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"in_channels": [-1]}}, "adapter.in_channels is -1"),
        ({"adapter": {"in_channels": [1280, 10**9]}}, "adapter.in_channels is 1000000000"),
        ({"adapter": {"in_channels": []}}, "adapter.in_channels are 0"),
        ({"adapter": {"in_channels": [1] * 10**5}}, "adapter.in_channels are 100000"),
        ({"itm_layer": -99}, "itm_layer is -99; the adapter has 1 decoder layers"),
        ({"itm_layer": 1}, "itm_layer is 1"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": 10**9}, "lora_rank is 1000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"control": "luck"}, "control is 'luck'; it must be none, random_unet"),
    ],
)
def test_configs_of_weights_are_checked(settings, message):
    DPTConfig(itm_layer=1, adapter=AdapterConfig(dec_layers=2))
    with pytest.raises(ValueError, match=message):
        DPTConfig(**settings | {"adapter": AdapterConfig(**settings.get("adapter", {}))})


@pytest.mark.parametrize("text", ["2024_05_01", "007", "3.10", "v1 # test", "yes", "1e3", "null", "a: b", "[x", "${b}"])
def test_text_is_taken_as_it_is_typed(tmp_path, text):
    assert load_config(TrainConfig, None, [f"run_name={text}"]).run_name == text
    assert load_config(TrainConfig, None, [f"run_name='{text}'"]).run_name == text  # in YAML's quotes
    arm = load_config(Experiment, None, [f"more_arms.base.about={text}"]).more_arms["base"]
    assert arm.about == text
    if text in ("2024_05_01", "007", "3.10", "yes", "1e3"):
        (tmp_path / "a.yaml").write_text(f"run_name: {text}\nsamples: {{prompts: [{text}, {text}]}}\ntracker: {text}")
        config = load_config(TrainConfig, tmp_path / "a.yaml", [f"model.revision={text}", f"lora.blocks=[{text}]"])
        assert (config.run_name, config.samples.prompts, config.tracker) == (text, [text, text], text)
        assert (config.model.revision, config.lora.blocks) == (text, [text])


@pytest.mark.parametrize("words", [["data.root=~/coco"], ["data={root: ~/coco}"], ["data.val_expressions=[~/coco]"]])
def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", "/home/me")
    data = load_config(TrainConfig, None, words).data
    assert "/home/me/coco" in (data.root, *data.val_expressions)
    (tmp_path / "a.yaml").write_text("data: {root: ~}\ntracker:")
    config = load_config(TrainConfig, tmp_path / "a.yaml", ["init_from=null", "model.revision="])
    assert (config.data.root, config.tracker, config.init_from, config.model.revision) == (None, None, None, None)


def test_numbers_lists_and_parts_are_read_by_their_type(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeffoptim: {<<: &one {lr: 1e-3, steps: 60_000}, steps: 5, betas: [.5, 9_0e-2]}\ndata: {num_samples: null}"
        "\nloss: {weights: {bbox: 3}, align_to_padding: yes}"
    )
    config = load_config(TrainConfig, path, ["optim={warmup_steps: 010}", "optim.epochs=2", "adapter={}"])
    optim = config.optim
    assert (optim.lr, optim.steps, optim.betas, optim.warmup_steps, optim.epochs) == (1e-3, 5, [0.5, 0.9], 10, 2.0)
    assert (config.loss.weights.bbox, config.loss.weights.giou, config.loss.align_to_padding) == (3.0, 2.0, True)
    save_config(config, tmp_path / "b.yaml")
    assert load_config(TrainConfig, tmp_path / "b.yaml") == config
    assert load_config(PretrainConfig, None, ["unet.train.parts=4"]).unet.train.ema == PretrainConfig().unet.train.ema


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.dim_feedforward=0"], "adapter.dim_feedforward is 0; it must be a whole number at least 1"),
        (["adapter.enc_layers=10000000"], "adapter.enc_layers is 10000000"),
        (["optim.batch_size=1000000000"], "optim.batch_size is 1000000000"),
        (["optim.gradient_accumulation_steps=1000000000"], "at most 4096"),
        (["data.num_workers=100000"], "data.num_workers is 100000"),
        (["data.num_samples=1000000000000"], "data.num_samples is 1000000000000"),
        (["lora.rank=1000000"], "lora.rank is 1000000"),
        (["samples.num_images=1000000"], "samples.num_images is 1000000"),
        (["samples.correction_factor=inf"], "samples.correction_factor is inf"),
        (["seed=99999999999"], "seed is 99999999999"),
        (["optim.steps=" + "9" * 400], "optim.steps is 999"),
        (["optim.betas=[0.9, nan]"], "optim.betas is nan"),
        (["optim=null"], "optim: expected object, got null"),
        (["optim=5"], "optim: expected object, got int"),
        (["lora.blocks=up1"], "lora.blocks: expected array, got str"),
        (["lora.blocks=[[up1]]"], "lora.blocks[0]: expected str, got array"),
        (["optim.lr=fast"], "optim.lr is 'fast'; it must be a number"),
        (["resume=perhaps"], "resume is 'perhaps'; it must be true or false"),
        (["optim.lr=!!python/object/apply:os.system [ls]"], "no YAML"),
        (["samples.prompts=" + "[" * 100_000], "nested too deeply"),
        (["optim={lr: 1, lr: 2}"], "duplicate key lr"),
        (["run_name="], "run_name is empty"),
        (["run_name=\udcff"], "no UTF-8 text"),
        (["data.whereabouts_of_it=1"], "known ones there: kind, num_samples"),
        (["=1"], "unknown key"),
        (["steps"], "is not of the form key=value"),
        (["data.latent_sample=posterior"], "data.latent_sample is 'posterior'"),
        (["data.latent_sample=mode"], "it must be mean or posterior"),
    ],
)
def test_settings_that_cannot_be_are_one_line(capsys, words, message):
    assert train_probe.main(["configs/shapes/probe.yaml", *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_config_that_merges_itself_over_and_over_takes_no_memory(tmp_path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 20))
    for text in (laughs, laughs.replace("[x]", "{x: 1}"), "data: &a {<<: *a}", "samples: {prompts: &a [*a]}"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"it cannot be read|unknown key|expected str"):
            load_config(TrainConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize("words", [["--pretrained_model_name_or_path", "x"], ["--train_batch_size=8", "--random_flip"]])
def test_the_reference_s_flags_are_told_where_settings_are(capsys, words):
    assert train_probe.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{words[0]} is no flag: settings are key=value" in error
    assert "docs/fidelity.md" in error
