"""The one program representation: a ``torch.export.ExportedProgram``, edited with graph, signature and state in step.

Passes never touch ``graph.placeholder`` or ``input_specs`` by hand: they add, drop and replace through this class, so
that the same edited program gives a trainable module, an unflattened tree and a ``.pt2`` file.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import GraphModule, Node


class Program:
    """A captured model under edit.

    Args:
        exported: what ``torch.export.export`` gave.
        source: the nn.Module it came from; its Parameters are the program's Parameters (same objects).
        notes: facts about the capture that the user must know (a dimension that had to be fixed, ...).
    """

    def __init__(self, exported: ExportedProgram, source: nn.Module | None = None, notes: tuple[str, ...] = ()):
        self.exported = exported
        self.source = source
        self.notes = notes

    # -- reading ---------------------------------------------------------------------------------------------------
    @property
    def graph(self) -> torch.fx.Graph:
        return self.exported.graph

    @property
    def signature(self) -> ExportGraphSignature:
        return self.exported.graph_signature

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by fully qualified name; the tensors themselves, not copies."""
        return self.exported.state_dict

    def op_counts(self) -> Counter[str]:
        """How often each operator stands in the graph, by its full name (``aten.linear.default``)."""
        return Counter(str(n.target) for n in self.graph.nodes if n.op == "call_function")

    def spec_of(self, node: Node) -> InputSpec | None:
        """The signature entry of a placeholder; None for other nodes."""
        if node.op != "placeholder":
            return None
        return next(s for s in self.signature.input_specs if getattr(s.arg, "name", None) == node.name)

    def name_of(self, placeholder: Node) -> str:
        """The fully qualified name of the parameter, buffer or constant that a placeholder stands for."""
        spec = self.spec_of(placeholder)
        assert spec is not None and spec.target is not None, f"{placeholder} is not a lifted tensor"
        return spec.target

    def lifted(self, *kinds: InputKind) -> Iterator[tuple[Node, str, Tensor]]:
        """(placeholder, fully qualified name, tensor) of every lifted input of these kinds, in graph order."""
        specs = {s.arg.name: s for s in self.signature.input_specs if isinstance(s.arg, TensorArgument)}
        for node in self.graph.find_nodes(op="placeholder"):
            spec = specs.get(node.name)
            if spec is not None and spec.kind in kinds:
                assert spec.target is not None
                yield node, spec.target, self.tensor(spec.target)

    def tensor(self, fqn: str) -> Tensor:
        """The parameter, buffer or constant of that name."""
        return self.state[fqn] if fqn in self.state else self.exported.constants[fqn]

    # -- editing ---------------------------------------------------------------------------------------------------
    def copy(self) -> Program:
        """A program with its own graph and signature over the SAME parameter and buffer tensors."""
        ep = self.exported
        graph = torch.fx.Graph()
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
        return Program(exported, self.source, self.notes)

    def add_parameter(self, fqn: str, value: Tensor, *, requires_grad: bool = True) -> Node:
        """Lift a new parameter; returns its placeholder."""
        return self._add(fqn, nn.Parameter(value, requires_grad=requires_grad), InputKind.PARAMETER)

    def add_buffer(self, fqn: str, value: Tensor) -> Node:
        """Lift a new persistent buffer; returns its placeholder."""
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
        """Remove a lifted tensor that nothing reads any more."""
        spec = self.spec_of(placeholder)
        assert spec is not None and not placeholder.users, f"{placeholder} is still read"
        self.graph.erase_node(placeholder)
        self.signature.input_specs.remove(spec)
        if spec.target is not None:
            self.state.pop(spec.target, None)

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` stand where ``old`` stood: users, metadata (module stack included) and output signature."""
        new.meta = copy.copy(old.meta) | {k: v for k, v in new.meta.items() if k == "val"}
        old.replace_all_uses_with(new)
        specs: list[OutputSpec] = self.signature.output_specs
        for spec in specs:
            if getattr(spec.arg, "name", None) == old.name:
                spec.arg.name = new.name
        self.graph.erase_node(old)

    def validate(self) -> None:
        """Lint the graph, check it against its signature, regenerate its code."""
        self.graph.lint()
        self.exported.graph_module.recompile()
        self.exported.validate()

    # -- running ---------------------------------------------------------------------------------------------------
    def module(self) -> GraphModule:
        """A flat, trainable GraphModule whose Parameters and buffers are this program's tensors.

        Where the trace took a branch on a size (``if x.shape[1] % 2 == 0``), the module refuses sizes of the other
        branch: it would compute something else than the model.
        """
        return self.exported.module(check_guards=bool(getattr(self.exported, "_guards_code", True)))


def _first_after(placeholders: list[Node], graph: torch.fx.Graph) -> Node:
    return placeholders[-1].next if placeholders else next(iter(graph.nodes))
