"""Forward passes that stop at every unit, one for each calibration batch.

Each pass runs in a greenlet (a coroutine that can be suspended inside any call). When the model calls a unit, the pass
is suspended with the unit's arguments; the walk computes the unit's output, with full-precision or quantized weights,
and hands it back. Whatever the model does between its units runs as written, so nothing has to be traced or known.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from dither.errors import InputError
from dither.models.layers import given_input
from dither.models.spill import Spill, bytes_of, tensors_in


@dataclass(frozen=True)
class Call:
    """A unit's call that waits for its output."""

    unit: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Pass(greenlet):  # type: ignore[misc]
    """The greenlet of one batch; its class tells suspended passes from the walk's own calls."""


@contextmanager
def suspended_at(model: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """While open, a unit that is called from a `_Pass` suspends it; called by anyone else it just runs."""
    modules = {name: model.get_submodule(name) for name in units}
    own = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}
    for name, module in modules.items():
        module.forward = _suspending(name, module.forward)
    try:
        with _no_stream_capture():
            yield
    finally:
        for name, module in modules.items():
            del module.forward
            if name in own:
                module.forward = own[name]


@contextmanager
def _no_stream_capture() -> Iterator[None]:
    """While open, and where no GPU can be used, PyTorch says that no CUDA stream is being captured.

    Models of transformers ask this in every pass. A CUDA build without a GPU answers by an error that records the
    stack; that of a greenlet cannot be followed to its end, and the process would die.
    """
    if torch.cuda.is_available():
        yield
        return
    own = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = own


