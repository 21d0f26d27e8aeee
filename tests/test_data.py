"""Views: the device share is torchvision's functional transforms; the randomness is keyed; datasets are what is on disk."""
import os
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as T

import data
from conftest import one_line_error, run_script, write_images
from data import BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, ORDERING, SATURATION, SIGMA, TwoViews, UserError


def reference(crop, p):
    """One sample by torchvision's own functions on a float image, in the drawn order."""
    x = crop.float() / 255
    steps = [lambda x: T.adjust_brightness(x, float(p[BRIGHTNESS])), lambda x: T.adjust_contrast(x, float(p[CONTRAST])),
             lambda x: T.adjust_saturation(x, float(p[SATURATION])), lambda x: T.adjust_hue(x, float(p[HUE]))]
    for step in data.ORDERINGS[int(p[ORDERING])]:
        x = steps[step](x)
    x = T.rgb_to_grayscale(x, 3) if p[GRAY] else x
    x = T.gaussian_blur(x, 13, float(p[SIGMA])) if p[SIGMA] > 0 else x
    x = T.hflip(x) if p[FLIP] else x
    return x


@pytest.mark.parametrize("size", [16, 32, 224])
@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.4)])
def test_augment_is_torchvisions_functional_sample_by_sample(size, jitter):
    generator = torch.Generator().manual_seed(size)
    crops = torch.randint(0, 256, (48, 3, size, size), generator=generator, dtype=torch.uint8)
    crops[0], crops[1], crops[2, 0] = 0, 255, 255     # black, white, saturated: where hue and saturation are degenerate
    crops[3:6] = crops[3:6, :1]                       # gray
    params = data.draw_params(data.keyed_uniform(10, 99, size, np.arange(48)), jitter=jitter, jitter_p=0.9, gray_p=0.3, blur_p=0.6)
    out = data.augment(crops, params)
    assert out.is_contiguous(memory_format=torch.channels_last)
    std, mean = torch.tensor(data.STD).view(3, 1, 1), torch.tensor(data.MEAN).view(3, 1, 1)
    for i in range(48):
        difference = (out[i] * std + mean - reference(crops[i], params[i])).abs().max().item()
        assert difference < 1e-3, (i, params[i], difference)


def test_augment_does_not_depend_on_the_company():
    crops = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    params = data.draw_params(data.keyed_uniform(10, 5, np.arange(40)), jitter=(.4, .4, .4, .1), jitter_p=.8, gray_p=.2, blur_p=.5)
    whole = data.augment(crops, params)
    torch.testing.assert_close(data.augment(crops[7:9], params[7:9]), whole[7:9], atol=1e-5, rtol=0)
    assert torch.equal(data.augment(crops, params), whole)


def test_parameters_are_distributed_as_the_recipe_says():
    n = 40000
    p = data.draw_params(data.keyed_uniform(10, 1, np.arange(n)), jitter=(0.4, 0.3, 1.5, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)
    share = lambda condition: condition.float().mean().item()
    near = lambda value, expected: abs(value - expected) < 0.01
    jittered = p[:, BRIGHTNESS] != 1
    assert near(share(p[:, FLIP] == 1), 0.5) and near(share(p[:, GRAY] == 1), 0.2) and near(share(jittered), 0.8)
    assert near(share(p[:, SIGMA] > 0), 0.5)
    for column, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.7, 1.3), (SATURATION, 0.0, 2.5), (HUE, -0.1, 0.1)):
        values = p[jittered, column]
        assert low <= values.min() and values.max() <= high
        assert (p[~jittered, column] == (0 if column == HUE else 1)).all()      # all four or none
        histogram = torch.histc(values, 10, low, high) / len(values)
        assert (histogram - 0.1).abs().max() < 0.01                            # uniform
    sigmas = p[p[:, SIGMA] > 0, SIGMA]
    assert 0.1 <= sigmas.min() and sigmas.max() <= 2 and (torch.histc(sigmas, 10, 0.1, 2) / len(sigmas) - 0.1).abs().max() < 0.01
    assert (torch.bincount(p[:, ORDERING].long(), minlength=24) / n - 1 / 24).abs().max() < 0.005
    assert abs(np.corrcoef(p[jittered][:, [BRIGHTNESS, CONTRAST, SATURATION, HUE]].T.numpy()) - np.eye(4)).max() < 0.02


