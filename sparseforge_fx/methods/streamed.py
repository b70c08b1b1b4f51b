"""A walk whose weights are fetched when a node needs them and let go after it, whose activations go to disk where they
take more than a limit, and which goes on from the last block's border after whatever ended it."""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import new_file
from sparseforge_fx.graph.capture import has_no_values
from sparseforge_fx.graph.compile import block_ends
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes.insert_soft_masks import mask_name

#: computed values that are smaller are not worth a file
SMALLEST_SPILL = 1 << 16


class Streamed:
    """Tensors of a graph that was captured without values, and the borders of its blocks.

    Args:
        module: the flat GraphModule; its graph is edited, so that a weight is read right before its uses.
        fetch: a parameter or buffer by name, as the walk is to compute with it.
        done: called with (name, weight, mask) of each of ``sites`` when its last node in a block has been computed.
        sites: names of weights that have a mask, which begins with ones.
        scratch: folder for activations and for what is alive at the last border; None: nothing is kept.
        limit: bytes of activations that stay in memory; None: all.
        at_border: called behind each border, with its number from 1, before what leads there is forgotten.
        blocks: stop behind so many blocks.
    """

    def __init__(
        self,
        module: GraphModule,
        fetch: Callable[[str], Tensor],
        *,
        done: Callable[[str, Tensor, Tensor], None] = lambda *_: None,
        sites: Collection[str] = (),
        scratch: Path | None = None,
        limit: int | None = None,
        at_border: Callable[[int], None] = lambda _: None,
        blocks: int | None = None,
    ):
        self.fetch, self.done, self.sites = fetch, done, set(sites)
        self.masks = {mask_name(name): name for name in sites}
        self.scratch, self.limit, self.at_border, self.blocks = scratch, limit, at_border, blocks
        self.graph = module.graph
        self.cache: dict[str, Tensor] = {}
        self.ends = block_ends(module)
        self.absent = _near_their_uses(module, self.ends)
        self.begin = 0  # border, counted from 1, behind which the walk begins
        self.padded: set[str] = set()
        self.finished: set[str] = set()  # of the sites: from now on, ``fetch`` gives what came of them

    # -- weights, as a mapping ---------------------------------------------------------------------------------------
    def __contains__(self, name: str) -> bool:
        return name in self.absent

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.cache:
            if name in self.masks:
                self.cache[name] = torch.ones_like(self[self.masks[name]])
            else:
                self.cache[name] = self.fetch(name)
                if name in self.sites and not bool(torch.isfinite(self.cache[name]).all()):
                    raise SparseForgeError(f"{name} holds NaN or infinite values: repair the checkpoint first")
        return self.cache[name]

    def drop(self, dead: Sequence[Node]) -> None:
        """Nothing in this block reads these any more."""
        names = [str(node.target) for node in dead if node.op == "get_attr"]
        for name in names:
            if name in self.sites - self.finished:
                self.finished.add(name)
                self.done(name, self[name], self[mask_name(name)])
        for name in names:
            self.cache.pop(name, None)

    # -- activations -------------------------------------------------------------------------------------------------
    def keep(self, run: Interpreter, runs: int) -> None:
        """Put the values of one of so many batches on disk, if they take more than their share of the limit."""
        if self.limit is None:
            return
        values = {n: v for n, v in run.env.items() if n.op != "get_attr" and isinstance(v, Tensor)}
        own = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in values.values()}
        if sum(s.nbytes() for s in own.values() if s.filename is None) <= self.limit // runs:
            return
        moved: dict[int, torch.UntypedStorage] = {}
        for node, value in values.items():
            storage = value.untyped_storage()
            if storage.filename is None and storage.nbytes() >= SMALLEST_SPILL:
                at = storage.data_ptr()
                if at not in moved:
                    moved[at] = self._mapped(storage)
                run.env[node] = torch.empty(0, dtype=value.dtype).set_(
                    moved[at], value.storage_offset(), value.size(), value.stride()
                )

    def _mapped(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A copy in a file without a name, whose pages the system writes and drops as it needs memory."""
        handle, path = tempfile.mkstemp(dir=self.scratch, suffix=".activation")
        try:
            os.posix_fallocate(handle, 0, storage.nbytes())  # a full disk is an error here, and a crash later
            mapped = torch.UntypedStorage.from_file(path, True, storage.nbytes())
        finally:
            os.close(handle)
            os.unlink(path)
        return mapped.copy_(storage)

    # -- borders -----------------------------------------------------------------------------------------------------
    def resume(self, runs: Sequence[Interpreter]) -> Node | None:
        """The last node that need not be computed again, with what was alive behind it put into the runs."""
        if not self.begin:
            return None
        nodes = {n.name: n for n in self.graph.nodes}
        for index, run in enumerate(runs):
            saved = torch.load(self._border(self.begin) / f"{index}.pt", weights_only=True)
            run.env = {nodes[name]: value for name, value in saved.items()}
        return self.ends[self.begin - 1]

    def after(self, step: Sequence[Node], dead: Sequence[Node], runs: Sequence[Interpreter]) -> bool:
        """Let go of weights that are ``dead``; at a border write down what is alive. Was this the last block that is
        wanted?"""
        self.drop(dead)
        border = next((i for i, end in enumerate(self.ends, 1) if end in step), None)
        if border is None:
            return False
        if self.scratch is not None:
            folder = self._border(border)
            folder.mkdir(exist_ok=True)
            for index, run in enumerate(runs):
                alive = {n.name: v for n, v in run.env.items() if n.op != "get_attr"}
                with new_file(folder / f"{index}.pt") as file:
                    torch.save(alive, file)
            self.at_border(border)
            former = self._border(border - 1)
            for file in former.glob("*") if former.is_dir() else ():
                file.unlink()
        return border == self.blocks

    def _border(self, number: int) -> Path:
        assert self.scratch is not None
        return self.scratch / f"border-{number}"


class StreamedWeight(MaskedWeight):
    """One whose tensors are those that the walk holds at the moment."""

    def __init__(self, fqn: str, fake: Tensor, dim: int, held: Streamed):
        super().__init__(fqn, fake, fake, dim)
        self.held = held

    def oriented(self, expert: int | None = None) -> tuple[Tensor, Tensor]:
        return MaskedWeight(self.fqn, self.held[self.fqn], self.held[mask_name(self.fqn)], self.dim).oriented(expert)


# -- the graph -------------------------------------------------------------------------------------------------------
def _near_their_uses(module: GraphModule, ends: Sequence[Node]) -> set[str]:
    """Let every block read its weights for itself, right before their first use. Returns names of what has no value."""
    block: dict[Node, int] = {}
    count = 0
    for node in module.graph.nodes:
        block[node] = count
        count += node in ends
    absent = set()
    for read in module.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(read.target))(module)
        if not isinstance(value, Tensor) or not has_no_values(value):
            continue
        absent.add(str(read.target))
        here: dict[int, Node] = {}
        for user in sorted(read.users):
            if block[user] not in here:
                with module.graph.inserting_before(user):
                    here[block[user]] = module.graph.node_copy(read)
            user.replace_input_with(read, here[block[user]])
        module.graph.erase_node(read)
    return absent