def _suspending(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def suspend(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, _Pass) or current.parent is None:
            return forward(*args, **kwargs)
        return current.parent.switch(Call(name, args, kwargs))

    return suspend


@dataclass(frozen=True)
class _Held:
    """A tensor that a unit is called on, as it was before or is after the call: all of its storage."""

    tensor: Tensor
    version: int
    content: Tensor

    def put_back(self) -> None:
        """Let the tensor hold this again."""
        bytes_of(self.tensor).copy_(self.content)


class Stream:
    """All batches, suspended at the same unit; activations wait in `spill`.

    A unit that changes its input in place is run on the same input each time, and changes it for good when its pass
    goes on.
    """

    def __init__(self, run: Callable[[Any], Any], batches: Sequence[Any], spill: Spill, idle: bool = False) -> None:
        """`run` calls the model on one batch; `idle`, the batches show the way and are not measured."""
        self._passes = [_Pass(run) for _ in batches]
        self._spill, self._idle = spill, idle
        self._edits: bool | None = None  # whether the unit changes its input in place; the first call tells
        self._before: list[_Held] = []
        self._after: list[list[_Held]] = []
        self.calls: list[Call] = []
        self.results: list[Any] = []
        try:
            self._take([self._go_on(one, batch) for one, batch in zip(self._passes, batches, strict=True)])
        except BaseException:
            self.close()
            raise

    def _go_on(self, one: _Pass, value: Any) -> Any:
        """Give a pass what it waits for; its next call is parked."""
        state = one.switch(value)
        if isinstance(state, Call):
            self._spill.park((state.args, state.kwargs))
        return state

    def _take(self, states: list[Any]) -> None:
        self._edits, self._after = None, []
        self.calls = [state for state in states if isinstance(state, Call)]
        self.results = [state for state in states if not isinstance(state, Call)]
        if len({call.unit for call in self.calls}) > 1 or (self.calls and self.results):
            raise InputError(
                "calibration batches take different ways through the model "
                f"({sorted({call.unit for call in self.calls})}); use batches of equal shape"
            )

    @property
    def unit(self) -> str | None:
        """The unit at which the passes wait; None at the end."""
        return self.calls[0].unit if self.calls else None

    def run(self, module: Callable[..., Any]) -> Generator[Any, None, None]:
        """The module's output for each batch in turn, inputs fetched and parked around each; none where idle."""
        if not self._idle:
            yield from self._each(module)

    def once(self, module: nn.Module) -> Any:
        """The module's output for the first batch."""
        with closing(self._each(module)) as outputs:
            return next(outputs)

    def _each(self, module: Callable[..., Any]) -> Generator[Any, None, None]:
        for call in self.calls:
            given = tensors_in([call.args, call.kwargs])
            self._spill.fetch(given)
            versions = [x._version for x in given]
            if self._edits is not False:
                self._before = _held(given)
            try:
                output = module(*call.args, **call.kwargs)
                edits = versions != [x._version for x in given]
                if edits and self._edits is False:
                    raise InputError(f"{call.unit} changes its input in place for some batches only; let it copy")
                self._edits = self._edits or edits
                yield _copied(output) if self._edits else output  # it may be the input itself
            finally:  # whoever stops after the first batch still leaves it parked
                self.put_back()
                self._before = []
                self._spill.park(given)

    def put_back(self) -> None:
        """Give a unit's input the values that the unit was called with."""
        for held in self._before:
            if held.tensor._version != held.version:
                held.put_back()

    def outputs(self, module: nn.Module) -> list[Any]:
        """All outputs, parked."""
        outputs = []
        self._spill.fetch([held.content for after in self._after for held in after])  # of an earlier time
        self._after = []
        for call, output in zip(self.calls, self._each(module), strict=True):
            outputs.append(output)
            after = _held(tensors_in([call.args, call.kwargs])) if self._edits else []
            self._after.append(after)
            self._spill.park([output, [held.content for held in after]])
        return outputs

    @property
    def samples(self) -> int:
        """How many samples all batches hold: entries of the first axis of the unit's first input."""
        return sum(self._sizes())

    def call(self, module: Callable[..., Any], samples: Sequence[int]) -> Any:
        """The module's output for some samples only, numbered over all batches in rising order, as one batch."""
        args, kwargs = self.pick([(call.args, call.kwargs) for call in self.calls], samples)
        return module(*args, **kwargs)

    def pick(self, values: Sequence[Any], samples: Sequence[int]) -> Any:
        """One nest of fresh tensors with some samples of what was parked, or is to be, for each batch.

        A tensor whose first axis counts the samples is cut and joined; any other is the first batch's.
        """
        start = 0
        parts: list[Any] = []
        rows: list[list[int]] = []
        sizes: list[int] = []
        for value, size in zip(values, self._sizes(), strict=True):
            chosen = [sample - start for sample in samples if start <= sample < start + size]
            start += size
            if chosen:
                parts, rows, sizes = [*parts, value], [*rows, chosen], [*sizes, size]
        for part in parts:
            self._spill.fetch(part)
        try:
            return _joined(parts, rows, sizes)
        finally:
            for part in parts:
                self._spill.park(part)

    def _sizes(self) -> list[int]:
        return [_leading(call) for call in self.calls]

    def resume(self, outputs: list[Any]) -> None:
        """Hand every pass its unit's output and run it to its next unit."""
        states = []
        for one, call, output, after in zip(self._passes, self.calls, outputs, self._after, strict=True):
            self._spill.fetch([call.args, call.kwargs, output, [held.content for held in after]])
            for held in after:
                held.put_back()
            states.append(self._go_on(one, output))
        self._take(states)

    def advance(self, module: Callable[..., Any]) -> None:
        """Run every pass to its next unit, with the module's output; an input is free before the next batch begins."""
        self._spill.fetch([held.content for after in self._after for held in after])  # of an earlier time
        self._after, states = [], []
        waiting, self.calls = self.calls[::-1], []
        for one in self._passes:
            call = waiting.pop()
            self._spill.fetch((call.args, call.kwargs))
            output = module(*call.args, **call.kwargs)
            del call
            states.append(self._go_on(one, output))
            del output
        self._take(states)

    def close(self) -> None:
        """Unwind passes that did not reach their end."""
        for one in self._passes:
            if not one.dead:
                one.throw(GreenletExit)


class _AllSeenError(Exception):
    """Every layer that is listened to has its input."""


def layer_inputs(
    stream: Stream, module: nn.Module, layers: Mapping[str, nn.Module]
) -> Iterator[dict[str, list[Tensor]]]:
    """What each layer of a unit is given in each batch, call by call; the same dict is filled again and again.

    Once every layer was called exactly once in a batch, the passes of the others end where the last has its input:
    its own product and all behind it would be for nothing. An input that the unit changes in place later, as a residual
    sum may, is copied.
    """
    seen: dict[str, list[Tensor]] = {}
    versions: list[tuple[str, Tensor, int]] = []
    changing: set[str] = set()
    once = False

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = given_input(args, kwargs)
            seen.setdefault(name, []).append(x.clone() if name in changing else x)
            versions.append((name, x, x._version))
            if once and len(seen) == len(layers):
                raise _AllSeenError

        return hook

    def run(*args: Any, **kwargs: Any) -> None:
        with suppress(_AllSeenError):
            module(*args, **kwargs)
        late = {name for name, x, version in versions if x._version != version} - changing
        versions.clear()
        if late:  # known now: once more, with copies
            changing.update(late)
            seen.clear()
            stream.put_back()
            run(*args, **kwargs)

    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for _ in stream.run(run):
            once = len(seen) == len(layers) and all(len(calls) == 1 for calls in seen.values())
            yield seen
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def _held(tensors: Sequence[Tensor]) -> list[_Held]:
    return [_Held(x, x._version, bytes_of(x).clone()) for x in tensors]


def _copied(value: Any) -> Any:
    """A nest with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part) for part in value)
    return value


def _leading(call: Call) -> int:
    """Length of the first axis of the first tensor that a unit is called on."""
    first = next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))
    return int(first.shape[0])


def _joined(parts: list[Any], rows: list[list[int]], sizes: list[int]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        if all(part.ndim and part.shape[0] == size for part, size in zip(parts, sizes, strict=True)):
            return torch.cat([part[chosen] for part, chosen in zip(parts, rows, strict=True)])
        return first.clone()
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], rows, sizes) for key in first}
    if isinstance(first, list | tuple):
        return tuple(_joined([part[k] for part in parts], rows, sizes) for k in range(len(first)))
    return first
