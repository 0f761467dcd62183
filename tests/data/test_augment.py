"""Per-sample random views: exact when switched off, in range, reproducible, right in each change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wscl_fast.data import Augment, AugmentConfig
from wscl_fast.data.augment import _grid, _hue_rotation

OFF: dict[str, Any] = {
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter": 0.0,
    "greyscale": 0.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}


def _images(n: int = 16, height: int = 12, width: int = 12) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def _views(images: Tensor, views: int = 1, seed: int = 0, **config: Any) -> Tensor:
    augment = Augment(AugmentConfig(**(OFF | config)))
    return augment(images, generator=torch.Generator().manual_seed(seed), views=views)


def test_everything_off_is_the_picture() -> None:
    images = _images()
    assert torch.allclose(_views(images)[:, 0], images / 255, atol=1e-5)


def test_normalisation_is_folded_in() -> None:
    images = _images()
    config = AugmentConfig(**(OFF | {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}))
    expected = (images / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(
        3, 1, 1
    )
    augment = Augment(config)
    assert torch.allclose(augment.normalise(images), expected, atol=1e-6)
    assert torch.allclose(augment(images, generator=torch.Generator(), views=1)[:, 0], expected, atol=1e-4)


def test_shape_dtype_and_range() -> None:
    out = Augment()(_images(5, 16, 24), generator=torch.Generator().manual_seed(0), views=3)
    assert out.shape == (5, 3, 3, 16, 24)
    assert out.dtype == torch.float32
    assert out.min() >= -2
    assert out.max() <= 2


def test_same_generator_state_same_views() -> None:
    images, augment = _images(), Augment(AugmentConfig(rotate=20, blur=0.5))
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    first = augment(images, generator=generator)
    assert not torch.equal(first, augment(images, generator=generator))
    assert torch.equal(first, augment(images, generator=generator.set_state(state)))


def test_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    Augment(AugmentConfig(blur=1.0))(_images(), generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


def test_settings_do_not_shift_the_stream() -> None:
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    Augment(AugmentConfig())(_images(), generator=generators[0])
    Augment(AugmentConfig(**OFF))(_images(), generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_each_sample_and_view_has_its_own_parameters() -> None:
    one = _images(1).expand(32, -1, -1, -1)
    views = Augment()(one, generator=torch.Generator().manual_seed(0), views=2).flatten(0, 1)
    assert torch.unique(views, dim=0).shape[0] == 64


def test_flip() -> None:
    images = _images()
    assert torch.allclose(_views(images, flip=1.0)[:, 0], images.flip(3) / 255, atol=1e-4)
    some = (_views(_images(400), flip=0.5)[:, 0] - _images(400) / 255).abs().amax((1, 2, 3)) > 1e-3
    assert 0.4 < some.float().mean() < 0.6


def test_half_turn_flips_both_axes() -> None:
    images = _images()
    turned = torch.stack([_views(images[:1], seed=s, rotate=180.0)[0, 0] for s in range(60)])
    upside_down = images[0].flip(1, 2) / 255
    assert (turned - upside_down).abs().amax((1, 2, 3)).min() < 0.5  # some angle comes near 180°
    assert (turned - images[0] / 255).abs().amax((1, 2, 3)).max() > 0.5


def test_rotation_of_a_wide_picture_keeps_shapes() -> None:
    """A disc stays a disc, whatever the aspect: its second moments stay equal in x and y."""
    height, width = 40, 80
    y, x = torch.meshgrid(torch.arange(height) - 19.5, torch.arange(width) - 39.5, indexing="ij")
    disc = ((x**2 + y**2 < 12**2) * 255).to(torch.uint8).expand(8, 3, -1, -1)
    weight = _views(disc, rotate=180.0)[:, 0, 0]
    moment_x, moment_y = ((weight * axis**2).sum((1, 2)) / weight.sum((1, 2)) for axis in (x, y))
    assert torch.allclose(moment_x, moment_y, rtol=0.02)
    assert torch.allclose(moment_x, torch.full((8,), 36.0), rtol=0.05)  # r²/4


def test_crops_stay_inside_and_cover_the_asked_area() -> None:
    """A ramp in x and in y tells the crop's place: its values never leave the ramp's."""
    ramp = torch.arange(64).mul(4).to(torch.uint8)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)])
    views = _views(images.expand(200, -1, -1, -1), scale=(0.25, 0.5), ratio=(0.5, 2.0))[:, 0] * 255 / 4
    span_x = views[:, 0, 0, -1] - views[:, 0, 0, 0]
    span_y = views[:, 1, -1, 0] - views[:, 1, 0, 0]
    area = (span_x / 63) * (span_y / 63)
    assert views.min() > -1e-3
    assert views.max() < 63 + 1e-3
    assert area.min() > 0.22
    assert area.max() < 0.52
    ratio = span_x / span_y
    assert ratio.min() > 0.48
    assert ratio.max() < 2.1
    assert ratio.min() < 0.6
    assert ratio.max() > 1.6


def test_grid_is_affine_grid() -> None:
    affine = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        _grid(affine, 5, 7), F.affine_grid(affine, [4, 3, 5, 7], align_corners=False), atol=1e-5
    )


def test_greyscale_is_the_luma() -> None:
    images = _images()
    luma = (images / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(_views(images, greyscale=1.0)[:, 0], luma.expand(-1, 3, -1, -1), atol=1e-4)


def test_brightness_scales() -> None:
    images = _images() // 4  # far from the clamp
    ratio = _views(images, jitter=1.0, brightness=0.5, contrast=0, saturation=0, hue=0)[:, 0] / (images / 255)
    for sample in ratio:
        values = sample[sample.isfinite()]
        assert values.std() < 1e-3
        assert 0.5 <= values.mean() <= 1.5


def test_contrast_keeps_the_mean_luma() -> None:
    images = _images() // 2 + 64
    views = _views(images, jitter=1.0, brightness=0, contrast=0.4, saturation=0, hue=0)[:, 0]
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    before, after = ((x * luma).sum(1).flatten(1) for x in (images / 255, views))
    assert torch.allclose(before.mean(1), after.mean(1), atol=1e-4)
    factor = after.std(1) / before.std(1)
    assert factor.min() > 0.6 - 1e-3
    assert factor.max() < 1.4 + 1e-3
    assert factor.std() > 0.05


def test_saturation_keeps_the_luma_of_each_pixel() -> None:
    images = _images() // 2 + 64
    views = _views(images, jitter=1.0, brightness=0, contrast=0, saturation=0.4, hue=0)[:, 0]
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert torch.allclose((views * luma).sum(1), (images / 255 * luma).sum(1), atol=1e-4)
    assert (views - images / 255).abs().max() > 0.02


def test_hue_leaves_grey_and_turns_colours() -> None:
    third = _hue_rotation(torch.tensor([2 * math.pi / 3]))[0]
    assert torch.allclose(third @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert torch.allclose(third @ torch.ones(3), torch.ones(3), atol=1e-6)
    grey = _images()[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(
        _views(grey, jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0.5)[:, 0], grey / 255, atol=1e-4
    )


def test_blur_is_a_gaussian_per_sample() -> None:
    point = torch.zeros(6, 3, 15, 15, dtype=torch.uint8)
    point[:, :, 7, 7] = 255
    views = _views(point, blur=1.0, blur_sigma=(0.8, 1.5))[:, 0]
    assert torch.allclose(views.sum((2, 3)), torch.ones(6, 3), atol=1e-3)
    offset = torch.arange(15.0) - 7
    sigma = (views[:, 0].sum(1) * offset**2).sum(1).sqrt()
    assert sigma.min() > 0.75
    assert sigma.max() < 1.55
    assert sigma.unique().numel() == 6
    assert torch.allclose(views, views.transpose(2, 3), atol=1e-5)
    untouched = _views(point, blur=0.5, blur_sigma=(0.8, 1.5), seed=3)[:, 0, 0, 7, 7]
    assert (untouched > 0.99).any()
    assert (untouched < 0.9).any()


def test_empty_batch() -> None:
    assert Augment()(_images(0), generator=torch.Generator()).shape == (0, 2, 3, 12, 12)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 3, 8, 8), TypeError),
        ([1, 2], TypeError),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ValueError),
    ],
)
def test_wrong_images(images: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="images"):
        Augment()(images, generator=torch.Generator())
    with pytest.raises(error, match="images"):
        Augment().normalise(images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"views": 0}, ValueError, "views: expected at least 1, got 0"),
        ({"views": "2"}, TypeError, "views: expected an int, got str"),
        ({"views": 1.5}, TypeError, "views: expected an int, got float"),
        ({"generator": None}, TypeError, "generator: expected a torch.Generator, got NoneType"),
        (
            {"images": torch.zeros(2, 3, 0, 8, dtype=torch.uint8)},
            ValueError,
            r"images: expected pixels, got shape \[2, 3, 0, 8\]",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"images": _images(), "generator": torch.Generator()}
    with pytest.raises(error, match=message):
        Augment()(**(good | arguments))


def test_config_of_another_type() -> None:
    with pytest.raises(TypeError, match="config: expected an AugmentConfig or None, got str"):
        Augment("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"scale": (0.0, 1.0)}, ValueError),
        ({"scale": (0.8, 0.5)}, ValueError),
        ({"scale": (0.5, 1.5)}, ValueError),
        ({"scale": 0.5}, TypeError),
        ({"scale": (0.1, 0.2, 0.3)}, TypeError),
        ({"ratio": (-1.0, 1.0)}, ValueError),
        ({"flip": 1.1}, ValueError),
        ({"flip": "often"}, TypeError),
        ({"flip": True}, TypeError),
        ({"flip": (0.1, 0.2)}, TypeError),
        ({"rotate": 200.0}, ValueError),
        ({"brightness": -0.1}, ValueError),
        ({"hue": 0.6}, ValueError),
        ({"greyscale": math.nan}, TypeError),
        ({"blur_sigma": (0.0, 1.0)}, ValueError),
        ({"std": (0.2, 0.0, 0.2)}, ValueError),
    ],
)
def test_wrong_config(config: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(config))):
        AugmentConfig(**config)


def test_config_from_lists() -> None:
    assert AugmentConfig(scale=[0.5, 1]) == AugmentConfig(scale=(0.5, 1.0))  # type: ignore[arg-type]
