"""`Artist.score` and `Artist.find`: the adapter asked about finished pictures."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

import dpt
from dpt.shapes.scenes import render
from dpt.shapes.world import ShapesWorld

EXAMPLES = [ShapesWorld("val")[index] for index in range(24)]


@pytest.fixture(scope="module")
def artist():
    return dpt.Artist.load("shapes", "ckpt/shapes-dpt/verifier")


def test_pictures_match_their_own_captions_better_than_edited_ones(artist):
    pictures = [render(example.scene) for example in EXAMPLES]
    own = artist.score(pictures, [example.caption for example in EXAMPLES])
    edited = artist.score(pictures, [example.negative.caption for example in EXAMPLES])
    assert np.mean(np.array(own) > edited) > 0.6
    assert artist.score(pictures[:1], [EXAMPLES[0].caption]) == pytest.approx(own[:1], abs=1e-4)
    assert artist.score(pictures[:1], [EXAMPLES[0].caption], timestep=500) != pytest.approx(own[:1], abs=1e-3)


def test_a_phrase_is_found(artist):
    found = []
    for example in EXAMPLES:
        expression = example.expressions[0]
        boxes = artist.find(render(example.scene), expression.text, count=2)
        assert 1 >= boxes[0][0] >= boxes[1][0] >= 0
        truth = torch.tensor(example.scene.boxes()[[expression.index]]).float()
        pair = (box_convert(box, "cxcywh", "xyxy") for box in (torch.tensor([boxes[0][1]]), truth))
        found.append(box_iou(*pair).item() >= 0.5)
    assert np.mean(found) > 0.5


def test_what_cannot_be_read_is_named(artist):
    picture = render(EXAMPLES[0].scene)
    with pytest.raises(ValueError, match="texts holds 2; 1 pictures need as many"):
        artist.score([picture], ["a", "b"])
    for images, texts, options, message in (
        ([], [], {}, "one for each of at least one picture"),
        ([picture] * 2, "ab", {}, "texts is 'ab'; it must be a list"),
        ([picture, picture[:64]], ["a", "b"], {}, "they must be uint8 arrays"),
        ([picture / 255], ["a"], {}, "they must be uint8 arrays"),
        ([picture[:60, :60]], ["a"], {}, "H is 60"),
        ([picture], ["a"], {"timestep": 1000}, "timestep is 1000; it must be a whole number at least 0 and below 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            artist.score(images, texts, **options)
    with pytest.raises(ValueError, match="needs an adapter"):
        dpt.Artist(artist.sd).find(picture, "a circle")
