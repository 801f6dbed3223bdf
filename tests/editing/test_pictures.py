"""Real pictures: of any size, with masks of their own, and results that keep what is known to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.editing.pictures import Picture, in_own_size, known_of, read_masks, read_pictures
from diffdistill.models import guidance_student, save_denoiser
from tests.builders import tiny_denoiser
from tests.scripts.calling import call

RANDOM = np.random.default_rng(0)


def picture(name="a.png", width=9, height=6):
    return Picture(name, RANDOM.integers(0, 256, (3, height, width), dtype=np.uint8))


def write(folder, name, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def test_the_centre_is_cut_and_put_back():
    given = picture(width=17, height=8)
    cut = given.fitted((8, 8))
    assert torch.equal(cut, torch.from_numpy(given.pixels[:, :, 4:12].copy()).float() / 127.5 - 1)
    result = in_own_size(given, torch.ones(3, 8, 8))
    values = ((result + 1) * 127.5).round().numpy()
    assert (values[:, :, 4:12] == 255).all() and (values[:, :, :4] == given.pixels[:, :, :4]).all()


@pytest.mark.parametrize("size", [(8, 8), (64, 40), (5, 7)])
@pytest.mark.parametrize("of_model", [False, True])
def test_what_is_known_keeps_its_bytes_in_any_size(size, of_model):
    given = picture(width=size[0], height=size[1])
    mask = np.zeros((8, 8) if of_model else (size[1], size[0]), bool)
    mask[mask.shape[0] // 2 - 1 : mask.shape[0] // 2 + 2, mask.shape[1] // 2] = True
    values = ((in_own_size(given, torch.ones(3, 8, 8), mask) + 1) * 127.5).round().byte().numpy()
    changed = (values != given.pixels).any(axis=0)
    assert changed.any() and (values[:, changed] == 255).all()
    if not of_model:
        assert not (changed & ~mask).any()


def test_a_mask_that_is_resized_loses_nothing_that_shall_be_made():
    mask = np.zeros((32, 32), bool)
    mask[13, 17] = True
    known = known_of(mask, (8, 8))
    assert known.shape == (1, 8, 8) and known.sum() == 63 and known[0, 3, 4] == 0
    assert torch.equal(known_of(mask[:8, :8], (8, 8)), torch.ones(1, 8, 8))


def test_masks_go_with_their_pictures(tmp_path):
    pictures = [picture(f"{i}.jpg", 4, 4) for i in (1, 2, 10)]
    for i in (1, 2, 10):
        write(tmp_path / "masks", f"{i}.png", np.full((4, 4), 255 * (i == 10), np.uint8))
        write(tmp_path / "numbers", f"mask{i}.png", np.full((4, 4), 255 * (i == 2), np.uint8))
    assert [bool(mask.all()) for mask in read_masks(tmp_path / "masks", pictures, (4, 4))] == [False, False, True]
    assert [bool(mask.all()) for mask in read_masks(tmp_path / "numbers", pictures, (4, 4))] == [False, True, False]
    assert [bool(mask.all()) for mask in read_masks(tmp_path / "masks/10.png", pictures, (4, 4))] == [True] * 3
    half = read_masks(None, pictures[:1], (4, 4))[0]
    assert half[:, 2:].all() and not half[:, :2].any()
    with pytest.raises(ValueError, match="no mask for 'b.png': name masks like the images, or give as many"):
        read_masks(tmp_path / "masks", [*pictures, picture("b.png", 4, 4)], (4, 4))
    with pytest.raises(ValueError, match="the mask '1.png' is 4x4, but '1.jpg' is 9x6 and the model takes 8x8"):
        read_masks(tmp_path / "masks/1.png", [picture("1.jpg")], (8, 8))
    with pytest.raises(FileNotFoundError, match="no images at"):
        read_masks(tmp_path / "nowhere", pictures, (4, 4))


def test_pictures_are_in_natural_order(tmp_path):
    for name in ("10.png", "9.png", "sub/1.png", ".hidden.png"):
        write((tmp_path / name).parent, (tmp_path / name).name, np.zeros((3, 3, 3), np.uint8))
    assert [p.name for p in read_pictures(tmp_path)] == ["9.png", "10.png", "sub/1.png"]
    assert read_pictures(tmp_path / "9.png", channels=1)[0].pixels.shape == (1, 3, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_denoiser(guidance_student(tiny_denoiser(data_shape=[3, 8, 8], num_classes=10), (0.0, 4.0)), path)
    return path


def edit(model, tmp_path, *options):
    return call("edit", f"model={model}", "num_steps=4", f"out={tmp_path / 'out'}", *options)


def bytes_of(path):
    return np.array(Image.open(path))


def test_photos_are_inpainted_each_by_its_mask_in_its_own_size(model, tmp_path):
    sizes, masks = {"a.png": (8, 8), "b.png": (21, 14)}, {}
    for name, (width, height) in sizes.items():
        write(tmp_path / "photos", name, RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))
        masks[name] = np.zeros((height, width), np.uint8)
        masks[name][2:5, 8 * (name == "b.png") : 8 * (name == "b.png") + 3] = 255
        write(tmp_path / "masks", name, masks[name])
    options = ["task=inpaint", f"images={tmp_path / 'photos'}", f"mask={tmp_path / 'masks'}"]
    done = edit(model, tmp_path, *options, "original_size=true")
    assert done.returncode == 0, done.stderr
    assert "b.png is 21x14: its centre of 14x14 is resized to 8x8" in done.stderr and "a.png" not in done.stderr
    assert (tmp_path / "out/inpaint.png").is_file()
    for name in sizes:
        before, after = (bytes_of(tmp_path / place / name) for place in ("photos", "out/inpaint"))
        changed = (before != after).any(axis=2)
        assert before.shape == after.shape and changed.any() and not (changed & (masks[name] == 0)).any()
    done = edit(model, tmp_path, *options, "num_images=1")
    assert done.returncode == 0 and bytes_of(tmp_path / "out/inpaint/a.png").shape == (8, 8, 3)


def test_strength_keeps_more_of_what_an_inpainting_begins_with(model, tmp_path):
    write(tmp_path / "photos", "a.png", RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    before, distances = bytes_of(tmp_path / "photos/a.png").astype(float), []
    for strength in (0, 0.25, 0.5, 1, None):
        given = [] if strength is None else [f"strength={strength}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            assert edit(model, tmp_path, "task=inpaint", f"images={tmp_path / 'photos'}", *given).returncode == 0
        distances.append(np.abs(bytes_of(tmp_path / "out/inpaint/a.png") - before).mean())
    assert distances[0] == 0 and 0 < distances[1] < distances[2] and distances[3] == distances[4]


UNUSED = {
    "mask": (["task=image_to_image", "mask=MASK"], "mask has no effect on task=image_to_image: it is for inpaint"),
    "repeats": (["task=style_transfer", "repeats=3"], "repeats has no effect on task=style_transfer"),
    "strength": (["task=reconstruct", "strength=0.3"], "strength has no effect on task=reconstruct"),
    "label": (["task=reconstruct", "label=3"], "label has no effect on task=reconstruct"),
    "encoder": (["task=inpaint", "encoder.model=MODEL"], "encoder.model has no effect on task=inpaint"),
    "source_prompt": (["task=inpaint", "source_prompt=cat"], "source_prompt has no effect on task=inpaint"),
    "prompt": (["task=inpaint", "prompt=cat"], "not conditioned on text: leave out prompt="),
    "a source": (["task=style_transfer", "source_prompt=cat"], "not conditioned on text: leave out source_prompt="),
    "original_size": (["task=inpaint", "original_size=true"], "original_size is for pictures: give images=PATH"),
    "background": (["task=inpaint", "background=red"], "background is for pictures: give images=PATH"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_what_a_task_does_not_read_is_refused(case, model, tmp_path):
    options, message = UNUSED[case]
    options = [option.replace("MODEL", str(model)).replace("MASK", "mask.png") for option in options]
    done = edit(model, tmp_path, "data=shapes", "data.resolution=8", *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr
