"""A program of ``torch.export`` under edit: graph, signature and state dict in step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from sparseforge_fx.graph.program import Program


class Exported(Program):
    """The same edited program gives a trainable module, an unflattened tree (of ``exported``) and a ``.pt2`` file.

    Args:
        exported: what ``torch.export.export`` gave.
        source, notes: as of any :class:`Program`.
    """

    def __init__(self, exported: ExportedProgram, source: nn.Module | None = None, notes: tuple[str, ...] = ()):
        super().__init__(source, notes)
        self.exported = exported

    # -- reading ---------------------------------------------------------------------------------------------------
    @property
    def graph_module(self) -> GraphModule:
        return self.exported.graph_module

    @property
    def signature(self) -> ExportGraphSignature:
        return self.exported.graph_signature

    @property
    def state(self) -> dict[str, Tensor]:
        return self.exported.state_dict

    def spec_of(self, node: Node) -> InputSpec | None:
        """The signature entry of a placeholder; None for other nodes."""
        if node.op != "placeholder":
            return None
        return next(s for s in self.signature.input_specs if getattr(s.arg, "name", None) == node.name)

    def lifted(self, *kinds: InputKind) -> Iterator[tuple[Node, str, Tensor]]:
        kinds = kinds or (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        specs = {s.arg.name: s for s in self.signature.input_specs if isinstance(s.arg, TensorArgument)}
        for node in self.graph.find_nodes(op="placeholder"):
            spec = specs.get(node.name)
            if spec is not None and spec.kind in kinds:
                assert spec.target is not None
                yield node, spec.target, self.tensor(spec.target)

    def user_inputs(self) -> list[Node]:
        names = set(self.signature.user_inputs)
        return [node for node in self.graph.find_nodes(op="placeholder") if node.name in names]

    def tensor(self, fqn: str) -> Tensor:
        return self.state[fqn] if fqn in self.state else self.exported.constants[fqn]

    # -- editing ---------------------------------------------------------------------------------------------------
    def copy(self) -> Self:
        """A program with its own graph and signature over the SAME parameter and buffer tensors."""
        ep = self.exported
        graph = Graph()
        mapping: dict[Node, Node] = {}
        out = graph.output(graph.graph_copy(ep.graph, mapping))
        out.meta = copy.copy(ep.graph.output_node().meta)
        renamed = {old.name: new.name for old, new in mapping.items()}
        signature = copy.deepcopy(ep.graph_signature)
        for spec in (*signature.input_specs, *signature.output_specs):
            if getattr(spec.arg, "name", None) in renamed:
                spec.arg.name = renamed[spec.arg.name]
        exported = ExportedProgram(
            root=ep.graph_module,
            graph=graph,
            graph_signature=signature,
            state_dict=dict(ep.state_dict),
            range_constraints=copy.copy(ep.range_constraints),
            module_call_graph=list(ep.module_call_graph),
            example_inputs=ep.example_inputs,
            constants=dict(ep.constants),
            verifiers=ep.verifiers,
        )
        return type(self)(exported, self.source, self.notes)

    def add_parameter(self, fqn: str, value: Tensor, *, requires_grad: bool = True) -> Node:
        return self._add(fqn, nn.Parameter(value, requires_grad=requires_grad), InputKind.PARAMETER)

    def add_buffer(self, fqn: str, value: Tensor) -> Node:
        return self._add(fqn, value, InputKind.BUFFER)

    def _add(self, fqn: str, value: Tensor, kind: InputKind) -> Node:
        if fqn in self.state or fqn in self.exported.constants:
            raise ValueError(f"the program already has a tensor named {fqn}")
        specs = self.signature.input_specs
        # export's verifier and unlift rely on the order parameters, buffers, the rest
        before = {InputKind.PARAMETER} if kind == InputKind.PARAMETER else {InputKind.PARAMETER, InputKind.BUFFER}
        index = next((i for i, s in enumerate(specs) if s.kind not in before), len(specs))
        placeholders = self.graph.find_nodes(op="placeholder")
        fake_mode = next(
            (v.fake_mode for n in self.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)), None
        )
        assert fake_mode is not None, "an exported graph carries fake values"
        anchor = placeholders[index] if index < len(placeholders) else _first_after(placeholders, self.graph)
        with self.graph.inserting_before(anchor):
            name = ("p_" if kind == InputKind.PARAMETER else "b_") + fqn.replace(".", "_")
            node = self.graph.placeholder(name)
        node.target = node.name  # made unique: "a.b" and "a_b" would give one argument name
        node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
        persistent = True if kind == InputKind.BUFFER else None
        specs.insert(index, InputSpec(kind, TensorArgument(node.name), fqn, persistent))
        self.state[fqn] = value
        return node

    def drop(self, placeholder: Node) -> None:
        spec = self.spec_of(placeholder)
        assert spec is not None and not placeholder.users, f"{placeholder} is still read"
        self.graph.erase_node(placeholder)
        self.signature.input_specs.remove(spec)
        if spec.target is not None:
            self.state.pop(spec.target, None)

    def redirect(self, old: Node, new: Node) -> None:
        super().redirect(old, new)
        for spec in self.signature.output_specs:
            if getattr(spec.arg, "name", None) == old.name:
                spec.arg.name = new.name

    def validate(self) -> None:
        self.graph.lint()
        self.graph_module.recompile()
        self.exported.validate()

    # -- running ---------------------------------------------------------------------------------------------------
    def module(self) -> GraphModule:
        """A flat, trainable GraphModule whose Parameters and buffers are this program's tensors.

        Where the trace took a branch on a size (``if x.shape[1] % 2 == 0``), the module refuses sizes of the other
        branch: it would compute something else than the model.
        """
        return self.exported.module(check_guards=bool(getattr(self.exported, "_guards_code", True)))


def _first_after(placeholders: list[Node], graph: Graph) -> Node:
    return placeholders[-1].next if placeholders else next(iter(graph.nodes))
