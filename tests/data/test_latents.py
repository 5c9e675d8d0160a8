import json
import shutil

import numpy as np
import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.data.__main__ import main
from dpt.data.latents import LatentFolder, verify_folder


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def cached(coco_tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("cached") / "train2014_shapes"
    for shard in ("0/2", "1/2"):
        assert main(command(coco_tree, output, "--shard", shard)) == 0
    return output


def command(tree, output, *more):
    where = ["--images", str(tree / "train2014"), "--output", str(output)]
    return ["cache-latents", "--model", "shapes", *where, "--batch_size", "3", *more]


def test_cached_latents_are_those_of_the_images(coco_tree, cached, sd):
    from dpt.data.coco import load_pixels

    names = sorted(path.stem for path in (coco_tree / "train2014").iterdir())
    assert sorted(path.stem for path in cached.glob("*.npy")) == names
    latents = LatentFolder(cached, sd, 128).read(names[4])
    expected = sd.encode_images(load_pixels(coco_tree / f"train2014/{names[4]}.jpg", 128)[None])[0]
    torch.testing.assert_close(latents, expected, atol=5e-3, rtol=5e-3)
    assert verify_folder(cached) == []


def test_a_killed_run_goes_on(coco_tree, cached, tmp_path, capsys):
    output = tmp_path / "again"
    shutil.copytree(cached, output)
    lost = sorted(output.glob("*.npy"))[3]
    content, before = lost.read_bytes(), np.load(lost)
    lost.unlink()
    assert main(command(coco_tree, output)) == 0
    assert "1 new latents" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(lost), before, atol=5e-3)  # in another batch
    lost.write_bytes(content[:-4] + b"abcd")
    (problem,) = verify_folder(output)
    assert f"{lost} differs from its checksum" == problem


def test_another_model_s_latents_are_refused(coco_tree, cached, sd, tmp_path, capsys):
    output = tmp_path / "other"
    shutil.copytree(cached, output)
    manifest = json.loads((output / "latents.json").read_text())
    (output / "latents.json").write_text(
        json.dumps(manifest | {"vae": [v + 0.1 for v in manifest["vae"]], "model": "sd14"})
    )
    assert main(command(coco_tree, output)) == 2
    assert "were made by sd14" in capsys.readouterr().err
    with pytest.raises(ValueError, match="were made by sd14"):
        LatentFolder(output, sd, 128)
    with pytest.raises(ValueError, match="size 128"):
        LatentFolder(cached, sd, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_makes_no_other_model(cached, dtype):
    assert LatentFolder(cached, load_stable_diffusion("shapes", dtype=dtype), 128).shape == (4, 16, 16)


def test_the_reference_s_folder_is_read_as_it_is(sd, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((1, 4, 16, 16), np.float32))
    np.save(tmp_path / "b.npy", np.ones((4, 8, 8), np.float32))
    folder = LatentFolder(tmp_path, sd, 128)
    assert folder.read("a").shape == (4, 16, 16)
    for stem, message in {"b": "the model's latents are", "c": "cannot be read"}.items():
        with pytest.raises(ValueError, match=message):
            folder.read(stem)


def test_bad_arguments(coco_tree, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command(coco_tree, tmp_path / "x", "--shard", "4/4"))
    assert "--shard: '4/4'" in capsys.readouterr().err
    assert main(command(coco_tree, tmp_path / "x", "--images", "/nowhere")) == 2
    assert "holds no images" in capsys.readouterr().err


def test_a_line_of_checksums_that_a_kill_cut_short(coco_tree, cached, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(cached, output)
    sums = output / "checksums_0_of_1.jsonl"
    sums.write_text('{"file": "a.npy", "sha')
    lost = sorted(output.glob("*.npy"))[3]
    lost.unlink()
    assert main(command(coco_tree, output)) == 0
    assert [json.loads(line)["file"] for line in sums.read_text().splitlines()] == [lost.name]
    assert verify_folder(output) == []


def test_latents_of_an_unknown_model_are_not_claimed(coco_tree, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((4, 16, 16), np.float16))
    assert main(command(coco_tree, tmp_path)) == 2
    assert "holds latents of an unknown model" in capsys.readouterr().err
    assert not (tmp_path / "latents.json").exists()
