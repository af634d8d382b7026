"""The attention maps and the attention-transfer loss against values worked by hand."""

import math

import pytest
import torch

from at import at_loss, attention_map, normalized


def features(*channels):
    """(1, C, 1, W) from rows of numbers, one a channel."""
    return torch.tensor(channels, dtype=torch.float32)[None, :, None, :]


def test_maps_by_hand():
    f = features([1.0, -2.0], [3.0, 0.0])
    assert attention_map(f, 1).flatten().tolist() == [4, 2]
    assert attention_map(f, 2).flatten().tolist() == [10, 4]
    assert attention_map(f, 2, "mean").flatten().tolist() == [5, 2]
    assert attention_map(f, 2, "max").flatten().tolist() == [9, 4]
    assert attention_map(f, 3).flatten().tolist() == [28, 8]
    assert attention_map(torch.ones(5, 7, 3, 4)).shape == (5, 1, 3, 4)


def test_normalized_is_one_norm_an_image():
    a = normalized(torch.rand(4, 1, 5, 6) + 0.1)
    assert torch.allclose(a.flatten(1).norm(dim=1), torch.ones(4), atol=1e-4)


def test_both_forms_by_hand():
    f_s = features([1.0, 0.0]).repeat(2, 1, 1, 1)  # normalised map (1, 0)
    f_t = torch.cat([features([1.0, 0.0]), features([0.0, 2.0])])  # (1, 0) and (0, 1)
    # squared differences: 0, 0 and 1, 1; norms of the differences: 0 and sqrt 2
    assert at_loss(f_s, f_t).item() == pytest.approx(2 / 4, abs=1e-5)
    assert at_loss(f_s, f_t, form="paper").item() == pytest.approx(math.sqrt(2) / 2, abs=1e-5)


def test_beta_of_the_two_forms_as_documented():
    f_s, f_t = torch.rand(1, 8, 16, 16), torch.rand(1, 8, 16, 16)
    d = at_loss(f_s, f_t, form="paper").item()
    assert at_loss(f_s, f_t).item() == pytest.approx(d * d / 256, rel=1e-4)


@pytest.mark.parametrize("form", ["demo", "paper"])
@pytest.mark.parametrize("attention", ["sum", "mean", "max"])
def test_zero_for_the_same_map_at_any_scale_and_a_finite_gradient(form, attention):
    f = torch.rand(3, 4, 5, 5, requires_grad=True)
    loss = at_loss(f, (7 * f).detach(), attention=attention, form=form)
    loss.backward()
    assert loss.item() < 2e-6
    assert f.grad.isfinite().all()
    assert at_loss(f, torch.rand(3, 4, 5, 5), attention=attention, form=form) > 1e-3


def test_maps_of_other_size_and_width_are_resized():
    f_s, f_t = torch.rand(2, 8, 16, 16), torch.rand(2, 3, 8, 8)
    assert at_loss(f_s, f_t) > 0
    assert at_loss(f_s, f_t).item() == pytest.approx(at_loss(f_t, f_s).item())
    flat = at_loss(torch.ones(1, 2, 4, 4), torch.ones(1, 5, 8, 8))  # two constant maps agree at any size
    assert flat.item() == pytest.approx(0, abs=1e-10)
