"""What a module holds, to see whether a call has changed it."""

from __future__ import annotations

from torch import Tensor, nn

CONTAINERS = {"_parameters", "_buffers", "_modules"}


def remember(model: nn.Module) -> dict[str, object]:
    """A copy of the parameters, buffers and plain attributes of all modules, by name."""
    parts: dict[str, object] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if name not in CONTAINERS:
                parts[f"{path}.{name}".lstrip(".")] = frozen(value)
    return parts


def changed_part(before: dict[str, object], after: dict[str, object]) -> str | None:
    """The name of something that was added, removed or changed, or None."""
    for name in {**before, **after}:
        if name not in before or name not in after or not alike(before[name], after[name]):
            return name
    return None


def frozen(value: object) -> object:
    """A copy of tensors and of the plain containers that hold them; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple | set):
        return [frozen(part) for part in value]
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    return value


def alike(a: object, b: object) -> bool:
    """Whether two frozen values are equal; objects of unknown kinds must be the same object."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    plain = isinstance(a, str | int | float | complex)
    return a is b or (plain and type(a) is type(b) and a == b)