def test_boxes_are_random_resized_crops():
    n = 20000
    boxes = data.draw_boxes(data.keyed_uniform(22, 2, np.arange(n)), np.full(n, 120), np.full(n, 160), 0.2)
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 120).all() and (left + width <= 160).all()
    area, aspect = height * width / (120 * 160), width / height
    assert 0.19 < area.min() and 0.73 < aspect.min() and aspect.max() < 1.36
    from torchvision.transforms import RandomResizedCrop
    theirs = np.array([RandomResizedCrop.get_params(torch.zeros(3, 120, 160), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    for ours, reference in zip(boxes.T, theirs.T):
        assert abs(ours.mean() - reference.mean()) < 0.05 * max(20, reference.mean())
        assert abs(ours.std() - reference.std()) < 0.1 * reference.std()


def test_box_of_an_extreme_image_is_the_largest_central_one():
    boxes = data.draw_boxes(data.keyed_uniform(22, 3, np.arange(50)), np.full(50, 10), np.full(50, 1000), 0.9)
    assert (boxes == [0, (1000 - 13) // 2, 10, 13]).all()


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (20, 31, 48), (1, 5, 8)])
def test_enlarging_is_torchvisions_resized_crop_to_one_level(height, width, size):
    images = torch.randint(0, 256, (30, 3, height, width), dtype=torch.uint8)
    boxes = data.draw_boxes(data.keyed_uniform(22, 4, np.arange(30)[:, None], np.arange(2)), np.full((30, 1), height),
                            np.full((30, 1), width), 0.2)
    crops = data.enlarge(images, boxes, size)
    for i in range(30):
        for view in range(2):
            expected = data.TF.resized_crop(images[i], *boxes[i, view].tolist(), [size, size], antialias=True)
            assert (crops[i, view].int() - expected.int()).abs().max() <= 1


def test_a_crop_is_torchvisions_resized_crop_of_its_box():
    image = torch.randint(0, 256, (90, 130, 3), dtype=torch.uint8).permute(2, 0, 1)      # in memory as decoders leave it
    for seed in range(6):
        crops, _, _ = TwoViews([(image, 0)], 64, seed)[(0, 0)]
        boxes = data.draw_boxes(data.keyed_uniform(32, data.VIEWS, seed, 0, 0, np.arange(2))[:, :22], 90, 130, 0.2)
        for crop, box in zip(crops, boxes.tolist()):
            expected = data.TF.resized_crop(image, *box, [64, 64], antialias=True)
            assert (crop.int() - expected.int()).abs().max() <= 1


def test_views_are_a_function_of_seed_epoch_and_index_alone(images):
    dataset = data.load_dataset(str(images), "train")
    views = TwoViews(dataset, 32, seed=3)
    together = views.__getitems__([(e, i) for e in (0, 1) for i in (5, 0, 7)])
    for (e, i), item in zip([(e, i) for e in (0, 1) for i in (5, 0, 7)], together):
        alone = TwoViews(dataset, 32, seed=3)[(e, i)]
        assert all(torch.equal(a, b) for a, b in zip(item[:2], alone[:2])) and item[2] == i == alone[2]
    first = views[(0, 5)]
    assert first[0].shape == (2, 3, 32, 32) and first[0].dtype == torch.uint8 and first[1].shape == (2, 8)
    assert first[1].dtype == torch.float32
    assert not torch.equal(first[0][0], first[0][1])                            # two different views
    for other in (views[(1, 5)], TwoViews(dataset, 32, seed=4)[(0, 5)]):
        assert not torch.equal(first[1], other[1])


def test_workers_change_nothing(images):
    dataset = data.load_dataset(str(images), "train")
    views = TwoViews(dataset, 24)                                               # smaller than the images: both paths are tested
    batches = list(data.schedule(len(dataset), 16, 1, 0))
    runs = [[b for b in torch.utils.data.DataLoader(views, batch_sampler=batches, collate_fn=data.collate, num_workers=n)]
            for n in (0, 2)]
    for a, b in zip(*runs):
        assert a[0].shape == (2, 16, 3, 24, 24) and a[1].shape == (2, 16, 8)
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_parts_of_the_schedule_join_to_the_global_batch():
    whole = list(data.schedule(50, 12, 3, seed=7))
    parts = [list(data.schedule(50, 12, 3, seed=7, rank=r, world=3)) for r in range(3)]
    assert len(whole) == 3 * 4
    assert whole == [a + b + c for a, b, c in zip(*parts)]
    assert whole[5:] == list(data.schedule(50, 12, 3, seed=7, first_step=5))    # resuming inside an epoch
    epochs = [[i for batch in whole[4 * e:4 * e + 4] for _, i in batch] for e in range(3)]
    assert all(len(set(e)) == 48 for e in epochs) and epochs[0] != epochs[1]


def test_keyed_numbers_are_pinned():
    """The streams must never change, or old runs could not be continued: values of this very implementation."""
    assert data.keyed_bits(1, 2, 3).tolist() == PINNED_BITS
    assert data.keyed_permutation(8, 1, 2).tolist() == PINNED_ORDER
    u = data.keyed_uniform(1000, 5, np.arange(1000))
    assert u.shape == (1000, 1000) and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 2e-3
    assert np.abs(np.corrcoef(u[:50]) - np.eye(50)).max() < 0.17                # streams of different keys: unrelated


PINNED_BITS, PINNED_ORDER = [15020427595393229491], [7, 5, 6, 1, 4, 3, 0, 2]


def test_shapes_are_reproducible_and_colour_does_not_give_the_class():
    train, val = data.load_dataset("shapes", "train"), data.load_dataset("shapes", "val")
    assert len(train) >= 4000 and len(train.classes) >= 10 and train.images.dtype == torch.uint8
    assert train.fingerprint == data.load_dataset("shapes", "train").fingerprint != val.fingerprint

    def histogram(images):                     # 4 x 4 x 4 colours: shares of each
        bins = (images.long() // 64).permute(1, 0, 2, 3).flatten(2)
        return torch.stack([torch.bincount(b, minlength=64) for b in (16 * bins[0] + 4 * bins[1] + bins[2])]).float().sqrt()

    from lineval import linear_probe
    probe = linear_probe(histogram(train.images), train.labels, histogram(val.images), val.labels, steps=600)
    assert probe["top1"] < 2 / len(train.classes), probe


def test_folders_flat_nested_and_split(tmp_path):
    write_images(tmp_path / "split", 24)
    train, val = (data.load_dataset(str(tmp_path / "split"), s) for s in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c"] and len(train) == 24 and train[0][0].shape == (3, 32, 32)
    deep = tmp_path / "deep" / "x" / "y"
    deep.mkdir(parents=True)
    Image.new("RGB", (9, 7), (255, 0, 0)).save(deep / "1.png")
    Image.new("L", (9, 7), 128).save(tmp_path / "deep" / "2.jpg")
    nested = data.load_dataset(str(tmp_path / "deep"), "train")
    assert nested.labels.tolist() == [-1, 0] and nested.classes == ["x"]
    assert nested[0][0].shape == (3, 7, 9) and nested[1][0][:, 0, 0].tolist() == [255, 0, 0]
    assert not data.has_val(str(tmp_path / "deep"))
    (tmp_path / "split" / "val").rename(tmp_path / "split" / "test")
    assert len(data.load_dataset(str(tmp_path / "split"), "val")) == 24


def test_what_unpackers_and_viewers_leave_in_folders_changes_nothing(tmp_path):
    """Folders without images would shift the labels of val against train's; hidden ones and links back have no images."""
    root = write_images(tmp_path / "split", 24)
    wanted = [data.load_dataset(str(root), split) for split in ("train", "val")]
    (root / "train" / "__MACOSX").mkdir()
    for folder in (root / "train" / "a", root / "train"):
        (folder / ".thumbnails").mkdir()
        shutil.copy(root / wanted[0].path(0), folder / ".thumbnails" / "x.png")
        (folder / "back").symlink_to(root, target_is_directory=True)
    for split, before in zip(("train", "val"), wanted):
        now = data.load_dataset(str(root), split)
        assert now.classes == before.classes and now.fingerprint == before.fingerprint
        assert torch.equal(now.labels, before.labels)
    (root / "train" / "a" / "aside").symlink_to(root / "train" / "b", target_is_directory=True)      # a link is a folder, else
    assert len(data.load_dataset(str(root), "train")) > 24


def test_links_that_lead_nowhere_or_in_circles(tmp_path, monkeypatch):
    root = write_images(tmp_path / "far" / "pictures", 12, splits=("",))
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "round").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "round").symlink_to(tmp_path / "aside", target_is_directory=True)
    (tmp_path / "near").symlink_to(root / "a", target_is_directory=True)
    assert len(data.load_dataset(str(root), "train")) == 12
    assert len(data.load_dataset(str(tmp_path / "near" / ".." / ".." / "pictures"), "train")) == 12
    monkeypatch.chdir(tmp_path / "aside")      # where a path with .. crosses the link's target
    assert len(data.load_dataset("../far/pictures", "train")) == 12
    (root / "itself.png").symlink_to("itself.png")
    (root / "gone.png").symlink_to("nowhere.png")
    dataset = data.load_dataset(str(root), "train")
    assert len(dataset) == 14
    for i in (dataset.labels < 0).nonzero().flatten():
        with pytest.raises(UserError, match="(itself|gone).png"):
            dataset[i]
    for name in ("itself", "d"):      # a class, whose disk is gone
        (root / name).symlink_to(name if name == "itself" else "/nowhere/d")
        with pytest.raises(UserError, match=f"cannot follow the link .*/{name}:"):
            data.load_dataset(str(root), "train")
        (root / name).unlink()


def test_a_folder_that_only_root_may_list(tmp_path, monkeypatch):
    root, listed = write_images(tmp_path / "disk", 12, splits=("",)), os.scandir
    for name in ("lost+found", "a"):
        (root / name).mkdir(exist_ok=True)

        def scandir(folder):
            if os.path.basename(folder) == name:
                raise PermissionError(13, "Permission denied")
            return listed(folder)
        monkeypatch.setattr(data.os, "scandir", scandir)
        if name == "a":
            with pytest.raises(UserError, match="cannot list .*/a .Permission denied"):
                data.load_dataset(str(root), "train")
        else:
            assert len(data.load_dataset(str(root), "train")) == 12


def test_what_is_forbidden_to_read_is_named(tmp_path):
    locked, user = write_images(tmp_path / "locked", 12), os.geteuid()
    os.chmod(locked, 0)
    try:
        os.seteuid(user or 65534)      # root may read anything
        for name in (locked, locked / "x"):
            with pytest.raises(UserError, match=str(name)):
                data.load_dataset(str(name), "train")
            assert not data.has_val(str(name))
    finally:
        os.seteuid(user), os.chmod(locked, 0o700)


def test_stl10s_transposed_arrays_are_read(monkeypatch):
    pictures = np.arange(2 * 3 * 96 * 96, dtype=np.uint8).reshape(2, 3, 96, 96)

    def stl10(root, split, download):
        return SimpleNamespace(data=pictures.transpose(0, 1, 3, 2), labels=np.array([4, -1]), classes=list("abcde"))
    monkeypatch.setattr(data.tv_datasets, "STL10", stl10)
    dataset = data.load_dataset("stl10", "train")
    assert dataset.labels.tolist() == [4, -1] and dataset[0][0][1, 2, 3] == pictures[0, 1, 3, 2]


def odd_files(folder):
    """Every unusual kind of image that people have, and what Pillow makes of it."""
    folder.mkdir()
    rgb = data.draw_shapes(1, 7, 40).images[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray(rgb)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "gray.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("1").save(folder / "bits.png")
    sixteen = (np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    (folder / "sixteen.pgm").write_bytes(b"P5 40 40 65535\n" + sixteen.astype(">u2").tobytes())
    picture.save(folder / "upper.JPEG")
    picture.save(folder / "a.bmp"), picture.save(folder / "a.webp"), picture.save(folder / "a.tiff"), picture.save(folder / "a.gif")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb[:30]).save(folder / "turned.jpg", exif=turned)
    return folder


def test_unusual_files_decode_as_pillow_does(tmp_path):
    dataset = data.load_dataset(str(odd_files(tmp_path / "odd")), "train")
    assert len(dataset) == 13
    for i in range(len(dataset)):
        with Image.open(dataset.path(i)) as file:
            if "sixteen" in dataset.path(i):     # not clipped at 255
                file = Image.fromarray((np.array(file) / 257).astype(np.uint8))
            expected = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        image = dataset[i][0]
        assert image.dtype == torch.uint8 and image.shape == expected.shape, dataset.path(i)
        assert (image.int() - expected.int()).abs().float().mean() < 2, dataset.path(i)


def test_twelve_bits_are_not_taken_for_sixteen(tmp_path):
    values = np.arange(0, 4096, 16).reshape(16, 16)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(np.uint8).tobytes()
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(packed)}
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    (tmp_path / "twelve.tif").write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    assert np.array_equal(data.read_image(str(tmp_path / "twelve.tif"))[0].numpy(), values >> 4)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff.*mode F.*8 or 16 bits"):
        data.read_image(str(tmp_path / "float.tiff"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is None:                                       # ends early: libjpeg would fill it with gray in silence
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:-400]
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken.jpg"):
        data.read_image(str(path))


def test_bad_datasets_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("x")
    for name, word in (("nowhere", "does not exist"), ("empty", "no images"), ("text", "no images"), ("text/readme.txt", "is a file")):
        with pytest.raises(UserError, match=word):
            data.load_dataset(str(tmp_path / name), "train")
    write_images(tmp_path / "split", 12)
    (tmp_path / "split" / "val" / "a").rename(tmp_path / "split" / "val" / "z")
    with pytest.raises(UserError, match="'z' with images.*move that one away"):
        data.load_dataset(str(tmp_path / "split"), "val")


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(data.tv_datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match="cannot download cifar10.*--data PATH"):
        data.load_dataset("cifar10", "train")


def test_data_py_lists_what_it_found_and_names_broken_files(tmp_path):
    folder = odd_files(tmp_path / "odd")
    result = run_script("data.py", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "13 images" in result.stdout and "cannot be read: 0" in result.stdout and "JPEG CMYK: 1" in result.stdout
    with Image.open(tmp_path / "view_pairs.png") as picture:
        assert min(picture.size) > 64
    (folder / "broken.jpg").write_bytes(b"no image")
    result = run_script("data.py", folder, cwd=tmp_path)
    assert "broken.jpg" in result.stdout and "cannot be read: 1" in result.stdout
    one_line_error(result, "remove or replace")


def test_data_py_without_a_dataset_says_what_to_pass(tmp_path):
    one_line_error(run_script("data.py", cwd=tmp_path), "usage: python data.py PATH")


def test_evaluation_view():
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    view = data.CenterView([(image, 4)], 224)
    expected = data.TF.center_crop(data.TF.resize(image, [256], antialias=True), [224, 224])
    assert torch.equal(view[0][0], expected) and view[0][1:] == (4, 0)
    pillow = T.center_crop(T.resize(Image.fromarray(image.permute(1, 2, 0).numpy()), 256), 224)      # as the papers' code
    assert (view[0][0].int() - torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()).abs().max() <= 1
    small = data.CenterView([(image, 4)], 32)[0][0]
    assert torch.equal(small, data.TF.resize(image, [32, 32], antialias=True))
    x = data.normalize(image[None, :, :224, :224])
    expected = T.normalize(image[:, :224, :224].float() / 255, data.MEAN, data.STD)
    torch.testing.assert_close(x[0], expected, atol=1e-6, rtol=1e-5)
