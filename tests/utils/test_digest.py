"""`digest_tensors` tells weights apart."""

from __future__ import annotations

import torch

from tokenlearner.utils.digest import digest_tensors


def test_equal_tensors_have_one_digest_whatever_their_order_and_layout() -> None:
    a, b = torch.randn(3, 4), torch.arange(5)
    digest = digest_tensors({"a": a, "b": b}, 0.5)
    assert digest == digest_tensors({"b": b, "a": a.t().contiguous().t()}, 0.5)
    assert len(digest) == 64


def test_a_name_type_shape_value_or_option_makes_another_digest() -> None:
    a = torch.randn(3, 4)
    others = ({"b": a}, {"a": a.view(torch.int32)}, {"a": a.view(4, 3)}, {"a": a + 1e-3}, {})
    digests = [digest_tensors(tensors) for tensors in ({"a": a}, *others)]
    assert len({*digests, digest_tensors({"a": a}, 1)}) == 7


def test_a_number_and_a_tensor_of_low_precision_have_digests() -> None:
    assert digest_tensors({"": torch.tensor(1.0)}) != digest_tensors({"": torch.tensor([1.0])})
    halves = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    assert digest_tensors({"": halves}) != digest_tensors({"": halves.half()})
