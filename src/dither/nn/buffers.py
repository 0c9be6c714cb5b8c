"""Modules whose buffers are part of a stored format."""

from collections.abc import Callable

from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose own buffers move between devices but keep dtype and value under `.half()` or `.to(dtype)`.

    A float32 scale that goes through float16 comes back changed, or as zero.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedBuffers":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self.get_buffer(name)
            if after.dtype != buffer.dtype:
                self.register_buffer(name, buffer.to(after.device))
        return self
