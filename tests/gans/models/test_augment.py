from __future__ import annotations

import pytest
import torch

from gans.common import rng
from gans.models import augment
from gans.models.augment import AUGMENTATIONS, diff_augment


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.rand(16, 3, 24, 20, dtype=torch.float64) + 0.5  # positive, so that zeros are erased pixels


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_dtype_and_repeatable_draws(name, channels):
    x = torch.rand(4, channels, 48, 48)
    torch.manual_seed(1)
    first = [AUGMENTATIONS[name](x) for _ in range(8)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = [AUGMENTATIONS[name](x) for _ in range(8)]
    assert all(a.shape == x.shape and a.dtype == x.dtype for a in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert (name, channels) == ("hue", 1) or any(not torch.equal(a, first[0]) for a in first)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_linear_in_the_image_and_differentiable_twice(name):
    """Every augmentation is affine, so its derivative is exact and the same everywhere."""
    torch.manual_seed(0)
    x, direction = torch.randn(2, 2, 3, 24, 24, dtype=torch.float64)

    def run(image):
        torch.manual_seed(2)  # the batch-wide choice falls on "erase" with this seed, see below
        return AUGMENTATIONS[name](image)

    x.requires_grad_(True)
    weight = torch.randn(2, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((run(x) * weight).sum(), x, create_graph=True)
    torch.testing.assert_close((gradient * direction).sum(), ((run(x + direction) - run(x)) * weight).sum())
    # Second order: the gradient is linear in `weight`, with the augmentation's own linear part as derivative.
    (second,) = torch.autograd.grad((gradient * direction).sum(), weight)
    torch.testing.assert_close(second, run(x + direction) - run(x))


def test_translation_moves_whole_pixels_and_pads_with_zero(x):
    torch.manual_seed(4)
    moved = augment.translation(x)
    seen = set()
    for before, after in zip(x, moved, strict=True):
        matches = []
        for dy in range(-5, 6):  # 0.2 * 24 rounds to 5
            for dx in range(-4, 5):  # 0.2 * 20 = 4
                expected = torch.zeros_like(before)
                target = (slice(None), slice(max(0, dy), 24 + min(0, dy)), slice(max(0, dx), 20 + min(0, dx)))
                origin = (
                    slice(None),
                    slice(max(0, -dy), 24 + min(0, -dy)),
                    slice(max(0, -dx), 20 + min(0, -dx)),
                )
                expected[target] = before[origin]
                if torch.equal(expected, after):
                    matches.append((dy, dx))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 4  # images move independently


def test_translation_reaches_its_limits_and_no_further():
    x = torch.arange(1.0, 25).view(1, 1, 24, 1).expand(2000, 1, 24, 1)
    shift = (augment.translation(x)[:, 0, 12, 0] - x[:, 0, 12, 0]).unique()
    assert shift.tolist() == list(range(-5, 6))


def erased(x: torch.Tensor) -> torch.Tensor:
    return (x == 0).all(1)


def test_cutout_erases_half_sides_with_probability_0_3(x):
    torch.manual_seed(0)
    hits = 0
    for _ in range(400):
        out = augment.cutout(x)
        holes = erased(out)
        if holes.any():
            hits += 1
            heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
            assert torch.equal(holes.sum((1, 2)), heights * widths)  # one box each
            assert heights.max() <= 12 and widths.max() <= 10
            assert heights.min() >= 6 and widths.min() >= 5  # its centre lies inside the image
            assert torch.equal(out[~holes[:, None].expand_as(out)], x[~holes[:, None].expand_as(x)])
    assert 90 <= hits <= 150


@pytest.mark.parametrize(("name", "low", "high"), [("erase_ratio", 9, 33), ("stl_erase_ratio", 20, 44)])
def test_random_sides_are_drawn_once_a_batch(name, low, high):
    torch.manual_seed(0)
    x = torch.ones(32, 1, 48, 48)
    sides, hits = set(), 0
    for _ in range(600):
        holes = erased(AUGMENTATIONS[name](x))
        if holes.any():
            hits += 1
            sides.add(int(holes.any(2).sum(1).max()))
    assert 130 <= hits <= 230
    assert low - 1 <= min(sides) <= low + 4 and high - 4 <= max(sides) <= high


def test_color_constants():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 4, 4, dtype=torch.float64) - 0.5
    grey = x.mean(1, keepdim=True)

    offset = (augment.brightness(x) - x).flatten(1)
    assert torch.allclose(offset, offset[:, :1].expand_as(offset))
    assert -0.5 <= offset.min() < -0.49 and 0.49 < offset.max() <= 0.5

    out = augment.saturation(x)
    factor = (out - grey).flatten(1).norm(dim=1) / (x - grey).flatten(1).norm(dim=1)
    torch.testing.assert_close(out.mean(1, keepdim=True), grey)
    assert factor.min() < 0.01 and 1.99 < factor.max() <= 2

    mean = x.mean((1, 2, 3), keepdim=True)
    out = augment.contrast(x)
    factor = (out - mean).flatten(1).norm(dim=1) / (x - mean).flatten(1).norm(dim=1)
    torch.testing.assert_close(out.mean((1, 2, 3), keepdim=True), mean)
    assert 0.5 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.5

    grey_image = torch.rand(4, 1, 4, 4)
    torch.testing.assert_close(augment.saturation(grey_image), grey_image)


def test_policy():
    x = torch.rand(2, 3, 8, 8)
    assert diff_augment(x, ()) is x
    torch.manual_seed(0)
    expected = augment.color(augment.translation(x))
    torch.manual_seed(0)
    assert torch.equal(diff_augment(x, ("translation", "color")), expected)
    with pytest.raises(ValueError, match="'blur'"):
        augment.check_policy(("color", "blur"))


def test_hue_turns_about_the_grey_axis():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 2, 1, dtype=torch.float64)
    out = augment.hue(x)
    torch.testing.assert_close(out.mean(1), x.mean(1))
    torch.testing.assert_close(out.norm(dim=1), x.norm(dim=1))
    turned = (out - x).abs().amax((1, 2, 3)) > 1e-9
    assert 1900 < int(turned.sum()) < 2100
    colour, before = (y - y.mean(1, keepdim=True) for y in (out[turned], x[turned]))
    cosine = torch.nn.functional.cosine_similarity(colour, before, dim=1)
    assert cosine.min() < -0.999 and cosine.max() > 0.999 and abs(float(cosine.mean())) < 0.03


def test_band_filters_split_the_frequencies():
    bank = augment.BAND_FILTERS
    delta = torch.zeros(43, dtype=torch.float64)
    delta[21] = 1
    torch.testing.assert_close(bank.sum(0), delta)
    torch.testing.assert_close(bank, bank.flip(1))
    response = torch.fft.rfft(bank, 512).abs()
    assert torch.equal(response[:, [0, 48, 96, 256]].argmax(0), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(response[:, 0], torch.tensor([1.0, 0, 0, 0]).double())


def test_band_filter_scales_octaves_at_constant_power():
    x = torch.randn(2000, 1, 24, 22, dtype=torch.float64)
    flat = torch.ones_like(x)
    torch.testing.assert_close(augment.band_filter(x, probability=0), x)
    torch.manual_seed(0)
    brightness = augment.band_filter(flat)
    gain = brightness[:, 0, 0, 0]  # of the lowest octave, which holds the mean
    assert torch.allclose(brightness, gain[:, None, None, None].expand_as(flat))
    # With the powers 10, 1, 1, 1 over 13 normalised after each band, on each of the two axes:
    assert gain.min() > 0 and 1.2 < gain.max() < 13 / 10 * (13 / 12) ** 3
    untouched = float((gain - 1).abs().lt(1e-9).double().mean())
    assert abs(untouched - 0.75**4) < 0.04
    with pytest.raises(ValueError, match="larger than 21 px"):
        augment.band_filter(torch.zeros(1, 3, 21, 32))


def test_scaling_is_bilinear_about_the_centre(x):
    torch.manual_seed(3)
    out = augment.scaling(x)
    torch.manual_seed(3)
    factor = torch.exp2(torch.randn(16, 1, 1, dtype=torch.float64) * 0.2)
    matrix = torch.zeros(16, 2, 3, dtype=torch.float64)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / factor.flatten()
    grid = torch.nn.functional.affine_grid(matrix, x.shape, align_corners=True)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=True)
    torch.testing.assert_close(out, expected)


def test_probability_is_per_image_and_augmentation():
    torch.manual_seed(0)
    x = torch.rand(3000, 3, 2, 2)
    assert abs(float((diff_augment(x, ("color",), 0.8) != x).any(dim=(1, 2, 3)).float().mean()) - 0.8) < 0.03
    changed = (diff_augment(x, ("color", "scaling"), 0.5) != x).flatten(1).any(1).float().mean()
    assert abs(float(changed) - 0.75) < 0.03


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_parts_of_a_batch_are_augmented_like_the_whole(name):
    x = torch.rand(6, 3, 48, 48, dtype=torch.float64)
    with rng.part(7, 6, 0, 6):
        whole = diff_augment(x, (name,), 0.9)
    for start, stop in ((0, 2), (2, 6)):
        with rng.part(7, 6, start, stop):
            torch.testing.assert_close(diff_augment(x[start:stop], (name,), 0.9), whole[start:stop])
