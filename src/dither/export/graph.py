"""An ONNX graph to look around in and to change: who writes and who reads each tensor, constants, new nodes."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from jaxtyping import Shaped
from onnx import helper, numpy_helper

Array = Shaped[np.ndarray, "..."]


class Graph:
    """A view of a graph whose maps follow the changes made through it."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self.constants = {tensor.name: tensor for tensor in proto.initializer}
        self.outputs = {value.name for value in proto.output}
        self.refresh()

    def refresh(self) -> None:
        """Look again, after nodes were changed by hand."""
        self.producer = {name: node for node in self.proto.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    def of_type(self, *kinds: str) -> list[onnx.NodeProto]:
        """The nodes of these operators, in order."""
        return [node for node in self.proto.node if node.op_type in kinds]

    def value(self, name: str) -> Array | None:
        """A constant; None where the tensor is computed."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def values(self, names: Iterable[str]) -> list[Array] | None:
        """Several constants; None where one of them is computed."""
        found = [self.value(name) for name in names]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None

    def constant(self, name: str, value: Array) -> str:
        """Put a constant into the graph, in place of one of the same name; returns the name."""
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        return self.store(tensor)

    def store(self, tensor: onnx.TensorProto) -> str:
        """As `constant`, of a tensor that is made already."""
        if tensor.name in self.constants:
            self.constants[tensor.name].CopyFrom(tensor)
        else:
            self.proto.initializer.append(tensor)
            self.constants[tensor.name] = self.proto.initializer[-1]
        return str(tensor.name)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None where there are others or it is an output of the graph."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def made_by(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node that writes a tensor if it is of this operator."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == kind else None

    def insert(self, before: onnx.NodeProto, new: Iterable[onnx.NodeProto]) -> None:
        """Put new nodes in front of one that is there."""
        place = self._place(before)
        for k, node in enumerate(new):
            self.proto.node.insert(place + k, node)
        self.refresh()

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out."""
        del self.proto.node[self._place(node)]
        self.refresh()

    def move_before(self, reader: onnx.NodeProto, name: str) -> None:
        """Have a dequantized tensor made, codes and all, in front of a node that is to read it."""
        real = self.producer[name]
        quantize = self.producer[real.input[0]]
        if self._place(real) < self._place(reader):
            return
        nodes = [copy.deepcopy(node) for node in (quantize, real)]
        for node in (quantize, real):
            self.remove(node)
        self.insert(reader, nodes)

    def _place(self, node: onnx.NodeProto) -> int:
        return next(k for k, one in enumerate(self.proto.node) if one is node)

    def rename_input(self, node: onnx.NodeProto, number: int, name: str) -> None:
        """Let a node read another tensor."""
        node.input[number] = name
        self.refresh()

    def remove_unused(self) -> None:
        """Drop nodes whose outputs nobody reads, and constants that are left."""
        while unused := [
            node for node in self.proto.node
            if not any(self.readers.get(name) or name in self.outputs for name in node.output)
        ]:  # fmt: skip
            for node in unused:
                self.remove(node)
        for tensor in [tensor for tensor in self.proto.initializer if tensor.name not in self.readers]:
            self.proto.initializer.remove(tensor)
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as plain values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute in place of an earlier value."""
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
