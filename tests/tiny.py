"""Sizes of the small hosts that several tests build: 16 positions, 16 channels, 3 blocks.

And parameters for them that hide nothing: as they start, fusers add nothing and heads are 0. And
what torch.compile has to manage with all models: one graph, compiled once, for batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn

TIMM: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 5,
}
HF: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
OBLONG: dict[str, Any] = {  # a grid of 4 x 6
    "img_size": (8, 12),
    "patch_size": 2,
    "embed_dim": 16,
    "num_classes": 5,
}
FRAMES: dict[str, Any] = {  # of a model for live video
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "num_heads": 2,
    "depth": 4,
    "at": 3,
    "num_frames": 4,
    "num_tokens": 5,
    "num_classes": 7,
}


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=5)


def transformers_vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5))


def drawn(module: nn.Module, std: float) -> Any:
    """The module with every parameter drawn at random, so that no path hides behind a constant."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def randomized(model: nn.Module) -> Any:
    """The model with every parameter drawn at random: head and fusers then do something."""
    return drawn(model, 0.2).eval()


def inputs_of(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What `module` is given when the model runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call()
    hook.remove()
    (x,) = seen
    return x


def snapshot(model: nn.Module) -> Any:
    """Whatever a call could change: parts, their modes, parameters and their values, randomness."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    kept = [(name, id(t), t.requires_grad, t.grad, t.dtype, t.tolist()) for name, t in tensors]
    return modules, kept, torch.get_rng_state().tolist()


def stem(model: Any) -> Any:
    """Where a named model of ours, or one of timm's ViTs, embeds patches."""
    return model.get_submodule(model.default_cfg["first_conv"].removesuffix(".proj"))


def images_for(model: Any, batch: int = 2, device: str = "cpu") -> Tensor:
    """Images or clips of the size of such a model."""
    clip = [model.num_frames] if hasattr(model, "num_frames") else []
    embed = stem(model)
    return torch.randn(batch, embed.proj.in_channels, *clip, *embed.img_size, device=device)


@torch.no_grad()
def check_compiled(model: nn.Module, inputs: dict[str, Tensor], backend: str = "eager") -> None:
    """The model compiles to one graph, once for all sizes of a batch, and gives its own numbers."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for value in inputs.values():
        torch._dynamo.mark_dynamic(value, 0)  # an error if a batch of 2 is compiled for 2 alone
    larger = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    _same(compiled(**inputs), model(**inputs))
    with torch.compiler.set_stance("fail_on_recompile"):
        _same(compiled(**larger), model(**larger))


# A softmax over positions ignores the first, LayerNorms over channels the others.
WITHOUT_EFFECT = ("learner.attention_maps.3.bias", "fuser.mix.bias", "mlp_tokens.fc2.bias")


def check_trained(model: nn.Module, x: Tensor) -> None:
    """A loss of the outputs moves every parameter that has an effect."""
    out = model.double().train()(x.double())
    (out * torch.randn_like(out)).sum().backward()
    largest = {
        n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None
    }
    assert largest.keys() == dict(model.named_parameters()).keys()
    ignored = {n for n in largest if n.endswith(WITHOUT_EFFECT)}
    assert max((largest[n] for n in ignored), default=0) < 1e-9
    assert min(value for n, value in largest.items() if n not in ignored) > 1e-9


def _same(found: Any, expected: Any) -> None:
    """The same tensors; of transformers' outputs those that are tensors."""
    if not isinstance(found, Tensor):
        found, expected = (
            [v for v in o.values() if isinstance(v, Tensor)] for o in (found, expected)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def same(left: Any, right: Any) -> bool:
    """Whether trees are equal in type, dtype, shape and every bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and left.equal(right)
    return type(left) is type(right) and left == right
